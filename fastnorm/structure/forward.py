"""One module's own forward as a torch.fx graph that may stand for it: children whole, guards noted.

Tracing runs the forward once with placeholders for tensors. Whatever else decides what it does is
either noted, so that the graph is used only while it still holds (attributes that were read, the
members of a ModuleList), or ends the attempt with a reason: values that are asked for, types and
absences of what was computed, random numbers, contexts, attributes that are set.
"""

import operator
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import fx, nn

from fastnorm.structure.hazards import entry_codes, hazard
from fastnorm.structure.undrawn import undrawn
from fastnorm.structure.watch import SIMPLE, Guard, UntraceableError, Watch

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
IN_PLACE = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior",
    "ixor", "ilshift", "irshift",
)  # fmt: skip

_tracing = threading.Lock()  # torch.fx replaces methods of nn.Module meanwhile


def is_tensors(value: object) -> TypeGuard[list[torch.Tensor] | tuple[torch.Tensor, ...]]:
    """Whether an argument is a list or tuple of tensors, which are placeholders each."""
    return (
        isinstance(value, list | tuple)
        and type(value) in (list, tuple)
        and len(value) > 0
        and all(isinstance(one, torch.Tensor) for one in value)
    )


@dataclass
class Captured:
    """A graph, and what must be as it was for the graph to be the forward."""

    graph: fx.Graph
    guards: list[Guard] = field(default_factory=list)
    members: list[tuple[Mapping[str, nn.Module], list[nn.Module]]] = field(default_factory=list)
    """The `_modules` of each container, and the modules in it."""

    def holds(self) -> bool:
        return all(guard.holds() for guard in self.guards) and all(
            list(now.values()) == then for now, then in self.members
        )


def capture(
    module: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Captured:
    """The graph of `forward(module, *args, **kwargs)`.

    Tensors, those of a list or tuple each, and values that are not SIMPLE become placeholders, in
    the order of the arguments.

    Raises:
        UntraceableError: with the reason.
    """
    with _tracing:
        watch = Watch()
        graph = _traced(module, forward, args, kwargs, watch)
        entries = entry_codes(forward)
        found = (hazard(code, code in entries) for code in watch.codes)
        reason = watch.fickle or next(filter(None, found), "")
    if reason:
        raise UntraceableError(reason)
    members = [
        (one._modules, list(one._modules.values()))
        for one in module.modules()
        if isinstance(one, CONTAINERS) or (one is module and isinstance(one, nn.Sequential))
    ]
    return Captured(graph, watch.guards, members)  # type: ignore[arg-type]


def glance(
    module: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> fx.Graph:
    """A graph that shows what one such call runs, and may not stand for the forward.

    Raises:
        UntraceableError: with the reason.
    """
    with _tracing:
        return _traced(module, forward, args, kwargs, Watch(strict=False))


def _traced(
    module: nn.Module,
    forward: Callable[..., Any],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    watch: Watch,
) -> fx.Graph:
    try:
        with undrawn() as drawn:
            with watch.on():
                graph = _Tracer(forward, args, kwargs).trace(module)
            if drawn():  # NumPy's functions are not heard when they are called
                watch.fickle = watch.fickle or "it draws random numbers"
        return graph
    except UntraceableError:
        raise
    except Exception as error:  # a forward may raise anything when its tensors have no values
        line = f"{error}".splitlines()[0] if f"{error}" else ""
        raise UntraceableError(f"{type(error).__name__}: {line}"[:120]) from None


class _Value(fx.Proxy):
    """A placeholder or what was computed of it; code that asks for its type is told, or stopped."""

    @property
    def __class__(self) -> type:  # what isinstance() asks
        module = str(sys._getframe(1).f_globals.get("__name__", ""))
        if module.split(".")[0] == "torch":
            return type(self)
        if self.node.meta.get("is_tensor"):
            return torch.Tensor
        raise UntraceableError("it asks for the type of what it computed")

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise UntraceableError("it changes the type of what it computed")


def _in_place(name: str) -> Callable[[fx.Proxy, object], fx.Proxy]:
    """`x += y` as what it is: torch.fx would note x + y, and the change of x be lost."""

    def change(self: fx.Proxy, other: object) -> fx.Proxy:
        proxy: fx.Proxy = self.tracer.create_proxy(
            "call_function", getattr(operator, name), (self, other), {}
        )
        return proxy

    return change


for _name in IN_PLACE:
    setattr(_Value, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Traces one call; every child is whole, and other threads go on as if nothing was."""

    def __init__(
        self,
        forward: Callable[..., Any],
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.forward, self.args, self.kwargs = forward, args, kwargs
        self.thread = threading.get_ident()

    def create_arg(self, a: Any) -> Any:
        kind = type(a)  # isinstance() would ask a placeholder
        if issubclass(kind, SIMPLE) and kind not in SIMPLE:  # its repr would become code
            if kind.__module__ != "numpy" or not issubclass(kind, float):
                raise UntraceableError(f"it computes with a {kind.__name__}")
            return float(a)
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        args = [self._argument(f"arg_{i}", value) for i, value in enumerate(self.args)]
        kwargs = {name: self._argument(name, value) for name, value in self.kwargs.items()}
        lists = [(value, list(value)) for value in (*args, *kwargs.values()) if type(value) is list]
        self.lists = [now for now, _ in lists]

        def call() -> Any:
            output = self.forward(self.root, *args, **kwargs)
            if any(
                len(now) != len(then) or any(map(operator.is_not, now, then)) for now, then in lists
            ):
                raise UntraceableError("it changes a list that it is given")
            return output

        return call, []

    def _argument(self, name: str, value: object) -> object:
        if isinstance(value, SIMPLE):
            return value
        if is_tensors(value):
            parts = [self._argument(f"{name}_{i}", one) for i, one in enumerate(value)]
            return parts if type(value) is list else tuple(parts)
        proxy = self.create_proxy("placeholder", name, (), {})
        proxy.node.meta["is_tensor"] = isinstance(value, torch.Tensor)
        return proxy

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        if any(one is given for one in (*args, *kwargs.values()) for given in self.lists):
            raise UntraceableError("it passes on a list that it is given")
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
