"""The launchers of fastnorm/kernels/linear_batch_norm.py as operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels import linear_batch_norm as kernels
from fastnorm.kernels.launch import ChannelView, cdiv
from fastnorm.kernels.linear_batch_norm import Folded
from fastnorm.kernels.products import FOLD_ROWS, compute_dtype, empty_rows
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

FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, bool training, Tensor? momentum, "
    "float share, float eps, str activation, bool columns) -> "
)
_GRAM = (
    "(Tensor y, Tensor x_mean, Tensor ws, Tensor stats, Tensor sizes, Tensor flags, Tensor shift)"
)


def _has(x: Tensor, training: bool) -> tuple[bool, ...]:
    """Which fields of a Folded are there, but for the last: a graph has no other processes."""
    narrow = x.element_size() == 2
    return training, training, True, True, training and narrow, training and not narrow


def _gram_forward_fake(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    training, columns = arguments[5], arguments[-1]
    N, K = weight.shape
    F = cdiv(N, FOLD_ROWS)
    shapes = ((K,), (N, K), (5, N), (F,), (F,), (K,))
    wide, compute = torch.float64, compute_dtype(x.dtype)
    dtypes = (wide, compute, wide, wide, torch.int32, compute)
    folded = (
        torch.empty(shape if has else (0,), dtype=dtype, device=x.device)
        for shape, dtype, has in zip(shapes, dtypes, _has(x, training), strict=True)
    )
    return empty_rows(x, N, view_of(x, columns)), *folded


@kernel(
    *with_update("linear_batch_norm_gram_forward" + FORWARD + _GRAM),
    fake=_gram_forward_fake,
)
def _gram_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, momentum, share, eps, activation, columns = arguments
    y, folded = launched(
        kernels.gram_forward, x, *others, moved_by(momentum, share), eps, activation,
        view_of(x, columns),
    )  # fmt: skip
    wide, whole, single = torch.float64, torch.int32, compute_dtype(x.dtype)
    absent = (  # an operator returns no None
        torch.empty(0, dtype=dtype, device=x.device)
        for dtype in (wide, single, wide, wide, whole, single)
    )
    return y, *(a if t is None else t for t, a in zip(folded[:6], absent, strict=True))


def gram_forward(
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
) -> tuple[Tensor, Folded]:
    moves = training and running_mean is not None
    y, *found = updating("linear_batch_norm_gram_forward", moves)(
        x, weight, bias, norm_weight, norm_bias, running_mean, running_var,
        training, *moving(momentum), eps, activation, view.columns,
    )  # fmt: skip
    there = zip(found, _has(x, training), strict=True)
    return y, Folded._make([*(t if has else None for t, has in there), None])


def _gram_wanted(
    training: bool, norm_weight: Tensor | None, norm_bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[bool, ...]:
    """Whether a backward returns a dx, a dweight, a dbias, a dγ and a dβ."""
    wants_dx, wants_dw, wants_db, wants_dgamma, wants_dbeta = wanted
    has_dgamma, has_dbeta = norm_weight is not None, norm_bias is not None
    return (
        wants_dx, wants_dw, wants_db and not training, wants_dgamma and has_dgamma,
        wants_dbeta and has_dbeta,
    )  # fmt: skip


def _gram_backward_fake(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    _, weight, norm_weight, norm_bias, bias_dtype, x_mean, *_, wanted = arguments
    found = (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty(weight.shape[0], dtype=bias_dtype, device=x.device),
        *(None if t is None else torch.empty_like(t) for t in (norm_weight, norm_bias)),
    )
    return given(found, _gram_wanted(x_mean is not None, norm_weight, norm_bias, wanted))


@kernel(
    "linear_batch_norm_gram_backward(Tensor dy, Tensor x, Tensor? y, Tensor weight, "
    "Tensor? norm_weight, Tensor? norm_bias, ScalarType? bias_dtype, Tensor? x_mean, Tensor? ws, "
    "Tensor stats, Tensor sizes, Tensor? flags, Tensor? shift, str activation, bool columns, "
    "bool[] wanted) -> Tensor[]",
    fake=_gram_backward_fake,
)
def _gram_backward(dy: Tensor, x: Tensor, *arguments: Any) -> list[Tensor]:
    y, weight, norm_weight, norm_bias, bias_dtype, *found, activation, columns, wanted = arguments
    folded = Folded(*found)
    gradients = launched(
        kernels.gram_backward, dy, x, y, weight, norm_weight, norm_bias, bias_dtype, folded,
        activation, view_of(x, columns), tuple(wanted),
    )  # fmt: skip
    training = folded.x_mean is not None
    return given(gradients, _gram_wanted(training, norm_weight, norm_bias, wanted))


def gram_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    folded: Folded,
    activation: str,
    view: ChannelView,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    found = torch.ops.fastnorm.linear_batch_norm_gram_backward(
        dy, x, y, weight, norm_weight, norm_bias, bias_dtype, *folded[:6], activation, view.columns,
        wanted,
    )  # fmt: skip
    training = folded.x_mean is not None
    return spread(found, _gram_wanted(training, norm_weight, norm_bias, wanted))
