"""The launchers of fastnorm/kernels/linear_batch_norm_epilogue.py as operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import linear_batch_norm_epilogue as kernels
from fastnorm.kernels.launch import ChannelView
from fastnorm.kernels.products import compute_dtype, empty_rows
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
from fastnorm.ops.library.linear_batch_norm import FORWARD


def _forward_fake(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    N, view = weight.shape[0], view_of(x, arguments[-1])
    stats = torch.empty(3, N, dtype=compute_dtype(x.dtype), device=x.device)
    return empty_rows(x, N, view), empty_rows(x, N, view), stats


@kernel(
    *with_update(
        "linear_batch_norm_epilogue_forward" + FORWARD + "(Tensor y, Tensor z, Tensor stats)"
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
    moves = training and running_mean is not None
    y, z, stats = updating("linear_batch_norm_epilogue_forward", moves)(
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
    dy: Tensor, x: Tensor, z: Tensor, weight: Tensor, norm_weight: Tensor | None, *arguments: Any
) -> list[Tensor]:
    *_, training, _, wanted, dbeta_dtype = arguments
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
def _backward(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    *others, training, activation, flags, dbeta_dtype = arguments
    gradients = launched(
        kernels.backward, dy, x, *others, training, activation, (*flags, dbeta_dtype)
    )
    _, _, norm_weight, *_ = others
    return given(gradients, _wanted(norm_weight, training, flags, dbeta_dtype))


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
