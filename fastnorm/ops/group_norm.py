"""GroupNorm and InstanceNorm as differentiable operations: views, saved tensors, casts."""

from typing import Any

import torch
from torch import Tensor

from fastnorm import eager
from fastnorm.eager import native
from fastnorm.kernels import group_norm as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.ops.batch_norm import batch_norm
from fastnorm.ops.channels import (
    changed,
    differentiable_gradients,
    left_to_eager,
    residual_gradient,
    save,
)
from fastnorm.ops.function import Function
from fastnorm.ops.layer_norm import layer_norm
from fastnorm.ops.layout import as_vector, laid_out_as, on_device_of, recorded, sample_view
from fastnorm.ops.library import group_norm as library


class GroupNormFunction(Function):
    """(x, residual, weight, bias) are differentiable; the buffers change in place.

    x is dense, laid out as `view` says, and residual like it.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
        y_dtype: torch.dtype,
    ) -> Tensor:
        with on_device_of(x):
            y, stats = (library if recorded(x) else kernels).forward(
                x, residual, weight, bias, running_mean, running_var, momentum,
                eps, activation, view, num_groups, y_dtype,
            )  # fmt: skip
        changed(running_mean, running_var)
        save(ctx, x, weight, bias, stats, y, residual, activation)
        ctx.eps, ctx.view, ctx.num_groups = eps, view, num_groups
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nothing depends on the output
            return (None,) * 12
        saved = x, weight, bias, stats, y, residual = ctx.saved_tensors
        dx_wanted, dresidual_wanted, dw_wanted, db_wanted = ctx.needs_input_grad[:4]
        buffers_and_options = (None,) * 8
        if native.is_differentiated(dy):
            found = differentiable_gradients(ctx, dy, saved, _normalize_again)
            return *found, *buffers_and_options
        dz_dtype = ctx.residual_dtype if dresidual_wanted else None
        dz = dx = dw = db = None
        gated = y is not None or residual is not None
        if dx_wanted or dw_wanted or db_wanted or (dresidual_wanted and gated):
            with on_device_of(x):
                dx, dz, dw, db = (library if recorded(x) else kernels).backward(
                    laid_out_as(dy, x), x, y, residual, weight, bias, stats,
                    ctx.activation, ctx.view, ctx.num_groups,
                    (dx_wanted, dz_dtype, dw_wanted, ctx.bias_dtype if db_wanted else None),
                )  # fmt: skip
        return dx, residual_gradient(ctx, dy, dz), dw, db, *buffers_and_options


def _normalize_again(
    ctx: Any,
    _: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """For `differentiable_gradients`."""
    return eager.group_norm(x, ctx.num_groups, weight, bias, ctx.eps, residual, activation)


def _normalized(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str,
    y_dtype: torch.dtype,
) -> Tensor:
    x, view = sample_view(input)
    y: Tensor = GroupNormFunction.called(
        x,
        None if residual is None else laid_out_as(residual, x),
        as_vector(weight),
        as_vector(bias),
        running_mean,
        running_var,
        momentum,
        eps,
        activation,
        view,
        num_groups,
        y_dtype,
    )
    return y


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`functional.group_norm` on Triton kernels; arguments are already checked."""
    if num_groups == 1 and input.ndim == 2 and residual is None:  # rows, of which those know more
        return layer_norm(input, input.shape[1:], weight, bias, eps, activation)
    if left_to_eager(input, residual):
        return eager.group_norm(input, num_groups, weight, bias, eps, residual, activation)
    y_dtype = native.output_dtype(input, residual)
    return _normalized(
        input, num_groups, weight, bias, None, None, 0.0, eps, residual, activation, y_dtype
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`functional.instance_norm` on Triton kernels; arguments are already checked."""
    if not use_input_stats:  # the same statistics for every sample: batch norm's evaluation
        return batch_norm(
            input, running_mean, running_var, weight, bias,
            False, momentum, eps, residual, activation, None,
        )  # fmt: skip
    if left_to_eager(input, residual, running_mean, running_var):
        return eager.instance_norm(
            input, running_mean, running_var, weight, bias,
            use_input_stats, momentum, eps, residual, activation,
        )  # fmt: skip
    return _normalized(
        input, input.shape[1], weight, bias, running_mean, running_var, momentum, eps,
        residual, activation, torch.promote_types(
            input.dtype, (input if residual is None else residual).dtype
        ),
    )  # fmt: skip
