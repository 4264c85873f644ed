"""The launchers of fastnorm/kernels/linear_batch_norm_epilogue.py as operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import linear_batch_norm_epilogue as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.kernels.products import compute_dtype, empty_rows
from fastnorm.ops.layout import on_device_of, view_of
from fastnorm.ops.library.definition import given, kernel, moving, spread
from fastnorm.ops.library.linear_batch_norm import FORWARD

_RETURNS = "(Tensor y, Tensor z, Tensor stats)"


def _forward_fake(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    N, view = weight.shape[0], view_of(x, arguments[-1])
    stats = torch.empty(3, N, dtype=compute_dtype(x.dtype), device=x.device)
    return empty_rows(x, N, view), empty_rows(x, N, view), stats


@kernel(
    "linear_batch_norm_epilogue_forward" + FORWARD.format("", "", _RETURNS),
    "linear_batch_norm_epilogue_forward_with_update" + FORWARD.format("(a!)", "(b!)", _RETURNS),
    fake=_forward_fake,
)
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: Tensor | None,
    share: float,
    eps: float,
    activation: str,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with on_device_of(x):
        return kernels.forward(
            x, weight, bias, norm_weight, norm_bias, running_mean, running_var,
            training, share if momentum is None else momentum, eps, activation,
            view_of(x, columns),
        )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
) -> tuple[Tensor, Tensor, Tensor]:
    operators = torch.ops.fastnorm
    moves = training and running_mean is not None
    operator = (
        operators.linear_batch_norm_epilogue_forward_with_update
        if moves
        else operators.linear_batch_norm_epilogue_forward
    )
    y, z, stats = operator(
        x, weight, bias, norm_weight, norm_bias, running_mean, running_var,
        training, *moving(momentum), eps, activation, view.columns,
    )  # fmt: skip
    return y, z, stats


def _wanted(
    norm_weight: Tensor | None,
    training: bool,
    wanted: Sequence[bool],
    dbeta_dtype: torch.dtype | None,
) -> tuple[bool, ...]:
    """Whether a backward returns a dx, a dweight, a dbias, a dγ and a dβ."""
    wants_dx, wants_dw, wants_db, wants_dgamma = wanted
    has_dgamma = wants_dgamma and norm_weight is not None
    return wants_dx, wants_dw, wants_db and not training, has_dgamma, dbeta_dtype is not None


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    wanted: Sequence[bool],
    dbeta_dtype: torch.dtype | None,
) -> list[Tensor]:
    N = weight.shape[0]
    found = (
        torch.empty(x.shape, dtype=z.dtype, device=x.device),
        torch.empty(weight.shape, dtype=z.dtype, device=x.device),
        torch.empty(N, dtype=z.dtype, device=x.device),
        None if norm_weight is None else torch.empty_like(norm_weight),
        torch.empty(N, dtype=dbeta_dtype, device=x.device),
    )
    return given(found, _wanted(norm_weight, training, wanted, dbeta_dtype))


@kernel(
    "linear_batch_norm_epilogue_backward(Tensor dy, Tensor x, Tensor z, Tensor weight, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor stats, bool training, str activation, "
    "bool[] wanted, ScalarType? dbeta_dtype) -> Tensor[]",
    fake=_backward_fake,
)
def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    wanted: Sequence[bool],
    dbeta_dtype: torch.dtype | None,
) -> list[Tensor]:
    wants_dx, wants_dw, wants_db, wants_dgamma = wanted
    with on_device_of(x):
        gradients = kernels.backward(
            dy, x, z, weight, norm_weight, norm_bias, stats, training, activation,
            (wants_dx, wants_dw, wants_db, wants_dgamma, dbeta_dtype),
        )  # fmt: skip
    return given(gradients, _wanted(norm_weight, training, wanted, dbeta_dtype))


def backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    wanted: tuple[bool, bool, bool, bool, torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    *flags, dbeta_dtype = wanted
    found = torch.ops.fastnorm.linear_batch_norm_epilogue_backward(
        dy, x, z, weight, norm_weight, norm_bias, stats, training, activation, flags, dbeta_dtype
    )
    return spread(found, _wanted(norm_weight, training, flags, dbeta_dtype))
