"""BatchNorm over the batches of all processes of a group, in torch operators.

The formulas are those of batch_norm.py, n and the sums being everybody's. Each process takes the
moments of its own part, tells them to the others (fastnorm/distributed.py), and normalizes its
part; backward, Σ g and Σ g x̂ are added up over processes before dx. dγ and dβ stay its own: who
averages gradients over processes averages them too.

A part of a large batch is read a block of samples at a time, so that a CPU has each in its cache;
sums over blocks are float64. Under torch.compile, torch.func, forward-mode AD and tracing, and for
second derivatives, everything is differentiable operators: sync_formulas.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastnorm.distributed import gathered, summed
from fastnorm.eager import native, sync_formulas
from fastnorm.eager.activations import ACTIVATIONS, GRAD_FROM_OUTPUT
from fastnorm.eager.gram import compute_dtype
from fastnorm.eager.native import per_channel
from fastnorm.eager.sync_formulas import axes, differentiable_gradients, gated

BLOCK_BYTES = 1 << 20
"""Of float64: what a core's second-level cache holds with room to spare."""


def count_batch(
    num_batches_tracked: Tensor | None, training: bool, momentum: float | Tensor | None
) -> float | Tensor:
    """Count the batch; the share it has in the buffers."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:  # the cumulative average
            return num_batches_tracked.double().reciprocal()
    return 0.0 if momentum is None else momentum  # without a count there is no buffer to move


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
) -> Tensor:
    """`act(batch_norm(input) + residual)` in training, the batch being that of all processes."""
    momentum = count_batch(num_batches_tracked, True, momentum)
    if torch.compiler.is_compiling() or native.observed(input):
        z, mean, var, count = sync_formulas.batch_norm(
            input, weight, bias, eps, residual, activation, group
        )
        with torch.no_grad():
            move_buffers(running_mean, running_var, mean.double(), var.double(), count, momentum)
        return z
    y: Tensor = SyncBatchNormFunction.apply(  # type: ignore[no-untyped-call]
        input, residual, weight, bias, running_mean, running_var, momentum, eps, activation, group
    )
    return y


class SyncBatchNormFunction(torch.autograd.Function):
    """(input, residual, weight, bias) are differentiable; the buffers change in place."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        activation: str,
        group: Any,
    ) -> Tensor:
        mean, rest, var, count = merged(gathered(_moments(input), group))
        move_buffers(running_mean, running_var, mean + rest, var, count, momentum)
        stats = torch.stack([mean, rest, (var + eps).rsqrt_()])
        y = _normalize(input, residual, weight, bias, stats, activation)
        by_sign = residual is not None and activation in GRAD_FROM_OUTPUT
        ctx.save_for_backward(
            input, weight, bias, stats, count, y if by_sign else None,
            residual if activation != "identity" and not by_sign else None,
        )  # fmt: skip
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.eps, ctx.activation, ctx.group = eps, activation, group
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        buffers_and_options = (None,) * 6
        if native.is_differentiated(dy):
            return *differentiable_gradients(ctx, dy), *buffers_and_options
        return *_gradients(ctx, dy), *buffers_and_options


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Some samples of each tensor at a time; all of them where the device is not a CPU."""
    like = next(t for t in tensors if t is not None)
    if like.numel() == 0:
        return
    samples, size = like.shape[0], like.shape[0]
    if like.is_cpu:
        size = max(BLOCK_BYTES * samples // (8 * like.numel()), 1)
    for start in range(0, samples, size):
        yield tuple(None if t is None else t[start : start + size] for t in tensors)


def _moments(input: Tensor) -> Tensor:
    """What this process tells the others: (3C + 1,)."""
    mean = torch.zeros(input.shape[1], dtype=torch.float64, device=input.device)
    m2 = torch.zeros_like(mean)
    count = 0
    for (block,) in _blocks(input):
        assert block is not None
        values = block.numel() // block.shape[1]
        wide = block.double()
        block_mean = wide.mean(axes(block))
        square = (wide - per_channel(block_mean, block)).square_().sum(axes(block))
        share = values / (count + values)
        m2 += square + (block_mean - mean).square_() * (count * share)
        # an average, not mean + d · share: an infinite mean stays infinite, as in a plain sum
        mean = block_mean if count == 0 else mean * (1 - share) + block_mean * share
        count += values
    return told(mean, (m2 / max(count, 1)).sqrt_(), count, compute_dtype(input.dtype))


def told(mean: Tensor, std: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """What a process tells the others of its `count` values of each channel: (3C + 1,)."""
    high = mean.to(dtype)
    rest = (mean - high).nan_to_num(0.0, 0.0, 0.0)
    return torch.cat([high, rest.to(dtype), std.to(dtype), high.new_full((1,), count)])


def merged(everyone: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mean, rest, variance, count) of all processes, float64, from what each has told."""
    wide = everyone.double()
    counts = wide[:, -1:]
    mean, rest, std = wide[:, :-1].view(len(wide), 3, -1).unbind(1)  # (ranks, C) each
    first = (counts > 0).int().argmax(0)  # whose part is not empty
    base = mean.index_select(0, first).nan_to_num(0.0, 0.0, 0.0)
    mean = torch.where(counts > 0, (mean - base) + rest, 0.0)
    count = counts.sum()
    share = counts / count
    offset = (share * mean).sum(0)
    var = (share * (std.square() + (mean - offset).square())).sum(0)
    base = base[0]
    total = base + offset
    high = total.to(everyone.dtype).double()
    return high, (offset - (high - base)).nan_to_num(0.0, 0.0, 0.0), var, count


def move_buffers(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    momentum: float | Tensor,
) -> None:
    """Towards the batch's mean and unbiased variance, where two values or more make one."""
    share = momentum.double() if isinstance(momentum, Tensor) else momentum
    for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
        if running is not None:
            old = running.double()
            moved = torch.lerp(old, batch.view_as(old), share)
            running.copy_(torch.where(count > 1, moved, old))


def _coefficients(
    stats: Tensor, weight: Tensor | None, bias: Tensor | None, input: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, scale, shift) with which z is (x − mean) · scale + shift, as wide as need be."""
    mean, rest, rstd = stats
    scale = rstd if weight is None else rstd * weight.double().reshape(-1)
    shift = -rest * scale
    if bias is not None:
        shift = shift + bias.double().reshape(-1)
    dtype = compute_dtype(input.dtype)
    mean, scale, shift = (per_channel(t.to(dtype), input) for t in (mean, scale, shift))
    return mean, scale, shift


def _normalize(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: str,
) -> Tensor:
    mean, scale, shift = _coefficients(stats, weight, bias, input)
    like = input if residual is None else residual
    y = torch.empty_like(input, dtype=torch.promote_types(input.dtype, like.dtype))
    for x, r, out in _blocks(input, residual, y):
        assert x is not None
        assert out is not None
        z = torch.addcmul(shift, x.to(mean.dtype) - mean, scale)
        z = z if r is None else z.add_(r)
        out.copy_(ACTIVATIONS[activation](z))
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dresidual, dγ and dβ."""
    input, weight, bias, stats, count, y, residual = ctx.saved_tensors
    for_input, for_residual, for_weight, for_bias = ctx.needs_input_grad[:4]
    mean, scale, shift = _coefficients(stats, weight, bias, input)
    unit = _coefficients(stats, None, None, input)[1:]

    def xhat_dz(x: Tensor, g: Tensor, y: Tensor | None, r: Tensor | None) -> tuple[Tensor, Tensor]:
        d = x.to(mean.dtype) - mean
        g = g.to(mean.dtype)
        if y is not None:
            g = GRAD_FROM_OUTPUT[ctx.activation](g, y)
        elif ctx.activation != "identity":
            z = torch.addcmul(shift, d, scale)
            g = gated(ctx.activation, z if r is None else z.add_(r), g)
        return torch.addcmul(unit[1], d, unit[0]), g

    dresidual = None
    if for_residual and ctx.activation != "identity":
        dresidual = torch.empty_like(input, dtype=ctx.residual_dtype)
    sums = torch.zeros(2, input.shape[1], dtype=torch.float64, device=input.device)
    for x, g, out, act, r in _blocks(input, dy, dresidual, y, residual):
        assert x is not None
        assert g is not None
        xhat, dz = xhat_dz(x, g, act, r)
        sums += torch.stack([(xhat * dz).sum(axes(x)), dz.sum(axes(x))])
        if out is not None:
            out.copy_(dz)
    dx = None
    if for_input:
        total = summed(sums.to(mean.dtype, copy=True), ctx.group).double() / count
        dx = torch.empty_like(input)
        slope, offset = (per_channel(t.to(mean.dtype), input) for t in total)
        for x, g, out, act, r in _blocks(input, dy, dx, y, residual):
            assert x is not None
            assert g is not None
            assert out is not None
            xhat, dz = xhat_dz(x, g, act, r)
            out.copy_((dz - offset).addcmul_(xhat, slope, value=-1).mul_(scale))
    if for_residual and dresidual is None:  # nothing is between the sum and the output
        dresidual = dy.to(ctx.residual_dtype)
    dw = sums[0].to(weight.dtype).view_as(weight) if for_weight else None
    db = sums[1].to(bias.dtype).view_as(bias) if for_bias else None
    return dx, dresidual, dw, db
