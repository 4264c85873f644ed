"""Triton's number formats as NumPy holds them, and their rounding as a GPU does it."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as upstream

Handle = upstream.TensorHandle

_describe = upstream._get_np_dtype  # builds a table of all types at each call
_numpy_types: dict[str, np.dtype[Any]] = {}


def numpy_type(dtype: tl.dtype) -> np.dtype[Any]:
    """The NumPy type that holds a Triton type."""
    name = "pointer" if dtype.scalar.is_ptr() else dtype.scalar.name
    if name not in _numpy_types:
        _numpy_types[name] = _describe(dtype.scalar)
    return _numpy_types[name]


def values_of(handle: Handle) -> np.ndarray:
    """The numbers in a handle: bf16, which NumPy lacks, is held as bit patterns."""
    data = handle.data
    if data.dtype.char == "H" and handle.dtype.scalar == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data


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


def tf32(values: np.ndarray) -> np.ndarray:
    """A tensor core reads the upper 19 bits of a float32 and rounds nothing."""
    return (values.view(np.uint32) & 0xFFFFE000).view(np.float32)


def poison(shape: tuple[int, ...], dtype: tl.dtype) -> np.ndarray:
    """What a masked lane holds when the kernel did not say."""
    kind = numpy_type(dtype)
    if kind.kind == "b":
        return np.zeros(shape, kind)
    if kind.kind == "f":
        return np.full(shape, np.nan, kind)
    pattern = 0x7FC0 if dtype == tl.bfloat16 else int("5A" * kind.itemsize, 16)
    return np.full(shape, pattern, kind)
