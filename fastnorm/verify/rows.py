"""Layer norm and RMS norm, of an input or of a sum: the last axis is normalized."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.verify import reference
from fastnorm.verify.case import Case, Stages, Tensors, shift_of_xhat


@dataclass(frozen=True)
class RowCase(Case):
    """`layer_norm`, `rms_norm`, `add_layer_norm` or `add_rms_norm`."""

    @property
    def _centered(self) -> bool:
        return "layer" in self.operation

    @property
    def _adds(self) -> bool:
        return self.operation.startswith("add")

    def tensors(self, device: torch.device) -> Tensors:
        draw, size = self.random(), self.shape[-1]
        weight = draw.normal(size) * 0.3 + 1
        weight = weight if self.weight is None else torch.full_like(weight, self.weight)
        found = {
            "input": draw.large(self.shape, device, self.values),
            "weight": weight.to(device, self.dtype),
        }
        if self._centered:
            found["bias"] = (draw.normal(size) * 0.5).to(device, self.dtype)
        found["dy"] = draw.large(self.shape, device)
        if self._adds:
            found["residual"] = draw.large(self.shape, device)
            found["dsum"] = draw.large(self.shape, device)
        return found

    def ours(self, tensors: Tensors) -> Tensors:
        inputs = [tensors[n] for n in ("input", "residual") if n in tensors]
        y = getattr(FF, self.operation)(
            *inputs, self.shape[-1:], *self._parameters(tensors), self.eps,
            activation=self.activation,
        )  # fmt: skip
        return dict(zip(("y", "sum"), y, strict=True)) if self._adds else {"y": y}

    def torchs(self, tensors: Tensors) -> Tensors:
        x = tensors["input"] + tensors["residual"] if self._adds else tensors["input"]
        norm: Any = F.layer_norm if self._centered else F.rms_norm
        z = norm(x, self.shape[-1:], *self._parameters(tensors), eps=self.eps)
        y = ACTIVATIONS[self.activation](z)
        return {"y": y, "sum": x} if self._adds else {"y": y}

    def reference(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x = tensors["input"]
        if self._adds:  # the sum is what its dtype rounds it to, here and in torch
            total = x + tensors["residual"]
            x = total + (total.to(self.dtype).double() - total).detach()
        y = reference.layer_norm(
            x, 1, tensors["weight"], tensors.get("bias"), self.eps, self.activation, self._centered
        )
        return ({"y": y, "sum": x} if self._adds else {"y": y}), {}

    def _parameters(self, tensors: Tensors) -> list[Tensor]:
        return [tensors[n] for n in ("weight", "bias") if n in tensors]

    def stages(self, tensors: Tensors) -> Stages:
        x = tensors["input"]
        if self._adds:
            x = (x + tensors["residual"]).to(self.dtype).double()
        mean = x.mean(-1, keepdim=True) if self._centered else torch.zeros_like(x[..., :1])
        rstd = 1 / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + self.eps)
        xhat = (x - mean) * rstd
        shift = shift_of_xhat(x, mean, rstd, self.dtype)
        size = xhat.abs() + shift
        z, z_size = xhat * tensors["weight"], size * tensors["weight"].abs()
        if self._centered:
            z, z_size = z + tensors["bias"], z_size + tensors["bias"].abs()
        return Stages(z, z_size, size, rstd.expand_as(x), shift)

    def sizes(self, tensors: Tensors, stages: Stages) -> Tensors:
        g = tensors["dy"].abs()
        through = g * tensors["weight"].abs() * stages.rstd * (1 + stages.shift)
        rows = list(range(g.ndim - 1))
        found = {
            "y": stages.z_size,
            "dweight": (g * stages.xhat_size).sum(rows),
            "dbias": g.sum(rows),
        }
        if self._adds:
            through = through + tensors["dsum"].abs()
            found["sum"] = tensors["input"].abs() + tensors["residual"].abs()
        return found | {"dinput": through, "dresidual": through}
