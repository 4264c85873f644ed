"""LayerNorm and RMSNorm as other libraries mean them: other dtypes, another axis, 1 + weight.

A module of such a class gets one of these classes, and the attributes that they ask for. Its own
forward serves the calls that nobody has compared: with more than one tensor, or after one of its
attributes was set anew.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm import functional
from fastnorm.modules.attributes import parameter
from fastnorm.modules.group_norm import GroupNorm
from fastnorm.modules.layer_norm import LayerNorm, RMSNorm

Forward = Callable[..., Any]

FOLLOWED = (
    "training", "normalized_shape", "num_groups", "eps", "elementwise_affine", "activation",
    "result", "offset", "contiguous",
)  # fmt: skip
"""Attributes that our forwards read themselves, or that mean nothing to a norm."""

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


class Foreign(nn.Module):
    """What the classes below share: how a class of another library is called."""

    attributes_changed = False
    """Whether one that the written forward may read is not what it was when both were compared."""

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Of the class that is both: a forward with the signature of the one that was written."""
        return {"forward": called_as(original.forward, cls.forward)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ and name not in FOLLOWED and not name.startswith("_"):
            self.__dict__["attributes_changed"] = True
        super().__setattr__(name, value)


def called_as(written: Forward, ours: Forward) -> Forward:
    """`ours`, of one tensor, for calls that give `written` no more than that."""
    first, *others = list(inspect.signature(written).parameters.values())[1:]
    names = [first.name, *(one.name for one in others)]
    defaults = {one.name: one.default for one in others}

    def input_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """None where there is more than that, or less."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        input = given.pop(first.name, None)
        usual = all(defaults.get(name, given) is value for name, value in given.items())
        return input if usual and len(args) <= len(names) else None

    @functools.wraps(written)
    def forward(self: Foreign, *args: Any, **kwargs: Any) -> Any:
        input = args[0] if len(args) == 1 and not kwargs else input_alone(args, kwargs)
        if isinstance(input, Tensor) and input.is_floating_point() and not self.attributes_changed:
            return ours(self, input)
        return written(self, *args, **kwargs)

    # torch.compile counts recompilations by code object: each class has its own
    forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
    forward.computes = ours  # type: ignore[attr-defined]
    return forward


class ForeignGroupNorm(Foreign, GroupNorm):
    """GroupNorm whose forward was written anew."""

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input)


class ForeignRMSNorm(Foreign, RMSNorm):
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


class ForeignLayerNorm(Foreign, LayerNorm):
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
