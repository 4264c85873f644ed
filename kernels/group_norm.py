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

Bytes. Where one program owns a group, one kernel does everything: what is short and contiguous
stays in registers, and anything else that is read a second time is in a cache. Else x is read
twice, forward (moments, apply) and backward (reduce, apply), and programs share the tiles of a
sample: they need not know its groups. They leave the moments and sums of single channels, small
beside the tiles, and merging these is all that a group is. act′ is treated as in batch_norm.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels.batch_norm import saved_for_gate
from fastnorm.kernels.device.activations import ACTIVATIONS
from fastnorm.kernels.devices import Device, device_of
from fastnorm.kernels.group_norm_bwd import (
    group_norm_bwd_apply_kernel,
    group_norm_bwd_finalize_kernel,
    group_norm_bwd_reduce_kernel,
)
from fastnorm.kernels.group_norm_fwd import (
    group_norm_fwd_apply_kernel,
    group_norm_fwd_finalize_kernel,
    group_norm_fwd_moments_kernel,
    instance_norm_running_kernel,
)
from fastnorm.kernels.group_norm_whole import tile_of, whole_backward, whole_forward
from fastnorm.kernels.group_plans import (
    GROUP_MERGE_GROUPS,
    GROUP_MERGE_PARTIALS,
    GROUP_MERGE_WARPS,
    group_plan,
)
from fastnorm.kernels.launch import (
    MERGE_CHANNELS,
    MERGE_PARTIALS,
    MERGE_WARPS,
    ChannelView,
    cdiv,
    remembered,
)
from fastnorm.kernels.sums import sum_partials

__all__ = ["backward", "forward", "saved_for_gate"]


class _Shared(NamedTuple):
    """What the launches of a pass have in common, where programs share a group."""

    grid: tuple[int]
    shares: tuple[int, int, int]
    positions: int  # of a share
    tile: dict[str, int | bool]
    merge_grid: tuple[int]
    merge: dict[str, int]


@remembered
def _shared(view: ChannelView, num_groups: int, itemsize: int, device: Device) -> _Shared:
    plan = group_plan(*view, view.C // num_groups, itemsize, device)
    merge = {
        "BLOCK_R": GROUP_MERGE_GROUPS, "BLOCK_P": GROUP_MERGE_PARTIALS,
        "num_warps": GROUP_MERGE_WARPS,
    }  # fmt: skip
    return _Shared(
        (view.N * plan.channel_blocks * plan.programs,),
        (plan.programs, plan.tiles, plan.share),
        plan.share * plan.block_s,
        tile_of(plan) | {"COLUMNS": view.columns, "LEAD": plan.lead},
        (cdiv(view.N * num_groups, GROUP_MERGE_GROUPS),),
        merge,
    )


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
    N, C, S, _ = view
    G, K = num_groups, C // num_groups
    act, _ = ACTIVATIONS[activation]
    if y_dtype is None:
        y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = torch.empty_like(x, dtype=y_dtype)
    stats = torch.empty(3, N * G, dtype=dtype, device=x.device)
    std = None if running_mean is None else torch.empty(N * G, dtype=dtype, device=x.device)
    itemsize, device = x.element_size(), device_of(x.device)
    loaded = itemsize + (0 if residual is None else residual.element_size())
    whole = whole_forward(view, G, itemsize, loaded, device)
    if whole is not None:
        whole.kernel[(whole.programs,)](
            x, residual, weight, bias, y, stats, std, eps, N, C, S, G, K, *whole.shares,
            ACT=act, **whole.constants,
        )  # fmt: skip
    else:
        grid, shares, positions, tile, merge_grid, merge = _shared(view, G, itemsize, device)
        partial = torch.empty(3, shares[0], N * C, dtype=dtype, device=x.device)
        group_norm_fwd_moments_kernel[grid](x, partial, N, C, S, *shares, **tile)
        group_norm_fwd_finalize_kernel[merge_grid](
            partial, stats, std, eps, N * G, K, S, shares[0], positions, **merge
        )
        group_norm_fwd_apply_kernel[grid](
            x, residual, weight, bias, y, stats, N, C, S, G, K, *shares, ACT=act, **tile
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
    N, C, S, _ = view
    G, K = num_groups, C // num_groups
    _, gate = ACTIVATIONS[activation]
    wants_dx, dz_dtype, wants_dw, db_dtype = wanted
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    dx = torch.empty_like(x) if wants_dx else None
    dw = torch.empty_like(weight) if weight is not None and wants_dw else None
    db = None if db_dtype is None else torch.empty(C, dtype=db_dtype, device=x.device)
    wants_sums = dw is not None or db is not None
    x_read = wants_dx or wants_sums or (y is None and activation != "identity")
    large = (dy, x if x_read else None, y, residual)
    loaded = sum(t.element_size() for t in large if t is not None)
    itemsize, device = x.element_size(), device_of(x.device)
    whole = whole_backward(view, G, itemsize, loaded, bias is not None, device)
    dz = None
    if y is not None or residual is not None:
        if wants_dx and whole is None:  # read again: no coarser than dy, whatever is wanted
            dz = torch.empty_like(dy)
        elif dz_dtype is not None:
            dz = torch.empty_like(dy, dtype=dz_dtype)

    partial = None
    if whole is not None:
        if wants_sums:
            partial = torch.empty(2, whole.partials, C, dtype=dtype, device=x.device)
        whole.kernel[(whole.programs,)](
            *large, weight, bias, stats, dx, dz, partial, N, C, S, G, K, *whole.shares,
            ACT_GRAD=gate, **whole.constants,
        )  # fmt: skip
    else:
        grid, shares, _, tile, merge_grid, merge = _shared(view, G, itemsize, device)
        if wants_sums or wants_dx:
            partial = torch.empty(2, shares[0] * N, C, dtype=dtype, device=x.device)
        group_norm_bwd_reduce_kernel[grid](
            *large, weight, bias, stats, dz, partial, N, C, S, G, K, *shares,
            ACT_GRAD=gate, **tile,
        )  # fmt: skip
        if wants_dx:
            means = torch.empty(2, N * G, dtype=dtype, device=x.device)
            group_norm_bwd_finalize_kernel[merge_grid](
                partial, weight, means, N * G, G, K, S, shares[0], **merge
            )
            group_norm_bwd_apply_kernel[grid](
                dy if dz is None else dz, x, weight, bias, stats, means, dx, N, C, S, G, K, *shares,
                ACT_GRAD=gate if dz is None else ACTIVATIONS["identity"][1], **tile,
            )  # fmt: skip
    if partial is not None:
        sums = partial[0] if dw is not None else None, partial[1] if db is not None else None
        sum_partials(*sums, None, dw, db)
    return dx, dz, dw, db
