"""Plans for groups that are contiguous: N samples of G runs of L elements (see launch.py).

A run that fits registers is a row: see row_plans.py. Programs have `beside` runs of each of some
samples, one block after the other. A longer run is its program's alone, which reads it twice, the
second time from a cache. Where there are few of those, or they are longer still, programs share
them: see group_plans.py. Of the batch's size nothing that is compiled depends on but whether they
are few.
"""

from dataclasses import dataclass

from fastnorm.kernels.devices import Device
from fastnorm.kernels.launch import (
    SECTOR,
    TILE_BYTES,
    WHOLE_BYTES,
    cdiv,
    fold_of,
    power_of_two,
    resident,
)
from fastnorm.kernels.row_plans import (
    ROW_WARPS,
    WIDEST_ROW,
    WIDEST_ROW_BACKWARD,
    RowPlan,
    registers_of,
    row_tile,
    row_warps,
    shares_of,
    stages_of,
)

# Of a forward in registers, as ROW_FORWARD. Runs differ in their parameters: each element of a tile
# keeps its own, or each vector where a channel has whole ones.
RUN_FORWARD = ((512, 16, 17), (1024, 32, 11), (4096, 32, 12), (WIDEST_ROW, 32, 16))
KEPT_RUN = 4096  # elements, in registers, whose parameters are kept one by one
RUN_WARPS = 4  # of a longer run
# Of one that is read twice: those of all resident programs are in the cache; backward, dy's too.
RUN_BYTES, RUN_BYTES_BACKWARD = 98304, 49152


@dataclass(frozen=True)
class RunGradientPlan:
    """How a program takes a run of K channels of S positions, tile by tile."""

    block_c: int
    block_s: int
    stages: int
    options: dict[str, int]  # of the compiler
    parts: int  # of the positions
    tiles: int

    def is_full(self, K: int, S: int) -> bool:
        """Whether no tile reaches beyond the run."""
        return K % self.block_c == 0 and S % self.block_s == 0


def _are_few(N: int, G: int, device: Device) -> bool:
    """Whether programs with a run each would leave a device idle."""
    return 2 * device.multiprocessors > N * G


def _fits(L: int, itemsize: int, within: int, widest: int) -> bool:
    """Whether registers hold a run, of which so many neighbours `within` a vector are a channel."""
    widest = widest if within * itemsize == 16 else min(KEPT_RUN, widest)
    return power_of_two(L) * registers_of(itemsize) <= widest


def _kept(
    N: int, G: int, L: int, itemsize: int, block_m: int, block_n: int, stages: int,
    options: dict[str, int], together: int, device: Device,
) -> RowPlan:  # fmt: skip
    """The plan for tiles in registers, of so many programs `together` on a multiprocessor."""
    # no lanes beyond the runs; but where those are few and short, sectors are to be whole
    beside = min(G & -G if L * itemsize >= SECTOR else power_of_two(G), block_m)
    wanted = together * device.multiprocessors // cdiv(G, beside)
    return RowPlan(
        True, block_m, block_n, stages, options,
        *shares_of(cdiv(N, block_m // beside), wanted), beside=beside,
    )  # fmt: skip


def _evenly(length: int, block: int) -> int:
    """A block, or half of it where only that divides a length."""
    return block // 2 if length % block and length % (block // 2) == 0 else block


def kept_run_plan(
    N: int, G: int, L: int, itemsize: int, align: int, within: int, loaded: int, device: Device
) -> RowPlan | None:
    """Forward, in registers. `loaded`: bytes for each element, of the input and a residual."""
    # many long runs are faster in tiles: no lanes beyond them, and nobody waits for one program
    widest = WIDEST_ROW if _are_few(N, G, device) else KEPT_RUN
    if not _fits(L, itemsize, within, widest):
        return None
    # more addresses; or, of half vectors, parameters of each element beside them
    many = align < (8 if within == 1 else 4) or itemsize > 2
    block_m, block_n, stages, options, together = row_tile(
        RUN_FORWARD, L, itemsize, loaded, many, device
    )
    return _kept(N, G, L, itemsize, block_m, block_n, stages, options, together, device)


def run_plan(
    N: int, G: int, L: int, itemsize: int, align: int, loaded: int, device: Device
) -> RowPlan | None:
    """Forward, in tiles."""
    if L * itemsize > (WHOLE_BYTES if _are_few(N, G, device) else RUN_BYTES):
        return None
    block_n = _evenly(L, TILE_BYTES // itemsize // (1 if align >= 4 else 2))
    return RowPlan(
        False, 1, block_n,
        stages_of(1, block_n, loaded, ROW_WARPS // RUN_WARPS, device),
        resident(RUN_WARPS, ROW_WARPS, itemsize, device),
        *shares_of(cdiv(L, block_n), 1),
        *fold_of(block_n, 1, align, RUN_WARPS, columns=False),
    )  # fmt: skip


def kept_run_gradient_plan(
    N: int, G: int, L: int, itemsize: int, align: int, within: int, loaded: int, gated: bool,
    device: Device,
) -> RowPlan | None:  # fmt: skip
    """Backward, in registers; `gated`: act′ needs z, and so b, a further number of each channel."""
    if not _fits(L, itemsize, within, WIDEST_ROW_BACKWARD):
        return None
    wide, block_n = registers_of(itemsize), power_of_two(L)
    block_m = max(TILE_BYTES // 4 // block_n // wide, 1)
    num_warps = row_warps(block_m * block_n * wide, align < 4 or gated or itemsize > 2)
    together = max(ROW_WARPS // num_warps, 1)
    stages = stages_of(block_m, block_n, loaded, together, device)
    options = resident(num_warps, ROW_WARPS, itemsize, device)
    return _kept(N, G, L, itemsize, block_m, block_n, stages, options, together, device)


def run_gradient_plan(
    N: int, G: int, K: int, S: int, itemsize: int, align: int, loaded: int, device: Device
) -> RunGradientPlan | None:
    """Backward, in tiles; both dy and x are read twice."""
    if K * S * itemsize > (WHOLE_BYTES if _are_few(N, G, device) else RUN_BYTES_BACKWARD):
        return None
    many = align == 1 or loaded > 2 * itemsize  # addresses, or numbers, an element
    elements = TILE_BYTES // itemsize // (2 if many else 1)
    block_s = min(power_of_two(S), elements)
    block_c = _evenly(K, min(elements // block_s, power_of_two(K)))
    parts = cdiv(S, block_s)
    return RunGradientPlan(
        block_c, block_s,
        stages_of(block_c, block_s, loaded, ROW_WARPS // RUN_WARPS, device),
        resident(RUN_WARPS, ROW_WARPS, itemsize, device),
        parts, parts * cdiv(K, block_c),
    )  # fmt: skip
