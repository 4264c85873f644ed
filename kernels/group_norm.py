"""GroupNorm over the G groups of K = C / G neighbouring channels of each sample of (N, C, S).

InstanceNorm is G = C, with running statistics besides. Forward, per sample and group, with L = K·S:
    mean = Σ x / L        std² = Σ (x - mean)² / L        rstd = 1 / √(std² + eps)
    x̂ = (x - mean) · rstd
    z = x̂ · w + b (+ residual)            w, b: one number a channel
    y = act(z)
    running_mean ← (1 - m) · running_mean + m · average over samples of mean
    running_var  ← (1 - m) · running_var  + m · average over samples of std² · S / (S - 1)

Backward, with dz = dy · act′(z), which is also the residual's gradient:
    db = Σ dz             dw = Σ dz · x̂                over samples and positions of a channel
    dx = (w · dz - ⟨w · dz⟩ - x̂ · ⟨w · dz · x̂⟩) · rstd   with ⟨⟩ the mean over the group

Bytes. Where one program owns a group, one kernel does everything: the forward keeps what is short
and contiguous in registers, and anything else that is read a second time is in a cache. Else x is
read twice, forward (moments, apply) and backward (reduce, apply), and programs share the tiles of a
sample: they need not know its groups. They leave the moments and sums of single channels, small
beside the tiles, and merging these is all that a group is. act′ is treated as in batch_norm.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels.batch_norm import saved_for_gate
from fastnorm.kernels.device.activations import ACTIVATIONS
from fastnorm.kernels.devices import device_of
from fastnorm.kernels.group_norm_bwd import (
    group_norm_bwd_apply_kernel,
    group_norm_bwd_finalize_kernel,
    group_norm_bwd_kernel,
    group_norm_bwd_reduce_kernel,
)
from fastnorm.kernels.group_norm_fwd import (
    group_norm_fwd_apply_kernel,
    group_norm_fwd_finalize_kernel,
    group_norm_fwd_kernel,
    group_norm_fwd_moments_kernel,
    group_norm_fwd_rows_kernel,
    group_norm_fwd_run_kernel,
    instance_norm_running_kernel,
)
from fastnorm.kernels.group_plans import (
    GROUP_MERGE_GROUPS,
    GROUP_MERGE_PARTIALS,
    GROUP_MERGE_WARPS,
    GroupPlan,
    group_plan,
)
from fastnorm.kernels.launch import (
    MERGE_CHANNELS,
    MERGE_PARTIALS,
    MERGE_WARPS,
    ChannelView,
    cdiv,
    divisor_class,
)
from fastnorm.kernels.row_plans import run_plan
from fastnorm.kernels.sums import sum_partials

__all__ = ["backward", "forward", "saved_for_gate"]


class _Launch(NamedTuple):
    """What the launches of one tensor share."""

    plan: GroupPlan
    groups: tuple[int, int, int, int, int]  # N, C, S, G, K
    tile: dict[str, int | bool]
    merge_grid: tuple[int]
    merge: dict[str, int]
    dtype: torch.dtype  # of what is computed in


class _Whole(NamedTuple):
    """A forward of one launch, whose programs own whole groups."""

    kernel: Any
    programs: int
    shares: tuple[int, ...]
    constants: dict[str, int | bool]


def _launch(x: Tensor, view: ChannelView, num_groups: int) -> _Launch:
    N, C, S, columns = view
    K = C // num_groups
    plan = group_plan(N, C, S, columns, K, x.element_size(), device_of(x.device))
    tile = {
        "BLOCK_S": plan.block_s, "BLOCK_C": plan.block_c,
        "FOLD": plan.fold, "RUN": plan.run, "ALIGN": plan.align, "COLUMNS": columns,
        "num_warps": plan.num_warps,
    }  # fmt: skip
    if plan.whole:
        tile |= {"BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k, "PADDED": plan.block_k != K}
    merge = {
        "BLOCK_R": GROUP_MERGE_GROUPS, "BLOCK_P": GROUP_MERGE_PARTIALS,
        "num_warps": GROUP_MERGE_WARPS,
    }  # fmt: skip
    grid = (cdiv(N * num_groups, GROUP_MERGE_GROUPS),)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return _Launch(plan, (N, C, S, num_groups, K), tile, grid, merge, dtype)


def _of_runs(
    x: Tensor, residual: Tensor | None, view: ChannelView, num_groups: int
) -> _Whole | None:
    """The forward's launch where groups are contiguous, unless programs are to share them."""
    N, C, S, columns = view
    if columns and S > 1:
        return None
    L = C // num_groups * S
    itemsize = x.element_size()
    align, within = divisor_class(L, itemsize), divisor_class(S, itemsize)
    loaded = itemsize + (0 if residual is None else residual.element_size())
    plan = run_plan(N, num_groups, L, itemsize, align, within, loaded, device_of(x.device))
    if plan is None:
        return None
    constants = {
        "FULL": plan.is_full(L), "BLOCK_N": plan.block_n, "ALIGN": align, "WITHIN": within,
        **plan.options,
    }  # fmt: skip
    if not plan.whole:
        constants |= {"FOLD": plan.fold, "RUN": plan.run}
        return _Whole(group_norm_fwd_run_kernel, N * num_groups, (plan.tiles,), constants)
    constants |= {"BLOCK_M": plan.block_m, "BLOCK_G": plan.beside, "STAGES": plan.stages}
    grid = plan.programs * cdiv(num_groups, plan.beside)
    shares = (plan.programs, plan.tiles, plan.tiles_per_program)
    return _Whole(group_norm_fwd_rows_kernel, grid, shares, constants)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
    num_groups: int,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, stats): y laid out as x, stats (3, N·G) with the rows mean, rest, rstd.

    The running statistics are moved where they are given, and then there are as many groups as
    channels.
    """
    plan, groups, tile, merge_grid, merge, dtype = _launch(x, view, num_groups)
    N, C, S, G, K = groups
    act, _ = ACTIVATIONS[activation]
    if y_dtype is None:
        y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=y_dtype)
    stats = torch.empty(3, N * G, dtype=dtype, device=x.device)
    std = None if running_mean is None else torch.empty(N * G, dtype=dtype, device=x.device)
    whole = _of_runs(x, residual, view, num_groups)
    if whole is None and plan.whole:
        programs = cdiv(N, plan.block_n) * plan.channel_blocks
        constants = {name: value for name, value in tile.items() if name != "COLUMNS"}
        whole = _Whole(group_norm_fwd_kernel, programs, (plan.tiles,), constants)
    if whole is not None:
        whole.kernel[(whole.programs,)](
            x, residual, weight, bias, y, stats, std, eps, *groups, *whole.shares,
            ACT=act, **whole.constants,
        )  # fmt: skip
    else:
        grid = (N * plan.channel_blocks * plan.programs,)
        shares = (plan.programs, plan.tiles, plan.share)
        partial = torch.empty(3, plan.programs, N * C, dtype=dtype, device=x.device)
        group_norm_fwd_moments_kernel[grid](x, partial, N, C, S, *shares, **tile)
        group_norm_fwd_finalize_kernel[merge_grid](
            partial, stats, std, eps, N * G, K, S, plan.programs, plan.share * plan.block_s,
            **merge,
        )  # fmt: skip
        group_norm_fwd_apply_kernel[grid](
            x, residual, weight, bias, y, stats, *groups, *shares, ACT=act, **tile
        )
    if running_mean is not None:
        moving = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)
        instance_norm_running_kernel[(cdiv(C, MERGE_CHANNELS),)](
            stats, std, running_mean, running_var, *moving, N, C, S,
            BLOCK_C=MERGE_CHANNELS, BLOCK_P=MERGE_PARTIALS, num_warps=MERGE_WARPS,
        )  # fmt: skip
    return y, stats


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: str,
    view: ChannelView,
    num_groups: int,
    wanted: tuple[bool, torch.dtype | None, bool, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dz, dweight, dbias), None where not `wanted`; dy, y and residual laid out as x.

    y or residual is given as `saved_for_gate` says; only then is there a dz other than dy, the
    residual's gradient. bias is given where act′ needs z. dz (unless it is also read again) and
    dbias have the dtypes `wanted`.
    """
    plan, groups, tile, merge_grid, merge, dtype = _launch(x, view, num_groups)
    N, C, S, G, K = groups
    _, gate = ACTIVATIONS[activation]
    wants_dx, dz_dtype, wants_dw, db_dtype = wanted
    dx = torch.empty_like(x) if wants_dx else None
    dw = torch.empty_like(weight) if weight is not None and wants_dw else None
    db = None if db_dtype is None else torch.empty(C, dtype=db_dtype, device=x.device)
    wants_sums = dw is not None or db is not None
    dz = None
    gated = y is not None or residual is not None
    if gated and wants_dx and not plan.whole:
        dz = torch.empty_like(dy)  # the apply pass reads it: no coarser than dy, whatever is wanted
    elif gated and dz_dtype is not None:
        dz = torch.empty_like(dy, dtype=dz_dtype)
    x_read = wants_dx or wants_sums or (y is None and activation != "identity")
    sources = (dy, x if x_read else None, y, residual, weight, bias, stats)

    partial = None
    rows = plan.programs * (1 if plan.whole else N)  # of partial sums for each channel
    if wants_sums or (wants_dx and not plan.whole):
        partial = torch.empty(2, rows, C, dtype=dtype, device=x.device)
    if plan.whole:
        group_norm_bwd_kernel[(plan.programs * plan.channel_blocks,)](
            *sources, dx, dz, partial, *groups, plan.programs, plan.tiles, plan.share,
            ACT_GRAD=gate, **tile,
        )  # fmt: skip
    else:
        grid = (N * plan.channel_blocks * plan.programs,)
        shares = (plan.programs, plan.tiles, plan.share)
        group_norm_bwd_reduce_kernel[grid](
            *sources, dz, partial, *groups, *shares, ACT_GRAD=gate, **tile
        )
        if wants_dx:
            means = torch.empty(2, N * G, dtype=dtype, device=x.device)
            group_norm_bwd_finalize_kernel[merge_grid](
                partial, weight, means, N * G, G, K, S, plan.programs, **merge
            )
            group_norm_bwd_apply_kernel[grid](
                dy if dz is None else dz, x, weight, bias, stats, means, dx, *groups, *shares,
                ACT_GRAD=gate if dz is None else ACTIVATIONS["identity"][1], **tile,
            )  # fmt: skip
    if partial is not None:
        sums = partial[0] if dw is not None else None, partial[1] if db is not None else None
        sum_partials(*sums, None, dw, db)
    return dx, dz, dw, db
