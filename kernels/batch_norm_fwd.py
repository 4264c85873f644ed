"""BatchNorm's forward kernels; the formulas are in batch_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.channels import (
    as_int64,
    by_column,
    channels_of,
    columns_of_block,
    load_affine,
    load_stats,
    merge_columns,
    moments_of_tiles,
    normalize_tiles,
    share_of_program,
)
from fastnorm.kernels.device.moments import (
    merge_partials,
    merge_two,
    pivot_of,
    rstd_of,
    rstd_of_var,
    two_sum,
)
from fastnorm.kernels.device.tiles import load_as, store_cast
from fastnorm.kernels.launch import SIZES


@triton.jit
def moving_average(running_ptr, c, cmask, value, momentum, momentum_ptr):
    if running_ptr is not None:
        m = tl.full((), momentum, value.dtype)
        if momentum_ptr is not None:
            m = tl.load(momentum_ptr).to(value.dtype)
        old = tl.load(running_ptr + c, mask=cmask, other=0.0).to(value.dtype)
        store_cast(running_ptr, c, (1.0 - m) * old + m * value, cmask)


@triton.jit
def move_statistics(
    mean, rest, std, M, c, cmask, running_mean_ptr, running_var_ptr, momentum_ptr, momentum
):
    moving_average(running_mean_ptr, c, cmask, mean + rest, momentum, momentum_ptr)
    unbiased = std * std * (M / (M - 1.0))
    moving_average(running_var_ptr, c, cmask, unbiased, momentum, momentum_ptr)


@triton.jit
def save_stats(mean, rest, std, eps, c, cmask, C, stats_ptr):
    rstd = rstd_of(std, eps)
    tl.store(stats_ptr + c, mean, mask=cmask)
    tl.store(stats_ptr + C + c, rest, mask=cmask)
    tl.store(stats_ptr + 2 * C + c, rstd, mask=cmask)
    return rstd


@triton.jit
def finalize(
    mean, rest, std, M, eps, c, cmask, C,
    stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
):  # fmt: skip
    """Save the statistics of channels of M elements, and move their running ones; returns rstd."""
    rstd = save_stats(mean, rest, std, eps, c, cmask, C, stats_ptr)
    move_statistics(
        mean, rest, std, M, c, cmask, running_mean_ptr, running_var_ptr, momentum_ptr, momentum
    )
    return rstd


@triton.jit
def merge_moments(
    partial_ptr, count_ptr, first, c, cmask, P, step, stat, count_step, BLOCK_P: tl.constexpr
):
    """(count, mean, rest, std) of channels over P partial statistics; that of `first` is not empty.

    Statistic i of partial p is at i·stat + p·step + c, its count at p·count_step.
    """
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    base = tl.load(partial_ptr + first * step + c, mask=cmask, other=0.0)
    count = tl.zeros((1,), ACC)
    mean = tl.zeros(c.shape, ACC)  # relative to base
    std = tl.zeros(c.shape, ACC)
    first = first // BLOCK_P * BLOCK_P
    for start in range(first, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = (p.to(tl.int64) * step)[:, None] + c[None, :]
        count_p = load_as(count_ptr, p.to(tl.int64) * count_step, p < P, ACC)
        mask = (count_p > 0.0)[:, None] & cmask[None, :]
        mean_p = load_as(partial_ptr, at, mask, ACC)
        if start == first:
            share = count_p / tl.maximum(tl.sum(count_p, axis=0), 1.0)
            base = pivot_of(base, mean_p, mask, share[:, None])
        mean_p = (mean_p - base[None, :]) + load_as(partial_ptr, stat + at, mask, ACC)
        mean_p = tl.where(mask, mean_p, 0.0)
        std_p = load_as(partial_ptr, 2 * stat + at, mask, ACC)
        count_b, mean_b, std_b = merge_partials(count_p[:, None], mean_p, std_p)
        count, mean, std = merge_two(count, mean, std, count_b, mean_b, std_b)
    mean, rest = two_sum(base, mean)
    return count, mean, rest, std


@triton.jit
def count_batch(batches_ptr, pid):
    if batches_ptr is not None:
        if pid == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


# One program owns CHANNELS channels.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr,                       # (N, C, S), (3, C): mean, rest, rstd
    running_mean_ptr, running_var_ptr, batches_ptr, momentum_ptr,  # (C,), (C,), (), ()
    momentum: tl.float64, eps: tl.float64,
    N, C, S, tiles,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = as_int64(N, C, S)
    pid = tl.program_id(0)
    j, c, inside, W, T = columns_of_block(pid, N, C, S, ALIGN, COLUMNS, BLOCK_C, CHANNELS)
    count, mean, rest, std = moments_of_tiles(
        x_ptr, 0, tiles, j, inside, N, W, T, ACC,
        BLOCK_N, BLOCK_S, BLOCK_C, FOLD, RUN, COLUMNS, LEAD,
    )  # fmt: skip
    count, mean, rest, std = merge_columns(count, mean, rest, std, S, CHANNELS)
    k, kmask = channels_of(pid, C, CHANNELS)
    rstd = finalize(
        mean, rest, std, count, eps, k, kmask, C,
        stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
    )  # fmt: skip
    mean, rest = by_column(mean, S, BLOCK_C), by_column(rest, S, BLOCK_C)
    rstd = by_column(rstd, S, BLOCK_C)
    w, b = load_affine(w_ptr, b_ptr, c, inside, ACC)
    normalize_tiles(
        x_ptr, residual_ptr, y_ptr, 0, tiles, j, inside, mean, rest, rstd, w, b, N, W, T,
        ACT, BLOCK_N, BLOCK_S, COLUMNS, LEAD,
    )  # fmt: skip
    count_batch(batches_ptr, pid)


# One program owns some consecutive tiles of CHANNELS channels, and leaves their partial statistics.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_moments_kernel(
    x_ptr, partial_ptr, count_ptr, batches_ptr,  # (N, C, S), (3, P, C): mean, rest, std; (P,), ()
    N, C, S, P, tiles, tiles_per_program,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    N, C, S = as_int64(N, C, S)
    p, block, first, last = share_of_program(P, tiles, tiles_per_program)
    j, _, inside, W, T = columns_of_block(block, N, C, S, ALIGN, COLUMNS, BLOCK_C, CHANNELS)
    count, mean, rest, std = moments_of_tiles(
        x_ptr, first, last, j, inside, N, W, T, ACC,
        BLOCK_N, BLOCK_S, BLOCK_C, FOLD, RUN, COLUMNS, LEAD,
    )  # fmt: skip
    count, mean, rest, std = merge_columns(count, mean, rest, std, S, CHANNELS)
    k, kmask = channels_of(block, C, CHANNELS)
    at = p.to(tl.int64) * C + k
    tl.store(partial_ptr + at, mean, mask=kmask)
    tl.store(partial_ptr + P * C + at, rest, mask=kmask)
    tl.store(partial_ptr + 2 * P * C + at, std, mask=kmask)
    pid = tl.program_id(0)
    if pid == p:  # the first block of channels speaks for all
        tl.store(count_ptr + p, tl.sum(count, axis=0))
    count_batch(batches_ptr, pid)


# One program owns BLOCK_C channels of the statistics.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_finalize_kernel(
    partial_ptr, count_ptr, stats_ptr,      # (3, P, C), (P,), (3, C)
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (C,), (C,), ()
    momentum: tl.float64, eps: tl.float64,
    C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = C.to(tl.int64)
    c, cmask = channels_of(tl.program_id(0), C, BLOCK_C)
    count, mean, rest, std = merge_moments(
        partial_ptr, count_ptr, 0, c, cmask, P, C, P * C, 1, BLOCK_P
    )
    finalize(
        mean, rest, std, count, eps, c, cmask, C,
        stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
    )  # fmt: skip


# One program owns the tiles of CHANNELS channels that it reduced before. In evaluation the first
# program of a channel saves the running statistics, which may have moved when the backward runs.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_apply_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr,                       # (N, C, S), (3, C): mean, rest, rstd
    running_mean_ptr, running_var_ptr,      # (C,), (C,); None in training
    eps: tl.float64,
    N, C, S, P, tiles, tiles_per_program,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = as_int64(N, C, S)
    p, block, first, last = share_of_program(P, tiles, tiles_per_program)
    j, c, inside, W, T = columns_of_block(block, N, C, S, ALIGN, COLUMNS, BLOCK_C, CHANNELS)
    if running_mean_ptr is None:
        mean, rest, rstd = load_stats(stats_ptr, c, inside, C)
    else:
        mean = load_as(running_mean_ptr, c, inside, ACC)
        rest = tl.zeros((BLOCK_C,), ACC)
        var = tl.load(running_var_ptr + c, mask=inside, other=1.0).to(ACC)
        rstd = rstd_of_var(var, 1.0, eps)
        if p == 0:
            own = inside if CHANNELS == BLOCK_C else inside & (j == c * S)
            tl.store(stats_ptr + c, mean, mask=own)
            tl.store(stats_ptr + C + c, rest, mask=own)
            tl.store(stats_ptr + 2 * C + c, rstd, mask=own)
    w, b = load_affine(w_ptr, b_ptr, c, inside, ACC)
    normalize_tiles(
        x_ptr, residual_ptr, y_ptr, first, last, j, inside, mean, rest, rstd, w, b, N, W, T,
        ACT, BLOCK_N, BLOCK_S, COLUMNS, LEAD,
    )  # fmt: skip
