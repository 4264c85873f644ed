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

# dy · act′ from y = act(z), for the activations that have one: (dy, y) -> dz, differentiable.
GRAD_FROM_OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda dy, y: dy,
    "relu": lambda dy, y: torch.where(y <= 0, 0, dy),
    "relu6": lambda dy, y: torch.where((y <= 0) | (y >= 6), 0, dy),
    "leaky_relu": lambda dy, y: torch.where(y > 0, dy, 0.01 * dy),
    "elu": lambda dy, y: torch.where(y <= 0, dy * (y + 1), dy),
    "tanh": lambda dy, y: dy * (1 - y * y),
    "sigmoid": lambda dy, y: dy * (y * (1 - y)),
}
