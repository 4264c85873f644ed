"""Batch norm, instance norm and group norm: (N, C, *), a weight for each channel."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.verify import reference
from fastnorm.verify.case import (
    BUFFERS,
    MOMENTUM,
    Case,
    Stages,
    Tensors,
    compute_dtype,
    shift_of_xhat,
)


@dataclass(frozen=True)
class ChannelCase(Case):
    """`batch_norm`, `instance_norm`, or `group_norm` where `num_groups` says so."""

    num_groups: int = 0

    @property
    def _buffered(self) -> bool:
        return self.operation != "group_norm"

    def tensors(self, device: torch.device) -> Tensors:
        draw, channels = self.random(), self.shape[1]
        # torch's group norm asks a GPU for one dtype; batch norm's parameters stay float32
        small = compute_dtype(self.dtype) if self._buffered else self.dtype
        weight = draw.normal(channels) * 0.3 + 1
        found = {
            "input": draw.large(self.shape, device, self.values),
            "weight": weight if self.weight is None else torch.full_like(weight, self.weight),
            "bias": draw.normal(channels) * 0.5,
        }
        if self._buffered:
            found["running_mean"] = draw.normal(channels)
            found["running_var"] = draw.normal(channels).abs() + 0.5
        found |= {n: t.to(device, small) for n, t in found.items() if n != "input"}
        if self.residual:
            found["residual"] = draw.large(self.shape, device)
        return found | {"dy": draw.large(self.shape, device)}

    def ours(self, tensors: Tensors) -> Tensors:
        options: dict[str, Any] = {
            "residual": tensors.get("residual"),
            "activation": self.activation,
        }
        weight, bias = tensors["weight"], tensors["bias"]
        if self.operation == "group_norm":
            y = FF.group_norm(tensors["input"], self.num_groups, weight, bias, self.eps, **options)
        else:
            y = getattr(FF, self.operation)(
                tensors["input"], *(tensors[n] for n in BUFFERS), weight, bias,
                self.training, MOMENTUM, self.eps, **options,
            )  # fmt: skip
        return {"y": y}

    def torchs(self, tensors: Tensors) -> Tensors:
        weight, bias = tensors["weight"], tensors["bias"]
        if self.operation == "group_norm":
            z = F.group_norm(tensors["input"], self.num_groups, weight, bias, self.eps)
        else:
            z = getattr(F, self.operation)(
                tensors["input"], *(tensors[n] for n in BUFFERS), weight, bias,
                self.training, MOMENTUM, self.eps,
            )  # fmt: skip
        z = z + tensors["residual"] if self.residual else z
        return {"y": ACTIVATIONS[self.activation](z)}

    def reference(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x, weight, bias = (tensors[n] for n in ("input", "weight", "bias"))
        last = (tensors.get("residual"), self.activation)
        if self.operation == "group_norm":
            return {
                "y": reference.group_norm(x, self.num_groups, weight, bias, self.eps, *last)
            }, {}
        formula = getattr(reference, self.operation)
        y, *buffers = formula(
            x, *(tensors[n] for n in BUFFERS), weight, bias, self.training, MOMENTUM, self.eps,
            *last,
        )  # fmt: skip
        return {"y": y}, dict(zip(BUFFERS, buffers, strict=True))

    def _column(self, vector: Tensor) -> Tensor:
        """(C,) as it broadcasts to the input."""
        return vector.reshape(-1, *[1] * (len(self.shape) - 2))

    def _of_sets(self, x: Tensor, *, squares_about: Tensor | None = None) -> Tensor:
        """The mean of x, or of its squares about a mean, over each index set, as large as x."""
        x = x if squares_about is None else (x - squares_about) ** 2
        if self.operation == "batch_norm":
            axes = [0, *range(2, x.ndim)]
            return x.mean(axes, keepdim=True).expand_as(x)
        groups = self.num_groups or x.shape[1]
        sets = x.reshape(x.shape[0], groups, -1)
        return sets.mean(2, keepdim=True).expand_as(sets).reshape(x.shape)

    def stages(self, tensors: Tensors) -> Stages:
        x = tensors["input"]
        if self.training or not self._buffered:
            mean = self._of_sets(x)
            var = self._of_sets(x, squares_about=mean)
        else:
            mean, var = (self._column(tensors[n]).expand_as(x) for n in BUFFERS)
        rstd = 1 / torch.sqrt(var + self.eps)
        xhat = (x - mean) * rstd
        shift = shift_of_xhat(x, mean, rstd, self.dtype)
        size = xhat.abs() + shift
        weight, bias = (self._column(tensors[n]) for n in ("weight", "bias"))
        z, z_size = xhat * weight + bias, size * weight.abs() + bias.abs()
        if self.residual:
            z, z_size = z + tensors["residual"], z_size + tensors["residual"].abs()
        return Stages(z, z_size, size, rstd, shift)

    def sizes(self, tensors: Tensors, stages: Stages) -> Tensors:
        x, g = tensors["input"], tensors["dy"].abs()
        through = g * self._column(tensors["weight"]).abs() * stages.rstd * (1 + stages.shift)
        axes = [0, *range(2, x.ndim)]
        found = {
            "y": stages.z_size,
            "dinput": through,
            "dresidual": g,
            "dweight": (g * stages.xhat_size).sum(axes),
            "dbias": g.sum(axes),
        }
        if self._buffered:
            mean = self._of_sets(x)
            moments = (x.abs().mean(axes), self._of_sets(x, squares_about=mean).mean(axes))
            for name, moment in zip(BUFFERS, moments, strict=True):
                found[name] = tensors[name].abs() + MOMENTUM * moment
        return found
