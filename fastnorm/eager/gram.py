"""The N×K, K×K and vector arithmetic of the gram algorithm, in torch operators.

The formulas are in fastnorm/kernels/linear_batch_norm.py. All of it is float64: where all
channels of X share a signal that a row of W cancels, var = w S wᵀ / M is a small difference of
large numbers. Nothing here is as large as X or Y.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """What turns X Wᵀ into x̂: (X Wᵀ − centre) ∘ rstd; float64, and ws in what is computed in."""

    x_mean: Tensor | None  # (K,), None in evaluation
    ws: Tensor | None  # (N, K): rstd ∘ W S, which cannot overflow; None in evaluation
    centre: Tensor  # (N,): W x̄ in training, μ − b in evaluation
    rstd: Tensor  # (N,)
    cancels: Tensor | None  # (): whether some row of W cancels most of X; None in evaluation
    # Where rstd and centre are of all processes: (N,) W x̄ − centre, and (): everybody's rows.
    apart: Tensor | None = None
    rows: Tensor | None = None


class Gradients(NamedTuple):
    """Of the parameters, and what dX is made of; all float64."""

    dweight: Tensor  # (N, K)
    dgamma: Tensor  # (N,)
    a: Tensor | None  # (K, K), None in evaluation
    dx_mean: Tensor | None  # (K,): (α c₁)ᵀ W, None in evaluation


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


CANCELLED = 1e3
"""How much smaller than the sum of its terms a variance may be before more digits are kept.

16-bit products that were added up in float32 have an error of some 1e-8 of that sum: some 1e-5 of
the variance then.
"""


def batch_statistics(
    x_mean: Tensor,
    s: Tensor,
    weight: Tensor,
    rows: int,
    eps: float,
    shared: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Statistics, Tensor]:
    """Statistics of X Wᵀ over `rows` rows, and its biased variance, from x̄ and S.

    `shared` makes (centre, variance, rows) of all processes from centre and variance of this one.
    """
    w = weight.double()
    ws = w @ s
    left = torch.linalg.vecdot(ws, w)
    terms = w.square() @ torch.addcmul(s.diagonal(), x_mean, x_mean, value=rows)
    fine = (terms <= CANCELLED * (left + rows * eps)).all()  # not where something is not finite
    var = left.clamp_min_(0).div_(rows)
    centre = w @ x_mean
    apart = total = None
    if shared is not None:
        own = centre
        centre, var, total = shared(own, var)
        apart = own - centre
    rstd = (var + eps).rsqrt_()
    ws = (ws * rstd[:, None]).to(compute_dtype(weight.dtype))
    return Statistics(x_mean, ws, centre, rstd, ~fine, apart, total), var


def fixed_statistics(
    running_mean: Tensor, running_var: Tensor, bias: Tensor | None, eps: float
) -> Statistics:
    """Statistics that the buffers hold."""
    centre = running_mean.double().reshape(-1)
    if bias is not None:
        centre = centre - bias.double()
    rstd = (running_var.double().reshape(-1) + eps).rsqrt_()
    return Statistics(None, None, centre.clone(), rstd, None)


def fixed_moments(statistics: Statistics, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (mean, var) of Z that gave these statistics in evaluation, eps within var."""
    mean = statistics.centre if bias is None else statistics.centre + bias.detach()
    return mean, statistics.rstd**-2


def move_buffers(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    rows: int,
    momentum: float | Tensor,
) -> None:
    """Move the buffers towards the batch's mean and its unbiased variance."""
    share = momentum.double() if isinstance(momentum, Tensor) else momentum
    for running, batch in ((running_mean, mean), (running_var, var * (rows / (rows - 1)))):
        if running is not None:
            running.copy_(torch.lerp(running.double(), batch.view_as(running), share))


def scale_of(statistics: Statistics, norm_weight: Tensor | None) -> Tensor:
    """α = γ ∘ rstd."""
    if norm_weight is None:
        return statistics.rstd
    return statistics.rstd * norm_weight.double().reshape(-1)


def gradients(
    p: Tensor,
    dbeta: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    alpha: Tensor,
    statistics: Statistics,
    rows: int,
    wants_dx: bool,
    summed: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """From P = Gᵀ(X − shift) and dβ = 1ᵀG, both float64.

    `summed` adds up over all processes, where the statistics are theirs. There x̂ of this one's rows
    has a mean, r ∘ apart, and dz none of its own:
        dγ gets r ∘ dβ ∘ apart        c₁ gets r ∘ c₂ ∘ apart        dW gets α ∘ (dβ − M c₁) x̄ᵀ
    """
    x_mean, ws, centre, rstd, *_ = statistics
    w = weight.double()
    if x_mean is None or ws is None:
        dgamma = rstd * (torch.linalg.vecdot(p, w) - dbeta * centre)
        return Gradients(alpha[:, None] * p, dgamma, None, None)
    rest = x_mean if shift is None else x_mean - shift
    p = torch.addr(p, dbeta, rest, alpha=-1)
    dgamma = rstd * torch.linalg.vecdot(p, w)
    c2, c1 = dgamma / rows, dbeta / rows
    if statistics.apart is not None and statistics.rows is not None:
        dgamma = torch.addcmul(dgamma, dbeta, rstd * statistics.apart)
        if summed is not None:
            total = summed(torch.stack([dgamma, dbeta]).to(ws.dtype)).double()
            c2, c1 = total / statistics.rows
            c1 = torch.addcmul(c1, c2, rstd * statistics.apart)
        p = torch.addr(p, dbeta - rows * c1, x_mean)
    dweight = alpha[:, None] * (p - c2[:, None] * ws)
    if not wants_dx:
        return Gradients(dweight, dgamma, None, None)
    a = w.T @ ((alpha * rstd * c2)[:, None] * w)
    return Gradients(dweight, dgamma, a, (alpha * c1) @ w)


def shift_of(statistics: Statistics, dtype: torch.dtype) -> Tensor | None:
    """What X is less as it is multiplied: x̄ rounded to its dtype, in training."""
    return None if statistics.x_mean is None else statistics.x_mean.to(dtype)


def folded_weight(weight: Tensor, alpha: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(α∘W / unit, unit), a power of two that makes its largest element about 1."""
    folded, unit = _in_unit(alpha[:, None] * weight.double())
    return folded.to(dtype), unit


def folded_for_input(
    small: Gradients, statistics: Statistics, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float, Tensor]:
    """(a, unit, offset) of dX = G α∘W + (X − shift) a · unit + offset, a = −A / unit rounded."""
    assert small.a is not None
    assert small.dx_mean is not None
    assert statistics.x_mean is not None
    folded, unit = _in_unit(-small.a)
    a = folded.to(dtype)
    offset = ((statistics.x_mean - shift) @ a.double()) * -unit - small.dx_mean
    return a, unit, offset.to(dtype)


def _in_unit(values: Tensor) -> tuple[Tensor, float]:
    """Squares of inputs near the maximum make numbers that float32 has no place for."""
    unit = 2.0 ** math.frexp(values.abs().amax().item())[1]  # 1 where not finite
    return values / unit, unit
