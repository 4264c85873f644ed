"""What instructions compute, on values of all lanes at once: no registers, no memory.

Where the manual promises less than a correctly rounded result, `Rounding` errs at random, by no
more than it allows: another device may err elsewhere, as may another seed.
"""

import zlib
from collections.abc import Callable

import numpy as np

from emulate.numbers import PLAIN, Array, bits_of_type, of_bits, to_bits

TINY = np.finfo(np.float32).tiny
# Units in the last place by which an approximate instruction may be wrong (PTX ISA 8.7, 9.7.3).
APPROXIMATE = {"div.full": 2, "ex2.approx": 2, "sqrt.approx": 1, "rsqrt.approx": 1}


class Rounding:
    """The errors of approximate instructions; none where `seed` is None.

    They depend on the operands alone: a device gives the same result to the same question.
    """

    def __init__(self, seed: int | None) -> None:
        self.seed = seed

    def contracts(self, text: str, products: int) -> int | None:
        """Which of some products an addition takes unrounded: ptxas may make one of the two."""
        if self.seed is None or not products:
            return None
        return zlib.crc32(f"{self.seed} {text}".encode()) % products

    def approximate(self, name: str, exact: Callable[..., Array], *values: Array) -> Array:
        """float32 of float32, wrong by no more than the instruction may be."""
        wide = exact(*(v.astype(np.float64) for v in values))
        near = wide.astype(np.float32)
        if self.seed is None:
            return near
        step = APPROXIMATE[name] * np.spacing(np.abs(near)).astype(np.float64)
        usual = np.isfinite(near) & (near != 0)
        if name == "ex2.approx":  # libdevice relies on 2ⁿ
            usual &= values[0] != np.rint(values[0])
        return np.where(usual, (wide + step * _noise(self.seed, *values)).astype(np.float32), near)


def _noise(seed: int, *values: Array) -> Array:
    """Numbers of [-1, 1) that look random, and are functions of the operands."""
    mixed = np.uint64(2 * seed + 1) * np.uint64(0x9E3779B97F4A7C15)
    for value in values:
        mixed = mixed ^ np.ascontiguousarray(value).view(np.uint32)
        for by in (30, 27, 31):
            mixed = (mixed ^ (mixed >> np.uint64(by))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**52 - 1


def flush(x: Array) -> Array:
    """Subnormal numbers as zeros."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a · b + c, rounded once; in float32 up to a tie's second rounding."""
    if a.dtype != np.float64:
        wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        return wide if a.dtype == np.float16 else wide.astype(np.float32)
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total = product + c
    part = total - product
    rest = rest + ((product - (total - part)) + (c - part))
    exact = total + rest
    return np.where(np.isfinite(exact), exact, total)


def _split(a: Array) -> tuple[Array, Array]:
    """Two halves of 26 bits that sum to a float64."""
    high = (np.ascontiguousarray(a).view(np.uint64) & np.uint64(0xFFFFFFFFF8000000)).view(
        np.float64
    )
    return high, a - high


def divide(a: Array, b: Array) -> Array:
    """Integers, towards zero, as C does it; all bits are set where b is zero."""
    if a.dtype.kind == "u":
        return np.where(b == 0, a.dtype.type(-1 % 2 ** (8 * a.itemsize)), a // np.where(b, b, 1))
    divisor = np.where(b == 0, 1, b)
    quotient = a // divisor
    quotient += (quotient < 0) & (quotient * divisor != a)
    return np.where(b == 0, -1, quotient).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    """With the sign of a."""
    return a - divide(a, b) * b


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    shifted = a << np.minimum(by, bits - 1).astype(a.dtype)
    return np.where(by >= bits, a.dtype.type(0), shifted)


def shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by >= bits, a.dtype.type(0), shifted)


def extract(a: Array, at: Array, length: Array) -> Array:
    """Bits of a field, with its sign where the type has one."""
    unsigned = a.astype(np.uint64) & np.uint64(2 ** (8 * a.itemsize) - 1)
    at, length = at.astype(np.uint64), length.astype(np.uint64)
    field = (unsigned >> at) & ((np.uint64(1) << length) - np.uint64(1))
    if a.dtype.kind == "i":
        sign = (field >> (length - np.uint64(1))) & np.uint64(1)
        field = np.where(sign == 1, field | (~np.uint64(0) << length), field)
    return field.astype(a.dtype)


def permute(a: Array, b: Array, chosen: Array) -> Array:
    """`prmt`: each of four bytes is one of the eight of b:a."""
    a, b, chosen = np.broadcast_arrays(a, b, chosen)
    pool = np.stack([a, b], -1).astype(np.uint32).view(np.uint8).reshape(-1, 8)
    result = np.zeros(len(pool), np.uint32)
    for i in range(4):
        selector = (chosen >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.take_along_axis(pool, (selector & 7)[:, None].astype(np.intp), 1)[:, 0]
        byte = np.where(selector & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def count_ones(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip

INTEGRAL = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")


def minimum(a: Array, b: Array, propagates: bool) -> Array:
    return np.minimum(a, b) if propagates or a.dtype.kind in "iu" else np.fmin(a, b)


def maximum(a: Array, b: Array, propagates: bool) -> Array:
    return np.maximum(a, b) if propagates or a.dtype.kind in "iu" else np.fmax(a, b)


def convert(bits: Array, source: str, target: str, mode: str | None) -> Array:
    """The bits of `source` values as a `target`."""
    values = of_bits(bits, source)
    if mode in INTEGRAL:
        values = INTEGRAL[mode](values)
    if target in FLOATS:
        return to_bits(values, target)
    if source in FLOATS:
        rounded = values.astype(np.float64)
        limits = np.iinfo(PLAIN[target])
        rounded = np.clip(np.where(np.isnan(rounded), 0, rounded), limits.min, limits.max)
        return to_bits(rounded, target)
    width = f"u{bits_of_type(target)}"
    return to_bits(values, width)
