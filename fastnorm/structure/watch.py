"""What a forward reads, sets and calls while it is traced: noted, or a reason to give up."""

import gc
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import _symbolic_trace
from torch.utils._python_dispatch import TorchDispatchMode

SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Values that a trace may rest on: they are compared at every call."""
ABSENT = object()
"""The value of an attribute that is not there."""
FICKLE = frozenset((
    "is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled", "random", "getrandbits",
    "time", "perf_counter", "print", "hasattr", "is_tensor", "get_default_dtype", "warn",
))  # fmt: skip
"""Functions whose answer may differ at the next call, or that are called for what they do."""
MUTATORS = frozenset((
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove",
    "discard", "clear", "appendleft", "sort", "reverse",
))  # fmt: skip
"""Methods that change a list, dict or set."""
STANDARD = sysconfig.get_path("stdlib")
CONTEXT_FILES = ("_contextlib.py", "autocast_mode.py", "grad_mode.py", "checkpoint.py")


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
        return now is self.value or (
            type(now) is type(self.value) and _is_comparable(now) and bool(now == self.value)
        )


class _NoTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise UntraceableError("it computes with tensors that are not its input or parameters")


class Watch:
    """Notes what a forward reads, sets and calls while it is traced.

    If it is not `strict`, the forward may read what no guard can compare.
    """

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.guards: list[Guard] = []
        self.codes: dict[CodeType, None] = {}
        """Code outside torch that ran, in that order."""
        self.seen: set[CodeType] = set()
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

        collects = gc.isenabled()
        gc.disable()  # who listens to a collection would be heard as if the forward called
        nn.Module.__getattribute__ = reading  # type: ignore[method-assign, assignment]
        nn.Module.__setattr__ = setting  # type: ignore[method-assign]
        sys.setprofile(self.called)
        try:
            with _NoTensors():  # type: ignore[no-untyped-call]
                yield
        finally:
            sys.setprofile(profile)
            if collects:
                gc.enable()
            nn.Module.__setattr__ = set_attribute  # type: ignore[method-assign]
            del nn.Module.__getattribute__

    def read(self, module: nn.Module, name: str, value: object, frame: FrameType) -> None:
        if name.startswith("__") or threading.get_ident() != self.thread or _of_torch(frame):
            return
        own = object.__getattribute__(module, "__dict__")
        if name not in own:
            self._of_class(type(module), name, own)
            return
        if name in ("_modules", "_parameters", "_buffers"):
            return
        if self.strict and not _is_comparable(value) and not callable(value):
            raise UntraceableError(f"it reads {name}, a {type(value).__name__}")
        self.guards.append(Guard(own, name, value))

    def _of_class(self, kind: type, name: str, own: Mapping[str, Any]) -> None:
        """An attribute of the class: an instance may get its own, and the class another."""
        for owner in kind.__mro__:
            if name in vars(owner):
                self.guards.append(Guard(own, name, ABSENT))
                self.guards.append(Guard(vars(owner), name, vars(owner)[name]))
                return

    def _of_globals(self, code: CodeType, names: Mapping[str, Any]) -> None:
        """Values and functions that `code` finds among its globals."""
        if code in self.seen:
            return
        self.seen.add(code)
        for name in code.co_names:
            value = names.get(name, ABSENT)
            if type(value).__module__.startswith("numpy.random"):
                self.fickle = self.fickle or f"it may ask {name} for random numbers"
            if isinstance(value, FunctionType) and value.__globals__ is vars(_symbolic_trace):
                value = getattr(value, "__wrapped__", value)  # by torch.fx.wrap, while it traces
            if isinstance(value, (*SIMPLE, FunctionType)):
                self.guards.append(Guard(names, name, value))

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
            code, caller = frame.f_code, frame.f_back
            logs = frame.f_globals.get("__name__") == "logging" and caller is not None
            if code.co_filename.endswith(CONTEXT_FILES):
                if code.co_name in ("__enter__", "decorate_context", "checkpoint", "wrapper_fwd"):
                    self.fickle = self.fickle or "it runs in a context, or checkpointed"
            elif not _is_trusted(frame):
                self._of_globals(code, frame.f_globals)
                if not _is_aside(frame):
                    self.codes[code] = None
            elif logs and not _is_trusted(caller):  # type: ignore[arg-type]
                self.fickle = self.fickle or f"it calls {code.co_name}()"
        elif event == "c_call":
            name = getattr(argument, "__name__", "")
            drawn = frame.f_globals.get("__name__") == "random"
            if name in FICKLE and (drawn or not _is_trusted(frame)):
                self.fickle = self.fickle or f"it calls {name}()"
            if name in MUTATORS and not _is_trusted(frame):
                for of, value in frame.f_globals.items():
                    if value is getattr(argument, "__self__", ABSENT):
                        self.fickle = self.fickle or f"it changes {of}"


def _is_comparable(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_comparable, value))
    return isinstance(value, SIMPLE)


def _of_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] == "torch"


def _is_trusted(frame: FrameType) -> bool:
    """Code of torch, of Python, and of this package, which is no part of a forward."""
    path = frame.f_code.co_filename
    return (
        frame.f_globals.get("__package__") == __package__
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
