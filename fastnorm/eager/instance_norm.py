"""InstanceNorm in torch operators: other norms' over views of its input.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (N, C), of the S positions of an instance

torch's own is a batch norm of (1, N·C, S) by its slowest kernel, and loses channels_last. Here

* contiguous planes are the groups of a group norm of one channel each, 1.3 to 6 times as fast; or,
  where the running statistics are wanted, the channels of this library's batch norm;
* in channels_last each sample is a batch of its own: moments by the reduction of torch's batch norm
  (see native.py), as precise as torch's own InstanceNorm, and several times as fast. Small samples
  are copied to planes and back, since there a group norm of one channel each takes up to 50 times
  as long.

torch.nn's gradients of a dense channels_last_3d input are wrong (2.13): its errors are as large as
the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from fastnorm.eager import native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.batch_norm import batch_norm, move
from fastnorm.eager.batch_norm_cpu import apply_moments
from fastnorm.eager.channels import gradients, through_activation
from fastnorm.eager.group_norm import channels_are_last, group_norm, prepared
from fastnorm.eager.group_norm_cpu import normalize_again
from fastnorm.eager.native import STEPS, aten

SMALL = 1 << 15
"""Elements of a sample below which a call for each costs more than copies of all."""


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
    """`act(instance_norm(input) + residual)` of arguments that the function has checked."""
    weight, bias = (None if t is None else t.reshape(-1) for t in (weight, bias))
    if not use_input_stats:
        if (  # of 16 bits torch adds up other layouts' dβ in 16, and long sums overflow
            running_mean is not None
            and running_var is not None
            and input.dtype in native.WIDER
            and input.numel() > 0
            and not native.needs_no_gradient(weight, bias)
        ):  # so add by sample, in planes, as torch.nn does
            N = input.shape[0]
            fixed = running_mean.repeat(N), running_var.repeat(N)
            return _as_channels(input, weight, bias, eps, residual, activation, fixed, False)
        return batch_norm(
            input, running_mean, running_var, weight, bias,
            False, 0.0, eps, residual, activation, None,
        )  # fmt: skip
    if input.numel() == 0:
        return group_norm(input, input.shape[1], weight, bias, eps, residual, activation)
    statistics = None
    if running_mean is not None and running_var is not None:
        dtype = torch.promote_types(input.dtype, torch.float32)
        # a momentum of one leaves the instances' own statistics in these
        # (as vmapped as the input is; torch loses what it should write to a vmapped view)
        mean, var = (input.new_zeros(input.shape[:2], dtype=dtype) for _ in range(2))
        statistics = mean, var
    elif native.traced() or hasattr(input, "device_mesh"):
        return _recorded(input, weight, bias, eps, residual, activation)
    last = not input.is_contiguous() and channels_are_last(input)
    if (
        last
        and input.is_cpu
        and not torch.compiler.is_compiling()
        and input.numel() >= len(input) * SMALL
        and not native.observed(input)
        and (residual is None or residual.dtype is input.dtype)
    ):
        y = _by_samples(input, weight, bias, eps, residual, activation, statistics)
    elif last or statistics is not None:
        y = _as_channels(input, weight, bias, eps, residual, activation, statistics)
    else:
        y = group_norm(input, input.shape[1], weight, bias, eps, residual, activation)
        if input.is_cuda:  # autocast does not list instance norm
            other = input if residual is None else residual
            y = y.to(torch.promote_types(input.dtype, other.dtype))
    if statistics is not None:
        for running, instances in zip((running_mean, running_var), statistics, strict=True):
            assert running is not None  # or there were no statistics
            dtype = torch.promote_types(running.dtype, instances.dtype)
            move(running, instances.to(dtype).mean(0), momentum)
    return y


def _recorded(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """torch's own, for TorchScript: ONNX knows it, and no group norm of as many groups as channels.

    How many those are is the trace's to record, and a group norm's to know when it is exported. And
    for a DTensor: the rule of torch 2.13 for a group norm's gradient has an output too few.
    """
    y_dtype = torch.promote_types(input.dtype, (input if residual is None else residual).dtype)
    kept = native.kept_format(input)
    input, weight, bias = prepared(input, weight, bias, residual, activation)
    z = torch.instance_norm(
        input.contiguous(), weight, bias, None, None, True, 0.0, eps, False
    ).contiguous(memory_format=kept)
    return ACTIVATIONS[activation](z if residual is None else z + residual).to(y_dtype)


def _as_channels(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    statistics: tuple[Tensor, Tensor] | None,
    training: bool = True,
) -> Tensor:
    """A batch norm of (1, N·C, S); in training the statistics, if any, become the instances'."""
    N, C = input.shape[:2]
    mean, var = (None, None) if statistics is None else (t.view(N * C) for t in statistics)
    dtype = torch.promote_types(input.dtype, torch.float32)  # gradients are added up over samples
    weight, bias = (None if t is None else t.to(dtype).repeat(N) for t in (weight, bias))
    y = batch_norm(
        input.reshape(1, N * C, -1).contiguous(), mean, var, weight, bias,
        training, 1.0, eps, None if residual is None else residual.reshape(1, N * C, -1),
        activation, None,
    )  # fmt: skip
    return y.view(input.shape).contiguous(memory_format=native.kept_format(input))


def _by_samples(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    statistics: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """A batch norm of each sample."""
    y_dtype = input.dtype
    input, weight, bias = prepared(input, weight, bias, residual, activation)
    inner = activation if activation in STEPS else "identity"
    if residual is not None and residual.dtype is not input.dtype:
        residual = residual.to(input.dtype)
    if torch.is_grad_enabled():
        z = InstanceNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, inner, eps, statistics
        )
    else:
        z = native.finish(_normalize(input, weight, bias, eps, statistics)[0], residual, inner)
    return (z if inner == activation else ACTIVATIONS[activation](z)).to(y_dtype)


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd of channels_last input; fills the statistics."""
    output = native.empty_like(input)
    dtype = native.WIDER.get(input.dtype, input.dtype)
    mean, rstd = input.new_empty(2, *input.shape[:2], dtype=dtype)
    own_sums = dtype is input.dtype and eps > 1e-30  # 16 bits are rounded more than torch's sums
    for n, (x, y) in enumerate(zip(torch.split(input, 1), torch.split(output, 1), strict=True)):
        running = (None, None) if statistics is None else (t[n] for t in statistics)
        moved = (*running, True, 1.0, eps)
        if own_sums and (found := native.moments(x, y)):
            mean[n], rstd[n] = apply_moments(found, y, weight, bias, moved)
            continue
        if not own_sums:
            torch.native_batch_norm(x, weight, bias, *moved, out=(y, mean[n], rstd[n]))
        if own_sums or not (rstd[n] > 0).all():  # overflow: over planes torch's sums are in double
            for t in moved[:2]:
                if t is not None:
                    t.zero_()
            z, mean[n], rstd[n] = torch.native_batch_norm(x.contiguous(), weight, bias, *moved)
            y.copy_(z)
    return output, mean, rstd


class InstanceNormFunction(torch.autograd.Function):
    """`_normalize` and `native.finish`, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        eps: float,
        statistics: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        output, mean, rstd = _normalize(input, weight, bias, eps, statistics)
        native.finish(output, residual, activation)
        activated = None if activation == "identity" else output
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        ctx.activation, ctx.num_groups, ctx.eps = activation, input.shape[1], eps
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, grads[0], _gradients, normalize_again)
        return *found, None, None, None  # activation, eps, statistics


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dγ, dβ and dr."""
    input, weight, activated, mean, rstd = ctx.saved_tensors
    *wanted, for_residual = ctx.needs_input_grad[:4]
    g = through_activation(ctx.activation, dy, input, activated)
    dr = g if for_residual else None
    if not any(wanted):
        return None, None, None, dr
    found = []
    for n in range(len(input)):
        parts = g[n : n + 1], input[n : n + 1]
        asked = (wanted[0], True, wanted[2])  # dγ tells whether a sum overflowed
        options = (weight, None, None, mean[n], rstd[n], True, ctx.eps, asked)
        sums = aten.native_batch_norm_backward.default(*parts, *options)
        if not sums[1].isfinite().all():  # over planes torch's sums are in double
            planes = (t.contiguous() for t in parts)
            sums = aten.native_batch_norm_backward.default(*planes, *options)
        found.append(sums)
    dx, dw, db = zip(*found, strict=True)
    for_input, for_weight, for_bias = wanted
    return (
        _joined(dx, input) if for_input else None,
        torch.stack(dw).sum(0) if for_weight else None,
        torch.stack(db).sum(0) if for_bias else None,
        dr,
    )


def _joined(samples: tuple[Tensor, ...], input: Tensor) -> Tensor:
    """The samples as one tensor, laid out as the input, which they need not be."""
    return torch.cat(samples).contiguous(memory_format=native.memory_format(input))
