"""RMSNorm in torch operators: shorter ways than torch's own, which materializes every step.

    rstd = 1 / √(mean x² + eps)     y = act(x rstd w)                      x̂ = x rstd
    dw = Σ g x̂                      dx = rstd (g w − x̂ mean(g w x̂))

On a CPU the backward is that of torch's LayerNorm, a fused kernel, given rows of mean 0: it gives
dw, and dx less rstd · mean(g w), which is added. Rows are taken in chunks, so that what one
operator writes is still in the cache when the next one reads it, and 16-bit rows are widened a
chunk at a time. bench/bench_eager_layer_norm.py compares the ways.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.eager import native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.native import aten

CHUNK = 1 << 19
"""Elements of a chunk of rows: two megabytes of float32."""
BLOCK = 1 << 10
"""Elements of a row whose squares are added up in one go."""
SMALL = 1 << 17
"""Elements below which torch's own operators, of the wider dtype, cost less than ours."""
NARROW = 8
"""Elements of a row below which they do, too: LayerNorm's backward takes a row at a time."""


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """`act(rms_norm(input))` of arguments that `functional.rms_norm` has checked."""
    if input.is_complex():
        return ACTIVATIONS[activation](torch.rms_norm(input, tuple(normalized_shape), weight, eps))
    if (
        not input.is_cpu
        or input.numel() == 0
        or torch.compiler.is_compiling()
        or native.observed(input)
    ):
        x = input.to(native.WIDER.get(input.dtype, input.dtype))
        z = _short(x, tuple(range(-len(normalized_shape), 0)), weight, eps)
        y_dtype = native.output_dtype(input, listed=native.RMS_IS_LISTED)
        return ACTIVATIONS[activation](z).to(y_dtype)
    shape = tuple(normalized_shape)
    if input.numel() < SMALL or torch.Size(shape).numel() < NARROW:
        dtype = input.dtype
        if activation == "identity" and (weight is None or weight.dtype is dtype):
            return torch.rms_norm(input, shape, weight, eps)  # computes in the wider dtype itself
        wider = native.WIDER.get(dtype, dtype)
        wide = None if weight is None else weight.to(wider)
        z = torch.rms_norm(input.to(wider), shape, wide, eps)
        return ACTIVATIONS[activation](z).to(dtype)
    if torch.is_grad_enabled() and (
        input.requires_grad or (weight is not None and weight.requires_grad)
    ):
        if input.is_inference():  # which autograd does not save, and torch does not need
            input = input.clone()
        z = RMSNormFunction.apply(input, weight, shape, eps)  # type: ignore[no-untyped-call]
    else:
        z = _normalize(input, weight, shape, eps)[0]
    z = z.contiguous(memory_format=native.kept_format(input))
    return z if activation == "identity" else ACTIVATIONS[activation](z)


def _short(x: Tensor, axes: tuple[int, ...], weight: Tensor | None, eps: float) -> Tensor:
    """The output in the wider dtype, one plain operator a step."""
    z = x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    return z if weight is None else z * weight.to(x.dtype)


def _vector(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if weight is None else weight.reshape(-1).to(dtype)


def _chunks(rows: Tensor) -> Iterator[slice]:
    step = max(CHUNK // rows.shape[1], 1)
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def _normalize(
    input: Tensor, weight: Tensor | None, shape: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """The output, contiguous, and rstd (rows, 1) in the wider dtype."""
    dtype = native.WIDER.get(input.dtype, input.dtype)
    size = torch.Size(shape).numel()
    x, w = input.reshape(-1, size), _vector(weight, dtype)
    y = native.empty_like(input, memory_format=torch.contiguous_format)
    rstd = input.new_empty(x.shape[0], 1, dtype=dtype)
    for rows in _chunks(x):
        wide, out = x[rows].to(dtype).contiguous(), y.view(x.shape)[rows]
        norm = _squares(wide, out=rstd[rows])
        norm.div_(size).add_(eps).rsqrt_()
        z = torch.mul(wide, norm, out=out if out.dtype is dtype else None)
        z = z if w is None else z.mul_(w)
        if z is not out:
            out.copy_(z)
    return y, rstd


def _squares(x: Tensor, out: Tensor) -> Tensor:
    """Write Σ x² of each row to out (rows, 1).

    torch's norm is its fastest sum of squares, but adds a row up in one go: the errors of a long
    one, whose squares are all positive, are those of BLOCK elements here.
    """
    rows, size = x.shape
    if size <= BLOCK:
        norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, out=out)
        return norm.square_()
    whole = size // BLOCK * BLOCK
    blocks = torch.linalg.vector_norm(x[:, :whole].reshape(rows, -1, BLOCK), dim=2)
    torch.sum(blocks.square_(), 1, keepdim=True, out=out)
    if whole < size:
        out += torch.linalg.vector_norm(x[:, whole:], dim=1, keepdim=True).square_()
    return out


class RMSNormFunction(torch.autograd.Function):
    """`_normalize`, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        y, rstd = _normalize(input, weight, shape, eps)
        ctx.save_for_backward(input, weight, rstd)
        ctx.shape, ctx.eps = shape, eps
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        if dy is None:  # nothing depends on the output
            return (None,) * 4
        input, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if native.is_differentiated(dy):
            axes = tuple(range(-len(ctx.shape), 0))
            dx, dw = native.gradients_again(
                lambda x, weight: _short(x.to(rstd.dtype), axes, weight, ctx.eps),
                (input, weight), wanted, dy,
            )  # fmt: skip
        else:
            dx, dw = _gradients(dy, input, weight, rstd, wanted)
        return dx, dw, None, None  # shape, eps


def _gradients(
    dy: Tensor, input: Tensor, weight: Tensor | None, rstd: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dw, None where not wanted."""
    rows_of, dtype = rstd.shape[0], rstd.dtype
    size = input.numel() // rows_of
    x, g, w = input.reshape(-1, size), dy.reshape(-1, size), _vector(weight, dtype)
    dx = native.empty_like(input, memory_format=torch.contiguous_format) if wanted[0] else None
    total = rstd.new_zeros(size) if wanted[1] else None
    zero = rstd.new_zeros(min(rows_of, max(CHUNK // size, 1)), 1)
    for rows in _chunks(x):
        wide, dz = (t[rows].to(dtype).contiguous() for t in (x, g))
        r = rstd[rows]
        centered, dw, _ = aten.native_layer_norm_backward.default(
            dz, wide, [size], zero[: r.shape[0]], r, w, None,
            [wanted[0], wanted[1], False],
        )  # fmt: skip
        if total is not None:
            total += dw
        if dx is not None:  # what LayerNorm subtracts on account of its mean comes back
            mean = (dz.mean(1) if w is None else torch.mv(dz, w).div_(size)).mul_(r[:, 0])
            out = dx.view(x.shape)[rows]
            z = torch.add(centered, mean[:, None], out=out if out.dtype is dtype else None)
            if z is not out:
                out.copy_(z)
    if weight is None or total is None:
        return dx, None
    return dx, total.view(weight.shape).to(weight.dtype)
