"""Plans for groups of channels of a sample (see launch.py)."""

from dataclasses import dataclass

from fastnorm.kernels.devices import Device
from fastnorm.kernels.launch import (
    LED_PROGRAMS,
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
class GroupPlan:
    """How programs share a dense (N, C, S) tensor that groups of K channels of a sample normalize.

    `whole`: a program owns whole groups, and one kernel does everything, where channels are
    innermost; for contiguous groups see run_plans.py. Else programs share the tiles of a sample,
    whatever groups its channels are in.
    """

    whole: bool
    block_n: int  # samples of a program, side by side; 1 where not whole
    block_c: int  # channels of a sample
    block_k: int  # lanes that a group's channels take; 1 where not whole
    block_s: int  # positions
    fold: int  # lanes that one thread sums in its registers, in
    run: int  # runs of so many neighbours
    align: int  # elements: contiguous runs are a multiple of it
    lead: int  # elements of a vector, where rows begin within one (see device/tiles.py); or 1
    options: dict[str, int]  # of the compiler
    tiles: int  # of the positions of a sample
    channel_blocks: int
    programs: int  # that share the sample blocks of a backward (whole), or the tiles of a sample
    share: int  # sample blocks or tiles of each


GROUP_LANES = 1024  # channels of a program: each keeps its statistics and sums in registers
# Of a channel, where channels are innermost. From there on the threads of a program that owns a
# group merge more than they sum, a few positions each at a time; and what programs that share a
# sample leave of each channel is little beside its elements.
WHOLE_POSITIONS = 128

# Merging the partials of a group: P · K of them, few where a channel is long.
GROUP_MERGE_PARTIALS = 64
GROUP_MERGE_GROUPS = 8
GROUP_MERGE_WARPS = 4


def group_plan(
    N: int, C: int, S: int, columns: bool, K: int, itemsize: int, device: Device
) -> GroupPlan:
    """The plan for groups of K channels of a dense (N, C, S) tensor.

    Nothing that is compiled depends on N: a last batch of another size brings no new kernel.
    """
    led = None if columns else led_rows(C, S, itemsize)
    if led and (led.short or device.multiprocessors <= 2 * C):  # enough of each sample
        return _led_plan(C, S, led, itemsize, device)
    elements = TILE_BYTES // itemsize
    sector = max(SECTOR // itemsize, 1)  # the fewest channels whose loads waste nothing
    block_k = power_of_two(K)
    # groups side by side that a program needs lest its loads waste sectors
    width = power_of_two(cdiv(min(sector, C), K)) if columns else 1
    fits = width * K * S * itemsize <= WHOLE_BYTES and width * block_k <= GROUP_LANES
    whole = columns and S < WHOLE_POSITIONS and fits
    innermost = (K if whole and block_k != K else C) if columns else S
    align = divisor_class(innermost, itemsize)
    block_n = 1
    if align == 1:  # addresses, one an element, want registers too
        elements //= 2
    if whole:
        elements //= 2  # statistics, parameters and sums of each channel want registers too
        block_s = min(power_of_two(S), max(elements // (width * block_k), 1))
        lanes = min(max(elements // block_s, 1), GROUP_LANES)
        block_c = max(min(lanes, power_of_two(C // K) * block_k), block_k)
        channel_blocks = cdiv(C // K, block_c // block_k)
        if channel_blocks == 1:
            block_n = max(lanes // block_c, 1)
        shared, others = cdiv(N, block_n), channel_blocks
    else:
        block_k = 1
        block_c = min(power_of_two(C), 2 * sector) if columns else 1
        block_s = min(power_of_two(S), elements // block_c)
        block_c = min(power_of_two(C), elements // block_s, GROUP_LANES)
        channel_blocks = cdiv(C, block_c)
        shared, others = cdiv(S, block_s), N * channel_blocks
    share = split(shared, others, programs_together(columns and not whole), device)
    lanes = block_n * block_c
    num_warps = min(max(4 * lanes * block_s // elements, lanes // 256, 1), 4)
    return GroupPlan(
        whole, block_n, block_c, block_k, block_s,
        *fold_of(block_s, lanes, align, num_warps, columns),
        align,
        1,
        {"num_warps": num_warps},
        cdiv(S, block_s),
        channel_blocks,
        cdiv(shared, share),
        share,
    )  # fmt: skip


def _led_plan(C: int, S: int, led: LedRows, itemsize: int, device: Device) -> GroupPlan:
    """The plan where rows begin within vectors: a program has one."""
    lead, block_s, tiles = led
    return GroupPlan(
        False, 1, 1, 1, block_s,
        *fold_of(block_s, 1, lead, 1, False),
        divisor_class(S, itemsize),
        lead,
        resident(1, LED_PROGRAMS, itemsize, device),
        tiles,
        C,
        1,
        tiles,
    )  # fmt: skip
