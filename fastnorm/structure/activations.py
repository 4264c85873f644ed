"""Activations by name, however a model writes them: a module, a function, a method, our keyword."""

import math
from dataclasses import dataclass

from torch import nn

RELU_LIKE = frozenset((
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "gelu", "gelu_tanh", "silu",
    "mish", "hardswish", "softplus", "threshold",
))  # fmt: skip
"""About the identity above zero and small below it: half of a centred signal's power is lost."""

SATURATING = frozenset((
    "tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign", "logsigmoid", "tanhshrink",
))  # fmt: skip
"""About linear near zero, flat far from it."""

NAMES = RELU_LIKE | SATURATING | {"selu"}

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.SELU: "selu",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Softplus: "softplus",
    nn.Threshold: "threshold",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardtanh: "hardtanh",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Softsign: "softsign",
    nn.LogSigmoid: "logsigmoid",
    nn.Tanhshrink: "tanhshrink",
}


@dataclass(frozen=True)
class Activation:
    """An activation's name, and its slope below zero where that is a number other than 0."""

    name: str
    slope: float = 0.0

    @property
    def relu_like(self) -> bool:
        return self.name in RELU_LIKE

    def __str__(self) -> str:
        return f"{self.name}({self.slope:g})" if self.slope else self.name


def name_of(kind: type) -> str | None:
    """The name of the activation that modules of this class are, if they are one."""
    # the most derived class first: ReLU6 is a Hardtanh
    return next((MODULES[base] for base in kind.__mro__ if base in MODULES), None)


def of_module(module: nn.Module) -> Activation | None:
    """The activation that `module` is, if it is one."""
    name = name_of(type(module))
    if name is None:
        return None
    slope = 0.0
    if isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope
    elif isinstance(module, nn.RReLU):
        slope = (module.lower + module.upper) / 2
    elif isinstance(module, nn.PReLU) and not module.weight.is_meta:
        slope = float(module.weight.detach().float().mean())
    return Activation(name, slope if math.isfinite(slope) else 0.0)


def of_function(target: object, slope: object = None) -> Activation | None:
    """The activation that a function, or a method's name, computes; `slope` as it was called."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    name = name.rstrip("_")
    if name not in NAMES:
        return None
    if name == "leaky_relu":
        return Activation(name, float(slope) if isinstance(slope, int | float) else 0.01)
    return Activation(name)


def of_norm(module: nn.Module) -> Activation | None:
    """The activation that a norm of fastnorm ends with."""
    name = getattr(module, "activation", None)
    if not isinstance(name, str) or name not in NAMES:
        return None
    return Activation(name, 0.01 if name == "leaky_relu" else 0.0)
