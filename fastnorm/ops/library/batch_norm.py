"""The launchers of fastnorm/kernels/batch_norm.py as operators."""

from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import batch_norm as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.kernels.products import compute_dtype
from fastnorm.ops.layout import view_of
from fastnorm.ops.library.definition import (
    given,
    kernel,
    launched,
    moved_by,
    moving,
    spread,
    updating,
    with_update,
)


def _forward_fake(x: Tensor, residual: Tensor | None, *arguments: object) -> tuple[Tensor, Tensor]:
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    stats = torch.empty(3, x.shape[1], dtype=compute_dtype(x.dtype), device=x.device)
    return torch.empty_like(x, dtype=y_dtype), stats


@kernel(
    *with_update(
        "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
        "bool training, Tensor? momentum, float share, float eps, str activation, bool columns) "
        "-> (Tensor y, Tensor stats)"
    ),
    fake=_forward_fake,
)
def _forward(x: Tensor, *arguments: Any) -> Any:
    *others, momentum, share, eps, activation, columns = arguments
    return launched(
        kernels.forward, x, *others, moved_by(momentum, share), eps, activation, view_of(x, columns)
    )


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
) -> tuple[Tensor, Tensor]:
    moves = training and (running_mean is not None or num_batches_tracked is not None)
    y, stats = updating("batch_norm_forward", moves)(
        x, residual, weight, bias, running_mean, running_var, num_batches_tracked,
        training, *moving(momentum), eps, activation, view.columns,
    )  # fmt: skip
    return y, stats


def gradients_wanted(
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    wants_dx: bool,
    dz_dtype: torch.dtype | None,
    wants_dw: bool,
    db_dtype: torch.dtype | None,
) -> tuple[bool, bool, bool, bool]:
    """Whether a backward returns a dx, a dz, a dweight and a dbias."""
    gated = y is not None or residual is not None
    has_dz, has_dw = gated and dz_dtype is not None, wants_dw and weight is not None
    return wants_dx, has_dz, has_dw, db_dtype is not None


def gradients_fake(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    """Those of any operator that begins with dy, x, y, … and ends with what is wanted."""
    y, residual, weight, *_ = arguments
    wanted = gradients_wanted(y, residual, weight, *arguments[-4:])
    _, dz_dtype, _, db_dtype = arguments[-4:]
    found = (
        torch.empty_like(x),
        torch.empty_like(dy, dtype=dz_dtype),
        None if weight is None else torch.empty_like(weight),
        torch.empty(x.shape[1], dtype=db_dtype, device=x.device),
    )
    return given(found, wanted)


@kernel(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor stats, bool training, str activation, bool columns, "
    "bool wants_dx, ScalarType? dz_dtype, bool wants_dw, ScalarType? db_dtype) -> Tensor[]",
    fake=gradients_fake,
)
def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *others, columns, wants_dx, dz_dtype, wants_dw, db_dtype = arguments
    wanted = wants_dx, dz_dtype, wants_dw, db_dtype
    found = launched(kernels.backward, dy, x, *others, view_of(x, columns), wanted)
    y, residual, weight, *_ = others
    return gradients_found(found, gradients_wanted(y, residual, weight, *wanted), dz_dtype)


def gradients_found(
    found: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    present: tuple[bool, bool, bool, bool],
    dz_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Those of a launcher. Whether its dz has another dtype than is wanted depends on sizes."""
    dx, dz, dw, db = found
    if dz is not None and present[1]:
        dz = dz.to(dz_dtype)
    return given((dx, dz, dw, db), present)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    view: ChannelView,
    wanted: tuple[bool, torch.dtype | None, bool, torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    found = torch.ops.fastnorm.batch_norm_backward(
        dy, x, y, residual, weight, bias, stats, training, activation, view.columns, *wanted
    )
    return spread(found, gradients_wanted(y, residual, weight, *wanted))
