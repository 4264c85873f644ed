"""Launch policy: tile sizes, warps, program counts, as pure functions of sizes, dtype and device.

No kernel measures or tunes itself: the same sizes always give the same launch, so results have the
same bits on every run, and the generated code of every launch can be inspected without a device.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

TILE_BYTES = 8192  # what one program of 4 warps loads at a time: four vectors a thread
WHOLE_BYTES = 32768  # a program that owns this much of x finds it in a cache when it reads it again
PROGRAMS_PER_MULTIPROCESSOR = 4  # that share the index sets, 4 warps each


# Kernel arguments that change from batch to batch: Triton must not compile again where one of them
# is 1 or a multiple of 16.
SIZES = ("N", "C", "S", "P", "tiles", "tiles_per_program")


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


class ChannelView(NamedTuple):
    """A dense tensor as (N, C, S); `columns`: channels are innermost in memory."""

    N: int
    C: int
    S: int
    columns: bool


@dataclass(frozen=True)
class ChannelPlan:
    """How programs share the (N, S) index sets of C channels (see device/tiles.py)."""

    block_n: int
    block_s: int
    block_c: int
    fold: int  # lanes that one thread sums in its registers
    align: int  # elements: S (rows) or C (columns) is a multiple of it
    num_warps: int
    tiles: int  # of one index set
    programs: int  # that share one index set
    tiles_per_program: int
    channel_blocks: int

    @property
    def whole(self) -> bool:
        """One program owns a channel: one kernel does everything."""
        return self.programs == 1

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.channel_blocks,)


# Merging the partials of a channel: a constant tile, so that no batch size compiles another kernel.
MERGE_PARTIALS = 512
MERGE_CHANNELS = 8
MERGE_WARPS = 8


def channel_plan(
    N: int, C: int, S: int, columns: bool, itemsize: int, device: Device
) -> ChannelPlan:
    """The plan for a dense (N, C, S) tensor with channels innermost (`columns`) or not."""
    elements = TILE_BYTES // itemsize
    sector = max(32 // itemsize, 1)  # the fewest channels whose loads waste nothing
    whole = N * S * (sector if columns else 1) * itemsize <= WHOLE_BYTES
    block_c = 1
    if columns:
        block_c = min(power_of_two(C), sector if whole else 2 * sector)
    block_s = min(power_of_two(S), elements // block_c)
    block_n = min(power_of_two(N), elements // (block_c * block_s)) if block_s >= S else 1
    if whole:  # several channels a program, while that leaves enough programs to fill the device
        while (
            block_n * block_s * block_c * 2 <= elements
            and block_c < C
            and cdiv(C, 2 * block_c) >= 2 * device.multiprocessors
        ):
            block_c *= 2
    tiles = cdiv(N, block_n) * cdiv(S, block_s)
    channel_blocks = cdiv(C, block_c)
    wanted = (
        1 if whole else cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, channel_blocks)
    )
    tiles_per_program = cdiv(tiles, min(wanted, tiles))
    lanes = block_n * block_s
    num_warps = min(max(lanes * block_c * itemsize // (TILE_BYTES // 4), 1), 4)
    return ChannelPlan(
        block_n, block_s, block_c,
        fold=min(lanes, 4 if columns or itemsize > 2 else 8),
        align=divisor_class(C if columns else S),
        num_warps=num_warps,
        tiles=tiles,
        programs=cdiv(tiles, tiles_per_program),
        tiles_per_program=tiles_per_program,
        channel_blocks=channel_blocks,
    )  # fmt: skip
