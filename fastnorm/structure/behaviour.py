"""Activations of other libraries, under whatever name: known by what they compute.

A module that has neither parameters nor parts is asked for its values between -8 and 8. It is not
disturbed: asked is a copy in evaluation, without hooks, on the CPU, and random numbers go on as if
nothing was. A module with other state than plain values and functions is not asked.
"""

import inspect
import types
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnorm.structure import activations
from fastnorm.structure.activations import Activation
from fastnorm.structure.undrawn import undrawn

NEAR = 0.03
"""x·σ(1.702x) is within 0.02 of GELU; no other two of those below are so close, but its own two."""
PLAIN = (
    bool, int, float, str, type(None), torch.dtype, torch.device, types.FunctionType,
    types.BuiltinFunctionType, types.MethodType, type,
)  # fmt: skip
OTHERS = ("leaky_relu", "prelu", "rrelu", "celu", "threshold")
"""Of parameters, chance or arguments: a slope is looked for; CELU is ELU at its default."""
KNOWN: dict[str, nn.Module] = {
    name: kind() for kind, name in activations.MODULES.items() if name not in OTHERS
} | {"gelu_tanh": nn.GELU("tanh")}


def activations_of(model: nn.Module) -> dict[nn.Module, Activation]:
    """The modules of `model` that are activations."""
    found = {module: activations.of_module(module) for module in model.modules()}
    for module, activation in found.items():
        if activation is None and _may_be_asked(module):
            found[module] = _of_values(module)
    return {module: activation for module, activation in found.items() if activation is not None}


def _may_be_asked(module: nn.Module) -> bool:
    own = vars(module)
    if type(module).__module__.split(".")[0] in ("torch", "fastnorm"):
        return False  # known by its class
    if own["_modules"] or own["_parameters"] or own["_buffers"]:
        return False
    try:
        inputs = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [one for one in inputs if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return len(needed) == 1 and all(map(_is_plain, _attributes(module).values()))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What it has besides that which every module has."""
    every = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in every}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    if isinstance(value, partial):
        return _is_plain((value.func, *value.args, *value.keywords.values()))
    return isinstance(value, PLAIN)


def _of_values(module: nn.Module) -> Activation | None:
    """The known activation whose values are those of `module`."""
    x = torch.linspace(-8, 8, 49, device="cpu", dtype=torch.float32).view(7, 7)
    y = _values(module, x)
    if y is None:
        return None
    apart = {name: float((known.forward(x) - y).abs().max()) for name, known in KNOWN.items()}
    nearest = min(apart, key=lambda name: apart[name])
    if apart[nearest] < NEAR:
        return Activation(nearest)
    slope = float(y[0, 0]) / -8
    leaky = 0 < slope < 1 and torch.allclose(F.leaky_relu(x, slope), y, atol=1e-5)
    return Activation("leaky_relu", round(slope, 6)) if leaky else None


@torch.no_grad()
def _values(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        copy: nn.Module = module.__new__(type(module))
        nn.Module.__init__(copy)
        copy.__dict__.update(_attributes(module), training=False)
        with undrawn(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            y = copy.forward(x.clone())
            like = isinstance(y, Tensor) and (y.shape, y.dtype, y.device) == (
                x.shape, x.dtype, x.device
            )  # fmt: skip
            return y if like and bool(y.isfinite().all()) else None
    except Exception:  # a forward may raise anything for an input that it was not made for
        return None
