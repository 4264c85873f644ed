"""Triton's interpreter, mended and watched: `mend()` repairs it, `trace()` records what it runs.

Mended, because a GPU does otherwise:
- bf16: `tl.dot`, arithmetic, comparison, `tl.sum` and `tl.full` worked on bit patterns; conversion
  from float32 truncated, from float64 and integers copied bits. Now values, rounded to nearest
  even, one rounding a conversion.
- NaN: `tl.maximum`, `tl.minimum` and `tl.clamp` kept it, where max.f32 drops it unless asked.
- `tl.dot` of float32 with input_precision "tf32", the default, was exact; a GPU reads 10 bits.
- `tl.fma` rounded its product; now once (float64: still twice).
- A masked lane without `other` was 0; a GPU leaves it undefined. Now NaN, in integers a pattern.
- A float argument was a Python float, an integer argument below 2³² a 32-bit one and annotations
  were ignored; a `range` variable was a plain int, so its offsets wrapped where a GPU's do not,
  and did not wrap where a GPU's do. Now both have the type that the compiler gives them.
- A grid may not exceed 65535 in y and z, a dot not be shorter than 16 in K.
Mended, because it costs: a device call patched all of triton.language again, and for good; every
integer operation was repeated in int64 for an assertion that is off; `tl.reduce` with a combine
function ran element by element; host tensors were wrapped, and copied back to themselves, which
only torch's own check keeps from touching every page. NumPy's floating-point warnings are silent
inside kernels.

Still hidden here, and seen on a GPU only:
- programs run one after another (checker.py finds their conflicts), and all threads of a program in
  step: a missing barrier between a store and a load in one program shows nothing;
- exp, log, sin, rsqrt, `/` and sigmoid are correctly rounded or nearly, where a GPU's approximate;
  a * b + c is not contracted to one fma; sums are added in another order; subnormals always live;
- `tl.sum` of fp16 and bf16 accumulates wider than a GPU; argmax treats NaN as the largest;
- fp8 conversions, bf16 atomics and `tl.associative_scan` are as Triton's interpreter has them;
- registers, shared memory, alignment and the compiler's refusals: bench/codegen.py sees those.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton._utils import type_canonicalisation_dict
from triton.runtime import interpreter as upstream
from triton.runtime.jit import TensorWrapper, _normalize_ty, mangle_type

Handle = upstream.TensorHandle


class KernelFault(AssertionError):  # noqa: N818 - a verdict, as Hypothesis has Flaky
    """A kernel did what no kernel may do."""


_describe = upstream._get_np_dtype  # builds a table of all types at each call
_numpy_types: dict[str, np.dtype[Any]] = {}


def _numpy_type(dtype: tl.dtype) -> np.dtype[Any]:
    """The NumPy type that holds a Triton type."""
    name = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _describe(dtype.scalar)
    return _numpy_types[name]


def _values(handle: Handle) -> np.ndarray:
    """The numbers in a handle: bf16, which NumPy lacks, is held as bit patterns."""
    if handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round once to the nearest bf16, ties to even, and return its bits."""
    values = np.asarray(values)
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    if values.dtype != np.float32:
        # Rounding to odd keeps what decides a tie, so that the second rounding is the only one.
        wide = values.astype(np.float64)
        inexact = single != wide
        bits = bits - (inexact & (np.abs(single) > np.abs(wide))) | inexact
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16)


def _tf32(values: np.ndarray) -> np.ndarray:
    """A tensor core reads the upper 19 bits of a float32 and rounds nothing."""
    return (values.view(np.uint32) & 0xFFFFE000).view(np.float32)


def _poison(shape: tuple[int, ...], dtype: tl.dtype) -> np.ndarray:
    """What a masked lane holds when the kernel did not say."""
    kind = _numpy_type(dtype)
    if kind.kind == "b":
        return np.zeros(shape, kind)
    if kind.kind == "f":
        return np.full(shape, np.nan, kind)
    pattern = 0x7FC0 if dtype == tl.bfloat16 else int("5A" * kind.itemsize, 16)
    return np.full(shape, pattern, kind)


class _Builder(upstream.InterpreterBuilder):
    """The operations that the interpreter got wrong, and memory that can be watched."""

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        data = _values(src)
        if dst_type.scalar == tl.bfloat16:
            return Handle(bf16_bits(data), tl.bfloat16)
        return Handle(data.astype(_numpy_type(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: Handle, dst_type: tl.dtype, rounding_mode: Any) -> Handle:
        types = {src.dtype.scalar, dst_type.scalar}
        if tl.bfloat16 not in types or any(t.is_fp8() for t in types):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if rounding_mode == upstream._ir.ROUNDING_MODE.RTZ and src.dtype.scalar == tl.float32:
            return Handle((src.data.view(np.uint32) >> 16).astype(np.uint16), tl.bfloat16)
        return self.cast_impl(src, dst_type)

    def get_bf16(self, value: float) -> Handle:
        return Handle(bf16_bits(np.array([value], np.float64)), tl.bfloat16)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Any) -> Handle:
        output = op(_values(lhs), _values(rhs))
        if output.dtype == bool:  # upstream keeps the operands' type, and a later cast believes it
            return Handle(output, tl.int1)
        if lhs.dtype.scalar == tl.bfloat16 and output.dtype == np.float32:
            return Handle(bf16_bits(output), tl.bfloat16)
        if not upstream._validate_np_data_size(output, lhs.dtype.scalar):
            output = output.astype(_numpy_type(lhs.dtype.scalar))
        return Handle(output, lhs.dtype.scalar)

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
        keep = propagate_nans == tl.PropagateNan.ALL
        lower, upper = (np.maximum, np.minimum) if keep else (np.fmax, np.fmin)
        return self.binary_op(self.binary_op(arg, lo, lower), hi, upper)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        a, b, c = (_values(h).astype(np.float64) for h in (x, y, z))
        return self.cast_impl(Handle(a * b + c, tl.float64), z.dtype.scalar)

    def create_dot(
        self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: int
    ) -> Handle:
        kind = a.dtype.scalar
        if not kind.is_floating() or kind.is_fp8() or kind == tl.float64:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        # a GPU multiplies 16-bit operands exactly and accumulates in float32
        left, right = (_values(h).astype(np.float32, copy=False) for h in (a, b))
        if kind == tl.float32 and input_precision == upstream._ir.INPUT_PRECISION.TF32:
            left, right = _tf32(left), _tf32(right)
        output = np.matmul(left, right) + d.data
        return Handle(output.astype(d.data.dtype, copy=False), d.dtype.scalar)

    def create_masked_load(
        self,
        ptrs: Handle,
        mask: Any,
        other: Handle | None,
        cache_modifier: Any,
        eviction_policy: Any,
        is_volatile: Any,
    ) -> Handle:
        dtype = ptrs.get_element_ty()
        kind = _numpy_type(dtype)
        if other is not None:
            default = other.data
        elif ptrs.data.size == 1:  # triton.language drops the `other` of a scalar where it is 0
            default = np.zeros(ptrs.data.shape, kind)
        else:
            default = _poison(ptrs.data.shape, dtype)
        mask = mask if isinstance(mask, np.ndarray) else mask.data  # block pointers send an array
        if _running is None:
            return Handle(upstream._interpreter.load(ptrs.data, mask, default, kind), dtype)
        address, chunks = _running.access("load", ptrs.data, mask, kind.itemsize)
        data = upstream._interpreter.load(address, mask, default, kind)
        for observer in _observers:
            observer.loaded(_running, chunks, data)
        return Handle(data, dtype)

    def create_masked_store(
        self, ptrs: Handle, value: Handle, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> None:
        kind = _numpy_type(ptrs.get_element_ty())
        mask = mask if isinstance(mask, np.ndarray) else mask.data
        address = ptrs.data
        if _running is not None:
            address, _ = _running.access("store", address, mask, kind.itemsize)
        upstream._interpreter.store(address, value.data, mask)

    def create_atomic_rmw(
        self, rmw_op: Any, ptr: Handle, val: Handle, mask: Handle, sem: Any, scope: Any
    ) -> Handle:
        return super().create_atomic_rmw(rmw_op, _atomic(ptr, mask.data), val, mask, sem, scope)

    def create_atomic_cas(
        self, ptr: Handle, cmp: Handle, val: Handle, sem: Any, scope: Any
    ) -> Handle:
        everywhere = np.ones(ptr.data.shape, bool)
        return super().create_atomic_cas(_atomic(ptr, everywhere), cmp, val, sem, scope)


def _atomic(ptr: Handle, mask: np.ndarray) -> Handle:
    if _running is None:
        return ptr
    size = _numpy_type(ptr.get_element_ty()).itemsize
    address, chunks = _running.access("atomic", ptr.data, mask, size)
    for observer in _observers:
        observer.atomic(_running, chunks)
    return Handle(address, ptr.dtype)


class _NotScalarError(Exception):
    """A combine function asked for the truth of a block."""


class _ReduceOps(upstream.ReduceOps):
    """Reductions with a GPU's NaN and bf16, and a tree for custom combine functions."""

    def min_max(self, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}
        return super().min_max(input, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    def sum(self, input: Any) -> Any:
        if input.dtype != tl.bfloat16:
            return super().sum(input)
        total = np.sum(_values(input.handle), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(bf16_bits(total), tl.bfloat16)

    def generic_reduce(self, input: Any) -> Any:
        global _strict_truth
        if self.axis is not None:  # upstream's own loop takes no negative axis
            self.axis %= input[0].handle.data.ndim
        outer, _strict_truth = _strict_truth, True
        try:
            return self._tree(input)
        except _NotScalarError:  # control flow that depends on an element
            _strict_truth = outer
            return super().generic_reduce(input)
        finally:
            _strict_truth = outer

    def _tree(self, input: Any) -> list[Any]:
        data = [x.handle.data for x in input]
        rank = data[0].ndim
        axis = self.axis or 0
        if self.axis is None:
            data = [d.reshape(-1) for d in data]
        while data[0].shape[axis] > 1:
            # neighbours, so that a combine function need not commute
            left, right = (
                [
                    self.to_tensor(d[(slice(None),) * axis + (slice(first, None, 2),)], x.dtype)
                    for d, x in zip(data, input, strict=True)
                ]
                for first in (0, 1)
            )
            merged = self.combine_fn(*left, *right)
            merged = merged if isinstance(merged, tuple) else (merged,)
            merged = tuple(upstream.interpreter_semantic.to_tensor(m) for m in merged)
            data = [
                np.broadcast_to(m.handle.data, x.handle.data.shape)
                for m, x in zip(merged, left, strict=True)
            ]
        if self.axis is None:
            shape: tuple[int, ...] = (1,) * rank if self.keep_dims else ()
        else:
            full = data[0].shape
            shape = full if self.keep_dims else full[:axis] + full[axis + 1 :]
        return [self.to_tensor(d.reshape(shape), x.dtype) for d, x in zip(data, input, strict=True)]


_strict_truth = False  # inside a tree reduction, `if block:` may not pass for true
_language_depth = 0
_language_patches: list[tuple[Any, str, Any, Any]] = []  # owner, name, compiled, interpreted


def _truth(tensor: tl.tensor) -> bool:
    data = tensor.handle.data
    if data.size != 1 and _strict_truth:
        raise _NotScalarError
    return bool(data.item()) if data.size == 1 else True


def _typed_range(*args: Any, **hints: Any) -> Iterator[tl.tensor]:
    """`range` whose variable has the integer type of its bounds, as the compiler gives it."""
    start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, hints.get("step", 1))[:3]
    semantic = upstream.interpreter_semantic
    bounds = [semantic.to_tensor(bound) for bound in (start, stop, step)]
    dtype = bounds[0].dtype
    for bound in bounds[1:]:
        dtype = semantic.integer_promote_impl(dtype, bound.dtype)
    kind = _numpy_type(dtype)
    for i in range(*(int(bound.handle.data.item()) for bound in bounds)):
        yield tl.tensor(Handle(np.array([i], kind), dtype), dtype)


class _Transformer(upstream.ASTTransformer):
    def visit_For(self, node: ast.For) -> ast.For:  # noqa: N802
        call = node.iter
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            call.func.id = {"range": "_typed_range"}.get(call.func.id, call.func.id)
        return self.generic_visit(node)


def _find_patches() -> None:
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = upstream._patch_lang(everywhere)
    first = {}
    for owner, name, original in scope._changes:
        first.setdefault((id(owner), name), (owner, name, original))
    ours = {"__bool__": _truth, "__index__": lambda t: int(t.handle.data.item())}
    for owner, name, original in first.values():
        new = inspect.getattr_static(owner, name)
        if owner is tl.tensor:
            new = ours.get(name, new)
        if name == "range":
            new = _typed_range
        _language_patches.append((owner, name, original, new))
    scope.restore()


@contextmanager
def _interpreted_language() -> Iterator[None]:
    """Let triton.language mean NumPy; outside a launch it stays what the compiler needs."""
    global _language_depth
    if not _language_patches:
        _find_patches()
    if _language_depth == 0:
        for owner, name, _, new in _language_patches:
            setattr(owner, name, new)
    _language_depth += 1
    try:
        yield
    finally:
        _language_depth -= 1
        if _language_depth == 0:
            for owner, name, original, _ in _language_patches:
                if original is upstream._MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _language_depth:
        return self.rewrite()(*args, **kwargs)
    with _interpreted_language():
        return self.rewrite()(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class TensorArgument:
    """A tensor as a kernel saw it."""

    name: str
    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage_ptr: int
    storage_bytes: int

    def locate(self, address: int) -> str:
        """`element 13 [3, 1] of x_ptr`; outside the view, indices go on past its shape."""
        size = self.dtype.itemsize
        offset = rest = (address - self.data_ptr) // size
        index = [0] * len(self.shape)
        for axis in sorted(range(len(index)), key=lambda axis: -self.stride[axis]):
            if self.stride[axis] and self.shape[axis] > 1:
                index[axis], rest = divmod(rest, self.stride[axis])
        inside = rest == 0 and all(0 <= i < n for i, n in zip(index, self.shape, strict=True))
        flat = int(np.ravel_multi_index(index, self.shape)) if inside and index else offset
        place = f"element {flat} {index if rest == 0 else ''}".rstrip()
        outside = "" if inside else f", outside its shape {self.shape} and strides {self.stride}"
        return f"{place} of {self.name}{outside}"


class Chunk(NamedTuple):
    """Unmasked lanes of one access by one program to one argument."""

    program: int
    argument: int
    size: int
    address: np.ndarray


# One entry for each unmasked lane: its first byte, the program (in launch order; Launch.index gives
# the grid index), the position of the argument in Launch.tensors and the bytes of an element.
ACCESS = np.dtype([("address", "u8"), ("program", "i4"), ("argument", "i2"), ("size", "i2")])


def _gathered(chunks: list[Chunk]) -> np.ndarray:
    accesses = np.empty(sum(chunk.address.size for chunk in chunks), ACCESS)
    if chunks:
        counts = [chunk.address.size for chunk in chunks]
        accesses["address"] = np.concatenate([chunk.address.reshape(-1) for chunk in chunks])
        for name in ("program", "argument", "size"):
            accesses[name] = np.repeat([getattr(chunk, name) for chunk in chunks], counts)
    return accesses


def split(accesses: np.ndarray, unit: int) -> np.ndarray:
    """The same bytes as elements of `unit` bytes each."""
    counts = accesses["size"] // unit
    if (counts == 1).all():
        return accesses
    first = np.cumsum(counts, dtype=np.int64) - counts
    narrow = np.repeat(accesses, counts)
    step = np.arange(narrow.size) - np.repeat(first, counts)
    narrow["address"] += (step * unit).astype(np.uint64)
    narrow["size"] = unit
    return narrow


def numbered(address: np.ndarray, unit: int) -> tuple[np.ndarray, int]:
    """Number elements of `unit` bytes from 0; return their numbers and a bound on them."""
    number = ((address - address.min()) >> np.uint64(unit.bit_length() - 1)).view(np.int64)
    count = int(number.max()) + 1
    if count > 16 * number.size + 65536:  # far apart: an array over the gap would not fit
        _, number = np.unique(number, return_inverse=True)
        count = number.size
    return number, count


def distinct_bytes(accesses: np.ndarray) -> int:
    if not accesses.size:
        return 0
    unit = int(accesses["size"].min())
    number, count = numbered(split(accesses, unit)["address"], unit)
    seen = np.zeros(count, bool)
    seen[number] = True
    return int(np.count_nonzero(seen)) * unit


class _Window(NamedTuple):
    shift: int
    start: int
    stop: int


# Kernels that are watched see each argument in a window of its own, so that whatever a wrong offset
# reaches is known by the argument it started from, and lies inside no other.
_WINDOW_BITS = 44
_ALIGNMENT = 1 << 16


class Launch:
    """One kernel launch: what it was given and, when it has run, the memory it touched.

    `tensors`, `scalars` and `constants` (constexprs and None) hold its arguments by name, `options`
    what is no argument (num_warps), `grid` three sizes. `loads`, `stores` and `atomics` hold one
    entry for each unmasked lane.
    """

    def __init__(self, kernel: str, module: str, options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.module = module
        self.options = options
        self.grid: tuple[int, int, int] = (0, 0, 0)
        self.tensors: dict[str, TensorArgument] = {}
        self.scalars: dict[str, bool | int | float] = {}
        self.constants: dict[str, Any] = {}
        self.program = 0
        self.chunks: dict[str, list[Chunk]] = {"load": [], "store": [], "atomic": []}
        self._arguments: list[TensorArgument] = []
        self._windows: list[_Window] = []

    def __repr__(self) -> str:
        return f"Launch({self.kernel}, grid={self.grid})"

    @cached_property
    def loads(self) -> np.ndarray:
        return self.accesses("load")

    @cached_property
    def stores(self) -> np.ndarray:
        return self.accesses("store")

    @cached_property
    def atomics(self) -> np.ndarray:
        return self.accesses("atomic")

    def accesses(self, *kinds: str, arguments: Collection[int] | None = None) -> np.ndarray:
        """Loads, stores or atomics in the order they ran, of some arguments, given by position."""
        chunks = [chunk for kind in kinds for chunk in self.chunks[kind]]
        if arguments is not None:
            chunks = [chunk for chunk in chunks if chunk.argument in arguments]
        return _gathered(chunks)

    @property
    def storages(self) -> list[list[int]]:
        """Positions of the arguments that share a storage, for each storage."""
        groups: dict[int, list[int]] = {}
        for position, argument in enumerate(self._arguments):
            groups.setdefault(argument.storage_ptr, []).append(position)
        return list(groups.values())

    def argument(self, position: int) -> TensorArgument:
        return self._arguments[position]

    def index(self, program: int) -> tuple[int, ...]:
        """The grid index of a program."""
        return tuple(int(i) for i in np.unravel_index(program, self.grid))

    def bytes_loaded(self, distinct: bool = True) -> int:
        """Bytes loaded; with `distinct`, an address counts once however often it is read."""
        return self._bytes("load", self.storages, distinct)

    def bytes_stored(self, distinct: bool = True) -> int:
        """Bytes stored; with `distinct`, an address counts once however often it is written."""
        return self._bytes("store", self.storages, distinct)

    def traffic(self) -> dict[str, tuple[int, int, int, int]]:
        """(distinct loaded, distinct stored, raw loaded, raw stored) bytes of each tensor argument.

        An access counts for the argument whose pointer it was computed from, so that a tensor given
        twice is counted for the argument that was used.
        """
        return {
            argument.name: (
                self._bytes("load", [[position]], True),
                self._bytes("store", [[position]], True),
                self._bytes("load", [[position]], False),
                self._bytes("store", [[position]], False),
            )
            for position, argument in enumerate(self._arguments)
        }

    def _bytes(self, kind: str, groups: list[list[int]], distinct: bool) -> int:
        """Bytes of a kind of access and of atomics, over groups of arguments that share memory."""
        parts = (self.accesses(kind, "atomic", arguments=group) for group in groups)
        count = distinct_bytes if distinct else (lambda part: int(part["size"].sum(dtype=np.int64)))
        return sum(count(part) for part in parts)

    def admit(self, name: str, tensor: torch.Tensor) -> int:
        """Register a tensor argument and return the address that the kernel shall see."""
        while name in self.tensors:
            name += "'"
        storage = tensor.untyped_storage()
        pointer, start = tensor.data_ptr(), storage.data_ptr()
        argument = TensorArgument(
            name, pointer, tuple(tensor.shape), tensor.stride(), tensor.dtype, start, len(storage)
        )
        self.tensors[name] = argument
        self._arguments.append(argument)
        middle = (2 * len(self._arguments) + 1) << (_WINDOW_BITS - 1)
        seen = middle + pointer % _ALIGNMENT
        first = seen + start - pointer
        self._windows.append(_Window(pointer - seen, first, first + len(storage)))
        return seen

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int
    ) -> tuple[np.ndarray, list[Chunk]]:
        """Check and record the unmasked lanes; return the true addresses of all lanes."""
        full = mask.all()
        lanes = pointers if full else pointers[mask]
        if not lanes.size:
            return pointers, []
        low, high = int(lanes.min()), int(lanes.max())
        position = (low >> _WINDOW_BITS) - 1
        if 0 <= position < len(self._windows):
            shift, start, stop = self._windows[position]
            if start <= low and high + size <= stop:
                address = pointers + np.uint64(shift % 2**64)
                lanes = address if full else address[mask]
                chunk = Chunk(self.program, position, size, lanes)
                self.chunks[kind].append(chunk)
                return address, [chunk]
        return self._access_several(kind, pointers, mask, size)

    def _access_several(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int
    ) -> tuple[np.ndarray, list[Chunk]]:
        address = np.array(pointers)
        positions = (pointers >> np.uint64(_WINDOW_BITS)).astype(np.int64) - 1
        chunks = []
        for position in np.unique(positions[mask]).tolist():
            here = mask & (positions == position)
            if not 0 <= position < len(self._windows):
                self._stray(kind, int(pointers[here][0]), None)
            shift, start, stop = self._windows[position]
            wrong = here & ((pointers < start) | (pointers + np.uint64(size) > stop))
            if wrong.any():
                self._stray(kind, int(pointers[wrong][0]) + shift, self._arguments[position])
            address[here] += np.uint64(shift % 2**64)
            chunks.append(Chunk(self.program, position, size, address[here]))
        self.chunks[kind].extend(chunks)
        return address, chunks

    def _stray(self, kind: str, address: int, argument: TensorArgument | None) -> None:
        verb = {"load": "loads", "store": "stores", "atomic": "updates"}[kind]
        if argument is None:
            what, held = "an address", "no argument is near it"
        else:
            what = argument.locate(address)
            held = f"its storage of {argument.storage_bytes} bytes ends before it"
            if address < argument.storage_ptr:
                held = "its storage begins after it"
        raise self.fault(self.program, f"{verb} {what}: out of bounds, {held}")

    def fault(self, program: int, what: str) -> KernelFault:
        return KernelFault(f"{self.kernel}, program {self.index(program)}: {what}")


class Observer:
    """Watches launches; what a subclass does not override it does not see."""

    def begin(self, launch: Launch) -> None:
        """The arguments are known; nothing has run."""

    def loaded(self, launch: Launch, chunks: list[Chunk], data: np.ndarray) -> None:
        """Data was loaded, masked lanes included."""

    def atomic(self, launch: Launch, chunks: list[Chunk]) -> None:
        """An atomic is about to run."""

    def end(self, launch: Launch) -> None:
        """Every program has run."""


_observers: list[Observer] = []
_running: Launch | None = None


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
            data = np.array([value]).astype(_numpy_type(dtype))
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
        launch = Launch(self.fn.__name__, self.fn.__module__, options) if _observers else None
        with _interpreted_language(), np.errstate(all="ignore"):
            arguments = self._arguments(values, launch)
            if launch is None:
                self._programs(arguments, sizes, None)
                return
            launch.grid = sizes
            for observer in _observers:
                observer.begin(launch)
            self._programs(arguments, sizes, launch)
        for observer in _observers:
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
        global _running
        builder = upstream.interpreter_builder
        builder.set_grid_dim(*sizes)
        outer, _running = _running, launch
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
            _running = outer


def mend() -> None:
    """Repair Triton's interpreter, once for all; the module's docstring says what."""
    builder = upstream.interpreter_builder
    if isinstance(builder, _Builder):
        return
    builder.__class__ = _Builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (
        (1, 1, 32) if lhs.scalar.primitive_bitwidth == 8 else (1, 1, 16)
    )
    upstream.GridExecutor = _GridExecutor
    upstream.ReduceOps = _ReduceOps
    upstream._get_np_dtype = _numpy_type
    upstream.InterpretedFunction.__call__ = _call_device_function
    upstream.FunctionRewriter.ast_transformer = _Transformer()
    upstream._typed_range = _typed_range  # upstream's globals become the kernels'


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show every launch in the interpreter to an observer."""
    mend()
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


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
