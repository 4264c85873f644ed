"""One call of one operation: its tensors, and who computes it: ours, torch.nn, float64."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

import fastnorm
from fastnorm.verify import inputs

Tensors = dict[str, Tensor]
"""By argument name; the upstream gradients are "dy" and, of a sum, "dsum"."""

LEAVES = ("input", "residual", "weight", "bias", "norm_weight", "norm_bias")
BUFFERS = ("running_mean", "running_var")
MOMENTUM = 0.1
ROUNDINGS = 8.0
"""Between the load and the store of a result."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


@dataclass(frozen=True)
class Stages:
    """What lies between input and activation, in float64 and of the output's shape."""

    z: Tensor
    """Before the activation."""
    z_size: Tensor
    """The magnitudes whose sum is z: what its rounding errors are relative to."""
    xhat_size: Tensor
    """Likewise of the normalized values."""
    rstd: Tensor
    shift: Tensor
    """What the conditioning of the mean adds to that."""


@dataclass(frozen=True)
class Case(ABC):
    """What all families have; a family adds its draws, its calls, and the sizes of its results."""

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    activation: str = "identity"
    training: bool = True
    residual: bool = False
    values: str = "normal"
    eps: float = 1e-5
    weight: float | None = None
    """A value for all elements of γ."""

    def words(self) -> dict[str, str]:
        """The case as a reader sees it."""
        words = {
            "operation": self.operation,
            "dtype": str(self.dtype)[6:],
            "shape": "×".join(map(str, self.shape)),
            "layout": self.layout,
            "mode": "training" if self.training else "evaluation",
            "activation": self.activation + " of a sum" * self.residual,
            "values": self.values,
        }
        if self.eps != 1e-5:
            words["values"] += f", eps {self.eps:g}"
        if self.weight is not None:
            words["values"] += f", weight {self.weight:g}"
        return words

    @property
    def stored_between(self) -> int:
        """Tensors that torch.nn's layers store, rounded, between input and output."""
        return (self.activation != "identity") + self.residual

    @abstractmethod
    def tensors(self, device: torch.device) -> Tensors:
        """The arguments and upstream gradients, the same at every call."""

    @abstractmethod
    def ours(self, tensors: Tensors) -> Tensors:
        """The outputs, "y" and perhaps "sum"; buffers are moved in place."""

    @abstractmethod
    def torchs(self, tensors: Tensors) -> Tensors:
        """The same by torch.nn.functional."""

    @abstractmethod
    def reference(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """(outputs, new buffers) of float64 tensors."""

    def settled(self, want: Tensors) -> Tensors:
        """The reference's results, with those known beforehand in their place."""
        return want

    @abstractmethod
    def stages(self, tensors: Tensors) -> Stages:
        """The reference's inner values, from float64 tensors without gradients."""

    @abstractmethod
    def sizes(self, tensors: Tensors, stages: Stages) -> Tensors:
        """By result: the magnitudes that are added up to give it, as float64 tensors."""

    def random(self) -> "Draw":
        return Draw(self.dtype, self.layout)


class Draw:
    """Random tensors of a case, from one seed."""

    def __init__(self, dtype: torch.dtype, layout: str) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._dtype, self._layout = dtype, layout

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def large(self, shape: tuple[int, ...], device: torch.device, values: str = "normal") -> Tensor:
        """A tensor of the case's dtype and layout."""
        drawn = inputs.values(values, self.normal(*shape), self._dtype)
        return inputs.laid_out(drawn.to(device, self._dtype), self._layout)


def shift_of_xhat(x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """What x̂ may be off by, as a multiple of ε, beside its own roundings.

    The eager path, as torch.nn, holds a mean in one number: half a unit in its last place. And
    float64 is judged by float64, whose own mean is off by more.
    """
    if dtype is torch.float64:
        return (x.abs() + mean.abs()) * rstd
    held = 0.0 if fastnorm.backend_for(x) == "triton" else 1 / ROUNDINGS
    return held * mean.abs() * rstd
