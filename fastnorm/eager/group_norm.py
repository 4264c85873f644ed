"""GroupNorm in torch operators: torch's own where it is fast, a shorter way where it is not.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (N, G), of K channels by S positions
    g = dy ∘ act′(y)     dβ = Σ g     dγ = Σ g (x − μ) rstd     dr = g
    dx = rstd (γ g − ⟨γ g⟩ − (x − μ) rstd ⟨γ g (x − μ) rstd⟩)        ⟨⟩: the mean over a group

Where torch loses time on a CPU, and what is done about it. Ratios are torch's time over ours;
bench/bench_eager_group_norm.py measures them, and the ways that were not taken.

* channels_last, backward: torch walks each group's channels by themselves, a sector of memory for a
  few bytes. The reduction of batch norm's backward, sample by sample, and two elementwise passes
  take their place (16 bits: in float32, a few rows at a time, lest what lies between is rounded).
* From 32 MB on, the page faults of a new tensor cost more than its arithmetic: outputs are
  allocated here, on huge pages (see native.py), and filled from moments of each channel, which are
  more precise than torch's there.
* Residual and activation go in place over the output, which nobody else holds yet.

And where torch goes wrong: its channels_last backward writes dx even where none was allocated,
which ends the process where only the parameters' gradients are wanted. dx is always asked for.

Torch's channels_last forward takes E[x²] − E[x]², and so is κ = |mean| / std times less precise
than its contiguous one. It is kept below 32 MB and for 16 bits: nothing else is as fast there, and
this is what torch.nn gives.

Everything else, and all of it under torch.compile, torch.func, forward-mode AD and tracing, is
`torch.group_norm` and plain operators.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from fastnorm.eager import formulas, native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.batch_norm import SHORT_PLANE, rounds_between
from fastnorm.eager.native import STEPS, aten

SHORT = 1 << 17
"""Elements below which what Python does counts."""
SMALL = 1 << 16
"""Elements of a sample below which the calls for each cost more than torch's one."""
LARGE = 1 << 19
"""The same for 16 bits, which are converted to float32, where a group has FEW channels or more."""
FEW = 8
"""Channels of a group from which on torch's channels_last backward is fast in float32."""
ROWS = 1 << 16
"""Elements that are converted to float32 at a time: they stay in a core's cache."""


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`act(group_norm(input) + residual)` of arguments that `functional.group_norm` has checked."""
    dtype = native.WIDER.get(input.dtype, input.dtype)
    if (  # nothing to cast, add or gain, as of most calls: the shortest way
        residual is None
        and input.numel() > 0
        and (
            torch.compiler.is_compiling()  # sizes, once asked for, are compiled for
            or (not native.is_huge(input) and (input.numel() < SHORT or activation not in STEPS))
        )
        and (
            _is_exact(input, weight, bias, activation)
            if dtype is not input.dtype
            else (weight is None or weight.dtype is dtype)
            and (bias is None or (weight is not None and bias.dtype is dtype))
        )
        and (input.is_contiguous() or native.needs_no_gradient(weight, bias))
        and not native.transformed()
    ):
        z = torch.group_norm(input, num_groups, weight, bias, eps, torch.backends.cudnn.enabled)
        return z if activation == "identity" else ACTIVATIONS[activation](z)
    y_dtype = native.output_dtype(input, residual)
    input, weight, bias = prepared(input, weight, bias, residual, activation)
    plain = not input.is_cpu or torch.compiler.is_compiling() or native.observed(input)
    if plain or input.numel() == 0 or (residual is not None and residual.dtype != input.dtype):
        z = _plain(input, num_groups, weight, bias, eps)
        return ACTIVATIONS[activation](z if residual is None else z + residual).to(y_dtype)

    if not (input.is_contiguous() or channels_are_last(input)):
        # a copy costs less than torch's, which it makes in the backward again
        input = input.contiguous(memory_format=suggest_memory_format(input))
    inner = activation if activation in STEPS else "identity"
    own = native.is_huge(input) or not input.is_contiguous()
    if not own:
        z = torch.group_norm(input, num_groups, weight, bias, eps, False)
        z = native.finish(z, residual, inner)
    elif torch.is_grad_enabled():
        z = GroupNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, inner, num_groups, eps
        )
    else:
        z = native.finish(_normalize(input, num_groups, weight, bias, eps)[0], residual, inner)
    return (z if inner == activation else ACTIVATIONS[activation](z)).to(y_dtype)


def _is_exact(input: Tensor, weight: Tensor | None, bias: Tensor | None, activation: str) -> bool:
    """Whether torch, of a 16-bit input, computes in float32 and rounds once."""
    if not input.is_cpu or (activation != "identity" and rounds_between(input, None, activation)):
        return False
    if weight is not None and weight.dtype is torch.float32:
        return bias is None or bias.dtype is torch.float32
    # of 16-bit parameters too, but for what it keeps for a backward
    same = all(t is None or t.dtype is input.dtype for t in (weight, bias))
    return same and native.needs_no_gradient(input, weight, bias)


def prepared(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input, weight and bias, cast such that torch computes in float32 at least."""
    dtype = native.WIDER.get(input.dtype, input.dtype)
    if dtype is not input.dtype and (
        not input.is_cpu or rounds_between(input, residual, activation)
    ):
        input = input.to(dtype)
    if weight is None and (bias is not None or input.dtype is not dtype):
        # For torch's sake: a bias alone breaks its backward, and a 16-bit input without a float32
        # parameter would get statistics in 16 bits.
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    if weight is not None and weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return input, weight, bias


def channels_are_last(input: Tensor) -> bool:
    return input.dim() > 3 and input.is_contiguous(memory_format=native.memory_format(input))


def _plain(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if input.numel() == 0:  # torch's gradient of the weight would be NaN
        column = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        z = input if weight is None else input * weight.view(column)
        return (z if bias is None else z + bias.view(column)).to(input.dtype)
    if native.transformed():
        return formulas.group_norm(input, num_groups, weight, bias, eps)
    frozen = input.is_cpu and not input.requires_grad
    if frozen and not (input.is_contiguous() or native.needs_no_gradient(weight, bias)):
        kept = suggest_memory_format(input)
        z = torch.group_norm(input.contiguous(), num_groups, weight, bias, eps, False)
        return z.contiguous(memory_format=kept)
    enabled = input.is_cpu or torch.backends.cudnn.enabled
    return torch.group_norm(input, num_groups, weight, bias, eps, enabled)


def _normalize(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd of a dense input, the latter two (N, G)."""
    N, C = input.shape[:2]
    S = input.numel() // (N * C)
    if native.is_huge(input) and input.dtype not in native.WIDER and eps > 1e-30 and (
        S >= SHORT_PLANE or not input.is_contiguous()
    ):  # fmt: skip
        output = native.empty_like(input)
        parts = list(zip(_parts(input), _parts(output), strict=True))
        found = [moments for x, out in parts if (moments := native.moments(x, out)) is not None]
        if len(found) == len(parts):
            centered, *each = zip(*found, strict=True)
            offset, mean_c, var_c = (torch.stack(t).view(N, num_groups, -1) for t in each)
            mean = mean_c.mean(2)
            apart = mean_c - mean[..., None]
            var = (var_c + apart * apart).mean(2)
            rows = (len(parts), -1)
            scale, bias = (None if t is None else t.repeat(N // len(parts)) for t in (weight, bias))
            for x, m, v, (_, out) in zip(
                centered, (offset - apart).view(rows), _on_channels(var, C).view(rows), parts,
                strict=True,
            ):  # fmt: skip
                native.scale_shift(x, m, v, scale, bias, eps, out)
            return output, mean, (var + eps).rsqrt_()
    y, mean, rstd = torch.native_group_norm(input, weight, bias, N, C, S, num_groups, eps)
    return y, mean, rstd


class GroupNormFunction(torch.autograd.Function):
    """`_normalize` and `native.finish`, with their gradient."""

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
        output, mean, rstd = _normalize(input, num_groups, weight, bias, eps)
        native.finish(output, residual, activation)
        activated = None if activation == "identity" else output
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        ctx.activation, ctx.num_groups, ctx.eps = activation, num_groups, eps
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        gradients = differentiable_gradients if native.is_differentiated(dy) else _gradients
        return *gradients(ctx, dy), None, None, None  # activation, num_groups, eps


def through_activation(
    activation: str, dy: Tensor, input: Tensor, activated: Tensor | None
) -> Tensor:
    """dy ∘ act′, laid out as the input; dy itself where it is that already."""
    g = dy.contiguous(memory_format=native.memory_format(input))
    if activated is None:
        return g
    _, act_backward, arguments = STEPS[activation]
    out = native.empty_like(input) if g is dy else g
    dz: Tensor = act_backward.grad_input(g, activated, *arguments, grad_input=out)
    return dz


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
            g, input, mean, rstd, weight, N, C, S, G, [True, True, True]
        )
        wanted = zip(found, (for_input, for_weight, for_bias), strict=True)
        return *(t if asked else None for t, asked in wanted), dr

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


def differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by differentiable operators: normalize again, and differentiate that."""
    input, weight, activated, _, rstd = ctx.saved_tensors
    for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
    g = dy
    if activated is not None:
        _, act_backward, arguments = STEPS[ctx.activation]
        g = act_backward.default(dy, activated.detach(), *arguments)
    dx, dw = native.gradients_again(
        lambda: formulas.group_norm(input, ctx.num_groups, weight, None, ctx.eps),
        (input, weight), (for_input, for_weight), g,
    )  # fmt: skip
    db = g.sum([0, *range(2, g.dim())], dtype=rstd.dtype) if for_bias else None
    return dx, dw, db, g if for_residual else None
