"""LayerNorm's and RMSNorm's backward kernels; the formulas are in layer_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.rows import (
    columns_of,
    input_gradient,
    load_row_stats,
    load_scale,
    load_xhat_dz_wdz,
    rows_of,
    store_column_sums,
    wide_rows,
    wide_stride,
)
from fastnorm.kernels.device.tiles import fold, load_as, store_cast
from fastnorm.kernels.launch import ROW_SIZES


# One program owns some consecutive tiles of one row, and leaves their part of the row's sums.
@triton.jit(do_not_specialize=ROW_SIZES)
def layer_norm_bwd_reduce_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, stats_ptr,  # (M, N), (M, N), (N,), (N,); b where act′ needs it
    partial_ptr,                             # (2, P, M): Σ wdz·x̂, Σ wdz
    M, N, P, stride_dy_row, stride_x_row, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    M, N = wide_rows(M, N, ALIGN)
    pid = tl.program_id(0)
    row, rmask = rows_of(pid // P, M, 1)
    r, p = (pid // P).to(tl.int64), pid % P
    mean, rest, rstd = load_row_stats(stats_ptr, row, rmask, M, CENTER)
    dy_ptr += r * wide_stride(stride_dy_row, ALIGN)
    x_ptr += r * wide_stride(stride_x_row, ALIGN)
    c1 = tl.zeros((1, BLOCK_N), ACC)
    c2 = tl.zeros((1, BLOCK_N), ACC)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        col, inside = columns_of(tile, N, BLOCK_N, FULL)
        w, b = load_scale(w_ptr, b_ptr, col, inside, ACC)
        xhat, _, wdz = load_xhat_dz_wdz(
            dy_ptr, col[None, :], x_ptr, col[None, :],
            w, b, inside[None, :], mean, rest, rstd, ACT_GRAD, CENTER,
        )  # fmt: skip
        c1 += wdz * xhat
        c2 += wdz
    at = p.to(tl.int64) * M + row
    tl.store(partial_ptr + at, tl.sum(c1, axis=1))
    tl.store(partial_ptr + P * M + at, tl.sum(c2, axis=1))


# One program owns BLOCK_N columns of some consecutive tiles of BLOCK_M rows, and sums their dw and
# db: each thread first over the FOLD rows of a tile that it holds. Where those are all columns, a
# row's own sums are formed here too, and sums_ptr is None.
@triton.jit(do_not_specialize=ROW_SIZES)
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, stats_ptr,  # (M, N), (M, N), (N,), (N,); b where act′ needs it
    sums_ptr, dsum_ptr, dx_ptr,              # (2, M), (M, N), (M, N); None: none, not wanted
    dw_partial_ptr, db_partial_ptr,          # (P, N), (P, N)
    M, N, P, stride_dy_row, stride_x_row, stride_dsum_row, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, CENTER: tl.constexpr, FULL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    M, N = wide_rows(M, N, ALIGN)
    pid = tl.program_id(0)
    p = pid % P
    col, inside = columns_of(pid // P, N, BLOCK_N, FULL)
    first = p * tiles_per_program
    dw = tl.zeros((BLOCK_M // FOLD, BLOCK_N), ACC)
    db = tl.zeros((BLOCK_M // FOLD, BLOCK_N), ACC)
    w, b = load_scale(w_ptr, b_ptr, col, inside, ACC)
    last = tl.minimum(first + tiles_per_program, tiles)
    for tile in tl.range(first, last, num_stages=STAGES):
        row, rmask = rows_of(tile, M, BLOCK_M)
        mask = rmask[:, None] & inside[None, :]
        mean, rest, rstd = load_row_stats(stats_ptr, row, rmask, M, CENTER)
        xhat, dz, wdz = load_xhat_dz_wdz(
            dy_ptr, (row * wide_stride(stride_dy_row, ALIGN))[:, None] + col[None, :],
            x_ptr, (row * wide_stride(stride_x_row, ALIGN))[:, None] + col[None, :],
            w, b, mask, mean, rest, rstd, ACT_GRAD, CENTER,
        )  # fmt: skip
        if dx_ptr is not None:
            if sums_ptr is None:
                c1, c2 = tl.sum(wdz * xhat, axis=1), tl.sum(wdz, axis=1)
            else:
                c1 = load_as(sums_ptr, row, rmask, ACC)
                c2 = load_as(sums_ptr, M + row, rmask, ACC)
            c1, c2 = c1 / N.to(ACC), c2 / N.to(ACC)
            dsum_at = (row * wide_stride(stride_dsum_row, ALIGN))[:, None] + col[None, :]
            dx = input_gradient(xhat, wdz, rstd, c1, c2, dsum_ptr, dsum_at, mask, CENTER)
            store_cast(dx_ptr, (row * N)[:, None] + col[None, :], dx, mask)
        dw += fold(dz * xhat, FOLD, 1)
        db += fold(dz, FOLD, 1)
    store_column_sums(dw_partial_ptr, p, dw, col, inside, N)
    store_column_sums(db_partial_ptr, p, db, col, inside, N)
