"""Column means and second moments of X; the formulas are in linear_batch_norm.py.

S decides the variance of every channel, and where a row of W cancels a signal that the columns of X
share, only its last digits count. Elements of 32 and 64 bits are multiplied in float64, about the
first row, so that a large mean costs no digits. Products of 16-bit elements are exact in float32; a
tile's sum of them is rounded there; tiles are added up in float64, and a program's sum is rounded
once more, so that it moves half the bytes. Where that is not enough, the fold of W raises a flag,
and the same kernels do it once more, all in float64.
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.matmul import (
    aligned,
    any_flag,
    as_float64,
    fold_rows,
    load_rows,
    rows_of_tile,
    upper_pair,
)
from fastnorm.kernels.device.moments import finite_or_zero
from fastnorm.kernels.launch import PRODUCT_SIZES


@triton.jit
def first_row(x_ptr, k, K, S, COLUMNS: tl.constexpr):
    """What elements are taken relative to, in float64; 0 for 16-bit ones, and where not finite."""
    if x_ptr is None or x_ptr.dtype.element_ty.primitive_bitwidth == 16:
        return tl.zeros(k.shape, tl.float64)
    else:
        at = k if COLUMNS else k * S
        return finite_or_zero(tl.load(x_ptr + at, mask=k < K, other=0.0).to(tl.float64))


# One program owns one tile (i ≤ j) of S and one share of the rows; tiles are the faster index, so
# that programs that run together read the same rows. With flags that are down it does nothing.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_gram_kernel(
    x_ptr, read_flags_ptr,                  # (B, K, S), (F,) or None
    s_partial_ptr, sum_partial_ptr,         # (P, tiles of S, BLOCK_K, BLOCK_K), (P, K)
    B, K, S, F, tiles, tiles_per_program,
    WIDE: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN_K: tl.constexpr, ALIGN_S: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    K, S = aligned(K, ALIGN_K), aligned(S.to(tl.int64), ALIGN_S)
    blocks = tl.cdiv(K, BLOCK_K)
    pairs = blocks * (blocks + 1) // 2
    pid = tl.program_id(0)
    p = pid // pairs
    block_i, block_j = upper_pair(pid % pairs)
    column = tl.arange(0, BLOCK_K)
    i, j = block_i * BLOCK_K + column, block_j * BLOCK_K + column
    pivot_i, pivot_j = first_row(x_ptr, i, K, S, COLUMNS), first_row(x_ptr, j, K, S, COLUMNS)
    s = tl.zeros((BLOCK_K, BLOCK_K), tl.float64)
    total = tl.zeros((16, BLOCK_K), tl.float64)
    lane = tl.arange(0, BLOCK_B * BLOCK_S)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    if read_flags_ptr is not None:
        if not any_flag(read_flags_ptr, F, BLOCK_F):
            return
    for tile in range(first, last):
        b, at, inside = rows_of_tile(tile, B, S, lane, BLOCK_B, BLOCK_S)
        xi = load_rows(x_ptr, b, at, inside, i, K, S, COLUMNS)
        xj = load_rows(x_ptr, b, at, inside, j, K, S, COLUMNS)
        if WIDE:
            xi = tl.where(inside[:, None], as_float64(xi) - pivot_i[None, :], 0.0)
            xj = tl.where(inside[:, None], as_float64(xj) - pivot_j[None, :], 0.0)
            total += fold_rows(xj, 16, COLUMNS)
            s = tl.dot(tl.trans(xi), xj, s, input_precision="ieee", out_dtype=tl.float64)
        else:
            total += fold_rows(xj.to(tl.float32), 16, COLUMNS).to(tl.float64)
            s += tl.dot(tl.trans(xi), xj).to(tl.float64)
    at = column[:, None] * BLOCK_K + column[None, :]
    s = s.to(s_partial_ptr.dtype.element_ty)
    tl.store(s_partial_ptr + pid.to(tl.int64) * BLOCK_K * BLOCK_K + at, s)
    if block_i == block_j:
        tl.store(sum_partial_ptr + p.to(tl.int64) * K + j, tl.sum(total, axis=0), mask=j < K)


# One program owns one row of a tile (i ≤ j) of S and its mirror image; the first of a tile on the
# diagonal, a piece of x̄ too. With flags that are down it does nothing.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_gram_reduce_kernel(
    x_ptr, read_flags_ptr,                  # (B, K, S), (F,) or None
    s_partial_ptr, sum_partial_ptr,         # (P, tiles of S, BLOCK_K, BLOCK_K), (P, K)
    s_ptr, mean_ptr,                        # (K, K), (K,)
    share: tl.float64,                      # 1 / M: a division would be a call, with a stack
    K, S, P, F,
    BLOCK_P: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    S = S.to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_K)
    pairs = blocks * (blocks + 1) // 2
    pair = tl.program_id(0) // BLOCK_K
    row = tl.program_id(0) % BLOCK_K
    block_i, block_j = upper_pair(pair)
    i = block_i * BLOCK_K + row
    lane = tl.arange(0, BLOCK_K)
    j = block_j * BLOCK_K + lane
    s = tl.zeros((BLOCK_K,), tl.float64)
    sum_i = tl.zeros((BLOCK_P,), tl.float64)
    sum_j = tl.zeros((BLOCK_K,), tl.float64)
    if read_flags_ptr is not None:
        if not any_flag(read_flags_ptr, F, BLOCK_F):
            return
    for start in range(0, P, BLOCK_P):
        p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        inside = p < P
        at = ((p * pairs + pair) * BLOCK_K + row) * BLOCK_K
        found = tl.load(
            s_partial_ptr + at[:, None] + lane[None, :], mask=inside[:, None], other=0.0
        )
        s += tl.sum(found.to(tl.float64), axis=0)
        sum_i += tl.load(sum_partial_ptr + p * K + i, mask=inside & (i < K), other=0.0)
        mask = inside[:, None] & (j < K)[None, :]
        found = tl.load(sum_partial_ptr + (p * K)[:, None] + j[None, :], mask=mask, other=0.0)
        sum_j += tl.sum(found, axis=0)
    s -= tl.sum(sum_i, axis=0) * share * sum_j  # about the pivots to about the mean
    mask = (i < K) & (j < K)
    tl.store(s_ptr + i.to(tl.int64) * K + j, s, mask=mask)
    if block_i != block_j:
        tl.store(s_ptr + j.to(tl.int64) * K + i, s, mask=mask)
    elif row == 0:
        mean = first_row(x_ptr, j, K, S, COLUMNS) + sum_j * share
        tl.store(mean_ptr + j, mean, mask=j < K)
