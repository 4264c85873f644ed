"""Plans for the norms of channels (see launch.py)."""

import math
from dataclasses import dataclass

from fastnorm.kernels.devices import Device
from fastnorm.kernels.launch import (
    LED_PROGRAMS,
    PROGRAMS_PER_MULTIPROCESSOR,
    SECTOR,
    TILE_BYTES,
    WHOLE_BYTES,
    LedRows,
    cdiv,
    divisor_class,
    fold_of,
    led_rows,
    power_of_two,
    programs_together,
    resident,
    split,
)


@dataclass(frozen=True)
class ChannelPlan:
    """How programs share the (N, S) index sets of C channels (see device/tiles.py)."""

    block_n: int
    block_s: int
    block_c: int
    channels: int  # of a program; fewer than block_c where their positions are its columns
    columns: bool
    fold: int  # lanes that one thread sums in its registers, in
    run: int  # runs of so many neighbours
    align: int  # elements: contiguous runs are a multiple of it
    lead: int  # elements of a vector, where rows begin within one (see device/tiles.py); or 1
    options: dict[str, int]  # of the compiler
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


PLANE_COLUMNS = (64, 2048)  # of a tile of planes: at least, if there are enough channels; at most
PLANE_WARPS = 8  # of a multiprocessor: a thread keeps the statistics and parameters of 8 columns


def _planes(C: int, S: int, itemsize: int) -> int:
    """Channels whose planes, of S elements each, a tile takes as one run; 0: each by itself.

    A run is loaded in vectors of 16 bytes, and in whole sectors. Planes of a multiple of 8 bytes do
    as well by themselves.
    """
    align = divisor_class(S, itemsize)
    planes = divisor_class(C * S, itemsize) // align
    wide = planes == 1 or align * itemsize >= 8
    if S == 1 or (wide and S * itemsize >= SECTOR):
        return 0
    fewest, most = PLANE_COLUMNS
    while planes * S < fewest and planes < C:
        planes *= 2
    while planes * S > most and planes * align * itemsize > 8:  # in half vectors
        planes //= 2
    return planes if planes * S <= most else 0


def channel_plan(
    N: int, C: int, S: int, columns: bool, itemsize: int, device: Device
) -> ChannelPlan:
    """The plan for a dense (N, C, S) tensor with channels innermost (`columns`) or not."""
    planes = 0 if columns else _planes(C, S, itemsize)
    if planes:
        return _plane_plan(N, C, S, planes, itemsize, device)
    led = None if columns else led_rows(C, S, itemsize)
    if led and (led.short or PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors <= N * C):
        return _led_plan(N, C, S, led, itemsize, device)
    align = divisor_class(C if columns else S, itemsize)
    elements = TILE_BYTES // itemsize
    if align == 1:  # addresses, one an element, want registers too
        elements //= 2
    sector = max(SECTOR // itemsize, 1)  # the fewest channels whose loads waste nothing
    whole = N * S * (sector if columns else 1) * itemsize <= WHOLE_BYTES
    if whole and columns:  # and so do statistics and parameters of many channels
        elements //= 2
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
    together = programs_together(columns)
    tiles_per_program = tiles if whole else split(tiles, channel_blocks, together, device)
    lanes = block_n * block_s
    num_warps = min(max(4 * lanes * block_c // elements, 1), 4)
    options = {"num_warps": num_warps}
    if columns and not whole:  # left alone, the compiler spills to get by with fewer
        options = resident(num_warps, together * num_warps, itemsize, device)
    return ChannelPlan(
        block_n, block_s, block_c, block_c, columns,
        *fold_of(lanes, block_c, align, num_warps, columns),
        align,
        1,
        options,
        tiles,
        cdiv(tiles, tiles_per_program),
        tiles_per_program,
        channel_blocks,
    )  # fmt: skip


def _plane_plan(N: int, C: int, S: int, planes: int, itemsize: int, device: Device) -> ChannelPlan:
    """The plan where a tile has the planes of so many channels: columns, of N elements each."""
    align = divisor_class(math.gcd(C, planes) * S, itemsize)  # of a block, and of a sample
    while (  # several times as many a program, while that leaves enough programs
        N * planes * S * itemsize * 2 <= TILE_BYTES
        and 2 * planes * S <= PLANE_COLUMNS[1]
        and cdiv(C, 2 * planes) >= 2 * device.multiprocessors
    ):
        planes *= 2
    block_c = power_of_two(planes * S)
    warps = PLANE_WARPS if 2 * block_c > PLANE_COLUMNS[1] else PLANE_WARPS // 2
    elements = warps // 4 * TILE_BYTES // itemsize
    block_n = min(power_of_two(N), max(elements // block_c, 1))
    tiles, channel_blocks = cdiv(N, block_n), cdiv(C, planes)
    together = PLANE_WARPS // warps
    whole = N * S * planes * itemsize <= warps // 2 * WHOLE_BYTES
    tiles_per_program = tiles if whole else split(tiles, channel_blocks, together, device)
    num_warps = min(max(warps * block_n * block_c // elements, 1), warps)
    return ChannelPlan(
        block_n, 1, block_c, planes, True,
        *fold_of(block_n, block_c, align, num_warps, True),
        align,
        1,
        resident(num_warps, together * num_warps, itemsize, device),
        tiles,
        cdiv(tiles, tiles_per_program),
        tiles_per_program,
        channel_blocks,
    )  # fmt: skip


def _led_plan(N: int, C: int, S: int, led: LedRows, itemsize: int, device: Device) -> ChannelPlan:
    """The plan where rows begin within vectors: each is in tiles of its own."""
    lead, block_s, across = led
    rows = N
    if N * S * itemsize > WHOLE_BYTES:  # whole ones: then all channels' shares are of one count
        rows = cdiv(split(N * across, C, LED_PROGRAMS, device), across)
    return ChannelPlan(
        1, block_s, 1, 1, False,
        *fold_of(block_s, 1, lead, 1, False),
        divisor_class(S, itemsize),
        lead,
        resident(1, LED_PROGRAMS, itemsize, device),
        N * across,
        cdiv(N, rows),
        rows * across,
        C,
    )  # fmt: skip
