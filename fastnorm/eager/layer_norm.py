"""LayerNorm and the residual-add forms in torch operators.

torch's own LayerNorm runs at the speed of memory on a CPU, and is called as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm.eager import formulas, native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.rms_norm import rms_norm


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """`act(layer_norm(input))` of arguments that `functional.layer_norm` has checked."""
    dtype = y_dtype = input.dtype
    if (weight is not None and weight.dtype is not dtype) or (
        bias is not None and bias.dtype is not dtype
    ):
        y_dtype = native.output_dtype(input)
        input, weight, bias = _served(input, weight, bias)
    if native.transformed():
        z = formulas.layer_norm(input, len(normalized_shape), weight, bias, eps)
    else:
        z = torch.layer_norm(input, tuple(normalized_shape), weight, bias, eps, False)
    if activation != "identity":
        z = ACTIVATIONS[activation](z)
    return z if input.dtype is dtype else z.to(y_dtype)


def _served(
    input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The arguments in dtypes that torch's operator takes together.

    That is one for all; on a CPU, with a weight, also parameters in the float32 of a 16-bit input.
    """
    wider = native.WIDER.get(input.dtype, input.dtype)
    if input.is_cpu:
        if weight is not None and weight.dtype is wider and (bias is None or bias.dtype is wider):
            return input, weight, bias
    else:
        input = input.to(wider)
    weight, bias = (None if t is None else t.to(wider) for t in (weight, bias))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)
    return input, weight, bias


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`functional.add_layer_norm`; arguments are already checked."""
    total = input + residual
    return layer_norm(total, normalized_shape, weight, bias, eps, activation), total


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`functional.add_rms_norm`; arguments are already checked."""
    total = input + residual
    return rms_norm(total, normalized_shape, weight, eps, activation), total
