"""BatchNorm where torch loses time on a CPU: the shorter ways.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (C,), of the batch or from the buffers
    g = dy ∘ act′(y)     dβ = Σ g     dγ = Σ g (x − μ) rstd     dr = g
    dx = γ rstd (g − dβ/n − (x − μ) rstd dγ/n)    in training, n values a channel; else γ rstd g

Ratios are torch's time over ours in float32; bench/bench_eager_batch_norm.py measures them, and the
ways that were not taken.

* NCHW, training: torch adds up the moments one element after the other. torch.mean and, for
  Σ x (x − mean), the vectorized reduction of torch's backward kernel take their place; a mean of
  many standard deviations is subtracted first, into the output, and so costs no accuracy:
  3.7 for (8, 64, 56, 56), 2.3 for (16, 2048, 7, 7); with the subtraction 1.9 and 1.3.
* Long columns, (N, C) and channels_last: torch adds up millions of values in one float32, with an
  error of 5e-4 for 2 million. From 32 MB on the sums are shorter ones.
* From 32 MB on, the page faults of a new tensor cost more than its arithmetic: torch's kernels
  write into outputs allocated here, on huge pages: 4.7 for (32, 64, 112, 112) in evaluation. The
  backward kernel cannot; two elementwise passes replace its second half: 2.3.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastnorm.eager import formulas, native
from fastnorm.eager.channels import gradients, through_activation
from fastnorm.eager.native import aten

SMALL = 1 << 17
"""Elements a thread below which several fast operators cost more than one slow one."""
SHORT_PLANE = 32
"""Positions of a channel in a sample below which a reduction over planes is no longer fast."""

# running_mean, running_var, training, momentum and eps
Statistics: TypeAlias = tuple[Tensor | None, Tensor | None, bool, float, float]


def has_planes(input: Tensor, eps: float) -> bool:
    """Whether each channel of a sample is a long run of memory, and there is enough to gain."""
    return (
        input.dtype not in native.WIDER  # torch's moments are vectorized there
        and input.is_contiguous()
        and input.numel() >= SHORT_PLANE * input.shape[0] * input.shape[1]
        and input.numel() >= SMALL * torch.get_num_threads()
        and eps > 1e-30  # else the square of a tiny float32 would be missed
    )


def is_column(input: Tensor) -> bool:
    """Whether there is one channel, of few positions in each of many samples: a plane to us."""
    return (
        input.shape[1] == 1 < input.shape[0]
        and SMALL <= input.numel() < SHORT_PLANE * input.shape[0]
        and not native.observed(input)
    )


def is_slow(input: Tensor, training: bool, eps: float) -> bool:
    """Whether `normalize` is faster than torch, or more precise."""
    return native.is_huge(input) or (training and has_planes(input, eps))


def _sums_are_ours(input: Tensor, eps: float) -> bool:
    """Whether torch's moments are slow, or its sums long, and ours are not."""
    if input.dtype in native.WIDER or eps <= 1e-30:
        return False
    planes = input.dim() > 2 and input.is_contiguous()
    return has_planes(input, eps) if planes else native.is_huge(input)


def normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd of a dense input; moves the buffers in training."""
    output = native.empty_like(input)
    _, _, training, _, eps = statistics
    if training and _sums_are_ours(input, eps) and (found := native.moments(input, output)):
        return output, *apply_moments(found, output, weight, bias, statistics)
    running_mean, running_var, *_ = statistics
    mean, rstd = (
        input.new_empty(0, dtype=native.WIDER.get(input.dtype, input.dtype)) for _ in range(2)
    )
    torch.native_batch_norm(input, weight, bias, *statistics, out=(output, mean, rstd))
    if not training and running_mean is not None and running_var is not None:
        mean, rstd = running_mean.clone(), (running_var + eps).rsqrt_()
    return output, mean, rstd


def apply_moments(
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
) -> tuple[Tensor, Tensor]:
    """Write the output of what `native.moments` found, move the buffers; return mean and rstd."""
    running_mean, running_var, _, momentum, eps = statistics
    centered, offset, mean, var = found
    n = output.numel() // output.shape[1]
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (n / (n - 1)), momentum)
    native.scale_shift(centered, offset, var, weight, bias, eps, output)
    return mean, (var + eps).rsqrt_()


class BatchNormFunction(torch.autograd.Function):
    """`normalize` and `native.finish`, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        statistics: Statistics,
    ) -> Tensor:
        output, mean, rstd = normalize(input, weight, bias, statistics)
        native.finish(output, residual, activation)
        activated = None if activation == "identity" else output
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        _, _, ctx.training, _, ctx.eps = statistics
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, grads[0], _gradients, _normalize_again)
        return *found, None, None  # activation, statistics


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dγ, dβ and dr."""
    input, weight, activated, mean, rstd = ctx.saved_tensors
    for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    g = through_activation(ctx.activation, dy, input, activated)
    dr = g if for_residual else None
    if ctx.training and (not native.is_huge(input) or rstd.dtype is not input.dtype):
        # 16 bits always: two passes would round what lies between them.
        wanted = ctx.needs_input_grad[:3]
        return *aten.native_batch_norm_backward.default(
            g, input, weight, None, None, mean, rstd, True, ctx.eps, wanted
        ), dr

    dx = dw = db = None
    if ctx.training or for_weight or for_bias:
        dw, db = native.reduce(g, input, mean, rstd)
    if for_input:
        dx = native.empty_like(input) if g is dy or for_residual else g
        zero, one = torch.zeros_like(mean), torch.ones_like(mean)
        scale = rstd if weight is None else rstd * weight
        slope = shift = None
        if ctx.training:
            n = input.numel() // input.shape[1]
            slope = dw * rstd * scale / -n
            shift = torch.addcmul(db * scale / -n, slope, mean, value=-1)
        native.scale_shift(g, zero, one, scale, shift, 0.0, dx)
        if slope is not None:
            dx.addcmul_(input, native.per_channel(slope, input))
    return dx, dw if for_weight else None, db if for_bias else None, dr


def _normalize_again(
    ctx: Any, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """For `differentiable_gradients`."""
    if ctx.training:
        return formulas.batch_norm(input, weight, None, ctx.eps)
    scale = native.per_channel(rstd if weight is None else rstd * weight, input)
    z: Tensor = (input - native.per_channel(mean, input)) * scale
    return z.to(input.dtype)
