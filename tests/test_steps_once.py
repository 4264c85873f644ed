"""Operations whose steps are remembered do what the language says, whatever was done before."""

import interpreter
import mended
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from grid import SMALL_CASES
from number_formats import Handle, numpy_type
from steps_once import replayed
from triton.language.core import arange, full, load, minimum, mul, program_id
from triton.runtime import interpreter as upstream

import fastnorm

pytestmark = [
    pytest.mark.unchecked,
    pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="kernels are compiled where there is a GPU"
    ),
]
interpreter.mend()

ONCE = ("store", "atomic", "device_print")  # what they do is done, and twice is too often


def block(values, dtype=tl.float32):
    data = np.array(values, numpy_type(dtype))
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, data.shape))


def numbers(tensor):
    return tensor.handle.data.tolist()


@pytest.fixture
def fresh():
    """A builtin as an interpreted kernel calls it, with nothing remembered."""
    with mended.interpreted_language():
        yield replayed.__wrapped__


def test_a_square_is_no_product(fresh):
    multiply = fresh(mul)
    two, three = block([2.0, 2.0]), block([3.0, 3.0])
    assert numbers(multiply(two, two)) == [4.0, 4.0]
    assert numbers(multiply(two, three)) == [6.0, 6.0]
    assert numbers(multiply(three, two)) == [6.0, 6.0]


def test_shapes_and_types_are_told_apart(fresh):
    multiply = fresh(mul)
    row, column = block([[2.0, 3.0]]), block([[5.0], [7.0]])
    for a, b in ((row, column), (column, row), (row, row), (row, column)):
        outer = multiply(a, b)
        assert np.array_equal(outer.handle.data, a.handle.data * b.handle.data)
        assert outer.type.shape.values == list(outer.handle.data.shape)
    half = block([[2.0, 3.0]], tl.float16)
    for other, dtype in ((half, tl.float16), (row, tl.float32), (half, tl.float16)):
        assert multiply(half, other).dtype == dtype


def test_constants_are_told_apart(fresh):
    multiply = fresh(mul)
    one, whole = block([1.0, 1.0]), block([3, 3], tl.int32)
    for constant in (0.0, -0.0, 1.0, 1, True, 2, 2.0, 0.0, -0.0, float("inf")):
        for given in (constant, tl.constexpr(constant)):
            for factor in (one, whole):
                want = mul(factor, given, _semantic=upstream.interpreter_semantic)
                product = multiply(factor, given)
                assert product.type == want.type, given
                assert product.handle.data.tobytes() == want.handle.data.tobytes(), given


def test_what_a_builtin_calls_is_remembered_with_it(fresh):
    """Here a promotion, which is an operation itself and must not remember a value as constant."""
    least = fresh(minimum)
    for a, b in ((1, 1), (2, 33), (40, 7)):
        small = least(block([a], tl.int32), block([b], tl.int32))
        assert numbers(small) == [min(a, b)]


def test_programs_and_memory_are_asked_each_time(fresh):
    place, read = fresh(program_id), fresh(load)
    builder = upstream.interpreter_builder
    builder.set_grid_dim(4, 1, 1)
    x = torch.zeros(1)
    pointer = tl.tensor(
        Handle(np.array([x.data_ptr()], np.uint64), tl.pointer_type(tl.float32)),
        tl.pointer_type(tl.float32),
    )
    for program in range(4):
        builder.set_grid_idx(program, 0, 0)
        x.fill_(program)
        assert numbers(place(0)) == [program]
        assert numbers(read(pointer)) == [program]


def test_what_fails_fails_again(fresh):
    multiply, count = fresh(mul), fresh(arange)
    for _ in range(3):
        with pytest.raises(ValueError, match="incompatible"):
            multiply(block([1.0, 2.0]), block([1.0, 2.0, 3.0, 4.0]))
        with pytest.raises(ValueError, match="power of 2"):
            count(0, 3)


def test_what_is_not_known_is_asked_of_the_language(fresh):
    class Width(int):
        """Equal to an integer, and perhaps treated otherwise."""

    fill = fresh(full)
    for value in (1.0, 2.0):
        assert numbers(fill((Width(2),), value, tl.float32)) == [value, value]


def compared(builtin, counts):
    """An operation that does what is remembered and what the language says, and compares."""
    operation = replayed.__wrapped__(builtin)
    seen = set()

    def both(*args, _semantic=None, **kwargs):
        if _semantic is not None:
            return builtin(*args, **kwargs, _semantic=_semantic)
        got = operation(*args, **kwargs)
        if builtin.__name__.startswith(ONCE):
            return got
        want = builtin(*args, **kwargs, _semantic=upstream.interpreter_semantic)
        assert type(got) is type(want)
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        for a, b in pairs:
            assert a.__dict__.keys() == b.__dict__.keys()
            assert (a.type, a.dtype, a.handle.dtype) == (b.type, b.dtype, b.handle.dtype)
            assert a.shape == b.shape
            assert a.handle.data.dtype == b.handle.data.dtype
            np.testing.assert_array_equal(a.handle.data, b.handle.data, strict=True)
        counts["again" if id(builtin) in seen else "first"] += 1
        seen.add(id(builtin))
        return got

    return both


FIRST_OF_FAMILIES = {case.family: case for case in reversed(SMALL_CASES)}


@pytest.mark.parametrize("case", FIRST_OF_FAMILIES.values(), ids=str)
def test_every_operation_of_a_kernel(case, monkeypatch):
    with mended.interpreted_language():
        pass  # the patches are found
    counts = {"first": 0, "again": 0}
    patches = []
    for owner, name, original, new in mended._language_patches:
        builtin = getattr(new, "__wrapped__", None)
        new = compared(builtin, counts) if builtin is not None else new
        patches.append((owner, name, original, new))
    monkeypatch.setattr(mended, "_language_patches", patches)
    with fastnorm.use_backend("triton"):
        case.forward_and_backward(case.inputs("cpu"))
    assert counts["first"] > 15
    assert counts["again"] > 20 * counts["first"]
