"""How a module changes what it computes and stays what it is: its class becomes one of both.

Replacing a module loses its identity: hooks, names, ties, and whoever holds a reference. Assigning
`module.__class__` keeps all that, parameters and buffers too, since they live in the instance.
"""

import types
from typing import Any

import torch
from torch import nn

PLANS = "_fastnorm_plans"
"""The attribute of a module whose forward has been rewritten; see fuse.py."""


_merged: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def merged(ours: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """A class that computes as `ours` and otherwise is `original`, with its name.

    torch.nn's own class is just replaced by ours, which derives from it.
    """
    if issubclass(ours, original):
        return ours
    if (ours, original) not in _merged:
        _merged[ours, original] = _merge(ours, original)
    return _merged[ours, original]


def _merge(ours: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            __reduce_ex__=_reduced,
            _fastnorm_classes=(ours, original),
        )
        if hasattr(ours, "members"):
            namespace.update(ours.members(original))

    return types.new_class(original.__name__, (ours, original), exec_body=body)


def _reduced(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy.deepcopy: a merged class has no name to be found by, its parts have."""
    ours, original = type(self)._fastnorm_classes  # type: ignore[attr-defined]
    getstate = getattr(self, "__getstate__", None)  # of every object from Python 3.11 on
    state = self.__dict__ if getstate is None else getstate()
    if isinstance(state, dict):  # plans hold code that was made here; a copy makes its own
        state = {name: value for name, value in state.items() if name != PLANS}
    return _new, (ours, original), state


def _new(ours: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    kind = merged(ours, original)
    return kind.__new__(kind)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a user gave `module`: of a merged one, that part."""
    parts: tuple[type[nn.Module], type[nn.Module]] | None
    parts = getattr(type(module), "_fastnorm_classes", None)
    return parts[1] if parts else type(module)


def overridden(module: nn.Module, base: type[nn.Module], *names: str) -> str:
    """The first of these methods that `module` has from elsewhere than `base`; empty for none."""
    for name in names:
        if name in module.__dict__ or getattr(type(module), name, None) is not getattr(base, name):
            return name
    return ""


def closed(module: nn.Module) -> str:
    """Why nothing may change inside this module; empty where it may."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted, and TorchScript runs its own copy of the code"
    if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
        return "it is compiled, and compiled code may have been made already"
    return ""
