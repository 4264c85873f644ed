"""Definitions in torch.ops.fastnorm: schema, implementation and fake at once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def composite(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function of differentiable operations: it is run again wherever it is recorded."""

    def define(function: Callable[..., Any]) -> Any:
        _library.impl(_define(schema), function, "CompositeImplicitAutograd")
        return function

    return define


def _define(schema: str) -> str:
    _library.define(schema, tags=TAGS)
    return schema.partition("(")[0]


def moving(momentum: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    """A momentum as two arguments of a schema: as a tensor, or as a number."""
    return (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)


def given(tensors: Iterable[Tensor | None], wanted: Iterable[bool]) -> list[Tensor]:
    """Those that are `wanted`: what an operator returns, which cannot return a None."""
    pairs = zip(tensors, wanted, strict=True)
    return [tensor for tensor, asked in pairs if asked and tensor is not None]


def spread(tensors: Sequence[Tensor], wanted: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """The inverse: None where a tensor was not `wanted`."""
    remaining = iter(tensors)
    return tuple(next(remaining) if asked else None for asked in wanted)
