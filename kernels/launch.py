"""Launch policy: tile sizes, warps, program counts, as pure functions of sizes, dtype and device.

No kernel measures or tunes itself: the same sizes always give the same launch, so results have the
same bits on every run, and the generated code of every launch can be inspected without a device.
Here is what the plans of channel_plans.py, row_plans.py and group_plans.py share.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from fastnorm.kernels.devices import Device

TILE_BYTES = 8192  # what one program of 4 warps loads at a time: four vectors a thread
WHOLE_BYTES = 32768  # a program that owns this much of x finds it in a cache when it reads it again
PROGRAMS_PER_MULTIPROCESSOR = 4  # that share the index sets, 4 warps each
COLUMN_PROGRAMS = 3  # the same, where a thread's registers hold the statistics of 8 channels
START = 2  # tiles that take as long as what a program does before and after its own
SECTOR = 32  # bytes that a cache loads together


# Kernel arguments that change from batch to batch: Triton must not compile again where one of them
# is 1 or a multiple of 16.
SIZES = ("N", "C", "S", "P", "R", "tiles", "tiles_per_program")
ROW_SIZES = (
    "M", "N", "P", "tiles", "tiles_per_program",
    "stride_dy_row", "stride_x_row", "stride_residual_row", "stride_dsum_row",
)  # fmt: skip
GROUP_SIZES = (
    "N", "C", "S", "G", "K", "P", "R", "tiles", "tiles_per_program", "blocks_per_program",
    "positions",
)  # fmt: skip
PRODUCT_SIZES = ("B", "N", "K", "S", "P", "F", "tiles", "tiles_per_program")

# Kernel arguments with flags that an earlier launch may have raised: a launch that is given one
# returns at once where none is up, and for who proves things about launches it is none.
ON_A_FLAG = ("read_flags_ptr", "todo_ptr")


_Plan = TypeVar("_Plan", bound=Callable[..., Any])
_memories: list[Callable[[], None]] = []


def remembered(plan: _Plan) -> _Plan:
    """Keep what `plan`, a pure function of a call's sizes, found for those of the last calls."""
    memory = functools.lru_cache(maxsize=1024)(plan)
    _memories.append(memory.cache_clear)
    return cast(_Plan, memory)


def forget() -> None:
    """Plan everything anew: for who has changed a constant that plans are made from."""
    for clear in _memories:
        clear()


def power_of_two(n: int) -> int:
    """The smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()


def divisor_class(n: int, itemsize: int = 2) -> int:
    """The largest power of two that divides n > 0, up to what makes a 16-byte vector."""
    return min(n & -n, 8, 16 // itemsize)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def resident(num_warps: int, together: int, itemsize: int, device: Device) -> dict[str, int]:
    """Options of a kernel of which a multiprocessor is to have so many warps at a time."""
    options = {"num_warps": num_warps}
    if device.limits and itemsize <= 4:
        options["maxnreg"] = min(65536 // (32 * together) // 8 * 8, 255)
    return options


class ChannelView(NamedTuple):
    """A dense tensor as (N, C, S); `columns`: channels are innermost in memory."""

    N: int
    C: int
    S: int
    columns: bool


# Merging the partials of a channel: a constant tile, so that no batch size compiles another kernel.
MERGE_PARTIALS = 512
MERGE_CHANNELS = 8
MERGE_WARPS = 8


def fold_of(
    lanes: int, channels: int, align: int, num_warps: int, columns: bool
) -> tuple[int, int]:
    """(fold, run) of a (lanes, channels) tile: which lanes are in one thread's registers.

    Vectors of `align` go to threads one after the other, along what is innermost in memory first.
    At least four lanes, be they those of neighbours: each sum that is left wants registers too.
    """
    threads, run = 32 * num_warps, min(align, lanes)
    if columns:
        threads, run = max(threads // max(channels // align, 1), 1), 1
    return max(lanes // threads, run, min(lanes, 4)), run


LED_PROGRAMS = 20  # of a multiprocessor, a warp each, with such rows in tiles of 512 or fewer


class LedRows(NamedTuple):
    """Tiles of rows of S that begin anywhere within vectors, and are read in whole ones."""

    lead: int  # elements of a vector
    block_s: int
    tiles: int  # of a row

    @property
    def short(self) -> bool:
        """Whether a row is little enough for a program, however few rows there are."""
        return self.tiles <= 4


def led_rows(C: int, S: int, itemsize: int) -> LedRows | None:
    """None where rows begin where vectors do, or their loads are wide enough to be asynchronous.

    Nor may a sample end within a vector, or what is read before a row need a tile more.
    """
    lead = 16 // itemsize
    narrow = divisor_class(S, itemsize) * itemsize < 4 and lead <= S
    # a warp's, half as many a thread as elsewhere: masks, one an element, want registers too
    block_s = min(power_of_two(S + lead - 1), TILE_BYTES // itemsize // 8)
    tiles = cdiv(S, block_s)
    if not narrow or divisor_class(C * S, itemsize) < lead or tiles * block_s < S + lead - 1:
        return None
    return LedRows(lead, block_s, tiles)


def programs_together(columns: bool) -> int:
    """Of a multiprocessor, that share index sets."""
    return COLUMN_PROGRAMS if columns else PROGRAMS_PER_MULTIPROCESSOR


def split(tiles: int, others: int, together: int, device: Device) -> int:
    """Tiles of each program, where so many others have as many tiles.

    A multiprocessor has room for so many programs together. Up to three rounds of these are tried,
    and those taken that leave least, START included, to the multiprocessor with most programs.
    """
    room = together * device.multiprocessors
    fewest = cdiv(others, room)
    programs = [max(rounds * room // others, 1) for rounds in range(fewest, fewest + 3)]
    shares = [cdiv(tiles, min(number, tiles)) for number in programs]

    def time(share: int) -> int:
        programs = cdiv(tiles, share) * others
        return cdiv(programs, device.multiprocessors) * (share + START)

    return min(shares, key=time)
