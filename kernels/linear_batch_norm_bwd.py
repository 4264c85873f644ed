"""The backward products of Linear + BatchNorm; the formulas are in linear_batch_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.matmul import (
    aligned,
    as_float64,
    block_of_program,
    fold_rows,
    gated,
    less,
    load_matrix,
    load_rows,
    rows_of_tile,
    store_joined,
    store_matrix,
    store_rows,
    unit_of,
)
from fastnorm.kernels.launch import PRODUCT_SIZES


# One program owns one tile of P and one share of the rows; tiles are the faster index, so that
# programs that run together read the same rows. Those of the first columns of P store their G.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_weight_kernel(
    dy_ptr, y_ptr, x_ptr, shift_ptr,        # (B, N, S), or None, (B, K, S), (K,) or None
    p_partial_ptr, dbeta_partial_ptr,       # (P, N, K) or None, (P, N)
    h_ptr, sizes_ptr,                       # (M, stride): G in the unit of α∘W, or None; (F,)
    B, N, K, S, F, stride_h_row, tiles, tiles_per_program,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_S: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = dbeta_partial_ptr.dtype.element_ty
    WIDE: tl.constexpr = dbeta_partial_ptr.dtype.element_ty == tl.float64
    N, K, S = aligned(N, ALIGN_N), aligned(K, ALIGN_K), aligned(S.to(tl.int64), ALIGN_S)
    blocks_k = 1 if p_partial_ptr is None else tl.cdiv(K, BLOCK_K)
    blocks = tl.cdiv(N, BLOCK_N) * blocks_k
    pid = tl.program_id(0)
    share = pid // blocks
    block_n = pid % blocks // blocks_k
    block_k = pid % blocks_k
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_B * BLOCK_S)
    p = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    dbeta = tl.zeros((16, BLOCK_N), ACC)
    if h_ptr is not None:
        unit, _ = unit_of(sizes_ptr, F, BLOCK_F)
        unit = unit.to(ACC)
    first = share * tiles_per_program
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        b, s, inside = rows_of_tile(tile, B, S, lane, BLOCK_B, BLOCK_S)
        dy = load_rows(dy_ptr, b, s, inside, cols, N, S, COLUMNS)
        g = gated(dy, y_ptr, b, s, inside, cols, N, S, GATE, COLUMNS)
        dbeta += fold_rows(g.to(ACC), 16, COLUMNS)
        if p_partial_ptr is not None:
            x = less(load_rows(x_ptr, b, s, inside, k, K, S, COLUMNS), shift_ptr, k, K)
            left = as_float64(g) if WIDE else g
            right = as_float64(x) if WIDE else x
            p = tl.dot(tl.trans(left), right, p, input_precision=PRECISION, out_dtype=ACC)
            if h_ptr is not None:
                if block_k == 0:
                    store_joined(h_ptr, g.to(ACC) * unit, b * S + s, stride_h_row, inside, cols, N)
    if p_partial_ptr is not None:
        store_matrix(p_partial_ptr + share.to(tl.int64) * N * K, p, cols, k, N, K)
    if block_k == 0:
        at = share.to(tl.int64) * N + cols
        tl.store(dbeta_partial_ptr + at, tl.sum(dbeta, axis=0), mask=cols < N)


# One program owns a tile of X − x̄, which stands right of G in the rows of one matrix.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_join_kernel(
    x_ptr, mean_ptr, h_ptr,                 # (S, K), (K,), (S, stride)
    N, K, S, stride_h_row,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr,
):  # fmt: skip
    N, K, S = aligned(N, ALIGN_N), aligned(K, ALIGN_K), S.to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_K)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < S
    x = load_rows(x_ptr, tl.zeros_like(row), row, inside, k, K, S, True)
    mean = tl.load(mean_ptr + k, mask=k < K, other=0.0).to(x.dtype)
    x = x.to(tl.float32) - mean.to(tl.float32)[None, :]
    store_joined(h_ptr + N, x, row, stride_h_row, inside, k, K)


# One program owns one tile of dX. The product with A comes first: it is scaled to the other's unit.
# Where a library's product stands already it does nothing.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_input_kernel(
    dy_ptr, y_ptr, x_ptr, shift_ptr,        # (B, N, S), or None, (B, K, S), (K,) or None
    aw_ptr, a_ptr, unit_ptr, sizes_ptr,    # (N, K), (2, K, K), (): None in evaluation; (F,)
    offset_ptr, flag_ptr, todo_ptr,         # (K,), (): whether A's second part counts; ()
    dx_ptr,                                 # (B, K, S)
    B, N, K, S, F, tiles,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr, GROUP: tl.constexpr,
    ALIGN_N: tl.constexpr, ALIGN_K: tl.constexpr, ALIGN_S: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if dx_ptr.dtype.element_ty == tl.float64 else tl.float32
    N, K, S = aligned(N, ALIGN_N), aligned(K, ALIGN_K), aligned(S.to(tl.int64), ALIGN_S)
    tile, block = block_of_program(tiles, tl.cdiv(K, BLOCK_K), GROUP)
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_B * BLOCK_S)
    b, s, inside = rows_of_tile(tile, B, S, lane, BLOCK_B, BLOCK_S)
    dx = tl.zeros((BLOCK_B * BLOCK_S, BLOCK_K), ACC)
    if todo_ptr is not None:
        if tl.load(todo_ptr) == 0:
            return
    if a_ptr is not None:
        parts = 1
        if flag_ptr is not None:
            parts += tl.load(flag_ptr)
        for part in range(parts):
            for start in range(0, K, BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                x = less(load_rows(x_ptr, b, s, inside, j, K, S, COLUMNS), shift_ptr, j, K)
                a = load_matrix(a_ptr + part * K * K, j, k, K, K)
                dx = tl.dot(x, a, dx, input_precision=PRECISION, out_dtype=ACC)
        dx = dx * tl.load(unit_ptr)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        dy = load_rows(dy_ptr, b, s, inside, cols, N, S, COLUMNS)
        g = gated(dy, y_ptr, b, s, inside, cols, N, S, GATE, COLUMNS)
        aw = load_matrix(aw_ptr, cols, k, N, K)
        dx = tl.dot(g, aw, dx, input_precision=PRECISION, out_dtype=ACC)
    unit, _ = unit_of(sizes_ptr, F, BLOCK_F)
    dx = dx * unit.to(ACC)
    if offset_ptr is not None:
        dx += tl.load(offset_ptr + k, mask=k < K, other=0.0)[None, :]
    store_rows(dx_ptr, dx, b, s, inside, k, K, S, COLUMNS)
