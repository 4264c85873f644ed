"""The launchers of fastnorm/kernels/group_norm.py as operators."""

from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import group_norm as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.kernels.products import compute_dtype
from fastnorm.ops.layout import view_of
from fastnorm.ops.library.batch_norm import gradients_fake, gradients_found, gradients_wanted
from fastnorm.ops.library.definition import (
    kernel,
    launched,
    moved_by,
    moving,
    spread,
    updating,
    with_update,
)


def _forward_fake(x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, num_groups, y_dtype = arguments
    if y_dtype is None:
        y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    stats = torch.empty(3, x.shape[0] * num_groups, dtype=compute_dtype(x.dtype), device=x.device)
    return torch.empty_like(x, dtype=y_dtype), stats


@kernel(
    *with_update(
        "group_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? momentum, float share, "
        "float eps, str activation, bool columns, SymInt num_groups, ScalarType? y_dtype) "
        "-> (Tensor y, Tensor stats)"
    ),
    fake=_forward_fake,
)
def _forward(x: Tensor, *arguments: Any) -> Any:
    *others, momentum, share, eps, activation, columns, num_groups, y_dtype = arguments
    return launched(
        kernels.forward, x, *others, moved_by(momentum, share), eps, activation,
        view_of(x, columns, by_sample=True), num_groups, y_dtype,
    )  # fmt: skip


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
    num_groups: int,
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    y, stats = updating("group_norm_forward", running_mean is not None)(
        x, residual, weight, bias, running_mean, running_var, *moving(momentum), eps, activation,
        view.columns, num_groups, y_dtype,
    )  # fmt: skip
    return y, stats


@kernel(
    "group_norm_backward(Tensor dy, Tensor x, Tensor? y, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor stats, str activation, bool columns, SymInt num_groups, "
    "bool wants_dx, ScalarType? dz_dtype, bool wants_dw, ScalarType? db_dtype) -> Tensor[]",
    fake=gradients_fake,
)
def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *others, columns, num_groups, wants_dx, dz_dtype, wants_dw, db_dtype = arguments
    wanted = wants_dx, dz_dtype, wants_dw, db_dtype
    view = view_of(x, columns, by_sample=True)
    found = launched(kernels.backward, dy, x, *others, view, num_groups, wanted)
    y, residual, weight, *_ = others
    return gradients_found(found, gradients_wanted(y, residual, weight, *wanted), dz_dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    activation: str,
    view: ChannelView,
    num_groups: int,
    wanted: tuple[bool, torch.dtype | None, bool, torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    found = torch.ops.fastnorm.group_norm_backward(
        dy, x, y, residual, weight, bias, stats, activation, view.columns, num_groups, *wanted
    )
    return spread(found, gradients_wanted(y, residual, weight, *wanted))
