"""Launch policy: tile sizes, warps, program counts, as pure functions of sizes, dtype and device.

No kernel measures or tunes itself: the same sizes always give the same launch, so results have the
same bits on every run, and the generated code of every launch can be inspected without a device.
"""

from dataclasses import dataclass
from typing import NamedTuple

from fastnorm.kernels.devices import Device

TILE_BYTES = 8192  # what one program of 4 warps loads at a time: four vectors a thread
WHOLE_BYTES = 32768  # a program that owns this much of x finds it in a cache when it reads it again
PROGRAMS_PER_MULTIPROCESSOR = 4  # that share the index sets, 4 warps each
SECTOR = 32  # bytes that a cache loads together
COLUMN_PROGRAMS = 3  # the same, where a thread's registers hold the statistics of 8 channels


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


# Merging the partials of a channel: a constant tile, so that no batch size compiles another kernel.
MERGE_PARTIALS = 512
MERGE_CHANNELS = 8
MERGE_WARPS = 8


def _fold(lanes: int, channels: int, align: int, num_warps: int, columns: bool) -> tuple[int, int]:
    """(fold, run) of a (lanes, channels) tile: which lanes are in one thread's registers.

    Vectors of `align` go to threads one after the other, along what is innermost in memory first.
    At least four lanes, be they those of neighbours: each sum that is left wants registers too.
    """
    threads, run = 32 * num_warps, min(align, lanes)
    if columns:
        threads, run = max(threads // max(channels // align, 1), 1), 1
    return max(lanes // threads, run, min(lanes, 4)), run


def _split(tiles: int, others: int, together: int, device: Device) -> int:
    """Tiles of each program, where so many others have as many tiles.

    A multiprocessor has room for so many programs together. All are resident at once; or in some
    rounds, where one would leave processors idle.
    """
    room = together * device.multiprocessors
    programs = 1
    for rounds in (1, 2, 3) if others < room else ():
        programs = max(rounds * room // others, 1)
        if programs * others >= 0.9 * rounds * room:
            break
    return cdiv(tiles, min(programs, tiles))


PLANE_COLUMNS = (64, 2048)  # of a tile of planes: at least, if there are enough channels; at most
PLANE_WARPS = 8  # of a multiprocessor: a thread keeps the statistics and parameters of 8 columns


def _planes(C: int, S: int, itemsize: int) -> int:
    """Channels whose planes, of S elements each, a tile takes as one run; 0: each by itself.

    A run is loaded in vectors of 16 bytes, where a plane is no multiple of one, and whole sectors.
    """
    planes = divisor_class(C * S, itemsize) // divisor_class(S, itemsize)
    if S == 1 or (planes == 1 and S * itemsize >= SECTOR):
        return 0
    fewest, most = PLANE_COLUMNS
    while planes * S < fewest and planes < C:
        planes *= 2
    return planes if planes * S <= most else 0


def channel_plan(
    N: int, C: int, S: int, columns: bool, itemsize: int, device: Device
) -> ChannelPlan:
    """The plan for a dense (N, C, S) tensor with channels innermost (`columns`) or not."""
    planes = 0 if columns else _planes(C, S, itemsize)
    if planes:
        return _plane_plan(N, C, S, planes, itemsize, device)
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
    together = COLUMN_PROGRAMS if columns else PROGRAMS_PER_MULTIPROCESSOR
    tiles_per_program = tiles if whole else _split(tiles, channel_blocks, together, device)
    lanes = block_n * block_s
    num_warps = min(max(4 * lanes * block_c // elements, 1), 4)
    options = {"num_warps": num_warps}
    if columns and not whole:  # left alone, the compiler spills to get by with fewer
        options = resident(num_warps, together * num_warps, itemsize, device)
    return ChannelPlan(
        block_n, block_s, block_c, block_c, columns,
        *_fold(lanes, block_c, align, num_warps, columns),
        align,
        options,
        tiles,
        cdiv(tiles, tiles_per_program),
        tiles_per_program,
        channel_blocks,
    )  # fmt: skip


def _plane_plan(N: int, C: int, S: int, planes: int, itemsize: int, device: Device) -> ChannelPlan:
    """The plan where a tile has the planes of so many channels: columns, of N elements each."""
    align = divisor_class(C * S, itemsize)
    block_c = power_of_two(planes * S)
    warps = PLANE_WARPS if 2 * block_c > PLANE_COLUMNS[1] else PLANE_WARPS // 2
    elements = warps // 4 * TILE_BYTES // itemsize
    block_n = min(power_of_two(N), max(elements // block_c, 1))
    tiles, channel_blocks = cdiv(N, block_n), cdiv(C, planes)
    together = PLANE_WARPS // warps
    whole = N * S * planes * itemsize <= warps // 2 * WHOLE_BYTES
    tiles_per_program = tiles if whole else _split(tiles, channel_blocks, together, device)
    num_warps = min(max(warps * block_n * block_c // elements, 1), warps)
    return ChannelPlan(
        block_n, 1, block_c, planes, True,
        *_fold(block_n, block_c, align, num_warps, True),
        align,
        resident(num_warps, together * num_warps, itemsize, device),
        tiles,
        cdiv(tiles, tiles_per_program),
        tiles_per_program,
        channel_blocks,
    )  # fmt: skip


# Elements of a row that a program keeps in registers, where those are 4 bytes in its arithmetic.
WIDEST_ROW = 16384
WIDEST_ROW_BACKWARD = 8192  # x̂, wdz, dw and db at once
LOOP_TILE = 4096  # of a longer row
COLUMN_TILE = (4, 512)  # rows and columns of the backward's tiles of longer rows
ROW_PARTIALS = 1024  # the most programs that share a row: a constant tile merges their statistics
THREAD_ELEMENTS = 16  # that a thread holds; half where each takes an address of its own
ROW_WARPS = 16  # of a multiprocessor: 128 registers a thread
# A forward of whole rows: (its columns up to, 16-bit elements a thread, warps of a multiprocessor).
# A thread of many elements spends less on sums across threads. Up to KEPT_ROW columns a program
# keeps their parameters, too.
ROW_FORWARD = ((128, 16, 22), (256, 32, 18), (512, 16, 22), (4096, 32, 12), (WIDEST_ROW, 32, 16))
KEPT_ROW = 4096
# The same of groups, which differ in their parameters: each element of a tile keeps its own.
GROUP_FORWARD = ((512, 16, 18), (1024, 32, 11), (4096, 32, 12))
AHEAD_BYTES = 65536  # of a multiprocessor: more under way is of no use


@dataclass(frozen=True)
class RowPlan:
    """How programs share M rows of N elements (see device/rows.py)."""

    whole: bool  # a tile holds whole rows
    block_m: int
    block_n: int
    stages: int  # of a loop over tiles: one, and those that are loaded ahead
    options: dict[str, int]  # of the compiler
    tiles: int  # that a program's share is counted in: of one row, or of rows
    programs: int  # that share those tiles
    tiles_per_program: int
    fold: int = 1  # rows of a tile, columns where it has one, that one thread sums in its registers
    run: int = 1  # in runs of so many neighbours
    beside: int = 1  # rows of a tile that are of one sample, each a group

    def is_full(self, N: int) -> bool:
        """Whether no tile reaches beyond a row."""
        return N % self.block_n == 0


def _shares(tiles: int, wanted: int) -> tuple[int, int, int]:
    """(tiles, programs, tiles_per_program) of at most `wanted` programs."""
    tiles_per_program = cdiv(tiles, max(min(wanted, tiles), 1))
    return tiles, cdiv(tiles, tiles_per_program), tiles_per_program


def _warps(elements: int, each: int) -> int:
    """Warps of threads that hold so many elements."""
    return min(max(elements // (32 * each), 1), 16)


def _wide(itemsize: int) -> int:
    """Registers of an element: float64 takes twice as many."""
    return max(itemsize // 4, 1)


def _row_warps(elements: int, many: bool) -> int:
    """Warps for a tile of so many 4-byte elements; `many`: each wants more registers."""
    return _warps(elements, THREAD_ELEMENTS // 2 if many else THREAD_ELEMENTS)


def scratch(columns: int) -> int:
    """Bytes of shared memory in which threads exchange sums, and what they load of each column."""
    return 4 * columns + 1024


def _stages(rows: int, columns: int, loaded: int, programs: int, device: Device) -> int:
    """With two tiles loaded ahead, or as many as are enough or shared memory has room for."""
    tile_bytes = rows * columns * loaded
    room = device.shared // programs - scratch(columns)
    wanted = 1 if programs * tile_bytes >= AHEAD_BYTES else 2
    return min(max(room // tile_bytes, 0), wanted) + 1


def _row_tile(
    shapes: tuple[tuple[int, int, int], ...],
    N: int, itemsize: int, align: int, loaded: int, device: Device,
) -> tuple[int, int, int, dict[str, int], int]:  # fmt: skip
    """(rows, columns, stages, options, programs of a multiprocessor) of a forward of whole rows."""
    wide = _wide(itemsize)
    block_n = power_of_two(N)
    _, each, resident_warps = next(f for f in shapes if block_n * wide <= f[0])
    if align < 4 or itemsize > 2:
        each, resident_warps = each // 2, max(resident_warps, ROW_WARPS)
    block_m = max(32 * each // (block_n * wide), 1)
    num_warps = _warps(block_m * block_n * wide, each)
    together = max(resident_warps // num_warps, 1)
    stages = _stages(block_m, block_n, loaded, together, device)
    options = resident(num_warps, together * num_warps, itemsize, device)
    return block_m, block_n, stages, options, together


def row_plan(M: int, N: int, itemsize: int, align: int, loaded: int, device: Device) -> RowPlan:
    """Forward: whole rows in registers, or a row's tiles shared by programs.

    `loaded`: bytes that are loaded for each element, of the input and a residual.
    """
    if N * _wide(itemsize) <= WIDEST_ROW:
        block_m, block_n, stages, options, together = _row_tile(
            ROW_FORWARD, N, itemsize, align, loaded, device
        )
        return RowPlan(
            True, block_m, block_n, stages, options,
            *_shares(cdiv(M, block_m), together * device.multiprocessors),
        )  # fmt: skip
    wide = _wide(itemsize)
    elements = LOOP_TILE if align >= 4 else LOOP_TILE // 2
    block_n = elements // wide
    wanted = min(cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, M), ROW_PARTIALS)
    if cdiv(device.multiprocessors, 2) <= M:
        wanted = 1  # a second launch, and x from memory again, cost more than some idle processors
    num_warps = _row_warps(elements, align < 4)
    return RowPlan(
        False, 1, block_n,
        _stages(1, block_n, loaded, PROGRAMS_PER_MULTIPROCESSOR, device),
        {"num_warps": num_warps},
        *_shares(cdiv(N, block_n), wanted),
        *_fold(block_n, 1, align, num_warps, columns=False),
    )  # fmt: skip


def row_sums_plan(
    M: int, N: int, itemsize: int, align: int, loaded: int, device: Device
) -> RowPlan | None:
    """Backward, rows too wide for registers: their sums first; None where they are not."""
    wide = _wide(itemsize)
    if N * wide <= WIDEST_ROW_BACKWARD:
        return None
    elements = LOOP_TILE // 2
    block_n = elements // wide
    wanted = min(cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, M), ROW_PARTIALS)
    options = {"num_warps": _row_warps(elements, align < 4)}
    stages = _stages(1, block_n, loaded, PROGRAMS_PER_MULTIPROCESSOR, device)
    return RowPlan(False, 1, block_n, stages, options, *_shares(cdiv(N, block_n), wanted))


def row_gradient_plan(
    M: int, N: int, itemsize: int, align: int, loaded: int, gated: bool, device: Device
) -> RowPlan:
    """Backward: tiles of rows, shared by the programs that own all or some of their columns.

    `loaded`: bytes that are loaded for each element; `gated`: act′ needs z, and so b, a further
    number of each column.
    """
    wide = _wide(itemsize)
    whole = N * wide <= WIDEST_ROW_BACKWARD
    if whole:
        block_n = power_of_two(N)
        block_m = max(TILE_BYTES // 4 // block_n // wide, 1)
    else:
        block_m, block_n = COLUMN_TILE[0], COLUMN_TILE[1] // wide
    many = align < 4 or gated or itemsize > 2 or (not whole and loaded > 2 * itemsize)
    num_warps = _row_warps(block_m * block_n * wide, many)
    together = max(ROW_WARPS // num_warps, 1)
    vectors = block_m * block_n // (32 * num_warps) // min(align, block_n)  # of a thread
    return RowPlan(
        whole, block_m, block_n,
        _stages(block_m, block_n, loaded, together, device),
        resident(num_warps, ROW_WARPS, itemsize, device),
        *_shares(cdiv(M, block_m), together * device.multiprocessors // cdiv(N, block_n)),
        fold=max(min(vectors, block_m), 1),
    )  # fmt: skip


@dataclass(frozen=True)
class GroupPlan:
    """How programs share a dense (N, C, S) tensor that groups of K channels of a sample normalize.

    `whole`: a program owns whole groups, and one kernel does everything. Else programs share the
    tiles of a sample, whatever groups its channels are in.
    """

    whole: bool
    block_n: int  # samples of a program, side by side; 1 where not whole
    block_c: int  # channels of a sample
    block_k: int  # lanes that a group's channels take; 1 where not whole
    block_s: int  # positions
    fold: int  # lanes that one thread sums in its registers, in
    run: int  # runs of so many neighbours
    align: int  # elements: contiguous runs are a multiple of it
    num_warps: int
    tiles: int  # of the positions of a sample
    channel_blocks: int
    programs: int  # that share the sample blocks of a backward (whole), or the tiles of a sample
    share: int  # sample blocks or tiles of each


def group_row_plan(
    N: int, G: int, L: int, itemsize: int, align: int, loaded: int, device: Device
) -> RowPlan | None:
    """Forward of N samples of G groups of L contiguous elements; None: too many for registers.

    Programs share the blocks of samples of `beside` groups.
    """
    if power_of_two(L) * _wide(itemsize) > GROUP_FORWARD[-1][0]:
        return None
    block_m, block_n, stages, options, together = _row_tile(
        GROUP_FORWARD, L, itemsize, align, loaded, device
    )
    # no lanes beyond the groups; but where groups are few and short, sectors are to be whole
    beside = G & -G if L * itemsize >= 32 else power_of_two(G)
    beside = min(beside, block_m)
    wanted = together * device.multiprocessors // cdiv(G, beside)
    return RowPlan(
        True, block_m, block_n, stages, options,
        *_shares(cdiv(N, block_m // beside), wanted), beside=beside,
    )  # fmt: skip


GROUP_LANES = 1024  # channels of a program: each keeps its statistics and sums in registers

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
    elements = TILE_BYTES // itemsize
    sector = max(SECTOR // itemsize, 1)  # the fewest channels whose loads waste nothing
    block_k = power_of_two(K)
    # groups side by side that a program needs lest its loads waste sectors
    width = power_of_two(cdiv(min(sector, C), K)) if columns else 1
    whole = width * K * S * itemsize <= WHOLE_BYTES and width * block_k <= GROUP_LANES
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
    together = COLUMN_PROGRAMS if columns and not whole else PROGRAMS_PER_MULTIPROCESSOR
    share = _split(shared, others, together, device)
    lanes = block_n * block_c
    num_warps = min(max(4 * lanes * block_s // elements, lanes // 256, 1), 4)
    return GroupPlan(
        whole, block_n, block_c, block_k, block_s,
        *_fold(block_s, lanes, align, num_warps, columns),
        align,
        num_warps,
        cdiv(S, block_s),
        channel_blocks,
        cdiv(shared, share),
        share,
    )  # fmt: skip
