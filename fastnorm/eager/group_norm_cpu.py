"""GroupNorm where torch loses time on a CPU: the shorter ways.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (N, G), of K channels by S positions
    g = dy ∘ act′(y)     dβ = Σ g     dγ = Σ g (x − μ) rstd     dr = g
    dx = rstd (γ g − ⟨γ g⟩ − (x − μ) rstd ⟨γ g (x − μ) rstd⟩)        ⟨⟩: the mean over a group

bench/bench_eager_group_norm.py measures them, and the ways that were not taken.

* channels_last, backward: torch walks each group's channels by themselves, a sector of memory for a
  few bytes. The reduction of batch norm's backward, sample by sample, and two elementwise passes
  take their place (16 bits: in float32, a few rows at a time, lest what lies between is rounded).
* From 32 MB on, the page faults of a new tensor cost more than its arithmetic: outputs are
  allocated here, on huge pages (see native.py), and filled from moments of each channel, which are
  more precise than torch's there.

And where torch goes wrong: its channels_last backward writes dx even where none was allocated,
which ends the process where only the parameters' gradients are wanted. dx is always asked for.

Torch's channels_last forward takes E[x²] − E[x]², and so is κ = |mean| / std times less precise
than its contiguous one. It is kept below 32 MB and for 16 bits: nothing else is as fast there, and
this is what torch.nn gives.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastnorm.eager import formulas, native
from fastnorm.eager.batch_norm_cpu import SHORT_PLANE
from fastnorm.eager.channels import gradients, through_activation
from fastnorm.eager.native import aten

SMALL = 1 << 16
"""Elements of a sample below which the calls for each cost more than torch's one."""
LARGE = 1 << 19
"""The same for 16 bits, which are converted to float32, where a group has FEW channels or more."""
FEW = 8
"""Channels of a group from which on torch's channels_last backward is fast in float32."""
LARGEST_RSTD = 1e12
"""And 1/LARGEST_RSTD is the least: their cubes are float32 numbers."""
ROWS = 1 << 16
"""Elements that are converted to float32 at a time: they stay in a core's cache."""


def normalize(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd of a dense input, the latter two (N, G)."""
    N, C = input.shape[:2]
    S = input.numel() // (N * C)
    gains = native.is_huge(input) and input.dtype not in native.WIDER and eps > 1e-30
    if gains and (S >= SHORT_PLANE or not input.is_contiguous()):
        found = _from_channels(input, num_groups, weight, bias, eps)
        if found is not None:
            return found
    return of_torch(input, num_groups, weight, bias, eps)


def of_torch(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, differentiable, by torch's operator.

    It squares in float32, and its gradient has the cube of rstd. Planes that are too large for
    that, or too much alike, are the channels of torch's batch norm, which sums in double.
    """
    N, C = input.shape[:2]
    S = input.numel() // (N * C)
    y, mean, rstd = torch.native_group_norm(input, weight, bias, N, C, S, num_groups, eps)
    if num_groups == C and input.is_contiguous():
        low, high = (t.item() for t in torch.aminmax(rstd))
        if not 1 / LARGEST_RSTD < low <= high < LARGEST_RSTD:
            planes = input.view(1, N * C, S)
            weight, bias = (None if t is None else t.repeat(N) for t in (weight, bias))
            y, *found = torch.native_batch_norm(planes, weight, bias, None, None, True, 0.0, eps)
            y, (mean, rstd) = y.view_as(input), (t.view(N, C) for t in found)
    return y, mean, rstd


def _from_channels(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same from moments of each channel; None where something is not finite."""
    N, C = input.shape[:2]
    output = native.empty_like(input)
    parts = list(zip(_parts(input), _parts(output), strict=True))
    found = [moments for x, out in parts if (moments := native.moments(x, out)) is not None]
    if len(found) < len(parts):
        return None
    centered, *each = zip(*found, strict=True)
    offset, mean_c, var_c = (torch.stack(t).view(N, num_groups, -1) for t in each)
    mean = mean_c.mean(2)
    apart = mean_c - mean[..., None]
    var = (var_c + apart * apart).mean(2)
    rows = (len(parts), -1)
    scale, shift = (None if t is None else t.repeat(N // len(parts)) for t in (weight, bias))
    for x, m, v, (_, out) in zip(
        centered, (offset - apart).view(rows), _on_channels(var, C).view(rows), parts, strict=True
    ):
        native.scale_shift(x, m, v, scale, shift, eps, out)
    return output, mean, (var + eps).rsqrt_()


class GroupNormFunction(torch.autograd.Function):
    """`normalize` and `native.finish`, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        num_groups: int,
        eps: float,
    ) -> Tensor:
        output, mean, rstd = normalize(input, num_groups, weight, bias, eps)
        native.finish(output, residual, activation)
        activated = None if activation == "identity" else output
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        ctx.activation, ctx.num_groups, ctx.eps = activation, num_groups, eps
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, grads[0], _gradients, normalize_again)
        return *found, None, None, None  # activation, num_groups, eps


def normalize_again(ctx: Any, input: Tensor, weight: Tensor | None, *_: Tensor) -> Tensor:
    """For `differentiable_gradients`."""
    return formulas.group_norm(input, ctx.num_groups, weight, None, ctx.eps)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dγ, dβ and dr."""
    input, weight, activated, mean, rstd = ctx.saved_tensors
    for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    g = through_activation(ctx.activation, dy, input, activated)
    dr = g if for_residual else None
    if not (for_input or for_weight or for_bias):
        return None, None, None, dr
    N, C = input.shape[:2]
    S, G = input.numel() // (N * C), ctx.num_groups
    K = C // G
    if not _is_slow(input, K):
        found = aten.native_group_norm_backward.default(
            g, input, mean, rstd, weight, N, C, S, G, [True, for_weight, for_bias]
        )  # (without dx torch's operator crashes)
        return *(found if for_input else (None, *found[1:])), dr

    mean_c, rstd_c = (_on_channels(t, C) for t in (mean, rstd))
    parts = list(zip(_parts(g), _parts(input), strict=True))
    rows = (len(parts), -1)
    sums = [
        native.reduce(g_p, x_p, mean_p, rstd_p)
        for (g_p, x_p), mean_p, rstd_p in zip(
            parts, mean_c.view(rows), rstd_c.view(rows), strict=True
        )
    ]
    product, total = (torch.cat(found).view(N, C) for found in zip(*sums, strict=True))
    dx = None
    if for_input:
        dx = native.empty_like(input) if g is dy or for_residual else g
        slope, shift = (
            (t if weight is None else t * weight).view(N, G, K).sum(2) / (K * S)
            for t in (product, total)
        )
        scale = rstd_c if weight is None else rstd_c * weight
        of_input = slope * rstd * -rstd
        constant = torch.addcmul(shift * -rstd, of_input, mean, value=-1)
        of_input, constant = (_on_channels(t, C).view(rows) for t in (of_input, constant))
        for (g_p, x_p), out, a, b, c in zip(
            parts, _parts(dx), scale.view(rows), of_input, constant, strict=True
        ):
            _combine(g_p, x_p, a, b, c, out)
    return dx, product.sum(0) if for_weight else None, total.sum(0) if for_bias else None, dr


def _is_slow(input: Tensor, K: int) -> bool:
    """Whether torch's backward of this input is slower than `_gradients`."""
    if input.is_contiguous():
        return native.is_huge(input) and input.dtype not in native.WIDER
    least = SMALL if K < FEW else LARGE
    return input.numel() >= least * len(input) and (K < FEW or input.dtype in native.WIDER)


def _on_channels(t: Tensor, channels: int) -> Tensor:
    """(N, G) as (N, C), in memory: torch's kernels take a stride of 0 for one of 1."""
    return t.repeat_interleave(channels // t.shape[1], dim=1)


def _parts(t: Tensor) -> Iterator[Tensor]:
    """Views in which each channel of each sample is a channel: all of them, or a sample's."""
    if t.is_contiguous():
        yield t.view(1, t.shape[0] * t.shape[1], -1)
    else:
        yield from torch.split(t, 1)


def _combine(
    g: Tensor, input: Tensor, scale: Tensor, of_input: Tensor, constant: Tensor, output: Tensor
) -> None:
    """Write `scale g + of_input input + constant`, of a part, to output, which may be g."""
    if input.dtype not in native.WIDER:
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        native.scale_shift(g, zero, one, scale, constant, 0.0, output)
        output.addcmul_(input, native.per_channel(of_input, input))
        return
    # 16 bits have channels last here
    g, input, output = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (g, input, output))
    for g_p, x_p, out in zip(
        *(torch.split(t, max(ROWS // len(scale), 1)) for t in (g, input, output)), strict=True
    ):
        z = torch.addcmul(constant, x_p.to(scale.dtype), of_input)
        out.copy_(z.addcmul_(g_p.to(scale.dtype), scale))
