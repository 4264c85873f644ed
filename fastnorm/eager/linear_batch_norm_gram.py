"""The gram algorithm as a differentiable operation."""

from typing import Any

import torch
from torch import Tensor

from fastnorm.distributed import gathered
from fastnorm.eager import gram, native
from fastnorm.eager.linear_batch_norm_bwd import gradients
from fastnorm.eager.linear_batch_norm_fwd import forward, gram_matrix
from fastnorm.eager.linear_batch_norm_unfused import (
    differentiable_gradients,
    differentiable_shared,
)
from fastnorm.eager.sync_batch_norm import merged, move_buffers, told


class GramFunction(torch.autograd.Function):
    """The gram algorithm on rows (M, K), with its gradient; the buffers change in place."""

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
        group: Any,
    ) -> Tensor:
        M = x.shape[0]

        def shared(centre: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean = centre if bias is None else centre + bias
            own = told(mean, var.sqrt(), M, gram.compute_dtype(x.dtype))
            mean, rest, var, count = merged(gathered(own, group))
            mean = mean + rest
            move_buffers(running_mean, running_var, mean, var, count, momentum)
            return mean if bias is None else mean - bias, var, count

        if training and group is not None:
            statistics, _ = gram.batch_statistics(*gram_matrix(x), weight, M, eps, shared)
        elif training:
            statistics, var = gram.batch_statistics(*gram_matrix(x), weight, M, eps)
            mean = statistics.centre if bias is None else statistics.centre + bias
            gram.move_buffers(running_mean, running_var, mean, var, M, momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            statistics = gram.fixed_statistics(running_mean, running_var, bias, eps)
        y = forward(x, weight, norm_weight, norm_bias, statistics, activation)
        ctx.save_for_backward(
            x, y if activation != "identity" else None, weight, None if training else bias,
            norm_weight, norm_bias, *statistics,
        )  # fmt: skip
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype, bias.device)
        ctx.training, ctx.eps, ctx.activation, ctx.group = training, eps, activation, group
        ctx.set_materialize_grads(group is not None)  # where others may wait for this one's sums
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        if dy is None:  # nothing depends on the output
            return (None,) * 12
        buffers_and_options = (None,) * 7
        if native.is_differentiated(dy) and ctx.group is not None:
            x, _, weight, _, norm_weight, norm_bias, *found = ctx.saved_tensors
            return *differentiable_shared(
                (x, weight, norm_weight, norm_bias), ctx.needs_input_grad[:5],
                gram.Statistics(*found).centre,
                ctx.bias_like, ctx.eps, ctx.activation, ctx.group, dy,
            ), *buffers_and_options  # fmt: skip
        if native.is_differentiated(dy):
            x, _, weight, bias, norm_weight, norm_bias, *found = ctx.saved_tensors
            fixed = None if ctx.training else gram.fixed_moments(gram.Statistics(*found), bias)
            return *differentiable_gradients(
                (x, weight, bias, norm_weight, norm_bias), ctx.needs_input_grad[:5], fixed,
                ctx.bias_like, ctx.eps, ctx.activation, dy,
            ), *buffers_and_options  # fmt: skip
        return *gradients(ctx, dy), *buffers_and_options
