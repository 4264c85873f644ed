"""What the autograd functions of norms by channels share: what is saved, and gradients from it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastnorm.eager import native
from fastnorm.eager.activations import GRAD_FROM_OUTPUT
from fastnorm.kernels.batch_norm import saved_for_gate

# x, weight, bias, stats, y, residual
Saved: TypeAlias = tuple[
    Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None
]  # fmt: skip


def left_to_eager(input: Tensor, residual: Tensor | None, *buffers: Tensor | None) -> bool:
    """Whether kernels would lose what torch's operators keep, or move what those do not.

    A float64 residual is added in float64 whatever the input is, and kernels compute in one type.
    Of buffers they know no strides; of an inference tensor torch has rules where it may change.
    """
    if residual is not None and residual.dtype is torch.float64 is not input.dtype:
        return True
    return any(
        b is not None
        and (not b.is_contiguous() or (b.is_inference() and not torch.is_inference_mode_enabled()))
        for b in buffers
    )


def changed(*buffers: Tensor | None) -> None:
    """Tell autograd of buffers that a kernel has moved."""
    for buffer in buffers:
        if buffer is not None:
            torch.autograd.graph.increment_version(buffer)


def save(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    y: Tensor,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Keep what the backward reads; bias, y and residual are read where act′ asks for them."""
    gate = saved_for_gate(activation, residual is not None)
    from_z = activation != "identity" and gate != "output"
    ctx.save_for_backward(
        x, weight, bias if from_z else None, stats,
        y if gate == "output" else None,
        residual if gate == "residual" else None,
    )  # fmt: skip
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.activation = activation
    ctx.set_materialize_grads(False)


def residual_gradient(ctx: Any, dy: Tensor, dz: Tensor | None) -> Tensor | None:
    """Without a dz there is nothing between the sum and the output."""
    if not ctx.needs_input_grad[1]:
        return None
    dresidual: Tensor = (dy if dz is None else dz).to(ctx.residual_dtype)
    return dresidual


def differentiable_gradients(
    ctx: Any, dy: Tensor, saved: Saved, normalize: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """dx, dresidual, dweight and dbias in torch operators, for second derivatives.

    `normalize(ctx, stats, x, residual, weight, bias, activation)` computes the output once more.
    """
    x, weight, bias, stats, y, residual = saved
    dz = dy if y is None else GRAD_FROM_OUTPUT[ctx.activation](dy, y)
    activation = "identity" if y is not None else ctx.activation
    gradients = native.gradients_again(
        lambda *leaves: normalize(ctx, stats, *leaves, activation),
        (x, residual, weight, bias), ctx.needs_input_grad[:4], dz,
    )  # fmt: skip
    if residual is None:  # it was not saved, or there is none
        gradients[1] = residual_gradient(ctx, dy, dz)
    if ctx.needs_input_grad[3] and bias is None:
        axes = [0, *range(2, dz.ndim)]
        gradients[3] = dz.sum(axes, dtype=stats.dtype).to(ctx.bias_dtype)
    return tuple(gradients)
