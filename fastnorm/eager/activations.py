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

_aten = torch.ops.aten

# dy · act′ from the output alone: (dy, y) -> g. The list of what `linear_batch_norm` can do without
# its pre-activation. relu6, elu, tanh and sigmoid see y as it was rounded.
OUTPUT_GRADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda dy, y: dy,
    "relu": lambda dy, y: _aten.threshold_backward.default(dy, y, 0),
    "relu6": lambda dy, y: _aten.hardtanh_backward.default(dy, y, 0.0, 6.0),
    "leaky_relu": lambda dy, y: _aten.leaky_relu_backward.default(dy, y, 0.01, True),
    "elu": lambda dy, y: _aten.elu_backward.default(dy, 1, 1, 1, True, y),
    "tanh": lambda dy, y: _aten.tanh_backward.default(dy, y),
    "sigmoid": lambda dy, y: _aten.sigmoid_backward.default(dy, y),
}
