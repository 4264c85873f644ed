"""LayerNorm's and RMSNorm's forward kernels; the formulas are in layer_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.moments import (
    finite_or_zero,
    merge_partials,
    rstd_of,
    two_sum,
)
from fastnorm.kernels.device.rows import (
    centered,
    columns_of,
    load_scale,
    load_sum,
    moments_of_long_row,
    moments_of_row,
    row_moments,
    rows_of,
    store_row_stats,
    wide_rows,
    wide_stride,
)
from fastnorm.kernels.device.tiles import load_as, store_cast
from fastnorm.kernels.launch import ROW_SIZES


# One program owns some consecutive tiles of BLOCK_M whole rows, and keeps each in registers.
@triton.jit(do_not_specialize=ROW_SIZES)
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (M, N), (M, N), (N,), (N,)
    sum_ptr, y_ptr, stats_ptr,              # (M, N), (M, N), (3, M): rstd, mean, rest; RMS: (1, M)
    eps: tl.float64,
    M, N, stride_x_row, stride_residual_row, tiles, tiles_per_program,
    ACT: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    M, N = wide_rows(M, N, ALIGN)
    col, inside = columns_of(0, N, BLOCK_N, FULL)
    if KEEP:
        w, b = load_scale(w_ptr, b_ptr, col, inside, ACC)
    first = tl.program_id(0) * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        row, rmask = rows_of(tile, M, BLOCK_M)
        mask = rmask[:, None] & inside[None, :]
        at = (row * N)[:, None] + col[None, :]
        x = load_sum(
            x_ptr, (row * wide_stride(stride_x_row, ALIGN))[:, None] + col[None, :],
            residual_ptr, (row * wide_stride(stride_residual_row, ALIGN))[:, None] + col[None, :],
            sum_ptr, mask, ACC,
        )  # fmt: skip
        store_cast(sum_ptr, at, x, mask)
        mean, rest, _, rstd, d = row_moments(x, inside[None, :], N.to(ACC), eps, CENTER)
        store_row_stats(stats_ptr, row, rmask, M, mean, rest, rstd, CENTER)
        xhat = d * rstd[:, None]
        if KEEP:
            store_cast(y_ptr, at, ACT(xhat * w[None, :] + b[None, :]), mask)
        elif tile < tiles:  # it is; what is loaded within a branch is not loaded ahead
            w_t, b_t = load_scale(w_ptr, b_ptr, col, inside, ACC)
            store_cast(y_ptr, at, ACT(xhat * w_t[None, :] + b_t[None, :]), mask)


@triton.jit
def normalize_row(
    x_ptr, residual_ptr, sum_ptr, w_ptr, b_ptr, y_ptr, first, last, N, mean, rest, rstd,
    ACT: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y of the tiles of one row, last tile first: what was read before is still in the cache."""
    ACC: tl.constexpr = rstd.dtype
    for i in range(first, last):
        col, inside = columns_of(first + last - 1 - i, N, BLOCK_N, FULL)
        at, mask = col[None, :], inside[None, :]
        x = load_sum(x_ptr, at, residual_ptr, at, sum_ptr, mask, ACC)
        w, b = load_scale(w_ptr, b_ptr, col, inside, ACC)
        xhat = centered(x, mean, rest, CENTER) * rstd[:, None]
        z = xhat * w[None, :] + b[None, :]
        store_cast(y_ptr, at, ACT(z), mask)


# One program owns a row of several tiles, and reads it twice: the second time from a cache.
@triton.jit(do_not_specialize=ROW_SIZES)
def layer_norm_fwd_loop_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (M, N), (M, N), (N,), (N,)
    sum_ptr, y_ptr, stats_ptr,              # (M, N), (M, N), (3, M): rstd, mean, rest; RMS: (1, M)
    eps: tl.float64,
    M, N, stride_x_row, stride_residual_row, tiles,
    ACT: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    M, N = wide_rows(M, N, ALIGN)
    row, rmask = rows_of(tl.program_id(0), M, 1)
    r = tl.program_id(0).to(tl.int64)
    x_ptr += r * wide_stride(stride_x_row, ALIGN)
    if residual_ptr is not None:
        residual_ptr += r * wide_stride(stride_residual_row, ALIGN)
        sum_ptr += r * N
    _, mean, rest, std = moments_of_row(
        x_ptr, residual_ptr, sum_ptr, 0, tiles, N, ACC, CENTER, FULL, BLOCK_N, 1
    )
    rstd = rstd_of(std, eps)
    store_row_stats(stats_ptr, row, rmask, M, mean, rest, rstd, CENTER)
    normalize_row(
        x_ptr, residual_ptr, sum_ptr, w_ptr, b_ptr, y_ptr + r * N, 0, tiles, N, mean, rest, rstd,
        ACT, CENTER, FULL, BLOCK_N,
    )  # fmt: skip


# One program owns some consecutive tiles of one row, and leaves their partial statistics.
@triton.jit(do_not_specialize=ROW_SIZES)
def layer_norm_fwd_moments_kernel(
    x_ptr, residual_ptr, sum_ptr,           # (M, N) each
    partial_ptr,                            # (4, M, P): count, mean, rest, std
    M, N, P, stride_x_row, stride_residual_row, tiles, tiles_per_program,
    CENTER: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    M, N = wide_rows(M, N, ALIGN)
    pid = tl.program_id(0)
    r, p = (pid // P).to(tl.int64), pid % P
    x_ptr += r * wide_stride(stride_x_row, ALIGN)
    if residual_ptr is not None:
        residual_ptr += r * wide_stride(stride_residual_row, ALIGN)
        sum_ptr += r * N
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    count, mean, rest, std = moments_of_long_row(
        x_ptr, residual_ptr, sum_ptr, first, last, N, ACC,
        CENTER, FULL, BLOCK_N, FOLD, RUN, STAGES,
    )  # fmt: skip
    at = r * P + p + tl.arange(0, 1)
    tl.store(partial_ptr + at, count)
    tl.store(partial_ptr + M * P + at, mean)
    tl.store(partial_ptr + 2 * M * P + at, rest)
    tl.store(partial_ptr + 3 * M * P + at, std)


@triton.jit
def merged_moments(partial_ptr, r, M, P, ACC: tl.constexpr, BLOCK_P: tl.constexpr):
    """(mean, rest, std), each (1,), of row r from its P partials, always in the same order."""
    p = tl.arange(0, BLOCK_P)
    mask = p < P
    at = r * P + p
    count = load_as(partial_ptr, at, mask, ACC)[:, None]
    mean = load_as(partial_ptr, M * P + at, mask, ACC)
    base = finite_or_zero(tl.sum(tl.where(p == 0, mean, 0.0), axis=0))
    mean = tl.where(mask, (mean - base) + load_as(partial_ptr, 2 * M * P + at, mask, ACC), 0.0)
    std = load_as(partial_ptr, 3 * M * P + at, mask, ACC)
    _, mean, std = merge_partials(count, mean[:, None], std[:, None])
    mean, rest = two_sum(base, mean)
    return mean, rest, std


# One program owns the tiles of one row that it reduced before; the first saves the statistics.
@triton.jit(do_not_specialize=ROW_SIZES)
def layer_norm_fwd_apply_kernel(
    x_ptr, w_ptr, b_ptr, partial_ptr,       # (M, N), (N,), (N,), (4, M, P)
    y_ptr, stats_ptr,                       # (M, N), (3, M): rstd, mean, rest; RMS: (1, M)
    eps: tl.float64,
    M, N, P, stride_x_row, tiles, tiles_per_program,
    ACT: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    M, N = wide_rows(M, N, ALIGN)
    pid = tl.program_id(0)
    row, rmask = rows_of(pid // P, M, 1)
    r, p = (pid // P).to(tl.int64), pid % P
    mean, rest, std = merged_moments(partial_ptr, r, M, P, ACC, BLOCK_P)
    rstd = rstd_of(std, eps)
    store_row_stats(stats_ptr, row, rmask & (p == 0), M, mean, rest, rstd, CENTER)
    first = p * tiles_per_program
    normalize_row(
        x_ptr + r * wide_stride(stride_x_row, ALIGN), None, None, w_ptr, b_ptr, y_ptr + r * N,
        first, tl.minimum(first + tiles_per_program, tiles), N, mean, rest, rstd,
        ACT, CENTER, FULL, BLOCK_N,
    )  # fmt: skip
