"""The N×K, K×K and vector arithmetic of gram's forward; formulas in linear_batch_norm.py.

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
)
from fastnorm.kernels.device.tiles import load_or
from fastnorm.kernels.launch import PRODUCT_SIZES

# How much smaller than the sum of its terms a variance may be before more digits are kept: products
# of 16 bits that were added up in float32 have an error of some 1e-8 of that sum.
CANCELLED = tl.constexpr(1e3)


@triton.jit
def load_wide(ptr, i, j, I, J):  # noqa: E741
    return as_float64(load_matrix(ptr, i, j, I, J))


@triton.jit
def shift_of(mean, DOUBLE: tl.constexpr):
    """What elements of 32 or 64 bits are less as they are loaded: a mean of half their digits.

    With all of them each difference would be rounded where it is large, and where columns share a
    signal that W cancels, that is a digit lost. So most differences are exact.
    """
    LEFT: tl.constexpr = 26 if DOUBLE else 41  # of the 52 binary digits behind the first
    bits = mean.to(tl.int64, bitcast=True) & -(1 << LEFT)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def unshifted(mean, SHIFTED: tl.constexpr, DOUBLE: tl.constexpr):
    """What is left of a mean that X is less already, where it is SHIFTED."""
    if SHIFTED:
        return mean - shift_of(mean, DOUBLE)
    else:
        return mean


@triton.jit
def unit_of_square(square):
    """A power of two near the root of each, and its reciprocal; 1 for zeros."""
    bits = square.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    root = ((bits >> 1) + 0x1FF8000000000000) & 0x7FF0000000000000  # half the exponent
    unit = tl.where(bits == 0, 1.0, root.to(tl.float64, bitcast=True))
    inverse = (0x7FE0000000000000 - root).to(tl.float64, bitcast=True)
    return unit, tl.where(bits == 0, 1.0, inverse)


# One program owns BLOCK_N rows of W. The first of two launches raises flags; the second does it
# again where one is up, with a better S, and moves the buffers. `final`: this launch moves them.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_fold_kernel(
    w_ptr, s_ptr, mean_ptr,                 # (N, K), (K, K), (K,): None in evaluation
    bias_ptr, gamma_ptr, beta_ptr,          # (N,) each, or None
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (N,), (N,), ()
    read_flags_ptr, flags_ptr,              # (F,): of the first launch, for the second; to write
    stats_ptr, ws_ptr, shift_ptr,           # (5, N): see Folded; (N, K): W S in a unit; (K,)
    affine_ptr, sizes_ptr,                  # (3, N): centre − W shift, α, β; (F,): max |α∘W|
    M: tl.float64, share: tl.float64,       # 1 / M: a division would be a call, with a stack
    unbiased: tl.float64, momentum: tl.float64, eps: tl.float64,  # M / (M − 1)
    N, K, F,
    FINAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr,
    ALIGN_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = affine_ptr.dtype.element_ty
    SHIFTED: tl.constexpr = shift_ptr is not None
    DOUBLE: tl.constexpr = affine_ptr.dtype.element_ty == tl.float64
    K = aligned(K, ALIGN_K)
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    centre = tl.zeros((BLOCK_N,), tl.float64)
    left = tl.zeros((BLOCK_N,), tl.float64)
    over = tl.zeros((BLOCK_N,), tl.float64)
    terms = tl.zeros((BLOCK_N,), tl.float64)
    largest = tl.zeros((BLOCK_N,), tl.float64)
    spread = tl.zeros((BLOCK_N,), tl.float64)
    todo = True if read_flags_ptr is None else any_flag(read_flags_ptr, F, BLOCK_F)
    end = tl.where(todo, K, 0)
    if s_ptr is not None:
        for start in range(0, end, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            w = load_wide(w_ptr, n, j, N, K)
            diagonal = tl.load(s_ptr + j.to(tl.int64) * K + j, mask=j < K, other=0.0)
            spread = tl.maximum(spread, tl.max(w * w * diagonal[None, :], axis=1))
    unit, inverse = unit_of_square(spread)
    if todo:
        tl.store(stats_ptr + 4 * N + n, unit, mask=mask)
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
            rest = unshifted(mean, SHIFTED, DOUBLE)
            diagonal = tl.load(s_ptr + j.to(tl.int64) * K + j, mask=j < K, other=0.0)
            left += tl.sum(ws * w, axis=1)
            centre += tl.sum(w * mean[None, :], axis=1)
            over += tl.sum(w * rest[None, :], axis=1)
            terms += tl.sum(w * w * (diagonal + M * mean * mean)[None, :], axis=1)
            store_matrix(ws_ptr, ws * inverse[:, None], n, j, N, K)
            if SHIFTED:
                if pid == 0:
                    tl.store(shift_ptr + j, shift_of(mean, DOUBLE).to(ACC), mask=j < K)

    bias = load_or(bias_ptr, n, mask, 0.0, tl.float64)
    if s_ptr is None:
        centre = tl.load(running_mean_ptr + n, mask=mask, other=0.0).to(tl.float64) - bias
        over = centre
        var = tl.load(running_var_ptr + n, mask=mask, other=1.0).to(tl.float64)
    else:
        # NaN stays: it is not below zero
        var = tl.where(left < 0.0, 0.0, left) * share
    if read_flags_ptr is not None:
        centre = tl.where(todo, centre, tl.load(stats_ptr + n, mask=mask, other=0.0))
        var = tl.where(todo, var, tl.load(stats_ptr + N + n, mask=mask, other=1.0))
    if FINAL:
        moving_average(running_mean_ptr, n, mask, centre + bias, momentum, momentum_ptr)
        moving_average(running_var_ptr, n, mask, var * unbiased, momentum, momentum_ptr)
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
            fine = (terms <= (left + M * eps) * CANCELLED) & (terms < float("inf"))
            tl.store(flags_ptr + pid, tl.max((mask & ~fine).to(tl.int32), axis=0))
