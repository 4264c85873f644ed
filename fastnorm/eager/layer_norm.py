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
    parameters = [t.dtype for t in (weight, bias) if t is not None]
    wider = native.WIDER.get(input.dtype, input.dtype)
    # torch's CPU operator takes the input's dtype, or float32 of a 16-bit one if there is a weight;
    # a GPU's the input's alone
    served = (input.dtype, wider) if weight is not None and input.is_cpu else (input.dtype,)
    y_dtype = None
    if any(dtype is not parameters[0] or dtype not in served for dtype in parameters):
        weight, bias = (None if t is None else t.to(wider) for t in (weight, bias))
        if weight is None and bias is not None:
            weight = torch.ones_like(bias)
        if not input.is_cpu:
            y_dtype, input = native.output_dtype(input), input.to(wider)
    if native.transformed():
        z = formulas.layer_norm(input, len(normalized_shape), weight, bias, eps)
    else:
        z = torch.layer_norm(input, tuple(normalized_shape), weight, bias, eps, False)
    z = z if activation == "identity" else ACTIVATIONS[activation](z)
    return z if y_dtype is None else z.to(y_dtype)


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
