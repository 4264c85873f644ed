"""The N×K, K×K and vector arithmetic of gram's backward; float64, as in its forward."""

import triton
import triton.language as tl

from fastnorm.kernels.device.matmul import (
    aligned,
    any_flag,
    load_matrix,
    matrix_offsets,
    store_matrix,
    unit_of,
)
from fastnorm.kernels.device.tiles import load_or, store_cast
from fastnorm.kernels.launch import PRODUCT_SIZES
from fastnorm.kernels.linear_batch_norm_small import load_wide, unshifted

# What A may be as a bfloat16 or a float32 without a unit of its own.
SMALLEST = tl.constexpr(2.0**-96)
LARGEST = tl.constexpr(2.0**96)


@triton.jit
def wide_reciprocal(count):
    """1 / count, a number of rows, in float64 by Newton's method: a division would be a call."""
    exact = count.to(tl.float64)
    found = (1.0 / count.to(tl.float32)).to(tl.float64)
    for _ in tl.static_range(2):
        found = found * (2.0 - exact * found)
    return found


@triton.jit
def sum_of_partials(ptr, at, mask, P, step, UNROLL: tl.constexpr):
    """Σ of P tensors that lie `step` elements apart, in float64 and in their order."""
    total = tl.zeros(at.shape, tl.float64)
    for start in range(0, P, UNROLL):
        for i in tl.static_range(UNROLL):  # loads that need not wait for one another
            p = start + i
            found = tl.load(ptr + at + p * step, mask=mask & (p < P), other=0.0)
            total += found.to(tl.float64)
    return total


# One program owns BLOCK_N rows of W, whose partial sums it adds up: for dγ and, then from a cache,
# for dW. With other processes, whose statistics Z has, there are two launches: the first leaves dγ
# and dβ of this one's rows, the second is given those of all.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_fold_kernel(
    p_partial_ptr, dbeta_partial_ptr,       # (P, N, K) or None, (P, N) or None
    w_ptr, mean_ptr,                        # (N, K), (K,): None in evaluation
    ws_ptr, stats_ptr, sizes_ptr,           # (N, K) or None, (5, N): see Folded, (F,)
    dw_ptr, db_ptr, dgamma_ptr, dbeta_ptr,  # (N, K), (N,), (N,), (N,); None: not wanted
    aw_ptr, vectors_ptr,                    # (N, K), (2, N): α r c₂, c₁ unit; None: not wanted
    own_ptr, sums_ptr, rows_ptr,            # (2, N): dγ, dβ; the same of all, (): rows of all
    M: tl.float64, share: tl.float64,       # 1 / M
    N, K, P, F,
    SHIFTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    UNROLL: tl.constexpr, ALIGN_K: tl.constexpr,
):  # fmt: skip
    DOUBLE: tl.constexpr = w_ptr.dtype.element_ty == tl.float64
    K = aligned(K, ALIGN_K)
    size = N.to(tl.int64) * K
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    centre = tl.load(stats_ptr + n, mask=mask, other=0.0)
    rstd = tl.load(stats_ptr + 2 * N + n, mask=mask, other=0.0)
    alpha = tl.load(stats_ptr + 3 * N + n, mask=mask, other=0.0)
    dbeta = tl.zeros((BLOCK_N,), tl.float64)
    if dbeta_partial_ptr is not None:
        dbeta = sum_of_partials(dbeta_partial_ptr, n, mask, P, N, UNROLL)
    dgamma = tl.zeros((BLOCK_N,), tl.float64)
    if p_partial_ptr is not None and sums_ptr is None:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at, inside = matrix_offsets(n, k, N, K)
            p = sum_of_partials(p_partial_ptr, at, inside, P, size, UNROLL)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + k, mask=k < K, other=0.0)
                p -= dbeta[:, None] * unshifted(mean, SHIFTED, DOUBLE)[None, :]
            dgamma += tl.sum(p * load_wide(w_ptr, n, k, N, K), axis=1)
        if mean_ptr is None or own_ptr is not None:
            dgamma -= dbeta * centre
        dgamma *= rstd
    c2 = dgamma * share
    c1 = dbeta * share
    if own_ptr is not None:
        store_cast(own_ptr, n, dgamma, mask)
        store_cast(own_ptr + N, n, dbeta, mask)
    if sums_ptr is not None:
        whole = wide_reciprocal(tl.load(rows_ptr))
        c2 = tl.load(sums_ptr + n, mask=mask, other=0.0).to(tl.float64) * whole
        c1 = tl.load(sums_ptr + N + n, mask=mask, other=0.0).to(tl.float64) * whole
        c1 -= rstd * c2 * centre
    store_cast(dgamma_ptr, n, dgamma, mask)
    store_cast(dbeta_ptr, n, dbeta, mask)
    store_cast(db_ptr, n, alpha * dbeta, mask)
    unit, inverse = unit_of(sizes_ptr, F, BLOCK_F)
    if vectors_ptr is not None:
        tl.store(vectors_ptr + n, alpha * rstd * c2, mask=mask)
        tl.store(vectors_ptr + N + n, c1 * unit, mask=mask)
    slope = c2 * rstd * tl.load(stats_ptr + 4 * N + n, mask=mask, other=0.0)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if dw_ptr is not None:
            at, inside = matrix_offsets(n, k, N, K)
            p = sum_of_partials(p_partial_ptr, at, inside, P, size, UNROLL)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + k, mask=k < K, other=0.0)
                p -= dbeta[:, None] * unshifted(mean, SHIFTED, DOUBLE)[None, :]
                p -= slope[:, None] * load_matrix(ws_ptr, n, k, N, K).to(tl.float64)
                if sums_ptr is not None:  # of this process's rows dz has a mean
                    p += (dbeta - M * c1)[:, None] * mean[None, :]
            store_matrix(dw_ptr, alpha[:, None] * p, n, k, N, K)
        if aw_ptr is not None:
            w = load_wide(w_ptr, n, k, N, K)
            store_matrix(aw_ptr, (alpha * inverse)[:, None] * w, n, k, N, K)


# One program owns one tile of −A, and on the first row of tiles a piece of c₁ᵀ(α∘W), of α∘W as it
# was rounded: that cancels on the mean of G.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_products_kernel(
    w_ptr, aw_ptr, vectors_ptr,             # (N, K), (N, K), (2, N): α r c₂, c₁ unit
    a_ptr, dx_mean_ptr, sizes_ptr,          # (K, K), (K,), (tiles,): max |A|
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN_K: tl.constexpr,
):  # fmt: skip
    K = aligned(K, ALIGN_K)
    blocks = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    i = pid // blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    j = pid % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    a = tl.zeros((BLOCK_K, BLOCK_K), tl.float64)
    dx_mean = tl.zeros((BLOCK_K,), tl.float64)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        slope = tl.load(vectors_ptr + n, mask=n < N, other=0.0)
        wi = load_wide(w_ptr, n, i, N, K)
        wj = load_wide(w_ptr, n, j, N, K)
        if pid < blocks:
            c1 = tl.load(vectors_ptr + N + n, mask=n < N, other=0.0)
            dx_mean += tl.sum(load_wide(aw_ptr, n, j, N, K) * c1[:, None], axis=0)
        wj = wj * -slope[:, None]
        a = tl.dot(tl.trans(wi), wj, a, input_precision="ieee", out_dtype=tl.float64)
    store_matrix(a_ptr, a, i, j, K, K)
    tl.store(sizes_ptr + pid, tl.max(tl.max(tl.abs(a), axis=1), axis=0))
    if pid < blocks:
        tl.store(dx_mean_ptr + j, dx_mean, mask=j < K)


# One program owns BLOCK_K columns of A, which it rounds; of 16 bits, what that takes is a second
# part, for where a flag is up. x̄ A is of the rounded A: the rounding cancels on the mean.
# For a library's product, whose X is less x̄ as it is rounded, A has no unit of its own and the
# offset is so many rows of a bfloat16's digits. Where A is out of range, or has a second part,
# there is something to do still.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_round_kernel(
    a_ptr, mean_ptr, dx_mean_ptr,           # (K, K), (K,), (K,)
    sizes_ptr, a_sizes_ptr, flags_ptr,      # (F,): max |α∘W|, (tiles,): max |A|, (F,) or None
    parts_ptr, unit_ptr, offset_ptr, flag_ptr,  # (1 or 2, K, K), (), (K,), () or None
    joined_ptr, left_ptr,                   # (K + PIECES, K), (); None: not wanted
    K, F, tiles,
    PIECES: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr, ALIGN_K: tl.constexpr,
):  # fmt: skip
    DOUBLE: tl.constexpr = offset_ptr.dtype.element_ty == tl.float64
    K = aligned(K, ALIGN_K)
    pid = tl.program_id(0)
    j = pid * BLOCK_K + tl.arange(0, BLOCK_K)
    _, inverse = unit_of(sizes_ptr, F, BLOCK_F)
    a_unit, a_inverse = unit_of(a_sizes_ptr, tiles, BLOCK_T)
    up = any_flag(flags_ptr, F, BLOCK_F)
    offset = tl.zeros((BLOCK_K,), tl.float64)
    joined_offset = -load_or(dx_mean_ptr, j, j < K, 0.0, tl.float64)
    for start in range(0, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        a = load_matrix(a_ptr, i, j, K, K)
        mean = tl.load(mean_ptr + i, mask=i < K, other=0.0)
        if joined_ptr is not None:
            whole = a.to(joined_ptr.dtype.element_ty)
            store_matrix(joined_ptr, whole, i, j, K, K)
            rest = mean - mean.to(joined_ptr.dtype.element_ty).to(tl.float64)
            joined_offset -= tl.sum(rest[:, None] * whole.to(tl.float64), axis=0)
        a = a * a_inverse
        counted = a.to(parts_ptr.dtype.element_ty).to(tl.float64)
        store_matrix(parts_ptr, counted, i, j, K, K)
        if flags_ptr is not None:
            second = (a - counted).to(parts_ptr.dtype.element_ty)
            store_matrix(parts_ptr + K * K, second, i, j, K, K)
            counted += tl.where(up, second.to(tl.float64), 0.0)
        offset += tl.sum(unshifted(mean, SHIFTED, DOUBLE)[:, None] * counted, axis=0)
    offset = -offset * a_unit - tl.load(dx_mean_ptr + j, mask=j < K, other=0.0)
    store_cast(offset_ptr, j, offset, j < K)
    if joined_ptr is not None:
        for piece in tl.static_range(PIECES):
            rounded = joined_offset.to(tl.bfloat16)  # tensor cores may read no more of a float32
            tl.store(joined_ptr + (K + piece) * K + j, rounded, mask=j < K)
            joined_offset -= rounded.to(tl.float64)
        if pid == 0:
            todo = ~((a_unit > SMALLEST) & (a_unit < LARGEST))
            if flags_ptr is not None:
                todo = todo | up
            tl.store(left_ptr, todo.to(tl.int32))
    if pid == 0:
        tl.store(unit_ptr, (a_unit * inverse).to(unit_ptr.dtype.element_ty))
        if flags_ptr is not None:
            tl.store(flag_ptr, up.to(tl.int32))
