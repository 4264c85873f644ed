"""What an operation of triton.language asks of the builder, found once; `replayed` does it again.

For every number that a program computes the language works out casts, broadcasts and constants from
types and shapes. A compilation does that once; the interpreter did it in every program, and it took
several times as long as the numbers. What comes out depends on types, shapes and constants alone,
so the builder's calls are written down the first time, as a function of the handles.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Hashable
from typing import Any

import triton.language as tl
from number_formats import Handle
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as upstream

_VALUES = (Handle, upstream.BlockPointerHandle, upstream.TensorDescHandle)
_PURE = ("get_", "create_splat", "create_make_range")  # of constants, a constant


class _UnknownError(Exception):
    """An argument of which it is not known whether it decides what is done."""


def _key(value: Any) -> Hashable:
    """What an argument that is no tensor has to do with the calls of the builder."""
    kind = type(value)
    if value is None or kind is int:
        return value
    if kind is tl.constexpr:
        return kind, _key(value.value)
    if kind is bool or kind is str:
        return kind, value
    if kind is float:
        return kind, value.hex()  # 0.0 and -0.0 are equal
    if kind is list or kind is tuple:
        return kind, *map(_key, value)
    if isinstance(value, tl.dtype):
        return kind, value.name
    if kind is slice and value.start is value.stop is value.step is None:
        return kind
    raise _UnknownError


class _Recorder:
    """A builder that writes down what it is asked, as lines of Python."""

    def __init__(self, handles: list[Any]) -> None:
        self.names = {id(handle): f"h{i}" for i, handle in enumerate(handles)}
        self.kept = list(handles)  # no two have one id
        self.lines = [f"{''.join(f'h{i}, ' for i in range(len(handles)))}= handles"] * bool(handles)
        self.scope: dict[str, Any] = {"tensor": tl.tensor}
        self.complete = True

    def __getattr__(self, name: str) -> Any:
        method = getattr(upstream.interpreter_builder, name)
        return functools.partial(self._call, name, method) if callable(method) else method

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = method(*args, **kwargs)
        self.kept.append(value)
        if name.startswith(_PURE) and not any(id(part) in self.names for part in args):
            return value
        nested = [part for many in args if isinstance(many, list | tuple) for part in many]
        hidden = kwargs or any(isinstance(part, _VALUES) for part in nested)
        if hidden or not (value is None or isinstance(value, _VALUES)):
            self.complete = False
        given = ", ".join(map(self._named, args))
        self.lines.append(f"v{len(self.kept)} = {self._named(method)}({given})")
        if value is not None:
            self.names[id(value)] = f"v{len(self.kept)}"
        return value

    def _named(self, value: Any) -> str:
        """The name of a variable, or a new one for a constant."""
        name = self.names.get(id(value))
        if name is None:
            name = f"k{len(self.scope)}"
            self.scope[name] = value
        return name

    def steps(self, result: Any) -> Callable[[list[Any]], Any] | None:
        """What was done to come to a result, as a function; None where it cannot be told."""
        tensors = result if isinstance(result, tuple) else [] if result is None else [result]
        if not self.complete or any(type(tensor) is not tl.tensor for tensor in tensors):
            return None
        for i, made in enumerate(tensors):
            others = {name: value for name, value in made.__dict__.items() if name != "handle"}
            handle = self._named(made.handle)
            self.lines += [
                f"t{i} = tensor.__new__(tensor)",
                f"t{i}.__dict__.update({self._named(others)}, handle={handle})",
            ]
        names = "".join(f"t{i}, " for i in range(len(tensors)))
        returned = f"({names})" if isinstance(result, tuple) else names.rstrip(", ") or "None"
        body = "".join(f"    {line}\n" for line in (*self.lines, f"return {returned}"))
        exec(f"def repeat(handles):\n{body}", self.scope)
        return self.scope["repeat"]


def _record(
    builtin: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[list[Any]], Any] | None, Any]:
    """Call a builtin and write down what it does, and return both."""
    handles = []

    def own(value: Any) -> Any:  # `x * x` is written down as `x * y`
        if type(value) is not tl.tensor:
            return value
        handles.append(copy.copy(value.handle))
        return tl.tensor(handles[-1], value.type)

    args = tuple(own(value) for value in args)
    kwargs = {name: own(value) for name, value in kwargs.items()}
    recorder = _Recorder(handles)
    result = builtin(*args, **kwargs, _semantic=TritonSemantic(recorder))
    return recorder.steps(result), result


@functools.cache
def replayed(builtin: Callable[..., Any]) -> Callable[..., Any]:
    """A builtin of triton.language as the interpreter calls it."""
    known: dict[Hashable, Callable[[list[Any]], Any] | None] = {}

    @functools.wraps(builtin, updated=())
    def operation(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        if _semantic is not None:  # called by another builtin, which is written down as a whole
            return builtin(*args, **kwargs, _semantic=_semantic)
        key: list[Hashable] = [*kwargs]
        handles = []
        try:
            for value in (*args, *kwargs.values()) if kwargs else args:
                if type(value) is tl.tensor:
                    handles.append(value.handle)
                    key.append(value.type.name)
                else:
                    key.append(_key(value))
        except _UnknownError:
            return builtin(*args, **kwargs, _semantic=upstream.interpreter_semantic)
        try:
            repeat = known[whole := tuple(key)]
        except KeyError:
            known[whole], result = _record(builtin, args, kwargs)
            return result
        if repeat is None:
            return builtin(*args, **kwargs, _semantic=upstream.interpreter_semantic)
        return repeat(handles)

    return operation
