"""The launch of a pass of GroupNorm whose programs own whole groups; formulas are in group_norm.py.

Contiguous groups in registers, or tile by tile (run_plans.py); or, where channels are innermost,
some neighbouring groups of some samples (group_plans.py).
"""

from typing import Any, NamedTuple

from fastnorm.kernels.devices import Device
from fastnorm.kernels.group_norm_bwd import (
    group_norm_bwd_kernel,
    group_norm_bwd_rows_kernel,
    group_norm_bwd_run_kernel,
)
from fastnorm.kernels.group_norm_fwd import (
    group_norm_fwd_kernel,
    group_norm_fwd_rows_kernel,
    group_norm_fwd_run_kernel,
)
from fastnorm.kernels.group_plans import GroupPlan, group_plan
from fastnorm.kernels.launch import ChannelView, cdiv, divisor_class, power_of_two, remembered
from fastnorm.kernels.row_plans import RowPlan
from fastnorm.kernels.run_plans import (
    kept_run_gradient_plan,
    kept_run_plan,
    run_gradient_plan,
    run_plan,
)


class Whole(NamedTuple):
    """The launch of a pass whose programs own whole groups."""

    kernel: Any
    programs: int
    shares: tuple[int, ...]
    constants: dict[str, int | bool]
    partials: int = 1  # of the sums of a channel


def tile_of(plan: GroupPlan) -> dict[str, int | bool]:
    return {
        "BLOCK_S": plan.block_s, "BLOCK_C": plan.block_c,
        "FOLD": plan.fold, "RUN": plan.run, "ALIGN": plan.align, **plan.options,
    }  # fmt: skip


def _whole_columns(
    view: ChannelView, num_groups: int, itemsize: int, device: Device, *, backward: bool
) -> Whole | None:
    """Where channels are innermost, unless programs are to share a group."""
    plan = group_plan(*view, view.C // num_groups, itemsize, device)
    if not plan.whole:
        return None
    constants = tile_of(plan) | {
        "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k,
        "PADDED": plan.block_k != view.C // num_groups,
    }  # fmt: skip
    if backward:
        shares = (plan.programs, plan.tiles, plan.share)
        programs = plan.programs * plan.channel_blocks
        return Whole(group_norm_bwd_kernel, programs, shares, constants, plan.programs)
    programs = cdiv(view.N, plan.block_n) * plan.channel_blocks
    return Whole(group_norm_fwd_kernel, programs, (plan.tiles,), constants)


def _rows(
    plan: RowPlan, kernel: Any, num_groups: int, L: int, constants: dict[str, int | bool]
) -> Whole:
    """Where groups are contiguous and fit registers."""
    constants = constants | {
        "FULL": plan.is_full(L), "BLOCK_M": plan.block_m, "BLOCK_G": plan.beside,
        "BLOCK_N": plan.block_n, "STAGES": plan.stages, **plan.options,
    }  # fmt: skip
    programs = plan.programs * cdiv(num_groups, plan.beside)
    shares = (plan.programs, plan.tiles, plan.tiles_per_program)
    return Whole(kernel, programs, shares, constants, plan.programs)


@remembered
def whole_forward(
    view: ChannelView, num_groups: int, itemsize: int, loaded: int, device: Device
) -> Whole | None:
    """None: programs share a group. `loaded`: bytes for each element, of x and a residual."""
    N, C, S, columns = view
    if columns and S > 1:
        return _whole_columns(view, num_groups, itemsize, device, backward=False)
    L = C // num_groups * S
    align, within = divisor_class(L, itemsize), divisor_class(S, itemsize)
    constants = {"ALIGN": align, "WITHIN": within}
    rows = kept_run_plan(N, num_groups, L, itemsize, align, within, loaded, device)
    if rows is not None:
        constants["BLOCK_K"] = power_of_two(C // num_groups)
        return _rows(rows, group_norm_fwd_rows_kernel, num_groups, L, constants)
    run = run_plan(N, num_groups, L, itemsize, align, loaded, device)
    if run is None:
        return None
    constants |= {
        "FULL": run.is_full(L), "BLOCK_N": run.block_n, "FOLD": run.fold, "RUN": run.run,
        "STAGES": run.stages, **run.options,
    }  # fmt: skip
    return Whole(group_norm_fwd_run_kernel, N * num_groups, (run.tiles,), constants)


@remembered
def whole_backward(
    view: ChannelView, num_groups: int, itemsize: int, loaded: int, gated: bool, device: Device
) -> Whole | None:
    """The same, with all that is read; `gated`: act′ needs z, and so b."""
    N, C, S, columns = view
    if columns and S > 1:
        return _whole_columns(view, num_groups, itemsize, device, backward=True)
    K = C // num_groups
    align, within = divisor_class(K * S, itemsize), divisor_class(S, itemsize)
    rows = kept_run_gradient_plan(
        N, num_groups, K * S, itemsize, align, within, loaded, gated, device
    )
    if rows is not None:
        constants = {
            "BLOCK_K": power_of_two(K), "BLOCK_S": power_of_two(S // within),
            "ALIGN": align, "WITHIN": within,
        }  # fmt: skip
        return _rows(rows, group_norm_bwd_rows_kernel, num_groups, K * S, constants)
    run = run_gradient_plan(N, num_groups, K, S, itemsize, within, loaded, device)
    if run is None:
        return None
    constants = {
        "FULL": run.is_full(K, S), "BLOCK_S": run.block_s, "BLOCK_C": run.block_c,
        "ALIGN": within, "STAGES": run.stages, **run.options,
    }  # fmt: skip
    shares = (run.parts, run.tiles)
    return Whole(group_norm_bwd_run_kernel, N * num_groups, shares, constants, run.parts * N)
