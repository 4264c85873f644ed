"""The forward products of Linear + BatchNorm; the formulas are in linear_batch_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.matmul import (
    aligned,
    block_of_program,
    product_of_rows,
    rows_of_tile,
    store_rows,
)
from fastnorm.kernels.device.moments import finite_or_zero, sqrt
from fastnorm.kernels.launch import PRODUCT_SIZES


# One program owns one tile of Y.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_kernel(
    x_ptr, w_ptr, shift_ptr,                # (B, K, S), (N, K), (K,) or None
    affine_ptr, y_ptr,                      # (3, N): centre, α, β; (B, N, S)
    B, N, K, S, tiles,
    ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = affine_ptr.dtype.element_ty
    N, K, S = aligned(N, ALIGN_N), aligned(K, ALIGN_K), aligned(S.to(tl.int64), ALIGN_S)
    tile, block = block_of_program(tiles, tl.cdiv(N, BLOCK_N), GROUP)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_B * BLOCK_S)
    b, s, inside = rows_of_tile(tile, B, S, lane, BLOCK_B, BLOCK_S)
    z = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_N), ACC)
    z = product_of_rows(
        z, x_ptr, w_ptr, shift_ptr, b, s, inside, cols, N, K, S, BLOCK_K, PRECISION, COLUMNS
    )
    centre = tl.load(affine_ptr + cols, mask=cols < N, other=0.0)
    alpha = tl.load(affine_ptr + N + cols, mask=cols < N, other=0.0)
    beta = tl.load(affine_ptr + 2 * N + cols, mask=cols < N, other=0.0)
    y = ACT((z - centre[None, :]) * alpha[None, :] + beta[None, :])
    store_rows(y_ptr, y, b, s, inside, cols, N, S, COLUMNS)


# One program owns one tile of Z and, in training, the statistics of its columns.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_epilogue_kernel(
    x_ptr, w_ptr, bias_ptr, z_ptr,          # (B, K, S), (N, K), (N,) or None, (B, N, S)
    partial_ptr, count_ptr,                 # (3, tiles, N): mean, rest, std; (tiles,); or None
    B, N, K, S, tiles,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_S: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if z_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, K, S = aligned(N, ALIGN_N), aligned(K, ALIGN_K), aligned(S.to(tl.int64), ALIGN_S)
    tile, block = block_of_program(tiles, tl.cdiv(N, BLOCK_N), GROUP)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_B * BLOCK_S)
    b, s, inside = rows_of_tile(tile, B, S, lane, BLOCK_B, BLOCK_S)
    z = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_N), ACC)
    z = product_of_rows(
        z, x_ptr, w_ptr, None, b, s, inside, cols, N, K, S, BLOCK_K, PRECISION, COLUMNS
    )
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    store_rows(z_ptr, z, b, s, inside, cols, N, S, COLUMNS)
    if partial_ptr is not None:
        z = z.to(z_ptr.dtype.element_ty).to(ACC)  # what is normalized is what was stored
        count = tl.sum(inside.to(ACC), axis=0)
        share = 1.0 / count
        at = tile.to(tl.int64) * N + cols
        step = tiles.to(tl.int64) * N
        # each number is stored as soon as it is there: a thread may have to hold it of many columns
        mean = tl.sum(tl.where(inside[:, None], z * share, 0.0), axis=0)
        tl.store(partial_ptr + at, mean, mask=cols < N)
        d = tl.where(inside[:, None], z - mean[None, :], 0.0)
        rest = finite_or_zero(tl.sum(d * share, axis=0))
        tl.store(partial_ptr + step + at, rest, mask=cols < N)
        d = tl.where(inside[:, None], d - rest[None, :], 0.0)
        size = tl.max(tl.abs(d), axis=0)
        unit = tl.where(size > 0.0, size, 1.0)
        d = d / unit[None, :]
        std = sqrt(tl.sum(d * d, axis=0) * share) * unit
        tl.store(partial_ptr + 2 * step + at, std, mask=cols < N)
        if block == 0:  # the first block of columns speaks for all
            tl.store(count_ptr + tile, count)
