"""PTX types as numpy's: registers hold bits, instructions compute with values."""

import functools

import numpy as np

Array = np.ndarray

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
# Registers hold 16, 32 or 64 bits by the letters of their names; predicates are of one.
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64}
PLAIN = {
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
    "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    **{f"{letter}{bits}": kind for letter in "ub" for bits, kind in UNSIGNED.items()},
}  # fmt: skip
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "s16x2": "s16", "u16x2": "u16"}
POISON = 0xFFF8DEADFFC5DEAD  # what nobody has written: NaN, as any float


def bits_of_type(kind: str) -> int:
    return 32 if kind in PACKED else int(kind.lstrip("bfstu"))


def of_bits(bits: Array, kind: str) -> Array:
    """Values of a type; packed ones on an axis more. bfloat16 is computed in float32."""
    if kind == "pred":
        return bits
    width = UNSIGNED[bits_of_type(kind)]
    if bits.dtype != width:
        bits = bits.astype(width)
    if kind in PACKED:
        return of_bits(np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2), PACKED[kind])
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if kind == "tf32":  # the lowest bits of a float32 are ignored
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return bits.view(PLAIN[kind])


def to_bits(values: Array, kind: str) -> Array:
    """The inverse: floats are rounded to the nearest, ties to even."""
    if kind == "pred":
        return values
    if kind in PACKED:
        return np.ascontiguousarray(to_bits(values, PACKED[kind])).view(np.uint32).reshape(-1)
    if kind == "bf16":
        return _bfloat16(values)
    bits = np.ascontiguousarray(values.astype(PLAIN[kind], copy=False)).view(
        UNSIGNED[bits_of_type(kind)]
    )
    if kind[0] == "f":
        wrong = np.isnan(values)
        if wrong.any():  # a device's arithmetic has one NaN
            bits = np.where(wrong, bits.dtype.type(2 ** (bits_of_type(kind) - 1) - 1), bits)
    return bits


def _bfloat16(values: Array) -> Array:
    if values.dtype == np.float64:
        values = _to_odd(values)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _to_odd(values: Array) -> Array:
    """float32 of float64 whose last bit is set where it is not exact: it rounds as float64 does."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    odd = np.where(near.astype(np.float64) == values, bits, (bits - away) | 1)
    return np.where(np.isfinite(values), odd, bits).astype(np.uint32).view(np.float32)


@functools.cache
def literal(text: str, kind: str) -> Array:
    """The bits of a number in the text, of a type; shape (1,)."""
    width = 64 if kind == "pred" else bits_of_type(kind)
    if text[:2] in ("0f", "0d") and len(text) in (10, 18):
        number = np.array([int(text[2:], 16)], UNSIGNED[(len(text) - 2) * 4])
        if kind in PLAIN and number.dtype != UNSIGNED[width]:
            number = to_bits(of_bits(number, f"f{(len(text) - 2) * 4}"), kind)
        return number
    value = int(text.rstrip("U"), 0)
    if kind == "pred":
        return np.array([value != 0])
    return np.array([value & (2**width - 1)], UNSIGNED[width])
