"""`wgmma`: products of four warps, whose operands shared memory has in layouts of descriptors."""

import re

import numpy as np

from emulate import warps
from emulate.computing import Decoder, names_of
from emulate.machine import Machine, Step
from emulate.memory import Shared
from emulate.numbers import UNSIGNED, Array, bits_of_type, of_bits, to_bits
from emulate.parse import Instruction

ROWS = 64  # of A
ROW_BYTES = 32  # of A's and of B's: 16 numbers, or 8 of tf32
# Of a descriptor's two last bits: the bytes of a row of what is swizzled together.
SWIZZLES = (16, 128, 64, 32)


def _field(descriptor: int, at: int) -> int:
    return (descriptor >> at & 0x3FFF) << 4


def addresses(descriptor: int, size: int, transposed: bool, each: int = 2) -> Array:
    """Byte addresses of a matrix of `size` rows; `transposed`: neighbours are along them.

    `each`: bytes of a number.
    """
    start, leading, stride = (_field(descriptor, at) for at in (0, 16, 32))
    width = SWIZZLES[descriptor >> 62]
    i, k = np.arange(size)[:, None], np.arange(ROW_BYTES // each)[None, :]
    run = width // each  # numbers of a row
    if width == 16:
        if transposed:
            at = i // run * stride + k // 8 * leading + k % 8 * width + i % run * each
        else:
            at = i // 8 * stride + k // run * leading + i % 8 * width + k % run * each
    elif transposed:
        at = i // run * leading + k // 8 * stride + k % 8 * width + i % run * each
    else:
        at = i // 8 * stride + i % 8 * width + k * each
    at = start + at
    return at ^ ((at >> 7 & (width // 16 - 1)) << 4)


def _operand(shared: Shared, program: int, descriptor: int, size: int, kind: str,
             transposed: bool) -> Array:  # fmt: skip
    each = bits_of_type(kind) // 8
    at = program * shared.size + addresses(descriptor, size, transposed, each)
    return of_bits(shared.bytes.view(UNSIGNED[8 * each])[at // each], kind).astype(np.float64)


def multiply(i: Instruction) -> Step:
    if not i.has("mma_async"):
        return lambda m: None  # fence, commit_group, wait_group: a product is there at once
    shape, kind = i.modifiers[3], i.modifiers[-1]
    columns, depth = (int(size) for size in re.findall(r"\d+", shape)[1:])
    target, left, right, accumulates, *signs = i.operands[:6]
    if signs != ["1", "1"]:
        raise NotImplementedError(f"a negated operand: {i.text}")
    in_registers = left.startswith("{")
    flags = [*(operand == "1" for operand in i.operands[6:]), False, False]  # tf32 has none
    left_transposed, right_transposed = (False, flags[0]) if in_registers else flags[:2]
    names = names_of(target)
    of_a_warp = warps.places((16, columns), 2)

    def left_of(m: Machine, lanes: slice, program: int, descriptor: int) -> Array:
        if not in_registers:
            return _operand(m.shared, program, descriptor, ROWS, kind, left_transposed)
        registers = [m.of_each(name, "b32")[lanes] for name in names_of(left)]
        parts = warps.fragment(
            warps.unpacked(registers, kind),
            *warps.places((16, depth), depth // 8),
            (16, depth),
        )
        return parts.reshape(ROWS, depth)

    def step(m: Machine) -> None:
        m.whole_warps(i)
        adds = m.of_each(accumulates, "pred")
        sums = [m.of_each(name, "b32").copy() for name in names]
        for first in range(0, m.lanes, 128):
            if not m.active[first]:
                continue
            lanes, program = slice(first, first + 128), first // m.threads
            a = left_of(m, lanes, program, 0 if in_registers else int(m.bits(left, "b64")[first]))
            descriptor = int(m.bits(right, "b64")[first])
            b = _operand(m.shared, program, descriptor, columns, kind, right_transposed)
            product = (a @ b.T).reshape(4, 16, columns)
            if adds[first]:
                before = [of_bits(s[lanes], "f32").astype(np.float64) for s in sums]
                product = product + warps.fragment(before, *of_a_warp, (16, columns))
            for s, row, column in zip(sums, *of_a_warp, strict=True):
                s[lanes] = to_bits(product[:, row, column].reshape(-1), "f32")
        for name, s in zip(names, sums, strict=True):
            m.write(name, s)

    return step


DECODERS: dict[str, Decoder] = {"wgmma": multiply}
