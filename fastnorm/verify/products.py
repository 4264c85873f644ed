"""Linear or convolution, batch norm and activation, by each algorithm."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.verify import reference
from fastnorm.verify.case import BUFFERS, MOMENTUM, Case, Stages, Tensors, compute_dtype

OPERANDS = ("input", "weight", "bias")
NORM = (*BUFFERS, "norm_weight", "norm_bias")


@dataclass(frozen=True)
class ProductCase(Case):
    """`linear_batch_norm` of rows (M, K); `conv_batch_norm` where a kernel's size is given."""

    features: int = 0
    algorithm: str = "auto"
    kernel: int = 0

    def words(self) -> dict[str, str]:
        words = super().words()
        made = f"{self.kernel}×{self.kernel}" if self.kernel else self.algorithm
        return words | {"mode": f"{words['mode']}, {made}"}

    @property
    def stored_between(self) -> int:
        return super().stored_between + 1  # the product

    def tensors(self, device: torch.device) -> Tensors:
        draw, features = self.random(), self.features
        kernel = (self.kernel,) * (len(self.shape) - 2)
        fan_in = self.shape[1] * self.kernel ** len(kernel)
        small = compute_dtype(self.dtype)
        norm_weight = draw.normal(features) * 0.3 + 1
        if self.weight is not None:
            norm_weight.fill_(self.weight)
        weight = draw.normal(features, self.shape[1], *kernel) / fan_in**0.5
        x = draw.large(self.shape, device, self.values)
        if self.values == "near the maximum":  # sums over rows fit: else it is luck which do
            x = x / self.shape[0]
        found = {
            "input": x,
            "weight": weight.to(device, self.dtype),
            "bias": draw.normal(features).to(device, self.dtype),
            "norm_weight": norm_weight.to(device, small),
            "norm_bias": (draw.normal(features) * 0.5).to(device, small),
            "running_mean": draw.normal(features).to(device, small),
            "running_var": (draw.normal(features).abs() + 0.5).to(device, small),
        }
        sides = (side - self.kernel + 1 for side in self.shape[2:])
        return found | {"dy": draw.large((self.shape[0], features, *sides), device)}

    def _arguments(self, tensors: Tensors, names: tuple[str, ...]) -> list[Any]:
        return [*(tensors[name] for name in names), self.training, MOMENTUM, self.eps]

    def ours(self, tensors: Tensors) -> Tensors:
        arguments = self._arguments(tensors, (*OPERANDS, *NORM))
        if self.kernel:
            return {"y": FF.conv_batch_norm(*arguments, activation=self.activation)}
        y = FF.linear_batch_norm(*arguments, activation=self.activation, algorithm=self.algorithm)
        return {"y": y}

    def torchs(self, tensors: Tensors) -> Tensors:
        z = F.batch_norm(self._product(tensors), *self._arguments(tensors, NORM))
        return {"y": ACTIVATIONS[self.activation](z)}

    def reference(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        arguments = [*self._arguments(tensors, NORM), None, self.activation]
        y, *buffers = reference.batch_norm(self._product(tensors), *arguments)
        return {"y": y}, {n: t for n, t in zip(BUFFERS, buffers, strict=True) if t is not None}

    def settled(self, want: Tensors) -> Tensors:
        """In training the mean takes the bias away: its gradient is zero, whatever the input."""
        return want | ({"dbias": torch.zeros_like(want["dbias"])} if self.training else {})

    def _product(self, tensors: Tensors) -> Tensor:
        x, weight, bias = (tensors[name] for name in OPERANDS)
        if self.kernel:
            return (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3](x, weight, bias)
        return F.linear(x, weight, bias)

    def _column(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *[1] * (len(self.shape) - 2))

    def _axes(self) -> list[int]:
        return [0, *range(2, len(self.shape))]

    def stages(self, tensors: Tensors) -> Stages:
        product = self._product(tensors)
        size = self._product({name: tensors[name].abs() for name in OPERANDS})
        if self.training:
            mean = product.mean(self._axes(), keepdim=True)
            var = ((product - mean) ** 2).mean(self._axes(), keepdim=True)
        else:
            mean, var = (self._column(tensors[n]) for n in BUFFERS)
        rstd = 1 / torch.sqrt(var + self.eps)
        size = (size + mean.abs()) * rstd
        weight, bias = (self._column(tensors[n]) for n in ("norm_weight", "norm_bias"))
        z = (product - mean) * rstd * weight + bias
        return Stages(z, size * weight.abs() + bias.abs(), size, rstd.expand_as(z), size)

    def sizes(self, tensors: Tensors, stages: Stages) -> Tensors:
        g = tensors["dy"].abs()
        through = g * self._column(tensors["norm_weight"]).abs() * stages.rstd
        leaves = {n: tensors[n].abs().requires_grad_() for n in OPERANDS}
        with torch.enable_grad():
            product = self._product(leaves)
        gradients = torch.autograd.grad(product, list(leaves.values()), through)
        size = product.detach()
        moments = (size.mean(self._axes()), (size**2).mean(self._axes()))
        found = {f"d{n}": t for n, t in zip(leaves, gradients, strict=True)}
        for name, moment in zip(BUFFERS, moments, strict=True):
            found[name] = tensors[name].abs() + MOMENTUM * moment
        return found | {
            "y": stages.z_size,
            "dnorm_weight": (g * stages.xhat_size).sum(self._axes()),
            "dnorm_bias": g.sum(self._axes()),
        }
