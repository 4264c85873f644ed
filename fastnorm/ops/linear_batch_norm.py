"""Linear + BatchNorm as a differentiable operation: views, saved tensors, casts. No arithmetic."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastnorm.distributed import gathered, summed
from fastnorm.eager import native
from fastnorm.eager.linear_batch_norm_unfused import (
    bias_gradient,
    differentiable_gradients,
    differentiable_shared,
    product,
)
from fastnorm.eager.sync_batch_norm import count_batch
from fastnorm.kernels import cost
from fastnorm.kernels import linear_batch_norm as kernels
from fastnorm.kernels import linear_batch_norm_epilogue as epilogue
from fastnorm.kernels.devices import device_of
from fastnorm.kernels.launch import ChannelView
from fastnorm.kernels.products import precision
from fastnorm.ops.batch_norm import batch_norm
from fastnorm.ops.channels import changed, left_to_eager
from fastnorm.ops.function import Function
from fastnorm.ops.layout import (
    as_recorded,
    as_vector,
    channel_view,
    in_memory,
    on_device_of,
    recorded,
)
from fastnorm.ops.library import linear_batch_norm as library
from fastnorm.ops.library import linear_batch_norm_epilogue as epilogue_library
from fastnorm.ops.sync_batch_norm import ProductFunction, sync_batch_norm


class GramFunction(Function):
    """(x, weight, bias, norm_weight, norm_bias) are differentiable; the buffers change in place.

    x (B, K, *) is dense, laid out as `view` says, and so is the output (B, N, *).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        activation: str,
        view: ChannelView,
        group: Any = None,
    ) -> Tensor:
        with on_device_of(x):
            y, folded = _gram(x, group).gram_forward(
                x, weight, bias, norm_weight, norm_bias, running_mean, running_var,
                training, momentum, eps, activation, view,
                *(() if group is None else (partial(gathered, group=group),)),
            )  # fmt: skip
        if training:
            changed(running_mean, running_var)
        ctx.save_for_backward(
            x, y if activation != "identity" else None, weight, None if training else bias,
            norm_weight, norm_bias, *folded,
        )  # fmt: skip
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype, bias.device)
        ctx.training, ctx.eps, ctx.activation, ctx.view = training, eps, activation, view
        ctx.group = group
        ctx.set_materialize_grads(group is not None)  # where others may wait for this one's sums
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nothing depends on the output
            return (None,) * 13
        x, y, weight, bias, norm_weight, norm_bias, *found = ctx.saved_tensors
        folded = kernels.Folded(*found)
        wanted = ctx.needs_input_grad[:5]
        buffers_and_options = (None,) * 8
        if native.is_differentiated(dy) and ctx.group is not None:
            return *differentiable_shared(
                (x, weight, norm_weight, norm_bias), wanted, folded.stats[5],
                ctx.bias_like, ctx.eps, ctx.activation, ctx.group, dy,
            ), *buffers_and_options  # fmt: skip
        if native.is_differentiated(dy):
            return *differentiable_gradients(
                (x, weight, bias, norm_weight, norm_bias), wanted,
                None if ctx.training else kernels.fixed_moments(folded, bias),
                ctx.bias_like, ctx.eps, ctx.activation, dy,
            ), *buffers_and_options  # fmt: skip
        with on_device_of(x):
            dx, dw, db, dgamma, dbeta = _gram(x, ctx.group).gram_backward(
                _laid_out(dy, ctx.view), x, y, weight, norm_weight, norm_bias,
                None if ctx.bias_like is None else ctx.bias_like[1],
                folded, ctx.activation, ctx.view, wanted,
                *(() if ctx.group is None else (partial(summed, group=ctx.group),)),
            )  # fmt: skip
        db = bias_gradient(db, wanted[2], ctx.bias_like)
        return dx, dw, db, dgamma, dbeta, *buffers_and_options


def _gram(x: Tensor, group: Any) -> Any:
    """The launchers, as operators where those are to be seen; those take no callable."""
    return library if group is None and recorded(x) else kernels


class EpilogueFunction(Function):
    """As GramFunction, on rows x (M, K); Z is written, and saved."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        activation: str,
        view: ChannelView,
    ) -> Tensor:
        with on_device_of(x):
            y, z, stats = (epilogue_library if recorded(x) else epilogue).forward(
                x, weight, bias, norm_weight, norm_bias, running_mean, running_var,
                training, momentum, eps, activation, view,
            )  # fmt: skip
        if training:
            changed(running_mean, running_var)
        ctx.save_for_backward(
            x, z, weight, None if training else bias, norm_weight, norm_bias, stats
        )
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype, bias.device)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # nothing depends on the output
            return (None,) * 12
        x, z, weight, bias, norm_weight, norm_bias, stats = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        buffers_and_options = (None,) * 7
        if native.is_differentiated(dy):
            return *differentiable_gradients(
                (x, weight, bias, norm_weight, norm_bias), wanted,
                None if ctx.training else (stats[0] + stats[1], stats[2] ** -2),
                ctx.bias_like, ctx.eps, ctx.activation, dy,
            ), *buffers_and_options  # fmt: skip
        dbeta_dtype = norm_bias.dtype if wanted[4] else None
        with on_device_of(x):
            dx, dw, db, dgamma, dbeta = (epilogue_library if recorded(x) else epilogue).backward(
                in_memory(dy).contiguous(), x, z, weight, norm_weight, norm_bias, stats,
                ctx.training, ctx.activation, (*wanted[:4], dbeta_dtype),
            )  # fmt: skip
        db = bias_gradient(db, wanted[2], ctx.bias_like)
        return dx, dw, db, dgamma, dbeta, *buffers_and_options


def _laid_out(t: Tensor, view: ChannelView) -> Tensor:
    """`t`, or the copy it takes to have its channels where the view has them."""
    t = in_memory(t)
    if view.columns:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t.contiguous()


def linear_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    activation: str,
    algorithm: str,
    num_batches_tracked: Tensor | None,
    group: Any = None,
) -> Tensor:
    """`eager.linear_batch_norm` on Triton kernels."""
    if group is not None and torch.compiler.is_compiling():
        algorithm = "unfused"
    x, view = channel_view(input)
    if algorithm == "auto":
        backward = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        M, K, N = (as_recorded(size) for size in (view.N * view.S, view.C, weight.shape[0]))
        algorithm = cost.choose(
            M, K, N, x.dtype, activation, device_of(x.device), training, backward,
            columns=view.columns, precision=precision(x.dtype),
        )  # fmt: skip
    buffers: tuple[Tensor | None, ...] = (running_mean, running_var)
    if not training:
        buffers = tuple(None if b is None else b.contiguous() for b in buffers)
    elif left_to_eager(input, None, *buffers):
        algorithm = "unfused"
    if weight.numel() == 0 or x.numel() == 0 or (algorithm == "epilogue" and not view.columns):
        algorithm = "unfused"
    as_rows = algorithm == "epilogue" and x.ndim > 2
    if group is not None and algorithm != "gram":
        found = None
        if algorithm == "epilogue":
            rows = x.movedim(1, -1).flatten(0, -2) if as_rows else x
            z, *found = ProductFunction.apply(rows, in_memory(weight).contiguous(), bias, view)
            z = z.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1) if as_rows else z
        else:
            z = product(input, weight, bias, training)
        return sync_batch_norm(
            z, running_mean, running_var, norm_weight, norm_bias,
            momentum, eps, None, activation, num_batches_tracked, group, found,
        )  # fmt: skip
    if algorithm == "unfused":
        return batch_norm(
            product(input, weight, bias, training), running_mean, running_var, norm_weight,
            norm_bias, training, momentum, eps, None, activation, num_batches_tracked,
        )  # fmt: skip
    momentum = count_batch(num_batches_tracked, training, momentum)
    function = GramFunction if algorithm == "gram" else EpilogueFunction
    y: Tensor = function.called(
        x.movedim(1, -1).flatten(0, -2) if as_rows else x,
        in_memory(weight).contiguous(),
        None if bias is None else in_memory(bias).contiguous(),
        as_vector(norm_weight),
        as_vector(norm_bias),
        *buffers,
        training,
        momentum,
        eps,
        activation,
        view,
        *(() if algorithm == "epilogue" else (group,)),
    )
    return y.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1) if as_rows else y
