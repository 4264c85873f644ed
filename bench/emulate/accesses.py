"""Instructions that move data, each decoded once into a step of a machine."""

import numpy as np

from emulate import warps
from emulate.computing import Decoder, names_of
from emulate.machine import Machine, Step
from emulate.memory import Copy
from emulate.numbers import UNSIGNED, Array, bits_of_type, of_bits
from emulate.parse import Instruction

WIDTH_OF_ADDRESS = {"global": "b64", "shared": "b32"}


class _Address:
    """`[register + offset]`"""

    def __init__(self, operand: str, space: str) -> None:
        base, _, offset = operand.strip("[] ").partition("+")
        self.base, self.offset = base.strip(), int(offset or 0)
        self.kind = WIDTH_OF_ADDRESS[space]

    def of(self, m: Machine) -> Array:
        bits = m.of_each(self.base, self.kind)
        width = UNSIGNED[bits_of_type(self.kind)]
        return bits + width(self.offset % 2 ** bits_of_type(self.kind)) if self.offset else bits


def _parameter(i: Instruction) -> Step:
    kind = i.modifiers[-1]
    target, source = i.operands
    index = int(source.strip("[] ").rpartition("_")[2])

    def step(m: Machine) -> None:
        bits = bits_of_type(kind)
        number = np.array([m.parameters[index] % 2**bits]).astype(UNSIGNED[bits])
        m.write(target, of_bits(number, kind))

    return step


def _load(i: Instruction) -> Step:
    space, kind = i.modifiers[0], i.modifiers[-1]
    if space == "param":
        return _parameter(i)
    target, source = i.operands
    address = _Address(source, space)
    names, bits = names_of(target), bits_of_type(kind)

    def step(m: Machine) -> None:
        lanes = np.flatnonzero(m.active)
        at = address.of(m)[lanes]
        if space == "global":
            found = m.memory.load(at, bits, len(names), i.text)
        else:
            found = m.shared.load(lanes, at, bits, len(names), i.text)
        for name, value in zip(names, found, strict=True):
            m.write_some(name, lanes, value)

    return step


def _store(i: Instruction) -> Step:
    space, kind = i.modifiers[0], i.modifiers[-1]
    address = _Address(i.operands[0], space)
    names, width = names_of(i.operands[1]), UNSIGNED[bits_of_type(kind)]

    def step(m: Machine) -> None:
        lanes = np.flatnonzero(m.active)
        at = address.of(m)[lanes]
        values = [m.of_each(name, kind)[lanes].astype(width) for name in names]
        if space == "global":
            m.memory.store(at, values, i.text)
        else:
            m.shared.store(lanes, at, values, i.text)

    return step


def _copy(i: Instruction) -> Step:
    """`cp.async`: until a copy is waited for, what it fills is not to be relied on."""
    if i.modifiers[0] != "async":
        raise NotImplementedError(i.text)
    if i.has("commit_group"):
        return lambda m: m.copies.append([])
    if i.has("wait_group"):
        return _wait(int(i.operands[0]))
    to, source = _Address(i.operands[0], "shared"), _Address(i.operands[1], "global")
    size, given = int(i.operands[2], 0), i.operands[3:]

    def step(m: Machine) -> None:
        lanes = np.flatnonzero(m.active)
        read = np.ones(len(lanes), bool)
        if given:  # how many bytes are read; the others are zeros
            length = m.of_each(given[0], "b32")[lanes]
            if not np.isin(length, (0, size)).all():
                raise NotImplementedError(f"a part of a copy: {i.text}")
            read = length != 0
        copy = Copy(lanes, to.of(m)[lanes], read, source.of(m)[lanes][read], size // 4, i.text)
        copy.begin(m.memory, m.shared)
        m.copies[-1].append(copy)

    return step


def _wait(left: int) -> Step:
    def step(m: Machine) -> None:
        while len(m.copies) > left + 1:
            for copy in m.copies.pop(0):
                copy.arrive(m.memory, m.shared)

    return step


def _count_of(i: Instruction) -> int:
    return int(next(word for word in i.modifiers if word in ("x1", "x2", "x4"))[1:])


def _words_of_rows(m: Machine, address: _Address, count: int) -> list[Array]:
    """Of each matrix the address of the word of every lane: 8 rows, of 4 words each."""
    column = (4 * (np.arange(m.lanes) % 4)).astype(np.uint32)
    return [row + column for row in warps.rows_of(address.of(m), count)]


def _load_matrices(i: Instruction) -> Step:
    names, address = names_of(i.operands[0]), _Address(i.operands[1], "shared")

    def step(m: Machine) -> None:
        m.whole_warps(i)
        here = np.flatnonzero(m.active)
        for name, at in zip(names, _words_of_rows(m, address, _count_of(i)), strict=True):
            (words,) = m.shared.load(here, at[here], 32, 1, i.text)
            m.write_some(name, here, warps.transposed(words) if i.has("trans") else words)

    return step


def _store_matrices(i: Instruction) -> Step:
    address, names = _Address(i.operands[0], "shared"), names_of(i.operands[1])

    def step(m: Machine) -> None:
        m.whole_warps(i)
        here = np.flatnonzero(m.active)
        for name, at in zip(names, _words_of_rows(m, address, _count_of(i)), strict=True):
            words = m.of_each(name, "b32")[here]
            if i.has("trans"):
                words = warps.transposed(words)
            m.shared.store(here, at[here], [words], i.text)

    return step


def _barrier(i: Instruction) -> Step:
    if i.has("warp"):
        return lambda m: m.whole_warps(i)
    return lambda m: m.barrier(i)


def _nothing(i: Instruction) -> Step:
    """Orders accesses that are in order here."""
    return lambda m: None


DECODERS: dict[str, Decoder] = {
    "ld": _load, "st": _store, "cp": _copy, "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices, "bar": _barrier, "fence": _nothing,
}  # fmt: skip
