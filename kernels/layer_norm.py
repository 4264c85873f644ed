"""LayerNorm and RMSNorm of M rows of N elements: of a contiguous tensor, or of an (M, N) one whose
last axis is contiguous.

Forward, per row; with a residual, x is its sum with the input, as the sum's dtype rounds it:
    mean = Σ x / N        std² = Σ (x - mean)² / N        rstd = 1 / √(std² + eps)
    x̂ = (x - mean) · rstd
    y = act(x̂ · w + b)
RMSNorm: mean = 0 and b = 0; std is then the root mean square.

Backward, with dz = dy · act′(x̂ · w + b), summed over rows for dw and db, over a row for c1 and c2:
    db = Σ dz             dw = Σ dz · x̂
    c1 = Σ dz · w · x̂     c2 = Σ dz · w
    dx = (dz · w - c2 / N - x̂ · c1 / N) · rstd (+ dsum)
RMSNorm has no c2. dsum is the gradient of the sum that the forward returned.

Bytes. A row that fits registers is read once, forward and backward. A longer one is read again by
the same program, from a cache; where rows are few they are split over programs, and read twice.
The backward of rows too wide for registers reads x and dy twice: once for c1 and c2, once more for
dx, in tiles of columns, where the sums for dw and db fit. z is recomputed, nothing saved for act′.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels.device.activations import ACTIVATIONS
from fastnorm.kernels.devices import Device, device_of
from fastnorm.kernels.launch import cdiv, divisor_class
from fastnorm.kernels.layer_norm_bwd import layer_norm_bwd_kernel, layer_norm_bwd_reduce_kernel
from fastnorm.kernels.layer_norm_fwd import (
    layer_norm_fwd_apply_kernel,
    layer_norm_fwd_kernel,
    layer_norm_fwd_loop_kernel,
    layer_norm_fwd_moments_kernel,
)
from fastnorm.kernels.row_plans import (
    KEPT_ROW,
    ROW_PARTIALS,
    row_gradient_plan,
    row_plan,
    row_sums_plan,
)
from fastnorm.kernels.sums import sum_partials


def _strides(N: int, *tensors: Tensor | None) -> list[int]:
    """From row to row."""
    return [0 if t is None else N if t.is_contiguous() else t.stride(0) for t in tensors]


def _align(N: int, strides: list[int]) -> int:
    """The vector, in elements, that divides the rows' length and every row's start."""
    return divisor_class(math.gcd(N, *strides))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    center: bool,
    N: int,
    shape: Sequence[int],
    y_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (y, sum, stats): stats is (3, M) with the rows rstd, mean, rest, or rstd alone.

    There is a sum only with a residual. y and the sum have `shape`, of M · N elements, and are no
    views, which autograd would not let anybody change. Both have the promoted dtype of x and
    residual, unless y is given another.
    """
    M = x.numel() // N
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(shape, dtype=y_dtype or dtype, device=x.device)
    total = None if residual is None else torch.empty_like(y, dtype=dtype)
    stats = torch.empty(3 if center else 1, M, dtype=_compute_dtype(y), device=x.device)
    strides = _strides(N, x, residual)
    align = _align(N, strides)
    loaded = x.element_size() + (0 if residual is None else residual.element_size())
    plan = row_plan(M, N, dtype.itemsize, align, loaded, device_of(x.device))
    act, _ = ACTIVATIONS[activation]
    options = {
        "CENTER": center, "FULL": plan.is_full(N), "BLOCK_N": plan.block_n, "ALIGN": align,
        **plan.options,
    }  # fmt: skip
    if plan.whole:
        layer_norm_fwd_kernel[(plan.programs,)](
            x, residual, weight, bias, total, y, stats, eps, M, N, *strides,
            plan.tiles, plan.tiles_per_program,
            ACT=act, KEEP=plan.block_n <= KEPT_ROW,
            BLOCK_M=plan.block_m, STAGES=plan.stages, **options,
        )  # fmt: skip
    elif plan.programs == 1:
        layer_norm_fwd_loop_kernel[(M,)](
            x, residual, weight, bias, total, y, stats, eps, M, N, *strides, plan.tiles,
            ACT=act, **options,
        )  # fmt: skip
    else:
        grid, share = (M * plan.programs,), (plan.tiles, plan.tiles_per_program)
        partial = torch.empty(4, M, plan.programs, dtype=stats.dtype, device=x.device)
        layer_norm_fwd_moments_kernel[grid](
            x, residual, total, partial, M, N, plan.programs, *strides, *share,
            FOLD=plan.fold, RUN=plan.run, STAGES=plan.stages, **options,
        )  # fmt: skip
        layer_norm_fwd_apply_kernel[grid](
            x if total is None else total, weight, bias, partial, y, stats, eps,
            M, N, plan.programs, strides[0] if total is None else N, *share,
            ACT=act, BLOCK_P=ROW_PARTIALS, **options,
        )  # fmt: skip
    return y, total, stats


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    dsum: Tensor | None,
    activation: str,
    N: int,
    shape: Sequence[int],
    wanted: tuple[bool, bool, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dweight, dbias), None where not `wanted`; dbias has the dtype `wanted`.

    dx has `shape`. x is what was normalized: the sum, where there was a residual. bias is given
    where act′ needs z.
    """
    M = x.numel() // N
    wants_dx, wants_dw, db_dtype = wanted
    dx = torch.empty(shape, dtype=x.dtype, device=x.device) if wants_dx else None
    dw = torch.empty_like(weight) if weight is not None and wants_dw else None
    db = None if db_dtype is None else torch.empty(N, dtype=db_dtype, device=x.device)
    device = device_of(x.device)
    _, gate = ACTIVATIONS[activation]
    strides = _strides(N, dy, x, dsum)
    align = _align(N, strides)
    loaded = sum(t.element_size() for t in (dy, x, dsum) if t is not None)
    plan = row_gradient_plan(M, N, x.element_size(), align, loaded, bias is not None, device)
    options = {"ACT_GRAD": gate, "CENTER": stats.shape[0] == 3, "ALIGN": align}
    operands = (dy, x, weight, bias, stats)
    sums = _row_sums(*operands, M, N, strides, device, options) if wants_dx else None

    dw_partial, db_partial = (
        None if total is None
        else torch.empty(plan.programs, N, dtype=stats.dtype, device=x.device)
        for total in (dw, db)
    )  # fmt: skip
    layer_norm_bwd_kernel[(plan.programs * cdiv(N, plan.block_n),)](
        *operands, sums, dsum, dx, dw_partial, db_partial,
        M, N, plan.programs, *strides, plan.tiles, plan.tiles_per_program,
        FULL=plan.is_full(N), BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, FOLD=plan.fold,
        STAGES=plan.stages, **options, **plan.options,
    )  # fmt: skip
    sum_partials(dw_partial, db_partial, None, dw, db)
    return dx, dw, db


def _row_sums(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    M: int,
    N: int,
    strides: list[int],
    device: Device,
    options: dict[str, Any],
) -> Tensor | None:
    """c1 and c2 as (2, M), where rows are too wide for one tile."""
    loaded = dy.element_size() + x.element_size()
    plan = row_sums_plan(M, N, x.element_size(), options["ALIGN"], loaded, device)
    if plan is None:
        return None
    partial = torch.empty(2, plan.programs, M, dtype=stats.dtype, device=x.device)
    layer_norm_bwd_reduce_kernel[(M * plan.programs,)](
        dy, x, weight, bias, stats, partial, M, N, plan.programs, *strides[:2],
        plan.tiles, plan.tiles_per_program, FULL=plan.is_full(N), BLOCK_N=plan.block_n,
        # what is loaded ahead goes past the first-level cache, where other programs leave w
        STAGES=plan.stages if weight is None else 1, **options, **plan.options,
    )  # fmt: skip
    if plan.programs == 1:
        return partial[:, 0]
    sums = torch.empty(2, M, dtype=stats.dtype, device=x.device)
    sum_partials(partial[0], partial[1], sums, None, None)
    return sums
