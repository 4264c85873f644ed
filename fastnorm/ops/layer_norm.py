"""LayerNorm, RMSNorm and their residual-add forms: views, saved tensors, casts. No arithmetic, but
for a sum of which torch is to choose the layout."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastnorm import eager
from fastnorm.eager import native
from fastnorm.kernels import layer_norm as kernels
from fastnorm.ops.function import Function
from fastnorm.ops.layout import as_rows, as_vector, is_in_order, on_device_of, recorded
from fastnorm.ops.library import layer_norm as library


class LayerNormFunction(Function):
    """(x, residual, weight, bias) are differentiable; weight and bias are 1-dimensional.

    Returns y, or (y, sum) with a residual. `center` is false for RMSNorm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        activation: str,
        center: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        size = math.prod(shape)
        y_dtype = native.output_dtype(x, residual, listed=center or native.RMS_IS_LISTED)
        with on_device_of(x):
            y, total, stats = (library if recorded(x) else kernels).forward(
                as_rows(x, size),
                None if residual is None else as_rows(residual, size),
                weight, bias, eps, activation, center, size, x.shape, y_dtype,
            )  # fmt: skip
        ctx.save_for_backward(
            x if total is None else total,
            weight,
            bias if activation != "identity" else None,
            stats,
        )
        ctx.dtypes = (x.dtype, None if residual is None else residual.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.shape, ctx.eps, ctx.activation = shape, eps, activation
        ctx.set_materialize_grads(False)
        if total is not None and not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)  # the parameters are no part of it
        return y if total is None else (y, total)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dsum: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x_wanted, residual_wanted, dw_wanted, db_wanted = ctx.needs_input_grad[:4]
        dw = db = None
        if dy is None:  # what was saved may have been changed since: the sum, by whoever has it
            dx = dsum
        elif native.is_differentiated(dy):
            dx, dw, db = _differentiable_backward(ctx, dy)
            if dsum is not None and dx is not None:
                dx = dx + dsum
        else:
            x, weight, bias, stats = ctx.saved_tensors
            size = math.prod(ctx.shape)
            with on_device_of(x):
                dx, dw, db = (library if recorded(x) else kernels).backward(
                    as_rows(dy, size), as_rows(x, size), weight, bias, stats,
                    None if dsum is None else as_rows(dsum, size),
                    ctx.activation, size, x.shape,
                    (x_wanted or residual_wanted, dw_wanted, ctx.bias_dtype if db_wanted else None),
                )  # fmt: skip
        x_dtype, residual_dtype = ctx.dtypes
        dinput = None if dx is None or not x_wanted else dx.to(x_dtype)
        dresidual = None if dx is None or not residual_wanted else dx.to(residual_dtype)
        return dinput, dresidual, dw, db, None, None, None, None  # shape and options


def _differentiable_backward(
    ctx: Any, dy: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight and dbias in torch operators, for second derivatives."""
    x, weight, bias, stats = ctx.saved_tensors
    center = stats.shape[0] == 3
    x_wanted, residual_wanted, dw_wanted, db_wanted = ctx.needs_input_grad[:4]

    def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        scale, shift = (None if t is None else t.view(ctx.shape) for t in (weight, bias))
        if center:
            return eager.layer_norm(x, ctx.shape, scale, shift, ctx.eps, ctx.activation)
        return eager.rms_norm(x, ctx.shape, scale, ctx.eps, ctx.activation)

    dx, dw, db = native.gradients_again(
        normalize, (x, weight, bias), (x_wanted or residual_wanted, dw_wanted, db_wanted), dy
    )
    if db_wanted and bias is None:  # without an activation the backward does not need it
        size = math.prod(ctx.shape)
        db = dy.reshape(-1, size).sum(0, dtype=stats.dtype).to(ctx.bias_dtype)
    return dx, dw, db


def _normalize(
    input: Tensor,
    residual: Tensor | None,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    center: bool,
) -> Any:
    total = None
    if residual is not None and not is_in_order(input):
        input = total = input + residual
        residual = None
    found = LayerNormFunction.called(
        input, residual, as_vector(weight), as_vector(bias), tuple(shape), eps, activation, center
    )
    if residual is None and not center:  # torch's keeps channels_last, unlike its layer norm
        found = found.contiguous(memory_format=native.kept_format(input))
    return found if total is None else (found, total)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """`functional.layer_norm` on Triton kernels; arguments are already checked."""
    y: Tensor = _normalize(input, None, normalized_shape, weight, bias, eps, activation, True)
    return y


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """`functional.rms_norm` on Triton kernels; arguments are already checked."""
    y: Tensor = _normalize(input, None, normalized_shape, weight, None, eps, activation, False)
    return y


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`functional.add_layer_norm` on Triton kernels; arguments are already checked."""
    both: tuple[Tensor, Tensor] = _normalize(
        input, residual, normalized_shape, weight, bias, eps, activation, True
    )
    return both


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`functional.add_rms_norm` on Triton kernels; arguments are already checked."""
    both: tuple[Tensor, Tensor] = _normalize(
        input, residual, normalized_shape, weight, None, eps, activation, False
    )
    return both
