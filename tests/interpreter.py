"""Kernels in Triton's interpreter, mended and watched: `trace()` records what it runs.

What the operations of kernels do is mended.py's; here is what launches them. Mended in it:
- A float argument was a Python float, an integer argument below 2³² a 32-bit one, and annotations
  were ignored; now all have the type that the compiler gives them.
- A grid may not exceed 65535 in y and z.
- Host tensors were wrapped, and copied back to themselves, which only torch's own check keeps from
  touching every page. NumPy's floating-point warnings are silent inside kernels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mended
import numpy as np
import shapes_once
import torch
import triton
import triton.language as tl
from accesses import KernelFault, Launch, Observer, watched
from mended import interpreted_language
from number_formats import Handle, numpy_type
from triton._utils import type_canonicalisation_dict
from triton.runtime import interpreter as upstream
from triton.runtime.jit import TensorWrapper, _normalize_ty, mangle_type


class _Arguments:
    """Turns the arguments of one launch into what the kernel sees, and tells the launch."""

    def __init__(self, launch: Launch | None) -> None:
        self.launch = launch

    def __call__(self, name: str, value: Any, annotation: str) -> Any:
        if isinstance(value, tuple):
            parts = (self(f"{name}[{i}]", part, "") for i, part in enumerate(value))
            return upstream._tuple_create(value, parts)
        if isinstance(value, bool | int | float):
            if self.launch:
                self.launch.scalars[name] = value
            known = annotation in type_canonicalisation_dict.values()
            dtype = tl.str_to_ty(annotation if known else mangle_type(value), None)
            if dtype == tl.bfloat16:
                return tl.tensor(upstream.interpreter_builder.get_bf16(value), dtype)
            data = np.array([value]).astype(numpy_type(dtype))
            return tl.tensor(Handle(data, dtype), dtype)
        if hasattr(value, "data_ptr"):
            tensor = upstream._unwrap_tensor(value)
            address = self.launch.admit(name, tensor) if self.launch else tensor.data_ptr()
            dtype = tl.str_to_ty(mangle_type(value), None)
            return tl.tensor(Handle(np.array([address], np.uint64), dtype), dtype)
        if isinstance(value, upstream.TensorDescriptor):
            return self._descriptor(name, value)
        if self.launch:
            self.launch.constants[name] = value
        return value

    def _descriptor(self, name: str, value: Any) -> Any:
        def convert(part: Any) -> Any:  # sizes and strides are no arguments of their own
            return (self if hasattr(part, "data_ptr") else _Arguments(None))(name, part, "")

        original = upstream._implicit_cvt
        with mock.patch.object(upstream, "_implicit_cvt", convert):
            return original(value)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, upstream.TensorDescriptor):
            yield value.base
        elif isinstance(value, torch.Tensor | TensorWrapper):
            yield upstream._unwrap_tensor(value)


def programs_of(sizes: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """The programs of a grid, as they are run; a test may replace it, to run but some."""
    return np.ndindex(sizes)


class _GridExecutor(upstream.GridExecutor):
    """Runs a grid on the caller's own memory, and under observation where there are observers."""

    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        kwargs = {k: v for k, v in kwargs.items() if k in self.arg_names}
        args_hst, kwargs_hst = args_dev, kwargs
        on_host = all(t.device.type == "cpu" for t in _tensors([*args_dev, *kwargs.values()]))
        if not on_host:
            args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
        for hook in self.pre_run_hooks:
            hook(*args_hst, **kwargs_hst)
        self._run(inspect.getcallargs(self.fn, *args_hst, **kwargs_hst), options)
        if not on_host:
            self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)

    def _run(self, values: dict[str, Any], options: dict[str, Any]) -> None:
        grid = self.grid(values) if callable(self.grid) else self.grid
        sizes = (*(int(n) for n in grid), 1, 1)[: max(3, len(grid))]
        if len(sizes) > 3 or any(n > 65535 for n in sizes[1:]) or sizes[0] >= 2**31:
            raise ValueError(f"no GPU launches a grid of {grid}: at most 2³¹ - 1, 65535, 65535")
        launch = (
            Launch(self.fn.__name__, self.fn.__module__, options) if watched.observers else None
        )
        with interpreted_language(), np.errstate(all="ignore"):
            arguments = self._arguments(values, launch)
            if launch is None:
                self._programs(arguments, sizes, None)
                return
            launch.grid = sizes
            for observer in watched.observers:
                observer.begin(launch)
            self._programs(arguments, sizes, launch)
        for observer in watched.observers:
            observer.end(launch)

    def _arguments(self, values: dict[str, Any], launch: Launch | None) -> dict[str, Any]:
        convert = _Arguments(launch)
        arguments = {}
        for name, value in values.items():
            if name in self.constexprs:
                if launch:
                    launch.constants[name] = value
                arguments[name] = value
            else:
                annotation = self.fn.__annotations__.get(name)
                kind = "" if annotation is None else _normalize_ty(annotation)
                arguments[name] = convert(name, value, kind)
        return arguments

    def _programs(
        self, arguments: dict[str, Any], sizes: tuple[int, ...], launch: Launch | None
    ) -> None:
        builder = upstream.interpreter_builder
        builder.set_grid_dim(*sizes)
        outer, watched.running = watched.running, launch
        try:
            for program, index in enumerate(programs_of(sizes)):
                if launch is not None:
                    launch.program = program
                builder.set_grid_idx(*index)
                self.fn(**arguments)
        except KernelFault:
            raise
        except Exception as error:
            if triton.knobs.compilation.front_end_debugging:
                raise
            raise upstream.InterpreterError(repr(error)) from error
        finally:
            watched.running = outer


def mend() -> None:
    """Repair Triton's interpreter, once for all: what runs, and what runs it."""
    if upstream.GridExecutor is not _GridExecutor:
        mended.mend()
        shapes_once.mend()
        upstream.GridExecutor = _GridExecutor


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show every launch in the interpreter to an observer."""
    mend()
    watched.observers.append(observer)
    try:
        yield
    finally:
        watched.observers.remove(observer)


class _Recorder(Observer):
    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def end(self, launch: Launch) -> None:
        self.launches.append(launch)


@contextmanager
def trace() -> Iterator[list[Launch]]:
    """Yield a list that receives one `Launch` for each kernel launched in the interpreter."""
    recorder = _Recorder()
    with observed(recorder):
        yield recorder.launches
