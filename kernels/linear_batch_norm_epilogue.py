"""Linear + BatchNorm with a product that leaves the statistics of what it writes.

The formulas are in linear_batch_norm.py and batch_norm.py.
"""

from functools import partial

import torch
from torch import Tensor

from fastnorm.kernels import batch_norm
from fastnorm.kernels.launch import ChannelView, cdiv
from fastnorm.kernels.linear_batch_norm_fwd import linear_batch_norm_fwd_epilogue_kernel
from fastnorm.kernels.products import (
    GROUP,
    aligns,
    compute_dtype,
    empty_rows,
    output_tiles,
    precision,
)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, view: ChannelView, training: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return (z, found) of x (B, K, *); found for batch_norm.forward, None in evaluation."""
    B, K, S = view[:3]
    N = weight.shape[0]
    z = empty_rows(x, N, view)
    plan, tile = output_tiles(x, view, N)
    found = None
    if training:
        empty = partial(torch.empty, dtype=compute_dtype(x.dtype), device=x.device)
        found = empty((3, plan.tiles, N)), empty((plan.tiles,))
    linear_batch_norm_fwd_epilogue_kernel[(plan.tiles * cdiv(N, tile["BLOCK_N"]),)](
        x, weight, bias, z, *(found or (None, None)), B, N, K, S, plan.tiles,
        PRECISION=precision(x.dtype), GROUP=GROUP, **tile, **aligns(view, N, K),
    )  # fmt: skip
    return z, found


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
    """Return (y, z, stats) of x (M, K), stats (3, N) with the rows mean, rest, rstd."""
    z, found = product(x, weight, bias, view, training)
    y, stats = batch_norm.forward(
        z, None, norm_weight, norm_bias, running_mean, running_var, None,
        training, momentum, eps, activation, view._replace(C=weight.shape[0]),
        found,
    )  # fmt: skip
    return y, z, stats


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
    """Return (dx, dweight, dbias, dγ, dβ) of x (M, K), None where not `wanted`.

    dβ has the dtype that is wanted.
    """
    wants_dx, wants_dw, wants_db, wants_dgamma, dbeta_dtype = wanted
    view = ChannelView(1, z.shape[1], z.shape[0], columns=True)
    through = wants_dx or wants_dw or (wants_db and not training)
    dz, _, dgamma, dbeta = batch_norm.backward(
        dy, z, None, None, norm_weight, norm_bias, stats, training, activation, view,
        (through, None, wants_dgamma, dbeta_dtype),
    )  # fmt: skip
    dx = dw = db = None
    if dz is not None:
        dx = dz @ weight if wants_dx else None
        dw = dz.T @ x if wants_dw else None
        db = dz.sum(0) if wants_db and not training else None
    return dx, dw, db, dgamma, dbeta
