"""Shapes and types of triton.language, each made once; `mend()` puts this in place.

A compilation makes a type for each value of a kernel, and can afford it; the interpreter made one
for each number that a program computes, shape, product and name included: half of its time.
"""

import functools
from typing import Any, NamedTuple

import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic

core = tl.core
PLAIN = {int, float, bool, str, type(None), tl.tensor, tl.dtype}  # neither constants nor sequences


class _Shape(NamedTuple):
    sizes: tl.tuple  # of a type: integers
    numel: int
    constants: tl.tuple  # of a tensor: constants
    constant: tl.constexpr
    text: str


@functools.lru_cache(maxsize=None, typed=True)
def _shape(*sizes: int) -> _Shape:
    numel = validate_block_shape(sizes) if sizes else 1
    constants = core.tuple([tl.constexpr(n) for n in sizes])
    return _Shape(core.tuple(sizes), numel, constants, tl.constexpr(numel), str(sizes))


def _init_block_type(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    if not len(shape):
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.known = _shape(*(core._unwrap_if_constexpr(n) for n in shape))
    self.shape, self.numel, *_ = self.known
    self.name = f"<{self.known.text}, {element_ty}>"


def _same_block_type(self: Any, other: Any) -> bool:
    if not isinstance(other, core.block_type):
        return False
    return self.known is other.known and self.element_ty == other.element_ty


def _init_tensor(self: Any, handle: Any, type: tl.dtype) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    known = type.known if type.is_block() else _shape()
    self.shape, self.numel = known.constants, known.constant


def _init_tuple(self: Any, args: Any, type: Any = None) -> None:
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)


def _same_type(self: Any, other: Any) -> bool:
    if self is other:
        return True
    other = core._unwrap_if_constexpr(other)
    return isinstance(other, tl.dtype) and self.name == other.name


def mend() -> None:
    """Put the constructors and comparisons of this module in the place of Triton's."""
    unwrap, broadcast = core._unwrap_if_constexpr, TritonSemantic.broadcast_impl_value

    def unwrap_constant(o: Any) -> Any:
        kind = type(o)
        if kind in PLAIN:
            return o
        return o.value if kind is tl.constexpr else unwrap(o)

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    core._unwrap_if_constexpr = unwrap_constant
    TritonSemantic.broadcast_impl_value = broadcast_values
    tl.dtype.__eq__ = _same_type
    tl.tensor.__init__ = _init_tensor
    core.block_type.__init__ = _init_block_type
    core.block_type.__eq__ = _same_block_type
    core.tuple.__init__ = _init_tuple
    kind = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
    kind.__set_name__(core.tuple, "type")
    core.tuple.type = kind
