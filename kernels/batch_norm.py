"""BatchNorm over the (N, S) index sets of the C channels of a dense (N, C, S) tensor.

Forward, per channel, with M = N·S:
    mean = Σ x / M        std² = Σ (x - mean)² / M        rstd = 1 / √(std² + eps)
    x̂ = (x - mean) · rstd
    z = x̂ · w + b (+ residual)
    y = act(z)
    running_mean ← (1 - m) · running_mean + m · mean
    running_var  ← (1 - m) · running_var  + m · std² · M / (M - 1)

Backward, with dz = dy · act′(z), which is also the residual's gradient:
    db = Σ dz             dw = Σ dz · x̂
    dx = (dz - db / M - x̂ · dw / M) · rstd · w         in training
    dx = dz · rstd · w                                 in evaluation, mean and rstd from the buffers

Bytes. Where one program owns a channel, one kernel does everything, and what it reads a second time
is in a cache. Else training reads x twice, forward (moments, apply) and backward (reduce, apply).
act′ is never saved. Without a residual z is recomputed from x, which the backward reads anyway.
With one, z needs x and the residual; where the sign of z is enough (relu, leaky_relu) y is read
instead, which the next layer keeps alive anyway. The reduce pass writes dz, the residual's
gradient, and the apply pass reads dz in place of dy and y: 7 passes in all. A packed mask would
take 6, plus 1/8 byte an element at three places, and a kernel that packs bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels.batch_norm_bwd import (
    batch_norm_bwd_apply_kernel,
    batch_norm_bwd_kernel,
    batch_norm_bwd_reduce_kernel,
)
from fastnorm.kernels.batch_norm_fwd import (
    batch_norm_fwd_apply_kernel,
    batch_norm_fwd_finalize_kernel,
    batch_norm_fwd_kernel,
    batch_norm_fwd_moments_kernel,
)
from fastnorm.kernels.channel_plans import ChannelPlan, channel_plan
from fastnorm.kernels.device.activations import ACTIVATIONS, SIGN_GATES
from fastnorm.kernels.devices import Device, device_of
from fastnorm.kernels.launch import (
    MERGE_CHANNELS,
    MERGE_PARTIALS,
    MERGE_WARPS,
    ChannelView,
    cdiv,
    remembered,
)
from fastnorm.kernels.sums import sum_partials


class Launch(NamedTuple):
    """What the launches of one tensor share."""

    plan: ChannelPlan
    sizes: tuple[int, ...]
    tile: dict[str, int | bool]
    merge_grid: tuple[int]
    merge: dict[str, int]
    dtype: torch.dtype  # of what is computed in


def launch_of(x: Tensor, view: ChannelView) -> Launch:
    return _launch(view, x.dtype, device_of(x.device))


@remembered
def _launch(view: ChannelView, x_dtype: torch.dtype, device: Device) -> Launch:
    plan = channel_plan(*view, x_dtype.itemsize, device)
    sizes = (*view[:3], plan.programs, plan.tiles, plan.tiles_per_program)
    tile = {
        "BLOCK_N": plan.block_n, "BLOCK_S": plan.block_s, "BLOCK_C": plan.block_c,
        "CHANNELS": plan.channels, "FOLD": plan.fold, "RUN": plan.run, "ALIGN": plan.align,
        "COLUMNS": plan.columns, "LEAD": plan.lead, **plan.options,
    }  # fmt: skip
    merge = {"BLOCK_C": MERGE_CHANNELS, "BLOCK_P": MERGE_PARTIALS, "num_warps": MERGE_WARPS}
    dtype = torch.float64 if x_dtype is torch.float64 else torch.float32
    return Launch(plan, sizes, tile, (cdiv(view.C, MERGE_CHANNELS),), merge, dtype)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
    found: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, stats): y laid out as x, stats (3, C) with the rows mean, rest, rstd.

    `found` are partial statistics (3, P, C) and their counts (P,), where whoever made x left some.
    """
    plan, sizes, tile, merge_grid, merge, dtype = launch_of(x, view)
    act, _ = ACTIVATIONS[activation]
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=y_dtype)
    stats = torch.empty(3, view.C, dtype=dtype, device=x.device)
    running = (running_mean, running_var)
    moving = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)
    operands = (x, residual, weight, bias, y, stats)
    if training and plan.whole and found is None:
        batch_norm_fwd_kernel[plan.grid](
            *operands, *running, num_batches_tracked, *moving, eps, *view[:3], plan.tiles,
            ACT=act, **tile,
        )  # fmt: skip
        return y, stats
    if training:
        if found is None:
            partial = torch.empty(3, plan.programs, view.C, dtype=dtype, device=x.device)
            count = torch.empty(plan.programs, dtype=dtype, device=x.device)
            batch_norm_fwd_moments_kernel[plan.grid](
                x, partial, count, num_batches_tracked, *sizes, **tile
            )
            found = partial, count
        partial, count = found
        batch_norm_fwd_finalize_kernel[merge_grid](
            partial, count, stats, *running, *moving, eps, view.C, count.numel(), **merge
        )
        running = (None, None)
    batch_norm_fwd_apply_kernel[plan.grid](*operands, *running, eps, *sizes, ACT=act, **tile)
    return y, stats


def saved_for_gate(activation: str, has_residual: bool) -> str:
    """Which tensor besides x the backward needs for act′: "", "output" or "residual"."""
    if not has_residual or activation == "identity":
        return ""
    return "output" if activation in SIGN_GATES else "residual"


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    view: ChannelView,
    wanted: tuple[bool, torch.dtype | None, bool, torch.dtype | None],
    count: Tensor | None = None,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dz, dweight, dbias), None where not `wanted`; dy, y and residual laid out as x.

    y or residual is given as `saved_for_gate` says; only then is there a dz other than dy, the
    residual's gradient. bias is given where act′ needs z. dz (unless it is also read again) and
    dbias have the dtypes `wanted`. Where other processes have parts of the batch, `summed` adds up
    (2, C) over all of them, and a channel has `count` values.
    """
    plan, sizes, tile, _, _, dtype = launch_of(x, view)
    _, gate = ACTIVATIONS[activation]
    wants_dx, dz_dtype, wants_dw, db_dtype = wanted
    dx = torch.empty_like(x) if wants_dx else None
    dw = torch.empty_like(weight) if weight is not None and wants_dw else None
    db = None if db_dtype is None else torch.empty(view.C, dtype=db_dtype, device=x.device)
    through_statistics = training and wants_dx
    sums = dw is not None or db is not None or through_statistics
    dz = None
    gated = y is not None or residual is not None
    whole = plan.whole and summed is None
    if gated and through_statistics and not whole:
        dz = torch.empty_like(dy)  # the apply pass reads it: no coarser than dy, whatever is wanted
    elif gated and dz_dtype is not None:
        dz = torch.empty_like(dy, dtype=dz_dtype)
    sources = (dy, x if sums or (y is None and activation != "identity") else None, y, residual)

    if whole:
        batch_norm_bwd_kernel[plan.grid](
            *sources, weight, bias, stats, dx, dz, dw, db, *view[:3], plan.tiles,
            ACT_GRAD=gate, TRAINING=training, **tile,
        )  # fmt: skip
        return dx, dz, dw, db

    partial = total = None
    if sums:
        partial = torch.empty(2, plan.programs, view.C, dtype=dtype, device=x.device)
    batch_norm_bwd_reduce_kernel[plan.grid](
        *sources, weight, bias, stats, None if training else dx, dz, partial, *sizes,
        ACT_GRAD=gate, **tile,
    )  # fmt: skip
    if through_statistics:
        total = torch.empty(2, view.C, dtype=dtype, device=x.device)
    if partial is not None:
        sum_partials(partial[0], partial[1], total, dw, db)
    if total is not None:
        total = total if summed is None else summed(total)
        batch_norm_bwd_apply_kernel[plan.grid](
            dy if dz is None else dz, x, weight, bias, stats, total, count, dx, *sizes,
            ACT_GRAD=gate if dz is None else ACTIVATIONS["identity"][1], **tile,
        )  # fmt: skip
    return dx, dz, dw, db
