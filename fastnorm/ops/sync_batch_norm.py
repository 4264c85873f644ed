"""BatchNorm over all processes' batches, as a differentiable operation: views, saved tensors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnorm import eager
from fastnorm.distributed import gathered, summed
from fastnorm.eager import native
from fastnorm.eager.linear_batch_norm_unfused import bias_gradient
from fastnorm.eager.sync_batch_norm import count_batch
from fastnorm.eager.sync_formulas import differentiable_gradients
from fastnorm.kernels import batch_norm as kernels
from fastnorm.kernels import linear_batch_norm_epilogue as epilogue
from fastnorm.kernels import sync_batch_norm as sync
from fastnorm.kernels.launch import ChannelView
from fastnorm.ops.channels import changed, left_to_eager, residual_gradient
from fastnorm.ops.layout import as_vector, channel_view, in_memory, laid_out_as, on_device_of


class SyncBatchNormFunction(torch.autograd.Function):
    """(x, residual, weight, bias) are differentiable; the buffers change in place.

    x is dense, laid out as `view` says, and residual like it; either may be empty.
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
        group: Any,
        found: Sequence[Tensor] | None,
    ) -> Tensor:
        with on_device_of(x):
            y, stats, count = sync.forward(
                x, residual, weight, bias, running_mean, running_var,
                momentum, eps, activation, view, partial(gathered, group=group), found,
            )  # fmt: skip
        changed(running_mean, running_var)
        gate = kernels.saved_for_gate(activation, residual is not None)
        ctx.save_for_backward(
            x, weight, bias, stats, count,
            y if gate == "output" else None,
            residual if gate == "residual" else None,
        )  # fmt: skip
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.eps, ctx.activation, ctx.view, ctx.group = eps, activation, view, group
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats, count, y, residual = ctx.saved_tensors
        dx_wanted, dresidual_wanted, dw_wanted, db_wanted = ctx.needs_input_grad[:4]
        buffers_and_options = (None,) * 8
        if native.is_differentiated(dy):
            return *differentiable_gradients(ctx, dy), *buffers_and_options
        with on_device_of(x):
            dx, dz, dw, db = sync.backward(
                laid_out_as(dy, x), x, y, residual, weight, bias, stats, count,
                ctx.activation, ctx.view,
                (
                    dx_wanted,
                    ctx.residual_dtype if dresidual_wanted else None,
                    dw_wanted,
                    bias.dtype if db_wanted else None,
                ),
                partial(summed, group=ctx.group),
            )  # fmt: skip
        return dx, residual_gradient(ctx, dy, dz), dw, db, *buffers_and_options


class ProductFunction(torch.autograd.Function):
    """Z = X Wᵀ + b of rows, with the statistics of its tiles; batch norm removes b's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, view: ChannelView
    ) -> tuple[Tensor, ...]:
        with on_device_of(x):
            bias = None if bias is None else in_memory(bias).contiguous()
            z, found = epilogue.product(x, weight, bias, view, training=True)
        assert found is not None
        ctx.mark_non_differentiable(*found)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype, bias.device)
        return z, *found

    @staticmethod
    def backward(ctx: Any, dz: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_dx, wants_dw, wants_db, _ = ctx.needs_input_grad
        dx = dz @ weight if wants_dx else None
        dw = dz.T @ x if wants_dw else None
        return dx, dw, bias_gradient(None, wants_db, ctx.bias_like), None  # view


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    num_batches_tracked: Tensor | None,
    group: Any,
    found: Sequence[Tensor] | None = None,
) -> Tensor:
    """`eager.sync_batch_norm` on Triton kernels; `found`: statistics of tiles of the input."""
    left = left_to_eager(input, residual, running_mean, running_var)
    if left or torch.compiler.is_compiling():
        return eager.sync_batch_norm(
            input, running_mean, running_var, weight, bias,
            momentum, eps, residual, activation, num_batches_tracked, group,
        )  # fmt: skip
    x, view = channel_view(input)
    y: Tensor = SyncBatchNormFunction.apply(
        x,
        None if residual is None else laid_out_as(residual, x),
        as_vector(weight),
        as_vector(bias),
        running_mean,
        running_var,
        count_batch(num_batches_tracked, True, momentum),
        eps,
        activation,
        view,
        group,
        found,
    )
    return y
