"""Tiles of rows (M, N) whose last axis is contiguous: BLOCK_M rows × BLOCK_N columns.

A tile holds whole rows, or a piece of one. Statistics are of a row; `CENTER` is false for RMSNorm,
whose moments are about zero: its mean and rest are 0 and its std is the root mean square.
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.channels import moments_of_tiles
from fastnorm.kernels.device.moments import (
    finite_or_zero,
    is_finite,
    merge_two,
    quotient,
    rstd_of_var,
    scale_of,
    sqrt,
)
from fastnorm.kernels.device.tiles import load_as, load_or, store_cast


@triton.jit
def wide_rows(M, N, ALIGN: tl.constexpr):
    """(M, N) as int64; the division shows the compiler that no vector straddles a mask."""
    return M.to(tl.int64), N.to(tl.int64) // ALIGN * ALIGN


@triton.jit
def wide_stride(stride, ALIGN: tl.constexpr):
    """A row stride as int64, known to be a multiple of a vector."""
    return stride.to(tl.int64) // ALIGN * ALIGN


@triton.jit
def rows_of(tile, M, BLOCK_M: tl.constexpr):
    """(row, inside); a tile of one row is inside, as the compiler can see."""
    row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row < M if BLOCK_M > 1 else tl.full((BLOCK_M,), 1, tl.int1)


@triton.jit
def columns_of(tile, N, BLOCK_N: tl.constexpr, FULL: tl.constexpr):
    """(col, inside); FULL: all are inside, as the compiler can see."""
    col = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return col, tl.full((BLOCK_N,), 1, tl.int1) if FULL else col < N


@triton.jit
def centered(x, mean, rest, CENTER: tl.constexpr):
    """x − mean − rest of a tile; what lies outside its mask is not 0."""
    return (x - mean[:, None]) - rest[:, None] if CENTER else x


@triton.jit
def deviations(x, inside, count, CENTER: tl.constexpr):
    """(mean, rest, x − mean − rest) of each row: the mean of a large one in two numbers."""
    zero = tl.zeros((x.shape[0],), x.dtype)
    if not CENTER:
        return zero, zero, x
    mean = quotient(tl.sum(x, axis=1), count)
    d = tl.where(inside, x - mean[:, None], 0.0)
    rest = quotient(tl.sum(d, axis=1), count)
    return mean, rest, tl.where(inside, d - rest[:, None], 0.0)


@triton.jit
def row_moments(x, inside, count, eps, CENTER: tl.constexpr):
    """(mean, rest, std, rstd, x − mean − rest) of each row of a tile, and 0 outside, as x is."""
    mean, rest, d = deviations(x, inside, count, CENTER)
    var = tl.sum(d * d, axis=1) / count
    std, rstd = sqrt(var), rstd_of_var(var, 1.0, eps)  # nothing is computed that nobody takes
    if tl.max(tl.where(is_finite(var), 0, 1), axis=0) > 0:  # a sum overflowed, or x is not finite
        scale, unit = scale_of(tl.max(tl.abs(x), axis=1))
        x_u = x * unit[:, None]
        mean, rest, d = deviations(x_u, inside, count, CENTER)
        if CENTER:  # an infinite mean is one, and no NaN
            mean = tl.where(is_finite(mean), mean, tl.sum(x_u, axis=1) / count)
        var = tl.sum(d * d, axis=1) / count
        std, rstd = sqrt(var) * scale, rstd_of_var(var, unit, eps)
        mean *= scale
        rest *= scale
        d = centered(x, mean, rest, CENTER)
    return mean, rest, std, rstd, d


@triton.jit
def load_sum(x_ptr, x_at, residual_ptr, residual_at, sum_ptr, mask, ACC: tl.constexpr):
    """x; or x + residual as the sum's dtype rounds it, which is what the backward will see."""
    x = load_as(x_ptr, x_at, mask, ACC)
    if residual_ptr is not None:
        x += load_as(residual_ptr, residual_at, mask, ACC)
        x = x.to(sum_ptr.dtype.element_ty).to(ACC)
    return x


@triton.jit
def moments_of_row(
    x_ptr, residual_ptr, sum_ptr, first, last, N, ACC: tl.constexpr,
    CENTER: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(count, mean, rest, std), each (1,), of tiles first … last-1 of the row at these pointers.

    Stores the sum, if there is one.
    """
    base = tl.zeros((1,), ACC)
    count = tl.zeros((1,), ACC)
    mean = tl.zeros((1,), ACC)  # relative to base
    std = tl.zeros((1,), ACC)
    for tile in tl.range(first, last, num_stages=STAGES):
        col, inside = columns_of(tile, N, BLOCK_N, FULL)
        at, mask = col[None, :], inside[None, :]
        x = load_sum(x_ptr, at, residual_ptr, at, sum_ptr, mask, ACC)
        store_cast(sum_ptr, at, x, mask)
        count_t = tl.sum(mask.to(tl.int32), axis=1).to(ACC)
        mean_t, rest_t, std_t, _, _ = row_moments(x, mask, count_t, 0.0, CENTER)
        if tile == first:
            base = finite_or_zero(mean_t)
        mean_t = (mean_t - base) + rest_t
        count, mean, std = merge_two(count, mean, std, count_t, mean_t, std_t)
    return count, base, mean, std


@triton.jit
def moments_of_long_row(
    x_ptr, residual_ptr, sum_ptr, first, last, N, ACC: tl.constexpr,
    CENTER: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`moments_of_row` of many tiles: where nothing is added, each thread sums its own."""
    std = tl.full((1,), float("inf"), ACC)
    count, mean, rest = std, std, std
    if CENTER and residual_ptr is None:
        one = tl.zeros((1,), tl.int64)
        count, mean, rest, std = moments_of_tiles(
            x_ptr, first, last, one, one == 0, 1, 1, N, ACC,
            1, BLOCK_N, 1, FOLD, RUN, False, 1, FULL,
        )  # fmt: skip
    if tl.max(tl.where(is_finite(std), 0, 1), axis=0) > 0:  # not yet, or squares overflowed
        count, mean, rest, std = moments_of_row(
            x_ptr, residual_ptr, sum_ptr, first, last, N, ACC, CENTER, FULL, BLOCK_N, STAGES
        )
    return count, mean, rest, std


@triton.jit
def load_row_stats(stats_ptr, row, rmask, M, CENTER: tl.constexpr):
    """(mean, rest, rstd) that the forward saved; RMSNorm saves rstd alone."""
    rstd = tl.load(stats_ptr + row, mask=rmask, other=0.0)
    if not CENTER:
        zero = tl.zeros(rstd.shape, rstd.dtype)
        return zero, zero, rstd
    mean = tl.load(stats_ptr + M + row, mask=rmask, other=0.0)
    return mean, tl.load(stats_ptr + 2 * M + row, mask=rmask, other=0.0), rstd


@triton.jit
def store_row_stats(stats_ptr, row, rmask, M, mean, rest, rstd, CENTER: tl.constexpr):
    tl.store(stats_ptr + row, rstd, mask=rmask)
    if CENTER:
        tl.store(stats_ptr + M + row, mean, mask=rmask)
        tl.store(stats_ptr + 2 * M + row, rest, mask=rmask)


@triton.jit
def load_scale(w_ptr, b_ptr, col, inside, ACC: tl.constexpr):
    """(w, b) of some columns; 1 and −0, which change nothing, where they are absent."""
    b = load_or(b_ptr, col, inside, 0.0, ACC)
    if b_ptr is None:  # a zero loses its sign in tl.full
        b *= -1.0
    return load_or(w_ptr, col, inside, 1.0, ACC), b


@triton.jit
def load_xhat_dz_wdz(
    dy_ptr, dy_at, x_ptr, x_at, w, b, mask, mean, rest, rstd,
    ACT_GRAD: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """x̂, dz = dy · act′(z) and dz · w of a tile, 0 outside."""
    ACC: tl.constexpr = rstd.dtype
    dy = load_as(dy_ptr, dy_at, mask, ACC)
    xhat = centered(load_as(x_ptr, x_at, mask, ACC), mean, rest, CENTER) * rstd[:, None]
    xhat = tl.where(mask, xhat, 0.0)
    dz = tl.where(mask, ACT_GRAD(dy, xhat * w[None, :] + b[None, :]), 0.0)
    return xhat, dz, dz * w[None, :]


@triton.jit
def input_gradient(xhat, wdz, rstd, c1, c2, dsum_ptr, dsum_at, mask, CENTER: tl.constexpr):
    """(wdz − c2 − x̂ c1) rstd, and the gradient of the sum that the forward returned, if any."""
    dx = wdz - xhat * c1[:, None]
    if CENTER:
        dx -= c2[:, None]
    dx *= rstd[:, None]
    if dsum_ptr is not None:
        dx += load_as(dsum_ptr, dsum_at, mask, rstd.dtype)
    return dx


@triton.jit
def store_column_sums(partial_ptr, p, t, col, inside, N):
    """Sum a tile over its rows into row p of (P, N) partials; nothing where they are absent."""
    if partial_ptr is not None:
        store_cast(partial_ptr, p.to(tl.int64) * N + col, tl.sum(t, axis=0), inside)
