"""LayerNorm, RMSNorm and their residual-add forms in torch operators."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.eager.activations import ACTIVATIONS

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The statistics' dtype, where it is not the input's."""


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """`act(layer_norm(input))` of arguments that `functional.layer_norm` has checked."""
    dtype = _WIDER.get(input.dtype, input.dtype)
    if weight is None and dtype is not input.dtype:  # else the statistics are saved in 16 bits
        weight = torch.ones(tuple(normalized_shape), dtype=dtype, device=input.device)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    z = F.layer_norm(input, tuple(normalized_shape), weight, bias, eps)
    return z if activation == "identity" else ACTIVATIONS[activation](z)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """`act(rms_norm(input))` of arguments that `functional.rms_norm` has checked."""
    x = input.to(_WIDER.get(input.dtype, input.dtype))
    axes = tuple(range(-len(normalized_shape), 0))
    z = x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()
    if weight is not None:
        z = z * weight.to(x.dtype)
    return ACTIVATIONS[activation](z).to(input.dtype)


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
