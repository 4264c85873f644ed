"""Launch policy: tile sizes, warps, program counts, as pure functions of sizes, dtype and device.

No kernel measures or tunes itself: the same sizes always give the same launch, so results have the
same bits on every run, and the generated code of every launch can be inspected without a device.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

TILE_BYTES = 8192  # what one program of 4 warps loads at a time: four vectors a thread
WHOLE_ELEMENTS = 16384  # an index set up to this size is held in one program's registers


@dataclass(frozen=True)
class Device:
    """What the policy asks of a device."""

    multiprocessors: int


INTERPRETER = Device(multiprocessors=4)  # small: the interpreter runs one program after another
_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Plan launches as for `device`, wherever the tensors are."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_of(device: torch.device) -> Device:
    return _assumed.get() or _queried(device)


@functools.cache
def _queried(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    return Device(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_two(n: int) -> int:
    """The smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()


def divisor_class(n: int) -> int:
    """The largest power of two ≤ 8 that divides n > 0: a 16-byte vector of the smallest dtype."""
    return min(n & -n, 8)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class ChannelPlan:
    """How programs share the (N, S) index sets of C channels (see device/tiles.py)."""

    whole: bool  # one tile holds an index set: one kernel does everything
    block_n: int
    block_s: int
    block_c: int
    align: int  # elements: S (rows) or C (columns) is a multiple of it
    num_warps: int
    tiles: int  # of one index set
    programs: int  # that share one index set
    tiles_per_program: int
    channel_blocks: int

    @property
    def block_p(self) -> int:
        """How many partials of its channels a program merges at a time."""
        return max(min(4096 // self.block_c, 512), 16)

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.channel_blocks,)


def channel_plan(
    N: int, C: int, S: int, columns: bool, itemsize: int, device: Device
) -> ChannelPlan:
    """The plan for a dense (N, C, S) tensor with channels innermost (`columns`) or not."""
    lanes = power_of_two(N) * power_of_two(S)
    least_c = min(power_of_two(C), max(32 // itemsize, 1)) if columns else 1  # a sector of 32 bytes
    whole = lanes * least_c * max(itemsize // 4, 1) <= WHOLE_ELEMENTS
    if whole:
        block_n, block_s, block_c = power_of_two(N), power_of_two(S), least_c
        # several channels a program, while that leaves enough programs to fill the device
        while (
            lanes * block_c * 2 * itemsize <= TILE_BYTES
            and block_c < C
            and cdiv(C, 2 * block_c) >= 2 * device.multiprocessors
        ):
            block_c *= 2
    else:
        elements = TILE_BYTES // itemsize
        block_c = min(power_of_two(C), 64 // itemsize) if columns else 1
        block_s = min(power_of_two(S), elements // block_c)
        block_n = min(power_of_two(N), elements // (block_c * block_s)) if block_s >= S else 1
    tiles = cdiv(N, block_n) * cdiv(S, block_s)
    channel_blocks = cdiv(C, block_c)
    wanted = cdiv(4 * device.multiprocessors, channel_blocks)
    tiles_per_program = cdiv(tiles, min(wanted, tiles))
    return ChannelPlan(
        whole, block_n, block_s, block_c,
        align=divisor_class(C if columns else S),
        num_warps=min(max(block_n * block_s * block_c * itemsize // (TILE_BYTES // 4), 1), 16),
        tiles=tiles,
        programs=cdiv(tiles, tiles_per_program),
        tiles_per_program=tiles_per_program,
        channel_blocks=channel_blocks,
    )  # fmt: skip
