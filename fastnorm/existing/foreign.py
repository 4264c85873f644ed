"""LayerNorm and RMSNorm as other libraries mean them: other dtypes, another axis, 1 + weight.

A module of such a class gets one of these classes, and the attributes that they ask for.
"""

import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.modules.attributes import parameter
from fastnorm.modules.layer_norm import LayerNorm, RMSNorm

RESULTS = ("input", "promoted", "weight")
"""Whose dtype the output has: the input's, that of input * weight, or the weight's where that is
of 16 bits, else as before (T5's rule)."""


def result_dtype(rule: str, input: Tensor, weight: Tensor | None) -> torch.dtype:
    if rule == "input" or weight is None or weight.dtype is input.dtype:
        return input.dtype
    if rule == "weight" and weight.dtype in (torch.float16, torch.bfloat16):
        return weight.dtype
    return torch.promote_types(input.dtype, weight.dtype)


def _widened(input: Tensor, dtype: torch.dtype) -> Tensor:
    """`input` in the output's dtype where that is the wider: nothing is to be rounded twice."""
    wider = dtype is not input.dtype and torch.promote_types(dtype, input.dtype) is dtype
    return input.to(dtype) if wider else input


class ForeignRMSNorm(RMSNorm):
    """RMSNorm whose weight may be counted from zero, as Gemma's, with an output dtype by rule."""

    offset: float
    """What is added to the weight."""
    result: str
    """One of RESULTS."""

    def forward(self, x: Tensor) -> Tensor:
        weight = parameter(self, "weight")
        dtype = result_dtype(self.result, x, weight)
        y = functional.rms_norm(
            _widened(x, dtype), self.normalized_shape, self._scale(weight), self.eps,
            activation=self.activation,
        )  # fmt: skip
        return y.to(dtype)

    def added(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(input + residual), input + residual)."""
        weight = parameter(self, "weight")
        if result_dtype(self.result, input, weight) is not input.dtype:
            total = input + residual
            return self.forward(total), total
        return functional.add_rms_norm(
            input, residual, self.normalized_shape, self._scale(weight), self.eps,
            activation=self.activation,
        )  # fmt: skip

    def _scale(self, weight: Tensor | None) -> Tensor | None:
        if weight is None or not self.offset:
            return weight
        # a weight of 16 bits is small beside the 1: the sum is not to be rounded to 16 bits
        return self.offset + (weight if weight.dtype is torch.float64 else weight.float())


class ForeignLayerNorm(LayerNorm):
    """LayerNorm with an output dtype by rule."""

    result: str
    """One of RESULTS."""

    def forward(self, input: Tensor) -> Tensor:
        weight = parameter(self, "weight")
        dtype = result_dtype(self.result, input, weight)
        y = functional.layer_norm(
            _widened(input, dtype), self.normalized_shape, weight, parameter(self, "bias"),
            self.eps, activation=self.activation,
        )  # fmt: skip
        return y.to(dtype)


class ChannelLayerNorm(ForeignLayerNorm):
    """LayerNorm over axis 1 of (N, C, *), at each position: ConvNeXt's, timm's LayerNorm2d."""

    contiguous: bool
    """Whether the output is contiguous; else it has channels innermost, as it was computed."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input.movedim(1, -1)).movedim(-1, 1)
        return y.contiguous() if self.contiguous else y
