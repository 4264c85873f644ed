"""Triton's interpreter, mended: operations as a GPU does them. `mend()` puts them in place.

Mended, because a GPU does otherwise:
- bf16: `tl.dot`, arithmetic, comparison, `tl.sum` and `tl.full` worked on bit patterns; conversion
  from float32 truncated, from float64 and integers copied bits. Now values, rounded to nearest
  even, one rounding a conversion.
- NaN: `tl.maximum`, `tl.minimum` and `tl.clamp` kept it, where max.f32 drops it unless asked.
- `tl.dot` of float32 with input_precision "tf32", the default, was exact; a GPU reads 10 bits.
- `tl.fma` rounded its product; now once (float64: still twice).
- A masked lane without `other` was 0; a GPU leaves it undefined. Now NaN, in integers a pattern.
- A `range` variable was a plain int, so its offsets wrapped where a GPU's do not, and did not wrap
  where a GPU's do. Now it has the type that the compiler gives it.
- A dot may not be shorter than 16 in K.
Mended, because it costs: every operation worked out types and shapes again (steps_once.py); NumPy's
helpers for new axes, broadcasts and splats took longer than small tiles; a device call patched all
of triton.language again, and for good; every integer operation was repeated in int64 for an
assertion that is off; `tl.reduce` with a combine function ran element by element.

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
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from accesses import watched
from number_formats import Handle, bf16_bits, numpy_type, poison, tf32, values_of
from steps_once import replayed
from triton.runtime import interpreter as upstream


class _Builder(upstream.InterpreterBuilder):
    """The operations that the interpreter got wrong, and memory that can be watched."""

    def cast_impl(self, src: Handle, dst_type: tl.dtype) -> Handle:
        data = values_of(src)
        if dst_type.scalar == tl.bfloat16:
            return Handle(bf16_bits(data), tl.bfloat16)
        return Handle(data.astype(numpy_type(dst_type)), dst_type.scalar)

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
        output = op(values_of(lhs), values_of(rhs))
        if output.dtype == bool:  # upstream keeps the operands' type, and a later cast believes it
            return Handle(output, tl.int1)
        if output.dtype == np.float32 and lhs.dtype.scalar == tl.bfloat16:
            return Handle(bf16_bits(output), tl.bfloat16)
        if not upstream._validate_np_data_size(output, lhs.dtype.scalar):
            output = output.astype(numpy_type(lhs.dtype.scalar))
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
        a, b, c = (values_of(h).astype(np.float64) for h in (x, y, z))
        return self.cast_impl(Handle(a * b + c, tl.float64), z.dtype.scalar)

    def create_expand_dims(self, arg: Handle, axis: int) -> Handle:
        return Handle(arg.data[(slice(None),) * axis + (None,)], arg.dtype.scalar)

    def create_broadcast(self, arg: Handle, shape: Any) -> Handle:
        return Handle(_filled(shape, arg.data), arg.dtype.scalar)

    def create_splat(self, ret_ty: tl.dtype, arg: Handle) -> Handle:
        return Handle(_filled(ret_ty.shape, arg.data), arg.dtype.scalar)

    def create_dot(
        self, a: Handle, b: Handle, d: Handle, input_precision: Any, max_num_imprecise_acc: int
    ) -> Handle:
        kind = a.dtype.scalar
        if not kind.is_floating() or kind.is_fp8() or kind == tl.float64:
            return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)
        # a GPU multiplies 16-bit operands exactly and accumulates in float32
        left, right = (values_of(h).astype(np.float32, copy=False) for h in (a, b))
        if kind == tl.float32 and input_precision == upstream._ir.INPUT_PRECISION.TF32:
            left, right = tf32(left), tf32(right)
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
        kind = numpy_type(dtype)
        if other is not None:
            default = other.data
        elif ptrs.data.size == 1:  # triton.language drops the `other` of a scalar where it is 0
            default = np.zeros(ptrs.data.shape, kind)
        else:
            default = poison(ptrs.data.shape, dtype)
        mask = mask if isinstance(mask, np.ndarray) else mask.data  # block pointers send an array
        if watched.running is None:
            return Handle(upstream._interpreter.load(ptrs.data, mask, default, kind), dtype)
        address, chunks = watched.running.access("load", ptrs.data, mask, kind.itemsize)
        data = upstream._interpreter.load(address, mask, default, kind)
        for observer in watched.observers:
            observer.loaded(watched.running, chunks, data)
        return Handle(data, dtype)

    def create_masked_store(
        self, ptrs: Handle, value: Handle, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> None:
        kind = numpy_type(ptrs.get_element_ty())
        mask = mask if isinstance(mask, np.ndarray) else mask.data
        address = ptrs.data
        if watched.running is not None:
            address, _ = watched.running.access("store", address, mask, kind.itemsize)
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


def _filled(shape: Any, data: np.ndarray) -> np.ndarray:
    whole = np.empty(tuple(shape), data.dtype)
    whole[...] = data
    return whole


def _atomic(ptr: Handle, mask: np.ndarray) -> Handle:
    if watched.running is None:
        return ptr
    size = numpy_type(ptr.get_element_ty()).itemsize
    address, chunks = watched.running.access("atomic", ptr.data, mask, size)
    for observer in watched.observers:
        observer.atomic(watched.running, chunks)
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
        total = np.sum(values_of(input.handle), axis=self.axis, keepdims=self.keep_dims)
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
    kind = numpy_type(dtype)
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
        # upstream wraps a builtin in a function whose `member` it is
        builtin = (getattr(new, "__kwdefaults__", None) or {}).get("member")
        if builtin is not None:
            new = replayed(builtin)
        _language_patches.append((owner, name, original, new))
    scope.restore()


@contextmanager
def interpreted_language() -> Iterator[None]:
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
    with interpreted_language():
        return self.rewrite()(*args, **kwargs)


def mend() -> None:
    """Put the operations of this module in the place of Triton's."""
    builder = upstream.interpreter_builder
    builder.__class__ = _Builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = lambda lhs, rhs: (
        (1, 1, 32) if lhs.scalar.primitive_bitwidth == 8 else (1, 1, 16)
    )
    upstream.ReduceOps = _ReduceOps
    upstream._get_np_dtype = numpy_type
    upstream.InterpretedFunction.__call__ = _call_device_function
    upstream.FunctionRewriter.ast_transformer = _Transformer()
    upstream._typed_range = _typed_range  # upstream's globals become the kernels'
