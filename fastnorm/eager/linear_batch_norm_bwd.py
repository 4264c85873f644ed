"""The gram algorithm's passes over the rows of dY, X and Y, backward."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnorm.distributed import summed
from fastnorm.eager import gram
from fastnorm.eager.activations import OUTPUT_GRADS
from fastnorm.eager.linear_batch_norm_fwd import blocks, shifted
from fastnorm.eager.linear_batch_norm_unfused import bias_gradient


def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dW, db, dγ and dβ."""
    x, y, weight, _, norm_weight, norm_bias, *kept = ctx.saved_tensors  # once: see checkpoint
    statistics = gram.Statistics(*kept)
    wants_dx, wants_dw, wants_db, wants_dgamma, wants_dbeta = ctx.needs_input_grad[:5]
    wants_db_sum = wants_db and not ctx.training
    # who waits for the sums of this process: those of the other algorithms too
    joins = ctx.group is not None and (wants_dx or wants_dw or wants_db)
    wants_p = wants_dw or wants_dgamma or (ctx.training and wants_dx) or joins
    alpha = gram.scale_of(statistics, norm_weight)
    dw = db = dgamma = dbeta = dx = small = None
    shift = gram.shift_of(statistics, gram.compute_dtype(x.dtype))
    if wants_p or wants_dx or wants_dbeta or wants_db_sum:
        dx, unit, p, total = _sweep(ctx, dy, x, y, weight, statistics, alpha, shift, wants_p)
    if wants_p:
        rows = x.shape[0]
        sums = partial(summed, group=ctx.group) if joins else None
        small = gram.gradients(p, total, shift, weight, alpha, statistics, rows, wants_dx, sums)
        dw = small.dweight.to(weight.dtype) if wants_dw else None
        if wants_dgamma:
            dgamma = small.dgamma.view_as(norm_weight).to(norm_weight.dtype)
    if dx is not None:
        dx = _through_statistics(dx, unit, x, shift, small, statistics).to(x.dtype)
    if wants_db:
        db = bias_gradient(alpha * total if wants_db_sum else None, wants_db, ctx.bias_like)
    if wants_dbeta:
        dbeta = total.view_as(norm_bias).to(norm_bias.dtype)
    return dx, dw, db, dgamma, dbeta


def _sweep(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    statistics: gram.Statistics,
    alpha: Tensor,
    shift: Tensor | None,
    wants_p: bool,
) -> tuple[Tensor | None, float, Tensor, Tensor]:
    """(G α∘W in a unit, that unit, P, 1ᵀG): one pass over dY and Y."""
    dtype = gram.compute_dtype(x.dtype)
    aw, unit = gram.folded_weight(weight, alpha, dtype)
    N, K = weight.shape
    dx = torch.empty_like(x, dtype=dtype) if ctx.needs_input_grad[0] else None
    total = torch.zeros(N, dtype=torch.float64, device=x.device)
    p = torch.zeros(N, K, dtype=torch.float64, device=x.device)
    gate = OUTPUT_GRADS[ctx.activation]
    # where W cancels a signal in P's rows, too, only their last digits count
    p_dtype = p.dtype if statistics.cancels is not None and statistics.cancels else dtype
    for dy_block, y_block, x_block, dx_block in blocks(N, dy, y, x, dx):
        assert dy_block is not None
        assert x_block is not None
        g = dy_block.to(dtype)
        if y_block is not None:
            g = gate(g, y_block.to(dtype))
        total += g.sum(0)
        if wants_p:
            p += g.T.to(p_dtype) @ shifted(x_block, shift, dtype).to(p_dtype)
        if dx_block is not None:
            torch.mm(g, aw, out=dx_block)
    return dx, unit, p, total


def _through_statistics(
    dx: Tensor,
    unit: float,
    x: Tensor,
    shift: Tensor | None,
    small: gram.Gradients | None,
    statistics: gram.Statistics,
) -> Tensor:
    """dX in place of G α∘W, which is in a unit."""
    if small is None or shift is None:
        return dx.mul_(unit)
    a, a_unit, offset = gram.folded_for_input(small, statistics, shift, dx.dtype)
    for x_block, dx_block in blocks(a.shape[0], x, dx):
        assert x_block is not None
        assert dx_block is not None
        dx_block.addmm_(shifted(x_block, shift, dx.dtype), a, alpha=a_unit / unit)
        dx_block.mul_(unit).add_(offset)
    return dx
