"""One module's own forward as a torch.fx graph that may stand for it: children whole, guards noted.

Tracing runs the forward once with placeholders for tensors. Whatever else decides what it does is
either noted, so that the graph is used only while it still holds (attributes that were read, the
members of a ModuleList), or ends the attempt with a reason: values that are asked for, types and
absences of what was computed, random numbers, contexts, attributes that are set.
"""

import operator
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any, TypeGuard

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastnorm.structure.hazards import entry_codes, hazard

SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Values that a trace may rest on: they are compared at every call."""
ABSENT = object()
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# functions whose answer may differ at the next call
FICKLE = frozenset((
    "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "random", "getrandbits",
    "time", "perf_counter", "print", "hasattr", "is_tensor",
))  # fmt: skip
IN_PLACE = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior",
    "ixor", "ilshift", "irshift",
)  # fmt: skip
STANDARD = sysconfig.get_path("stdlib")
CONTEXT_FILES = ("_contextlib.py", "autocast_mode.py", "grad_mode.py", "checkpoint.py")

_tracing = threading.Lock()  # torch.fx replaces methods of nn.Module meanwhile


def is_tensors(value: object) -> TypeGuard[list[torch.Tensor] | tuple[torch.Tensor, ...]]:
    """Whether an argument is a list or tuple of tensors, which are placeholders each."""
    return (
        isinstance(value, list | tuple)
        and type(value) in (list, tuple)
        and len(value) > 0
        and all(isinstance(one, torch.Tensor) for one in value)
    )


class UntraceableError(Exception):
    """Why a forward cannot be known from one run of it."""


@dataclass(frozen=True)
class Guard:
    """`owner[name]` was `value` when the forward was traced."""

    owner: Mapping[str, Any]
    name: str
    value: Any

    def holds(self) -> bool:
        now = self.owner.get(self.name, ABSENT)
        return now is self.value or (type(now) is type(self.value) and bool(now == self.value))


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
        tracer = _Tracer(forward, args, kwargs)
        watch = _Watch(module)
        try:
            with watch.on():
                graph = tracer.trace(module)
        except UntraceableError:
            raise
        except Exception as error:  # a forward may raise anything when its tensors have no values
            line = f"{error}".splitlines()[0] if f"{error}" else ""
            raise UntraceableError(f"{type(error).__name__}: {line}"[:120]) from None
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


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError("it computes with tensors that are not its input or parameters")


class _Watch:
    """Notes what a forward reads, sets and calls while it is traced."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.guards: list[Guard] = []
        self.codes: dict[CodeType, None] = {}
        """Code outside torch that ran, in that order."""
        self.fickle = ""
        self.thread = threading.get_ident()

    @contextmanager
    def on(self) -> Iterator[None]:
        set_attribute = nn.Module.__setattr__
        profile = sys.getprofile()
        watch = self

        def reading(self: nn.Module, name: str) -> Any:
            try:
                value = object.__getattribute__(self, name)
            except AttributeError:
                watch.absent(self, name, sys._getframe(1))
                raise
            watch.read(self, name, value, sys._getframe(1))
            return value

        def setting(self: nn.Module, name: str, value: Any) -> None:
            if watch.thread == threading.get_ident():
                what = "makes a tensor" if name.startswith("_tensor_constant") else f"sets {name}"
                raise UntraceableError(f"it {what}")
            set_attribute(self, name, value)

        nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__ = setting  # type: ignore[method-assign]
        sys.setprofile(self.called)
        try:
            with _NoTensors():  # type: ignore[no-untyped-call]
                yield
        finally:
            sys.setprofile(profile)
            nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
            del nn.Module.__getattribute__

    def read(self, module: nn.Module, name: str, value: object, frame: FrameType) -> None:
        if name.startswith("__") or threading.get_ident() != self.thread or _of_torch(frame):
            return
        own = object.__getattribute__(module, "__dict__")
        if name not in own:
            if isinstance(value, SIMPLE):  # of the class: an instance may get its own
                self.guards.append(Guard(own, name, ABSENT))
            return
        if name in ("_modules", "_parameters", "_buffers"):
            return
        if not _is_comparable(value) and not callable(value):
            raise UntraceableError(f"it reads {name}, a {type(value).__name__}")
        self.guards.append(Guard(own, name, value))

    def absent(self, module: nn.Module, name: str, frame: FrameType) -> None:
        """Not an attribute of the instance: perhaps a module, parameter or buffer that is None."""
        if threading.get_ident() != self.thread:
            return
        own = object.__getattribute__(module, "__dict__")
        for kind in ("_modules", "_parameters", "_buffers"):
            registered = own.get(kind, {})
            if name in registered and registered[name] is None:
                self.guards.append(Guard(registered, name, None))

    def called(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code.co_filename.endswith(CONTEXT_FILES):
                if code.co_name in ("__enter__", "decorate_context", "checkpoint", "wrapper_fwd"):
                    self.fickle = self.fickle or "it runs in a context, or checkpointed"
            elif not _is_trusted(frame) and not _is_aside(frame):
                self.codes[code] = None
        elif event == "c_call":
            name = getattr(argument, "__name__", "")
            random = frame.f_globals.get("__name__") == "random"
            if name in FICKLE and (random or not _is_trusted(frame)):
                self.fickle = self.fickle or f"it calls {name}()"


def _is_comparable(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_comparable, value))
    return isinstance(value, SIMPLE)


def _of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] == "torch"


def _is_trusted(frame: FrameType) -> bool:
    """Code of torch, of Python, and of this file, which is no part of a forward."""
    path = frame.f_code.co_filename
    return (
        frame.f_globals.get("__name__") == __name__
        or _of_torch(frame)
        or path.startswith("<frozen")
        or (path.startswith(STANDARD) and "site-packages" not in path)
    )


def _is_aside(frame: FrameType) -> bool:
    """Part of the source of its caller, or an object's own method that torch.fx asks in passing."""
    name, caller = frame.f_code.co_name, frame.f_back
    while caller is not None and caller.f_code.co_name.startswith("__"):
        caller = caller.f_back
    asked = name.startswith("__") and caller is not None and _is_trusted(caller)
    return name.startswith("<") or asked
