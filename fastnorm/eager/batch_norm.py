"""BatchNorm in torch operators: torch's own where it is fast, a shorter way where it is not.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (C,), of the batch or from the buffers
    g = dy ∘ act′(y)     dβ = Σ g     dγ = Σ g (x − μ) rstd     dr = g
    dx = γ rstd (g − dβ/n − (x − μ) rstd dγ/n)    in training, n values a channel; else γ rstd g

Where torch loses time on a CPU, and what is done about it. Ratios are torch's time over ours in
float32; bench/bench_eager_batch_norm.py measures them, and the ways that were not taken.

* NCHW, training: torch adds up the moments one element after the other. torch.mean and, for
  Σ x (x − mean), the vectorized reduction of torch's backward kernel take their place; a mean of
  many standard deviations is subtracted first, into the output, and so costs no accuracy:
  3.7 for (8, 64, 56, 56), 2.3 for (16, 2048, 7, 7); with the subtraction 1.9 and 1.3.
* Long columns, (N, C) and channels_last: torch adds up millions of values in one float32, with an
  error of 5e-4 for 2 million. From 32 MB on the sums are shorter ones.
* From 32 MB on, the page faults of a new tensor cost more than its arithmetic: torch's kernels
  write into outputs allocated here, on huge pages: 4.7 for (32, 64, 112, 112) in evaluation. The
  backward kernel cannot; two elementwise passes replace its second half: 2.3.
* Strided input is copied first: 3 for (64, 128, 100) stored as (N, L, C).
* Residual and activation go in place over the output, which nobody else holds yet.

Everything else, and all of it under torch.compile, torch.func, forward-mode AD and tracing, is
`torch.batch_norm` and plain operators.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastnorm.eager import formulas, native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.native import STEPS, aten

SMALL = 1 << 17
"""Elements a thread below which several fast operators cost more than one slow one."""
SHORT_PLANE = 32
"""Positions of a channel in a sample below which a reduction over planes is no longer fast."""


# Activations that give the same, and the same gradient, before and after z is rounded to 16 bits.
_ROUNDED = ("identity", "relu")

# running_mean, running_var, training, momentum and eps
Statistics: TypeAlias = tuple[Tensor | None, Tensor | None, bool, float, float]


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
    """`act(batch_norm(input) + residual)` of arguments that `functional.batch_norm` has checked."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None and running_mean is not None:
            momentum = _cumulative(num_batches_tracked, running_mean)
    if momentum is None:
        momentum = 0.0  # there is no buffer to move
    dtype = native.WIDER.get(input.dtype, input.dtype)
    if (
        isinstance(momentum, Tensor)
        or (dtype is not input.dtype and rounds_between(input, residual, activation))
        # A 16-bit input without a float32 parameter would get statistics in 16 bits.
        or (input if weight is None else weight).dtype is not dtype
        # torch's own operator reads parameters and buffers with strides as if they had none.
        or (weight is not None and not weight.is_contiguous())
        or (bias is not None and not _serves(bias, dtype))
        or (running_mean is not None and not _serves(running_mean, dtype))
        or (running_var is not None and not _serves(running_var, dtype))
    ):
        return _converted(
            input, running_mean, running_var, weight, bias,
            training, momentum, eps, residual, activation,
        )  # fmt: skip
    cpu = input.is_cpu
    dense = own = False
    # a graph is not asked for its sizes: it would be compiled again for others
    plain = not cpu or torch.compiler.is_compiling() or input.numel() < SMALL
    if not plain:
        dense = input.is_contiguous() or input.is_contiguous(
            memory_format=native.memory_format(input)
        )
        own = native.is_huge(input) or (training and _has_planes(input, eps))
        nothing_to_gain = dense and not own and residual is None and activation == "identity"
        plain = nothing_to_gain or native.observed(input)
    if plain or (residual is not None and residual.dtype is not input.dtype):
        statistics = (running_mean, running_var, training, momentum, eps)
        z = _plain(input, weight, bias, statistics, cpu or torch.backends.cudnn.enabled)
        if residual is not None:
            z = z + residual
        return z if activation == "identity" else ACTIVATIONS[activation](z)

    statistics = (running_mean, running_var, training, momentum, eps)
    if not dense:  # a copy costs less than torch's loops over strides
        input = input.contiguous(memory_format=suggest_memory_format(input))
        own = native.is_huge(input) or (training and _has_planes(input, eps))
    inner = activation if activation in STEPS else "identity"
    if not own:
        z = native.finish(
            torch.batch_norm(input, weight, bias, *statistics, False), residual, inner
        )
    elif torch.is_grad_enabled():
        z = BatchNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, inner, statistics
        )
    else:
        z = native.finish(_normalize(input, weight, bias, statistics)[0], residual, inner)
    return z if inner == activation else ACTIVATIONS[activation](z)


def _plain(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    cudnn_enabled: bool,
) -> Tensor:
    running_mean, _, training, _, eps = statistics
    if not training or not native.transformed():
        return torch.batch_norm(input, weight, bias, *statistics, cudnn_enabled)
    if running_mean is not None:  # moved by torch's operator, which has rules for it
        torch.batch_norm(input.detach(), None, None, *statistics, cudnn_enabled)
    return formulas.batch_norm(input, weight, bias, eps)


def _cumulative(num_batches_tracked: Tensor, running_mean: Tensor) -> float | Tensor:
    """The share of the newest batch in the average of all; a number where that costs no wait."""
    recorded = torch.compiler.is_compiling() or native.observed(num_batches_tracked)
    if num_batches_tracked.is_cpu and not recorded:
        return 1.0 / int(num_batches_tracked.item())
    dtype = torch.promote_types(running_mean.dtype, torch.float32)
    return num_batches_tracked.to(dtype).reciprocal()


def _serves(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_contiguous()


def _converted(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`batch_norm` of tensors cast as need be, with a momentum that may be a tensor."""
    if input.ndim < 2:  # (0,): no channel
        return input.clone() if residual is None else input + residual
    dtype = native.WIDER.get(input.dtype, input.dtype)
    y_dtype = torch.promote_types(input.dtype, (input if residual is None else residual).dtype)
    if rounds_between(input, residual, activation):
        input = input.to(dtype)
    elif not training and residual is None and _is_exact(
        input, running_mean, running_var, weight, bias
    ):  # fmt: skip
        statistics = (running_mean, running_var, False, 0.0, eps)
        return ACTIVATIONS[activation](torch.batch_norm(input, weight, bias, *statistics, False))
    if weight is None:
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    weight = weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    if running_mean is None or running_var is None:
        mean = var = None
    elif not training:
        mean, var = (t.to(dtype).contiguous() for t in (running_mean, running_var))
    elif not isinstance(momentum, Tensor) and _can_move(input, running_mean, running_var):
        mean, var = (t.to(dtype).contiguous() for t in (running_mean, running_var))
        y = batch_norm(
            input, mean, var, weight, bias, True, momentum, eps, residual, activation, None
        )
        if mean is not running_mean:
            running_mean.copy_(mean)
        if var is not running_var:
            running_var.copy_(var)
        return y.to(y_dtype)
    else:  # a momentum of one leaves the batch's own statistics in these
        # (as vmapped as the input is; torch loses what it should write to a vmapped view)
        mean, var = (input.new_zeros(running_mean.numel(), dtype=dtype) for _ in range(2))
    y = batch_norm(input, mean, var, weight, bias, training, 1.0, eps, residual, activation, None)
    if training and input.numel() > 0:
        for running, batch in ((running_mean, mean), (running_var, var)):
            if running is not None and batch is not None:
                dtype = torch.promote_types(running.dtype, batch.dtype)
                share = momentum.to(dtype) if isinstance(momentum, Tensor) else momentum
                running.copy_(torch.lerp(running.to(dtype), batch.to(dtype), share))
    return y.to(y_dtype)


def _is_exact(input: Tensor, *small: Tensor | None) -> bool:
    """Whether torch's evaluation of 16 bits, parameters and all, is as precise, and casts are dear.

    It computes in float32; only sums of gradients over other layouts are 16-bit ones.
    """
    return (
        input.is_cpu
        and not torch.compiler.is_compiling()
        and input.numel() < SMALL
        and all(t is None or (t.dtype is input.dtype and t.is_contiguous()) for t in small)
        and (input.is_contiguous() or native.needs_no_gradient(input, *small))
        and not native.transformed()
    )


def _can_move(input: Tensor, *buffers: Tensor) -> bool:
    """Whether torch's operator can move the buffers, or copies of them that lose nothing."""
    dtype = native.WIDER.get(input.dtype, input.dtype)
    return all(_serves(t, dtype) for t in buffers) or (
        all(t.dtype in native.WIDER for t in buffers) and not native.observed(input)
    )


def rounds_between(input: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether to cast a 16-bit input first, lest z is rounded before the end as it is in torch.nn.

    Not a large one: that would take three times as long.
    """
    cheap = torch.compiler.is_compiling() or input.numel() < SMALL
    return cheap and (residual is not None or activation not in _ROUNDED)


def _has_planes(input: Tensor, eps: float) -> bool:
    """Whether each channel of a sample is a long run of memory, and there is enough to gain."""
    return (
        input.dtype not in native.WIDER  # torch's moments are vectorized there
        and input.is_contiguous()
        and input.numel() >= SHORT_PLANE * input.shape[0] * input.shape[1]
        and input.numel() >= SMALL * torch.get_num_threads()
        and eps > 1e-30  # else the square of a tiny float32 would be missed
    )


def _sums_are_ours(input: Tensor, eps: float) -> bool:
    """Whether torch's moments are slow, or its sums long, and ours are not."""
    if input.dtype in native.WIDER or eps <= 1e-30:
        return False
    planes = input.dim() > 2 and input.is_contiguous()
    return _has_planes(input, eps) if planes else native.is_huge(input)


def _normalize(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd of a dense input; moves the buffers in training."""
    output = native.empty_like(input)
    _, _, training, _, eps = statistics
    if training and _sums_are_ours(input, eps) and (found := native.moments(input, output)):
        return output, *apply_moments(found, output, weight, bias, statistics)
    running_mean, running_var, *_ = statistics
    mean, rstd = (
        torch.empty(0, dtype=native.WIDER.get(input.dtype, input.dtype)) for _ in range(2)
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
    """`_normalize` and `native.finish`, with their gradient."""

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
        output, mean, rstd = _normalize(input, weight, bias, statistics)
        native.finish(output, residual, activation)
        activated = None if activation == "identity" else output
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        _, _, ctx.training, _, ctx.eps = statistics
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        gradients = _differentiable_gradients if native.is_differentiated(dy) else _gradients
        return *gradients(ctx, dy), None, None  # activation, statistics


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dγ, dβ and dr."""
    input, weight, activated, mean, rstd = ctx.saved_tensors
    for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    g = dy.contiguous(memory_format=native.memory_format(input))
    if activated is not None:
        _, act_backward, arguments = STEPS[ctx.activation]
        out = native.empty_like(input) if g is dy else g
        g = act_backward.grad_input(g, activated, *arguments, grad_input=out)
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


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by differentiable operators: normalize again, and differentiate that."""
    input, weight, activated, mean, rstd = ctx.saved_tensors
    for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    g = dy
    if activated is not None:
        _, act_backward, arguments = STEPS[ctx.activation]
        g = act_backward.default(dy, activated.detach(), *arguments)

    def normalize() -> Tensor:
        if ctx.training:
            return formulas.batch_norm(input, weight, None, ctx.eps)
        scale = native.per_channel(rstd if weight is None else rstd * weight, input)
        z: Tensor = (input - native.per_channel(mean, input)) * scale
        return z.to(input.dtype)

    dx, dw = native.gradients_again(normalize, (input, weight), (for_input, for_weight), g)
    db = g.sum([0, *range(2, g.dim())], dtype=rstd.dtype) if for_bias else None
    return dx, dw, db, g if for_residual else None
