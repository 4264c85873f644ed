"""The N×K, K×K and vector arithmetic of the gram algorithm; formulas in linear_batch_norm.py.

All of it is float64: where W cancels a signal that the columns of X share, var = w S wᵀ / M and
P are small differences of large numbers. A few kernels, since a launch costs as much as they do.
"""

import triton
import triton.language as tl

from fastnorm.kernels.batch_norm_fwd import moving_average
from fastnorm.kernels.device.matmul import (
    aligned,
    any_flag,
    as_float64,
    load_matrix,
    store_matrix,
    unit_of,
)
from fastnorm.kernels.device.tiles import load_or, store_cast
from fastnorm.kernels.launch import PRODUCT_SIZES

# How much smaller than the sum of its terms a variance may be before more digits are kept: products
# of 16 bits that were added up in float32 have an error of some 1e-8 of that sum.
CANCELLED = tl.constexpr(1e3)
# What A may be as a bfloat16 or a float32 without a unit of its own.
SMALLEST = tl.constexpr(2.0**-96)
LARGEST = tl.constexpr(2.0**96)


@triton.jit
def load_wide(ptr, i, j, I, J):  # noqa: E741
    return as_float64(load_matrix(ptr, i, j, I, J))


@triton.jit
def rounded_away(mean, ptr, SHIFTED: tl.constexpr):
    """What is left of a mean whose rounding to the operands' dtype was taken from X already."""
    if SHIFTED:
        return mean - mean.to(ptr.dtype.element_ty).to(tl.float64)
    else:
        return mean


# One program owns BLOCK_N rows of W. The first of two launches raises flags; the second does it
# again where one is up, with a better S, and moves the buffers. `final`: this launch moves them.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_fold_kernel(
    w_ptr, s_ptr, mean_ptr,                 # (N, K), (K, K), (K,): None in evaluation
    bias_ptr, gamma_ptr, beta_ptr,          # (N,) each, or None
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (N,), (N,), ()
    read_flags_ptr, flags_ptr,              # (F,): of the first launch, for the second; to write
    stats_ptr, ws_ptr, shift_ptr,           # (4, N): centre, var, rstd, α; (N, K): W S; (K,)
    affine_ptr, sizes_ptr,                  # (3, N): centre − W shift, α, β; (F,): max |α∘W|
    M: tl.float64, momentum: tl.float64, eps: tl.float64,
    N, K, F,
    FINAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    ALIGN_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = affine_ptr.dtype.element_ty
    SHIFTED: tl.constexpr = shift_ptr is not None
    K = aligned(K, ALIGN_K)
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    centre = tl.zeros((BLOCK_N,), tl.float64)
    left = tl.zeros((BLOCK_N,), tl.float64)
    over = tl.zeros((BLOCK_N,), tl.float64)
    terms = tl.zeros((BLOCK_N,), tl.float64)
    largest = tl.zeros((BLOCK_N,), tl.float64)
    todo = True if read_flags_ptr is None else any_flag(read_flags_ptr, F, BLOCK_F)
    end = tl.where(todo, K, 0)
    for start in range(0, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        w = load_wide(w_ptr, n, j, N, K)
        largest = tl.maximum(largest, tl.max(tl.abs(w), axis=1))
        if s_ptr is not None:
            ws = tl.zeros((BLOCK_N, BLOCK_K), tl.float64)
            for inner in range(0, K, BLOCK_K):
                i = inner + tl.arange(0, BLOCK_K)
                wi = load_wide(w_ptr, n, i, N, K)
                s = load_matrix(s_ptr, i, j, K, K)
                ws = tl.dot(wi, s, ws, input_precision="ieee", out_dtype=tl.float64)
            mean = tl.load(mean_ptr + j, mask=j < K, other=0.0)
            rest = rounded_away(mean, affine_ptr, SHIFTED)
            diagonal = tl.load(s_ptr + j.to(tl.int64) * K + j, mask=j < K, other=0.0)
            left += tl.sum(ws * w, axis=1)
            centre += tl.sum(w * mean[None, :], axis=1)
            over += tl.sum(w * rest[None, :], axis=1)
            terms += tl.sum(w * w * (diagonal + M * mean * mean)[None, :], axis=1)
            store_matrix(ws_ptr, ws, n, j, N, K)
            if SHIFTED:
                if pid == 0:
                    tl.store(shift_ptr + j, mean.to(ACC), mask=j < K)

    bias = load_or(bias_ptr, n, mask, 0.0, tl.float64)
    if s_ptr is None:
        centre = tl.load(running_mean_ptr + n, mask=mask, other=0.0).to(tl.float64) - bias
        over = centre
        var = tl.load(running_var_ptr + n, mask=mask, other=1.0).to(tl.float64)
    else:
        # NaN stays: it is not below zero
        var = tl.where(left < 0.0, 0.0, left) / M
    if read_flags_ptr is not None:
        centre = tl.where(todo, centre, tl.load(stats_ptr + n, mask=mask, other=0.0))
        var = tl.where(todo, var, tl.load(stats_ptr + N + n, mask=mask, other=1.0))
    if FINAL:
        moving_average(running_mean_ptr, n, mask, centre + bias, momentum, momentum_ptr)
        moving_average(running_var_ptr, n, mask, var * (M / (M - 1.0)), momentum, momentum_ptr)
    if todo:
        rstd = 1.0 / tl.sqrt(var + eps)
        gamma = load_or(gamma_ptr, n, mask, 1.0, tl.float64)
        beta = load_or(beta_ptr, n, mask, 0.0, tl.float64)
        alpha = rstd * gamma
        tl.store(stats_ptr + n, centre, mask=mask)
        tl.store(stats_ptr + N + n, var, mask=mask)
        tl.store(stats_ptr + 2 * N + n, rstd, mask=mask)
        tl.store(stats_ptr + 3 * N + n, alpha, mask=mask)
        tl.store(affine_ptr + n, over.to(ACC), mask=mask)
        tl.store(affine_ptr + N + n, alpha.to(ACC), mask=mask)
        tl.store(affine_ptr + 2 * N + n, beta.to(ACC), mask=mask)
        tl.store(sizes_ptr + pid, tl.max(tl.where(mask, tl.abs(alpha) * largest, 0.0), axis=0))
        if flags_ptr is not None:
            fine = terms <= (left + M * eps) * CANCELLED
            tl.store(flags_ptr + pid, tl.max((mask & ~fine).to(tl.int32), axis=0))


# One program owns BLOCK_N rows of W. With other processes, whose statistics Z has, there are two
# launches: the first leaves dγ and dβ of this one's rows, the second is given those of all.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_bwd_fold_kernel(
    p_ptr, total_ptr, w_ptr, mean_ptr,      # (N, K) or None, (N,), (N, K), (K,): None in evaluation
    ws_ptr, stats_ptr, sizes_ptr,           # (N, K) or None, (4, N), (F,)
    dw_ptr, db_ptr, dgamma_ptr, dbeta_ptr,  # (N, K), (N,), (N,), (N,); None: not wanted
    aw_ptr, vectors_ptr,                    # (N, K), (2, N): α r c₂, c₁ unit; None: not wanted
    own_ptr, sums_ptr, rows_ptr,            # (2, N): dγ, dβ; the same of all, (): rows of all
    M: tl.float64,
    N, K, F,
    SHIFTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    ALIGN_K: tl.constexpr,
):  # fmt: skip
    K = aligned(K, ALIGN_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    centre = tl.load(stats_ptr + n, mask=mask, other=0.0)
    rstd = tl.load(stats_ptr + 2 * N + n, mask=mask, other=0.0)
    alpha = tl.load(stats_ptr + 3 * N + n, mask=mask, other=0.0)
    dbeta = load_or(total_ptr, n, mask, 0.0, tl.float64)
    dgamma = tl.zeros((BLOCK_N,), tl.float64)
    if p_ptr is not None and sums_ptr is None:
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            p = load_matrix(p_ptr, n, k, N, K)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + k, mask=k < K, other=0.0)
                p -= dbeta[:, None] * rounded_away(mean, w_ptr, SHIFTED)[None, :]
            dgamma += tl.sum(p * load_wide(w_ptr, n, k, N, K), axis=1)
        if mean_ptr is None or own_ptr is not None:
            dgamma -= dbeta * centre
        dgamma *= rstd
    c2 = dgamma / M
    c1 = dbeta / M
    if own_ptr is not None:
        store_cast(own_ptr, n, dgamma, mask)
        store_cast(own_ptr + N, n, dbeta, mask)
    if sums_ptr is not None:
        rows = tl.load(rows_ptr).to(tl.float64)
        c2 = tl.load(sums_ptr + n, mask=mask, other=0.0).to(tl.float64) / rows
        c1 = tl.load(sums_ptr + N + n, mask=mask, other=0.0).to(tl.float64) / rows
        c1 -= rstd * c2 * centre
    store_cast(dgamma_ptr, n, dgamma, mask)
    store_cast(dbeta_ptr, n, dbeta, mask)
    store_cast(db_ptr, n, alpha * dbeta, mask)
    unit, inverse = unit_of(sizes_ptr, F, BLOCK_F)
    if vectors_ptr is not None:
        tl.store(vectors_ptr + n, alpha * rstd * c2, mask=mask)
        tl.store(vectors_ptr + N + n, c1 * unit, mask=mask)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if dw_ptr is not None:
            p = load_matrix(p_ptr, n, k, N, K)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + k, mask=k < K, other=0.0)
                p -= dbeta[:, None] * rounded_away(mean, w_ptr, SHIFTED)[None, :]
                p -= (c2 * rstd)[:, None] * load_matrix(ws_ptr, n, k, N, K)
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
    joined_ptr, todo_ptr,                   # (K + PIECES, K), (); None: not wanted
    K, F, tiles,
    PIECES: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr, ALIGN_K: tl.constexpr,
):  # fmt: skip
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
            rest = rounded_away(mean, joined_ptr, True)
            joined_offset -= tl.sum(rest[:, None] * whole.to(tl.float64), axis=0)
        a = a * a_inverse
        counted = a.to(parts_ptr.dtype.element_ty).to(tl.float64)
        store_matrix(parts_ptr, counted, i, j, K, K)
        if flags_ptr is not None:
            second = (a - counted).to(parts_ptr.dtype.element_ty)
            store_matrix(parts_ptr + K * K, second, i, j, K, K)
            counted += tl.where(up, second.to(tl.float64), 0.0)
        offset += tl.sum(rounded_away(mean, offset_ptr, SHIFTED)[:, None] * counted, axis=0)
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
            tl.store(todo_ptr, todo.to(tl.int32))
    if pid == 0:
        tl.store(unit_ptr, (a_unit * inverse).to(unit_ptr.dtype.element_ty))
        if flags_ptr is not None:
            tl.store(flag_ptr, up.to(tl.int32))
