"""The launchers of fastnorm/kernels/batch_norm.py as operators."""

from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import batch_norm as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.ops.layout import on_device_of, view_of
from fastnorm.ops.library.definition import given, kernel, moving, spread

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor{}? running_mean, Tensor{}? running_var, Tensor{}? num_batches_tracked, bool training, "
    "Tensor? momentum, float share, float eps, str activation, bool columns) "
    "-> (Tensor y, Tensor stats)"
)


def _forward_fake(x: Tensor, residual: Tensor | None, *arguments: object) -> tuple[Tensor, Tensor]:
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    stats = torch.empty(3, x.shape[1], dtype=dtype, device=x.device)
    return torch.empty_like(x, dtype=y_dtype), stats


@kernel(
    "batch_norm_forward" + _FORWARD.format("", "", ""),
    "batch_norm_forward_with_update" + _FORWARD.format("(a!)", "(b!)", "(c!)"),
    fake=_forward_fake,
)
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: Tensor | None,
    share: float,
    eps: float,
    activation: str,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    with on_device_of(x):
        return kernels.forward(
            x, residual, weight, bias, running_mean, running_var, num_batches_tracked,
            training, share if momentum is None else momentum, eps, activation,
            view_of(x, columns),
        )  # fmt: skip


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
    operators = torch.ops.fastnorm
    moves = training and (running_mean is not None or num_batches_tracked is not None)
    operator = operators.batch_norm_forward_with_update if moves else operators.batch_norm_forward
    y, stats = operator(
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


def gradients_fake(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    *options: Any,
) -> list[Tensor]:
    """Those of any operator that ends with what is wanted."""
    wanted = gradients_wanted(y, residual, weight, *options[-4:])
    _, dz_dtype, _, db_dtype = options[-4:]
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
def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    columns: bool,
    *wanted: Any,
) -> list[Tensor]:
    with on_device_of(x):
        dx, dz, dw, db = kernels.backward(
            dy, x, y, residual, weight, bias, stats, training, activation, view_of(x, columns),
            wanted,
        )  # fmt: skip
    return gradients_found(dx, dz, dw, db, gradients_wanted(y, residual, weight, *wanted), wanted)


def gradients_found(
    dx: Tensor | None,
    dz: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
    present: tuple[bool, bool, bool, bool],
    wanted: tuple[Any, ...],
) -> list[Tensor]:
    """Those of a launcher. Whether its dz has another dtype than is wanted depends on sizes."""
    if dz is not None and present[1]:
        dz = dz.to(wanted[1])
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
