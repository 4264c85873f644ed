"""What SyncBatchNorm does with statistics between processes; the formulas are in batch_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.batch_norm_fwd import merge_moments, move_statistics, save_stats
from fastnorm.kernels.device.channels import channels_of
from fastnorm.kernels.device.tiles import load_as
from fastnorm.kernels.launch import SIZES


# One program owns BLOCK_C channels of the statistics of this process.
@triton.jit(do_not_specialize=SIZES)
def sync_batch_norm_fwd_merge_kernel(
    partial_ptr, count_ptr,                 # (3, P, C): mean, rest, std; (P,)
    own_ptr,                                # (3C + 1,): mean, rest, std, count
    C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = C.to(tl.int64)
    pid = tl.program_id(0)
    c, cmask = channels_of(pid, C, BLOCK_C)
    count, mean, rest, std = merge_moments(
        partial_ptr, count_ptr, 0, c, cmask, P, C, P * C, 1, BLOCK_P
    )
    tl.store(own_ptr + c, mean, mask=cmask)
    tl.store(own_ptr + C + c, rest, mask=cmask)
    tl.store(own_ptr + 2 * C + c, std, mask=cmask)
    if pid == 0:
        tl.store(own_ptr + 3 * C, tl.sum(count, axis=0))


@triton.jit
def first_counted(count_ptr, P, step, BLOCK_P: tl.constexpr):
    """The first of P counts that is not 0; 0 where all are."""
    first = P
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        count = load_as(count_ptr, p.to(tl.int64) * step, p < P, count_ptr.dtype.element_ty)
        first = tl.minimum(first, tl.min(tl.where(count > 0.0, p, P), axis=0))
    return tl.where(first < P, first, 0)


# One program owns BLOCK_C channels of the statistics of all R processes. Where those have fewer
# than two values of a channel, there is no unbiased variance, and nothing moves.
@triton.jit(do_not_specialize=SIZES)
def sync_batch_norm_fwd_finalize_kernel(
    everyone_ptr, stats_ptr, total_ptr,     # (R, 3C + 1): mean, rest, std, count; (3, C), ()
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (C,), (C,), ()
    momentum: tl.float64, eps: tl.float64,
    C, R,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = C.to(tl.int64)
    pid = tl.program_id(0)
    c, cmask = channels_of(pid, C, BLOCK_C)
    step = 3 * C + 1
    first = first_counted(everyone_ptr + 3 * C, R, step, BLOCK_P)
    count, mean, rest, std = merge_moments(
        everyone_ptr, everyone_ptr + 3 * C, first, c, cmask, R, step, C, step, BLOCK_P
    )
    save_stats(mean, rest, std, eps, c, cmask, C, stats_ptr)
    moves = cmask & (count > 1.0)
    move_statistics(
        mean, rest, std, count, c, moves, running_mean_ptr, running_var_ptr, momentum_ptr, momentum
    )
    if pid == 0:
        tl.store(total_ptr, tl.sum(count, axis=0))
