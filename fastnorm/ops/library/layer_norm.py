"""The launchers of fastnorm/kernels/layer_norm.py as operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import layer_norm as kernels
from fastnorm.kernels.products import compute_dtype
from fastnorm.ops.library.definition import given, kernel, launched, spread


def _forward_fake(x: Tensor, residual: Tensor | None, *arguments: Any) -> list[Tensor]:
    *_, center, size, shape, y_dtype = arguments
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y_dtype = dtype if y_dtype is None else y_dtype
    wide = compute_dtype(y_dtype)
    sums = [] if residual is None else [torch.empty(shape, dtype=dtype, device=x.device)]
    stats = torch.empty(3 if center else 1, x.numel() // size, dtype=wide, device=x.device)
    return [torch.empty(shape, dtype=y_dtype, device=x.device), *sums, stats]


@kernel(
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, "
    "str activation, bool center, SymInt size, SymInt[] shape, ScalarType? y_dtype) -> Tensor[]",
    fake=_forward_fake,
)
def _forward(x: Tensor, residual: Tensor | None, *arguments: Any) -> list[Tensor]:
    found = launched(kernels.forward, x, residual, *arguments)
    return given(found, (True, residual is not None, True))


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    center: bool,
    size: int,
    shape: Sequence[int],
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    found = torch.ops.fastnorm.layer_norm_forward(
        x, residual, weight, bias, eps, activation, center, size, shape, y_dtype
    )
    return spread(found, (True, residual is not None, True))


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor | None, *arguments: Any) -> list[Tensor]:
    *_, size, shape, wants_dx, wants_dw, db_dtype = arguments
    found = (
        torch.empty(shape, dtype=x.dtype, device=x.device),
        None if weight is None else torch.empty_like(weight),
        torch.empty(size, dtype=db_dtype, device=x.device),
    )
    return given(found, (wants_dx, wants_dw, db_dtype is not None))


@kernel(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor stats, "
    "Tensor? dsum, str activation, SymInt size, SymInt[] shape, bool wants_dx, bool wants_dw, "
    "ScalarType? db_dtype) -> Tensor[]",
    fake=_backward_fake,
)
def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *others, wants_dx, wants_dw, db_dtype = arguments
    found = launched(kernels.backward, dy, x, *others, (wants_dx, wants_dw, db_dtype))
    return given(found, (wants_dx, wants_dw, db_dtype is not None))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    dsum: Tensor | None,
    activation: str,
    size: int,
    shape: Sequence[int],
    wanted: tuple[bool, bool, torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    wants_dx, wants_dw, db_dtype = wanted
    found = torch.ops.fastnorm.layer_norm_backward(
        dy, x, weight, bias, stats, dsum, activation, size, shape, *wanted
    )
    return spread(found, (wants_dx, wants_dw and weight is not None, db_dtype is not None))
