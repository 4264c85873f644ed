"""The activations a norm can end with, as torch operators; their names are the library's list."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _identity(z: Tensor) -> Tensor:
    return z


def _gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
}

# dy · act′ where the sign of z, and so y, is enough: (dy, y) -> dz, differentiable in dy.
GRAD_FROM_OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda dy, y: torch.where(y <= 0, 0, dy),
    "leaky_relu": lambda dy, y: torch.where(y > 0, dy, 0.01 * dy),
}
