"""Definitions in torch.ops.fastnorm: schema, implementation and fake at once."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastnorm.ops.layout import on_device_of

_Function = TypeVar("_Function", bound=Callable[..., Any])

_library = torch.library.Library("fastnorm", "DEF")

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
"""Kernels see raw memory: its layout must be that which was recorded."""


def kernel(*schemas: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a launcher; there is an operator for each of `schemas`.

    `fake` allocates what the launcher does. Below autograd: whoever calls it has its gradient.
    """

    def define(launch: Callable[..., Any]) -> Any:
        for schema in schemas:
            name = _define(schema)
            _library.impl(name, launch, "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastnorm::{name}", fake, lib=_library)
        return launch

    return define


def composite(schema: str, function: _Function) -> _Function:
    """`function`, of differentiable operations, as an operator: run again wherever it is recorded.

    It is called as the function is; its momentum is two arguments of the schema.
    """
    name = _define(schema)
    operator = getattr(torch.ops.fastnorm, name)
    names = [each.name for each in operator.default._schema.arguments]
    if "momentum" not in names:
        _library.impl(name, function, "CompositeImplicitAutograd")
        return cast(_Function, operator)
    at = names.index("momentum")

    def implementation(*arguments: Any) -> Any:
        return function(*arguments[:at], moved_by(*arguments[at : at + 2]), *arguments[at + 2 :])

    def call(*arguments: Any) -> Any:
        return operator(*arguments[:at], *moving(arguments[at]), *arguments[at + 1 :])

    _library.impl(name, implementation, "CompositeImplicitAutograd")
    return cast(_Function, call)


def _define(schema: str) -> str:
    _library.define(schema, tags=TAGS)
    return schema.partition("(")[0]


def with_update(schema: str) -> tuple[str, str]:
    """Schemas of a launcher that moves the buffers marked in `schema`, or only reads them."""
    name, opening, rest = schema.partition("(")
    return name + opening + re.sub(r"\(\w!\)", "", rest), f"{name}_with_update({rest}"


def updating(name: str, moves: bool) -> Callable[..., Any]:
    """The operator of `with_update` that moves its buffers, or that which reads them."""
    operator: Callable[..., Any] = getattr(
        torch.ops.fastnorm, f"{name}_with_update" if moves else name
    )
    return operator


def launched(launcher: Callable[..., Any], first: Tensor, *others: Any) -> Any:
    """What `launcher` returns, called for the device of its first argument."""
    with on_device_of(first):
        return launcher(first, *others)


def moving(momentum: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """A momentum as two arguments of a schema: as a tensor, or as a number."""
    return (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)


def moved_by(momentum: Tensor | None, share: Any) -> Any:
    """The inverse: the one of the two that there is."""
    return share if momentum is None else momentum


def given(tensors: Iterable[Tensor | None], wanted: Iterable[bool]) -> list[Tensor]:
    """Those that are `wanted`: what an operator returns, which cannot return a None."""
    pairs = zip(tensors, wanted, strict=True)
    return [tensor for tensor, asked in pairs if asked and tensor is not None]


def spread(tensors: Sequence[Tensor], wanted: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """The inverse: None where a tensor was not `wanted`."""
    remaining = iter(tensors)
    return tuple(next(remaining) if asked else None for asked in wanted)
