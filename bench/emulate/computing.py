"""Instructions that compute, each decoded once into a step of a machine."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from emulate import arithmetic, warps
from emulate.machine import Machine, Step
from emulate.numbers import UNSIGNED, Array, bits_of_type, of_bits, to_bits
from emulate.parse import Instruction

Decoder = Callable[[Instruction], Step]


def _computed(
    i: Instruction, function: Callable[..., Array], kinds: Sequence[str], result: str
) -> Step:
    """target = function(sources), on values."""
    target, *sources = i.operands
    pairs = list(zip(sources, kinds, strict=True))

    def step(m: Machine) -> None:
        found = function(*(m.value(source, kind) for source, kind in pairs))
        m.write(target, to_bits(found, result))

    return step


def plain(function: Callable[..., Array]) -> Decoder:
    """All operands have the type that comes last; `wide` products have twice its bits."""

    def make(i: Instruction) -> Step:
        kind = i.modifiers[-1]
        kinds = [kind] * (len(i.operands) - 1)
        result, inner = kind, function
        if i.has("wide"):
            result = f"{kind[0]}64"
            inner = _widened(function, np.int64 if kind[0] == "s" else np.uint64)
            kinds[2:] = [result] * len(kinds[2:])
        if i.modifiers[-2:] in (("f32", "bf16"), ("f32", "f16")):
            kinds[-1] = result = "f32"  # of narrow and wide operands
        if i.has("ftz"):
            inner = _flushed(inner)
        return _computed(i, inner, kinds, result)

    return make


def _contractible(i: Instruction) -> bool:
    """ptxas may make one instruction of a product and a sum, unless they say how to round."""
    return i.modifiers in (("f32",), ("f64",))


def _product(i: Instruction) -> Step:
    multiply, kind = plain(np.multiply)(i), i.modifiers[-1]
    target, *sources = i.operands
    if not _contractible(i):
        return multiply

    def step(m: Machine) -> None:
        first, second = (m.value(source, kind) for source in sources)
        multiply(m)
        if m.all_active:
            m.products[target] = first, second

    return step


def _sum(sign: int) -> Decoder:
    """a + sign · b, where a or b may be a product that has not been rounded."""
    function = np.add if sign > 0 else np.subtract

    def make(i: Instruction) -> Step:
        rounded, kind = plain(function)(i), i.modifiers[-1]
        target, *sources = i.operands
        if not _contractible(i):
            return rounded

        def step(m: Machine) -> None:
            products = [at for at, source in enumerate(sources) if source in m.products]
            chosen = m.rounding.contracts(i.text, len(products))
            if chosen is None or not m.all_active:
                rounded(m)
                return
            at = products[chosen]
            first, second = m.products[sources[at]]
            other = m.value(sources[1 - at], kind)
            if at == 0:
                found = arithmetic.fma(first, second, other if sign > 0 else -other)
            else:
                found = arithmetic.fma(first if sign > 0 else -first, second, other)
            m.write(target, to_bits(found, kind))

        return step

    return make


def _widened(function: Callable[..., Array], wide: type) -> Callable[..., Array]:
    return lambda *values: function(*(v.astype(wide) for v in values))


def _flushed(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *values: arithmetic.flush(function(*map(arithmetic.flush, values)))


def approximate(exact: Callable[..., Array]) -> Decoder:
    def make(i: Instruction) -> Step:
        kind = i.modifiers[-1]
        if i.has("rn") or kind[0] in "su":
            return plain(exact if kind[0] == "f" else arithmetic.divide)(i)
        name = f"{i.opcode}.{i.modifiers[0]}"

        def step(m: Machine) -> None:
            values = [m.value(source, kind) for source in i.operands[1:]]
            if i.has("ftz"):
                values = [arithmetic.flush(v) for v in values]
            found = m.rounding.approximate(name, exact, *values)
            if i.has("ftz"):
                found = arithmetic.flush(found)
            m.write(i.operands[0], to_bits(found, kind))

        return step

    return make


def by_numbers(function: Callable[..., Array]) -> Decoder:
    """The first operand has the type; the others are numbers of 32 bits."""

    def make(i: Instruction) -> Step:
        kind = i.modifiers[-1]
        return _computed(i, function, [kind] + ["u32"] * (len(i.operands) - 2), kind)

    return make


def extremum(function: Callable[..., Array]) -> Decoder:
    def make(i: Instruction) -> Step:
        kind = i.modifiers[-1]
        return _computed(i, partial(function, propagates=i.has("NaN")), [kind] * 2, kind)

    return make


def _count(i: Instruction) -> Step:
    return _computed(i, arithmetic.count_ones, [i.modifiers[-1]], "u32")


def _compare(i: Instruction) -> Step:
    relation, kind = i.modifiers[0], i.modifiers[-1]
    compare = arithmetic.COMPARISONS[relation]
    targets = i.operands[0].split("|")

    def step(m: Machine) -> None:
        found = compare(*(m.value(source, kind) for source in i.operands[1:3]))
        for k, target in enumerate(targets):
            m.write(target, found[:, k] if found.ndim > 1 else found)

    return step


def _select(i: Instruction) -> Step:
    kind = i.modifiers[-1]
    target, first, second, chosen = i.operands

    def step(m: Machine) -> None:
        m.write(target, np.where(m.bits(chosen, "pred"), m.bits(first, kind), m.bits(second, kind)))

    return step


def names_of(operand: str) -> list[str]:
    """Registers of a vector, or one by itself."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _move(i: Instruction) -> Step:
    kind = i.modifiers[-1]
    target, source = i.operands
    if target.startswith("{"):
        return _taken_apart(names_of(target), source, kind)
    if source.startswith("{"):
        return _put_together(target, names_of(source), kind)

    def step(m: Machine) -> None:
        m.write(target, m.bits(source, kind))

    return step


def _taken_apart(names: list[str], source: str, kind: str) -> Step:
    part = UNSIGNED[bits_of_type(kind) // len(names)]

    def step(m: Machine) -> None:
        parts = np.ascontiguousarray(m.of_each(source, kind)).view(part).reshape(m.lanes, -1)
        for k, name in enumerate(names):
            m.write(name, np.ascontiguousarray(parts[:, k]))

    return step


def _put_together(target: str, names: list[str], kind: str) -> Step:
    part = f"b{bits_of_type(kind) // len(names)}"

    def step(m: Machine) -> None:
        parts = np.stack([m.of_each(name, part) for name in names], 1)
        m.write(target, parts.view(UNSIGNED[bits_of_type(kind)]).reshape(-1))

    return step


def _convert(i: Instruction) -> Step:
    *modes, result, kind = i.modifiers
    target, *sources = i.operands
    mode = next((m for m in modes if m.startswith("r")), None)

    def packed(m: Machine) -> None:
        upper, lower = (of_bits(m.of_each(s, kind), kind) for s in sources)
        m.write(target, to_bits(np.stack([lower, upper], 1), result))

    def step(m: Machine) -> None:
        m.write(target, arithmetic.convert(m.bits(sources[0], kind), kind, result, mode))

    return packed if result.endswith("x2") else step


def _exchange(i: Instruction) -> Step:
    _, way, kind = i.modifiers
    target, source, by, within, _ = i.operands
    if within != "31" or way not in ("bfly", "idx"):
        raise NotImplementedError(i.text)

    def step(m: Machine) -> None:
        m.whole_warps(i)
        m.write(target, warps.exchange(m.of_each(source, kind), way, m.bits(by, "b32")))

    return step


def _reduce(i: Instruction) -> Step:
    _, way, kind = i.modifiers

    def step(m: Machine) -> None:
        m.whole_warps(i)
        m.write(i.operands[0], to_bits(warps.reduce(m.value(i.operands[1], kind), way), kind))

    return step


def _multiply_matrices(i: Instruction) -> Step:
    shape, kinds = i.modifiers[2], (i.modifiers[-3], i.modifiers[-1])
    target, a, b, c = (names_of(operand) for operand in i.operands)

    def step(m: Machine) -> None:
        m.whole_warps(i)
        operands = ([m.bits(name, "b64") for name in names] for names in (a, b, c))
        for name, bits in zip(target, warps.multiply(shape, kinds, *operands), strict=True):
            m.write(name, bits)

    return step


DECODERS: dict[str, Decoder] = {
    "add": _sum(1), "sub": _sum(-1), "mul": _product,
    "mad": plain(lambda a, b, c: a * b + c), "fma": plain(arithmetic.fma),
    "neg": plain(np.negative), "abs": plain(np.abs), "rem": plain(arithmetic.remainder),
    "and": plain(np.bitwise_and), "or": plain(np.bitwise_or), "xor": plain(np.bitwise_xor),
    "not": plain(np.invert), "prmt": plain(arithmetic.permute),
    "div": approximate(np.divide), "sqrt": approximate(np.sqrt), "ex2": approximate(np.exp2),
    "rsqrt": approximate(lambda x: 1.0 / np.sqrt(x)),
    "shl": by_numbers(arithmetic.shift_left), "shr": by_numbers(arithmetic.shift_right),
    "bfe": by_numbers(arithmetic.extract), "popc": _count,
    "min": extremum(arithmetic.minimum), "max": extremum(arithmetic.maximum),
    "setp": _compare, "selp": _select, "mov": _move, "cvt": _convert,
    "shfl": _exchange, "redux": _reduce, "mma": _multiply_matrices,
}  # fmt: skip
