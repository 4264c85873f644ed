"""The gram algorithm with the statistics of all processes: what each tells, and the fold again.

The formulas are in linear_batch_norm.py. Of the rows (6, N) of `stats` the first four change from
W x̄, var, rstd and α of this process to d = centre − W x̄ and var of it, then rstd and α of all; the
last is centre of all, the mean of Z less b. Since x̂ of one process's M rows has the mean −r ∘ d,
its gradients get
    dγ ∋ −r ∘ dβ ∘ d        c₁ ∋ −r ∘ c₂ ∘ d        dW ∋ α ∘ (dβ − M c₁) x̄ᵀ
with c₁ and c₂ the means of dβ and dγ over the rows of all. One collective forward, of what
SyncBatchNorm exchanges; one backward, of dγ and dβ.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnorm.kernels.device.matmul import aligned
from fastnorm.kernels.device.moments import finite_or_zero
from fastnorm.kernels.device.tiles import load_or, store_cast
from fastnorm.kernels.launch import PRODUCT_SIZES, cdiv, divisor_class
from fastnorm.kernels.linear_batch_norm_small import load_wide
from fastnorm.kernels.products import FOLD_COLUMNS, FOLD_ROWS
from fastnorm.kernels.sync_batch_norm import finalize


# One program owns BLOCK_N channels of what this process tells the others of its M rows of Z.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_tell_kernel(
    stats_ptr, bias_ptr, own_ptr,           # (6, N): W x̄, var; (N,) or None; (3N + 1,)
    M: tl.float64,
    N,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = own_ptr.dtype.element_ty
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    mean = tl.load(stats_ptr + n, mask=mask, other=0.0)
    mean += load_or(bias_ptr, n, mask, 0.0, tl.float64)
    high = mean.to(ACC)
    store_cast(own_ptr, n, high, mask)
    store_cast(own_ptr + N, n, finite_or_zero(mean - high.to(tl.float64)), mask)
    std = tl.sqrt(tl.load(stats_ptr + N + n, mask=mask, other=0.0))
    store_cast(own_ptr + 2 * N, n, std, mask)
    if pid == 0:
        tl.store(own_ptr + 3 * N, M.to(ACC))


# One program owns BLOCK_N rows of W, which it folds again with the statistics of all processes.
@triton.jit(do_not_specialize=PRODUCT_SIZES)
def linear_batch_norm_fwd_shared_fold_kernel(
    w_ptr, shared_ptr, bias_ptr, gamma_ptr,  # (N, K), (3, N): mean, rest, rstd; (N,) or None each
    stats_ptr, affine_ptr, sizes_ptr,       # (6, N): see above, (3, N), (F,)
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ALIGN_K: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = affine_ptr.dtype.element_ty
    K = aligned(K, ALIGN_K)
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    largest = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, K, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        w = load_wide(w_ptr, n, j, N, K)
        largest = tl.maximum(largest, tl.max(tl.abs(w), axis=1))
    mean = tl.load(shared_ptr + n, mask=mask, other=0.0).to(tl.float64)
    rest = tl.load(shared_ptr + N + n, mask=mask, other=0.0).to(tl.float64)
    rstd = tl.load(shared_ptr + 2 * N + n, mask=mask, other=1.0).to(tl.float64)
    # before rest: what is left of the mean is as small as that
    centre = (mean - load_or(bias_ptr, n, mask, 0.0, tl.float64)) + rest
    apart = centre - tl.load(stats_ptr + n, mask=mask, other=0.0)
    alpha = rstd * load_or(gamma_ptr, n, mask, 1.0, tl.float64)
    over = tl.load(affine_ptr + n, mask=mask, other=0.0).to(tl.float64) + apart
    tl.store(stats_ptr + n, apart, mask=mask)
    tl.store(stats_ptr + 2 * N + n, rstd, mask=mask)
    tl.store(stats_ptr + 3 * N + n, alpha, mask=mask)
    tl.store(stats_ptr + 5 * N + n, centre, mask=mask)
    tl.store(affine_ptr + n, over.to(ACC), mask=mask)
    tl.store(affine_ptr + N + n, alpha.to(ACC), mask=mask)
    tl.store(sizes_ptr + pid, tl.max(tl.where(mask, tl.abs(alpha) * largest, 0.0), axis=0))


def share(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    affine: Tensor,
    wide: Tensor,
    sizes: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    rows: int,
    gathered: Callable[[Tensor], Tensor],
) -> Tensor:
    """Fold once more, with the statistics of all processes, whose rows it returns, ().

    `wide`, `affine` and `sizes` are what the fold has left, and change in place.
    """
    N, K = weight.shape
    own = torch.empty(3 * N + 1, dtype=affine.dtype, device=affine.device)
    linear_batch_norm_fwd_tell_kernel[(cdiv(N, FOLD_ROWS),)](
        wide, bias, own, float(rows), N, BLOCK_N=FOLD_ROWS, num_warps=1
    )
    stats, total = finalize(gathered(own), running_mean, running_var, momentum, eps)
    linear_batch_norm_fwd_shared_fold_kernel[(cdiv(N, FOLD_ROWS),)](
        weight, stats, bias, norm_weight, wide, affine, sizes, N, K,
        BLOCK_N=FOLD_ROWS, BLOCK_K=FOLD_COLUMNS, ALIGN_K=divisor_class(K), num_warps=4,
    )  # fmt: skip
    return total
