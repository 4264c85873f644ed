"""Plans for rows (see launch.py)."""

from dataclasses import dataclass

from fastnorm.kernels.devices import Device
from fastnorm.kernels.launch import (
    PROGRAMS_PER_MULTIPROCESSOR,
    TILE_BYTES,
    cdiv,
    fold_of,
    power_of_two,
    remembered,
    resident,
)

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
ROW_FORWARD = ((128, 16, 22), (256, 32, 17), (512, 16, 22), (4096, 32, 12), (WIDEST_ROW, 32, 16))
KEPT_ROW = 4096
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
    beside: int = 1  # rows of a tile that are groups of one sample (run_plans.py)

    def is_full(self, N: int) -> bool:
        """Whether no tile reaches beyond a row."""
        return N % self.block_n == 0


def shares_of(tiles: int, wanted: int) -> tuple[int, int, int]:
    """(tiles, programs, tiles_per_program) of at most `wanted` programs."""
    tiles_per_program = cdiv(tiles, max(min(wanted, tiles), 1))
    return tiles, cdiv(tiles, tiles_per_program), tiles_per_program


def _warps(elements: int, each: int) -> int:
    """Warps of threads that hold so many elements."""
    return min(max(elements // (32 * each), 1), 16)


def registers_of(itemsize: int) -> int:
    """Registers of an element: float64 takes twice as many."""
    return max(itemsize // 4, 1)


def row_warps(elements: int, many: bool) -> int:
    """Warps for a tile of so many 4-byte elements; `many`: each wants more registers."""
    return _warps(elements, THREAD_ELEMENTS // 2 if many else THREAD_ELEMENTS)


def scratch(columns: int) -> int:
    """Bytes of shared memory in which threads exchange sums, and what they load of each column."""
    return 4 * columns + 1024


def stages_of(rows: int, columns: int, loaded: int, programs: int, device: Device) -> int:
    """With two tiles loaded ahead, or as many as are enough or shared memory has room for."""
    tile_bytes = rows * columns * loaded
    room = device.shared // programs - scratch(columns)
    wanted = 1 if programs * tile_bytes >= AHEAD_BYTES else 2
    return min(max(room // tile_bytes, 0), wanted) + 1


def row_tile(
    shapes: tuple[tuple[int, int, int], ...],
    N: int, itemsize: int, loaded: int, many: bool, device: Device,
) -> tuple[int, int, int, dict[str, int], int]:  # fmt: skip
    """(rows, columns, stages, options, programs of a multiprocessor) of a forward of whole rows.

    `many`: each element wants more registers.
    """
    wide = registers_of(itemsize)
    block_n = power_of_two(N)
    _, each, resident_warps = next(f for f in shapes if block_n * wide <= f[0])
    if many:
        each, resident_warps = each // 2, max(resident_warps, ROW_WARPS)
    block_m = max(32 * each // (block_n * wide), 1)
    num_warps = _warps(block_m * block_n * wide, each)
    together = max(resident_warps // num_warps, 1)
    stages = stages_of(block_m, block_n, loaded, together, device)
    options = resident(num_warps, together * num_warps, itemsize, device)
    return block_m, block_n, stages, options, together


@remembered
def row_plan(M: int, N: int, itemsize: int, align: int, loaded: int, device: Device) -> RowPlan:
    """Forward: whole rows in registers, or a row's tiles shared by programs.

    `loaded`: bytes that are loaded for each element, of the input and a residual.
    """
    if N * registers_of(itemsize) <= WIDEST_ROW:
        block_m, block_n, stages, options, together = row_tile(
            ROW_FORWARD, N, itemsize, loaded, align < 4 or itemsize > 2, device
        )
        return RowPlan(
            True, block_m, block_n, stages, options,
            *shares_of(cdiv(M, block_m), together * device.multiprocessors),
        )  # fmt: skip
    wide = registers_of(itemsize)
    elements = LOOP_TILE if align >= 4 else LOOP_TILE // 2
    block_n = elements // wide
    wanted = min(cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, M), ROW_PARTIALS)
    if cdiv(device.multiprocessors, 2) <= M:
        wanted = 1  # a second launch, and x from memory again, cost more than some idle processors
    num_warps = row_warps(elements, align < 4)
    return RowPlan(
        False, 1, block_n,
        stages_of(1, block_n, loaded, PROGRAMS_PER_MULTIPROCESSOR, device),
        {"num_warps": num_warps},
        *shares_of(cdiv(N, block_n), wanted),
        *fold_of(block_n, 1, align, num_warps, columns=False),
    )  # fmt: skip


@remembered
def row_sums_plan(
    M: int, N: int, itemsize: int, align: int, loaded: int, device: Device
) -> RowPlan | None:
    """Backward, rows too wide for registers: their sums first; None where they are not."""
    wide = registers_of(itemsize)
    if N * wide <= WIDEST_ROW_BACKWARD:
        return None
    elements = LOOP_TILE // 2
    block_n = elements // wide
    wanted = min(cdiv(PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors, M), ROW_PARTIALS)
    options = {"num_warps": row_warps(elements, align < 4)}
    stages = stages_of(1, block_n, loaded, PROGRAMS_PER_MULTIPROCESSOR, device)
    return RowPlan(False, 1, block_n, stages, options, *shares_of(cdiv(N, block_n), wanted))


@remembered
def row_gradient_plan(
    M: int, N: int, itemsize: int, align: int, loaded: int, gated: bool, device: Device
) -> RowPlan:
    """Backward: tiles of rows, shared by the programs that own all or some of their columns.

    `loaded`: bytes that are loaded for each element; `gated`: act′ needs z, and so b, a further
    number of each column.
    """
    wide = registers_of(itemsize)
    whole = N * wide <= WIDEST_ROW_BACKWARD
    if whole:
        block_n = power_of_two(N)
        block_m = max(TILE_BYTES // 4 // block_n // wide, 1)
    else:
        block_m, block_n = COLUMN_TILE[0], COLUMN_TILE[1] // wide
    many = align < 4 or gated or itemsize > 2 or (not whole and loaded > 2 * itemsize)
    num_warps = row_warps(block_m * block_n * wide, many)
    together = max(ROW_WARPS // num_warps, 1)
    vectors = block_m * block_n // (32 * num_warps) // min(align, block_n)  # of a thread
    return RowPlan(
        whole, block_m, block_n,
        stages_of(block_m, block_n, loaded, together, device),
        resident(num_warps, ROW_WARPS, itemsize, device),
        *shares_of(cdiv(M, block_m), together * device.multiprocessors // cdiv(N, block_n)),
        fold=max(min(vectors, block_m), 1),
    )  # fmt: skip
