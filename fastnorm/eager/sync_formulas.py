"""BatchNorm over the batches of all processes by differentiable operators, sums over processes too.

    x̂ = (x − μ) rstd     μ = Σ x / n     rstd = 1 / √(Σ (x − μ)² / n + eps)     Σ, n: everybody's
    dx = γ rstd (g − Σ g / n − x̂ Σ g x̂ / n)

For torch.compile, torch.func, forward-mode AD, tracing and second derivatives.
"""

from typing import Any

import torch
from torch import Tensor

from fastnorm.distributed import sum_over
from fastnorm.eager.activations import ACTIVATIONS, GRAD_FROM_OUTPUT
from fastnorm.eager.gram import compute_dtype
from fastnorm.eager.native import per_channel


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    group: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output; everybody's mean, variance and count."""
    xhat, _, mean, var, count = _standardized(input, None, eps, group)
    w, b = (None if t is None else t.to(xhat.dtype).reshape(-1) for t in (weight, bias))
    z = _affine(xhat, w, b)
    z = z if residual is None else z + residual
    like = input if residual is None else residual
    y = ACTIVATIONS[activation](z).to(torch.promote_types(input.dtype, like.dtype))
    return y, mean, var, count


def differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dresidual, dγ and dβ of what a `SyncBatchNormFunction` has saved."""
    input, weight, bias, stats, _, y, residual = ctx.saved_tensors
    options = (ctx.eps, ctx.activation, ctx.group, ctx.needs_input_grad[:4])
    dx, dz, dw, db = gradients_about(stats[0], dy, input, y, residual, weight, bias, *options)
    return dx, dz.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None, dw, db


def gradients_about(
    mean: Tensor,
    dy: Tensor,
    input: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    group: Any,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """(dx, dz, dγ, dβ), given a mean; y where its sign is enough for act′."""
    for_input, _, for_weight, for_bias = wanted
    xhat, rstd, _, _, count = _standardized(input, mean, eps, group)
    g = dy.to(xhat.dtype)
    w = None if weight is None else weight.to(xhat.dtype).reshape(-1)
    if y is not None:
        g = GRAD_FROM_OUTPUT[activation](g, y)
    elif activation != "identity":
        z = _affine(xhat, w, None if bias is None else bias.to(xhat.dtype).reshape(-1))
        g = gated(activation, z if residual is None else z + residual, g)
    sums = torch.stack([(xhat * g).sum(axes(input)), g.sum(axes(input))])
    dx = None
    if for_input:
        total = sum_over(sums, group) / count
        scale = rstd if w is None else rstd * w
        slope, offset, scale = (per_channel(t, input) for t in (*total, scale))
        dx = ((g - offset - xhat * slope) * scale).to(input.dtype)
    dw = sums[0].to(weight.dtype).view_as(weight) if weight is not None and for_weight else None
    db = sums[1].to(bias.dtype).view_as(bias) if bias is not None and for_bias else None
    return dx, g, dw, db


def gated(activation: str, z: Tensor, dy: Tensor) -> Tensor:
    """dy · act′(z); differentiable where gradients are recorded."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        (dz,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, dy, create_graph=create_graph)
    return dz


def _standardized(
    input: Tensor, about: Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x̂, rstd, mean, variance, count); `about`, near the mean, saves the digits of a large one."""
    x = input.to(compute_dtype(input.dtype))
    if about is not None:
        x = x - per_channel(about.to(x.dtype), x)
    values = x.new_full((1,), x.numel() // max(x.shape[1], 1))
    *_, count = found = sum_over(torch.cat([x.sum(axes(x)), values]), group)
    mean = found[:-1] / count
    d = x - per_channel(mean, x)
    var = sum_over(d.square().sum(axes(x)), group) / count
    rstd = (var + eps).rsqrt()
    return d * per_channel(rstd, x), rstd, mean, var, count


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = xhat if weight is None else xhat * per_channel(weight, xhat)
    return z if bias is None else z + per_channel(bias, z)


def axes(input: Tensor) -> list[int]:
    """All but the channels'."""
    return [0, *range(2, input.dim())]
