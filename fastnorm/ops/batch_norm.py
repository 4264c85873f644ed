"""BatchNorm as a differentiable operation: views, saved tensors, casts. No arithmetic."""

from typing import Any

from torch import Tensor

from fastnorm import eager
from fastnorm.eager import native
from fastnorm.kernels import batch_norm as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.ops.channels import (
    changed,
    differentiable_gradients,
    left_to_eager,
    residual_gradient,
    save,
)
from fastnorm.ops.function import Function
from fastnorm.ops.layout import as_vector, channel_view, laid_out_as, on_device_of, recorded
from fastnorm.ops.library import batch_norm as library


class BatchNormFunction(Function):
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
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        activation: str,
        view: ChannelView,
    ) -> Tensor:
        with on_device_of(x):
            y, stats = (library if recorded(x) else kernels).forward(
                x, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                training, momentum, eps, activation, view,
            )  # fmt: skip
        if training:
            changed(running_mean, running_var, num_batches_tracked)
        save(ctx, x, weight, bias, stats, y, residual, activation)
        ctx.training, ctx.eps, ctx.view = training, eps, view
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
        with on_device_of(x):
            dx, dz, dw, db = (library if recorded(x) else kernels).backward(
                laid_out_as(dy, x), x, y, residual, weight, bias, stats,
                ctx.training, ctx.activation, ctx.view,
                (dx_wanted, dz_dtype, dw_wanted, ctx.bias_dtype if db_wanted else None),
            )  # fmt: skip
        return dx, residual_gradient(ctx, dy, dz), dw, db, *buffers_and_options


def _normalize_again(
    ctx: Any,
    stats: Tensor,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """For `differentiable_gradients`."""
    mean, var = (None, None) if ctx.training else (stats[0] + stats[1], stats[2] ** -2)
    eps = ctx.eps if ctx.training else 0.0  # rstd⁻² is the variance with eps in it
    return eager.batch_norm(
        x, mean, var, weight, bias, ctx.training, 0.0, eps, residual, activation, None
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """`functional.batch_norm` on Triton kernels; arguments are already checked."""
    if running_mean is not None and running_var is not None and not training:
        running_mean, running_var = running_mean.contiguous(), running_var.contiguous()
    if left_to_eager(input, residual, running_mean, running_var):
        return eager.batch_norm(
            input, running_mean, running_var, weight, bias,
            training, momentum, eps, residual, activation, num_batches_tracked,
        )  # fmt: skip
    if not training:
        momentum, num_batches_tracked = 0.0, None  # nothing moves
    elif momentum is None and num_batches_tracked is not None:
        # The cumulative average: counted before the launch, in which every channel reads the count.
        momentum = num_batches_tracked.add_(1).double().reciprocal()
        num_batches_tracked = None
    x, view = channel_view(input)
    y: Tensor = BatchNormFunction.called(
        x,
        None if residual is None else laid_out_as(residual, x),
        as_vector(weight),
        as_vector(bias),
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        activation,
        view,
    )
    return y
