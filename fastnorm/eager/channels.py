"""Gradients that the autograd functions of norms by channel share.

What these have saved: input, weight, output (None without an activation), mean and rstd.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastnorm.eager import native
from fastnorm.eager.native import STEPS


def through_activation(
    activation: str, dy: Tensor, input: Tensor, activated: Tensor | None
) -> Tensor:
    """dy ∘ act′, laid out as the input; dy itself where it is that already."""
    g = native.in_order(dy).contiguous(memory_format=native.memory_format(input))
    if activated is None:
        return g
    _, act_backward, arguments = STEPS[activation]
    out = native.empty_like(input) if g is dy else g
    dz: Tensor = act_backward.grad_input(g, activated, *arguments, grad_input=out)
    return dz


def gradients(
    ctx: Any,
    dy: Tensor | None,
    direct: Callable[[Any, Tensor], tuple[Tensor | None, ...]],
    normalize: Callable[..., Tensor],
) -> tuple[Tensor | None, ...]:
    """dx, dγ, dβ and dr: by `direct(ctx, dy)`, or by differentiable operators where need be.

    Those differentiate `normalize(ctx, input, weight, mean, rstd)`: all but the shift and what
    comes after it.
    """
    if dy is None:  # nothing depends on the output
        return (None,) * 4
    if not native.is_differentiated(dy):
        return direct(ctx, dy)
    input, weight, activated, mean, rstd = ctx.saved_tensors
    for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    g = dy
    if activated is not None:
        _, act_backward, arguments = STEPS[ctx.activation]
        g = act_backward.default(dy, activated.detach(), *arguments)
    dx, dw = native.gradients_again(
        lambda x, w: normalize(ctx, x, w, mean, rstd),
        (input, weight), (for_input, for_weight), g,
    )  # fmt: skip
    db = g.sum([0, *range(2, g.dim())], dtype=rstd.dtype) if for_bias else None
    return dx, dw, db, g if for_residual else None
