"""What the modules share: the way to their attributes, their repr, and to be a node of a graph.

Parameters, buffers and children come without `nn.Module.__getattr__`, whose search takes 0.8 µs
each time. That is a seventh of a short call, and several times as much where a large tensor has
just swept the interpreter out of the cache. What is no longer registered is asked of the module as
usual: torch.nn.utils.parametrize makes a parameter a property.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module

from fastnorm.backend import backend_for


def parameter(module: Module, name: str) -> Tensor | None:
    """`module.name`."""
    registered = module._parameters
    value: Tensor | None = registered[name] if name in registered else getattr(module, name)
    return value


def buffer(module: Module, name: str) -> Tensor | None:
    """`module.name`."""
    registered = module._buffers
    value: Tensor | None = registered[name] if name in registered else getattr(module, name)
    return value


def child(module: Module, name: str) -> Any:
    """`module.name`, a module itself."""
    registered = module._modules
    return registered[name] if name in registered else getattr(module, name)


def operands(layer: Module) -> tuple[Any, Tensor | None]:
    """Weight and bias of a linear layer or a convolution."""
    return parameter(layer, "weight"), parameter(layer, "bias")


def is_hooked(module: Module) -> bool:
    """Whether somebody listens to calls of this module, or has replaced its forward."""
    of = module.__dict__
    return bool(
        of["_forward_hooks"]
        or of["_forward_pre_hooks"]
        or of["_backward_hooks"]
        or of["_backward_pre_hooks"]
        or "forward" in of
    )


def is_exported(*inputs: object) -> bool:
    """Whether torch.export records this, and no tensor is one that a kernel would be called for."""
    return torch.compiler.is_exporting() and all(
        backend_for(input) == "eager" for input in inputs if isinstance(input, Tensor)
    )


def convolves_as(layer: Module, kind: type[Module]) -> bool:
    """Whether a convolution is `kind`'s: padded with zeros, and by no method of its own."""
    own, method = layer.__dict__, "_conv_forward"
    is_own = method in own or getattr(type(layer), method, None) is not getattr(kind, method, None)
    return not is_own and own.get("padding_mode", "zeros") == "zeros"


def with_activation(shown: str, activation: str) -> str:
    """An `extra_repr` that names an activation other than the identity."""
    return shown if activation == "identity" else f"{shown}, activation={activation!r}"


def is_symbolic(module: Module, input: Tensor) -> bool:
    """Whether torch.fx traces a model that holds `module`, to which a norm is one node."""
    return isinstance(input, fx.Proxy) and getattr(input.tracer, "root", module) is not module


def as_node(module: Module, *arguments: Any) -> Any:
    """The call as torch.fx records those of torch.nn's layers, which it knows by torch's name."""
    tracer, given = arguments[0].tracer, tuple(a for a in arguments if a is not None)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), given, {})
