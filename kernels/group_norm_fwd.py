"""GroupNorm's forward kernels; the formulas are in group_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.batch_norm_fwd import moving_average
from fastnorm.kernels.device.channels import (
    channels_of,
    load_affine,
    load_stats,
    moments_of_tiles,
    normalize_tiles,
    wide_sizes,
)
from fastnorm.kernels.device.groups import (
    channels_of_groups,
    moments_of_groups,
    positions_of_lanes,
    samples_of_lanes,
    share_of_sample,
    wide_channels,
)
from fastnorm.kernels.device.moments import (
    finite_or_zero,
    merge_partials,
    merge_two,
    pivot_of,
    rstd_of,
    two_sum,
)
from fastnorm.kernels.device.rows import (
    centered,
    columns_of,
    moments_of_long_row,
    row_moments,
    wide_rows,
)
from fastnorm.kernels.device.runs import affine_of_rows, affine_of_run, repeat, rows_of_runs
from fastnorm.kernels.device.tiles import load_as, store_cast
from fastnorm.kernels.launch import GROUP_SIZES


@triton.jit
def save_statistics(mean, rest, std, rstd, r, mask, R, stats_ptr, std_ptr):
    """Store the statistics of groups r of R."""
    tl.store(stats_ptr + r, mean, mask=mask)
    tl.store(stats_ptr + R + r, rest, mask=mask)
    tl.store(stats_ptr + 2 * R + r, rstd, mask=mask)
    store_cast(std_ptr, r, std, mask)


# One program owns BLOCK_C // BLOCK_K groups of BLOCK_N samples, channels innermost.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr, std_ptr,              # (N, C, S), (3, N·G): mean, rest, rstd; (N·G,)
    eps: tl.float64,
    N, C, S, G, K, tiles,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, True)
    K = wide_channels(K, ALIGN, PADDED)
    pid = tl.program_id(0)
    blocks = tl.cdiv(G, BLOCK_C // BLOCK_K)
    g, c, cmask = channels_of_groups(pid % blocks, C, K, BLOCK_N, BLOCK_C, BLOCK_K, PADDED)
    n = samples_of_lanes(pid // blocks, BLOCK_N, BLOCK_C)
    mask = cmask & (n < N)
    at = positions_of_lanes(n, c, C, S)
    _, mean, rest, std = moments_of_tiles(
        x_ptr, 0, tiles, at, mask, 1, C, S, ACC, 1, BLOCK_S, BLOCK_N * BLOCK_C, FOLD, RUN, True, 1
    )
    mean, rest, std = moments_of_groups(mean, rest, std, K, BLOCK_K)
    speaks = mask & (tl.arange(0, BLOCK_N * BLOCK_C) % BLOCK_K == 0)
    rstd = rstd_of(std, eps)
    save_statistics(mean, rest, std, rstd, n * G + g, speaks, N * G, stats_ptr, std_ptr)
    w, b = load_affine(w_ptr, b_ptr, c, cmask, ACC)
    normalize_tiles(
        x_ptr, residual_ptr, y_ptr, 0, tiles, at, mask, mean, rest, rstd, w, b, 1, C, S,
        ACT, 1, BLOCK_S, True, 1,
    )  # fmt: skip


# One program owns BLOCK_G groups, each contiguous, of some consecutive blocks of samples, and keeps
# each block in registers. WITHIN neighbours have the same parameters.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_fwd_rows_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr, std_ptr,              # (N, C, S), (3, N·G): mean, rest, rstd; (N·G,)
    eps: tl.float64,
    N, C, S, G, K, P, tiles, tiles_per_program,
    ACT: tl.constexpr, FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr, WITHIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    R, L = wide_rows(N.to(tl.int64) * G, K * S, ALIGN)
    pid = tl.program_id(0)
    g = pid // P * BLOCK_G + tl.arange(0, BLOCK_M) % BLOCK_G
    col, inside = columns_of(0, L, BLOCK_N, FULL)
    w, b = affine_of_rows(
        w_ptr, b_ptr, pid // P * BLOCK_G, G, K, S, ACC, BLOCK_M, BLOCK_G, BLOCK_N, BLOCK_K, WITHIN
    )
    first = pid % P * tiles_per_program
    for tile in tl.range(first, tl.minimum(first + tiles_per_program, tiles), num_stages=STAGES):
        row, rmask, at, mask = rows_of_runs(tile, g, N, G, L, col, inside, BLOCK_M, BLOCK_G)
        x = load_as(x_ptr, at, mask, ACC)
        mean, rest, std, rstd, d = row_moments(x, inside[None, :], L.to(ACC), eps, True)
        rest = finite_or_zero(rest)  # an infinite mean stays infinite, as a running mean shows
        save_statistics(mean, rest, std, rstd, row, rmask, R, stats_ptr, std_ptr)
        z = d * rstd[:, None] * repeat(w, WITHIN) + repeat(b, WITHIN)
        if residual_ptr is not None:
            z += load_as(residual_ptr, at, mask, ACC)
        store_cast(y_ptr, at, ACT(z), mask)


# One program owns a group that is contiguous, of several tiles, and reads it twice: the second time
# from a cache. WITHIN neighbours have the same parameters.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_fwd_run_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr, std_ptr,              # (N, C, S), (3, N·G): mean, rest, rstd; (N·G,)
    eps: tl.float64,
    N, C, S, G, K, tiles,
    ACT: tl.constexpr, FULL: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, WITHIN: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    R, L = wide_rows(N.to(tl.int64) * G, K * S, ALIGN)
    row = tl.program_id(0) + tl.arange(0, 1)
    start = tl.program_id(0).to(tl.int64) * L
    _, mean, rest, std = moments_of_long_row(
        x_ptr + start, None, None, 0, tiles, L, ACC, True, FULL, BLOCK_N, FOLD, RUN, STAGES
    )
    rest = finite_or_zero(rest)  # an infinite mean stays infinite, as a running mean shows
    rstd = rstd_of(std, eps)
    save_statistics(mean, rest, std, rstd, row, row < R, R, stats_ptr, std_ptr)
    for i in tl.range(0, tiles, num_stages=STAGES):
        tile = tiles - 1 - i  # what was read before is still in the cache
        col, inside = columns_of(tile, L, BLOCK_N, FULL)
        at, mask = start + col[None, :], inside[None, :]
        x = load_as(x_ptr, at, mask, ACC)
        w, b = affine_of_run(
            w_ptr, b_ptr, tile * BLOCK_N, row % G, row < R, K, S, L, ACC, BLOCK_N, WITHIN
        )
        xhat = centered(x, mean, rest, True) * rstd[:, None]
        z = xhat * repeat(w, WITHIN) + repeat(b, WITHIN)
        if residual_ptr is not None:
            z += load_as(residual_ptr, at, mask, ACC)
        store_cast(y_ptr, at, ACT(z), mask)


# One program owns some consecutive tiles of BLOCK_C channels of a sample, and leaves the partial
# statistics of each channel.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_fwd_moments_kernel(
    x_ptr, partial_ptr,                     # (N, C, S), (3, P, N·C): mean, rest, std
    N, C, S, P, tiles, tiles_per_program,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    p, n, block, first, last = share_of_sample(N, P, tiles, tiles_per_program)
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    c, cmask = channels_of(block, C, BLOCK_C)
    _, mean, rest, std = moments_of_tiles(
        x_ptr, first, last, c, cmask, N, C, S, ACC, 1, BLOCK_S, BLOCK_C, FOLD, RUN, COLUMNS, LEAD
    )
    at = (p * N + n) * C + c
    tl.store(partial_ptr + at, mean, mask=cmask)
    tl.store(partial_ptr + P * N * C + at, rest, mask=cmask)
    tl.store(partial_ptr + 2 * P * N * C + at, std, mask=cmask)


# One program owns BLOCK_R groups of the statistics, each the merger of P · K partials.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_fwd_finalize_kernel(
    partial_ptr, stats_ptr, std_ptr,        # (3, P, R·K), (3, R), (R,)
    eps: tl.float64,
    R, K, S, P, positions,                  # P programs of so many positions had a channel
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    r, rmask = channels_of(tl.program_id(0), R, BLOCK_R)
    stride = R.to(tl.int64) * K
    base = tl.load(partial_ptr + r * K, mask=rmask, other=0.0)
    count = tl.zeros((1,), ACC)
    mean = tl.zeros((BLOCK_R,), ACC)  # relative to base
    std = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, P * K, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        inside = part < P * K
        p = (part // K).to(tl.int64)
        at = (p * stride + part % K)[:, None] + (r * K)[None, :]
        mask = inside[:, None] & rmask[None, :]
        count_p = tl.where(inside, tl.minimum(S - p * positions, positions), 0).to(ACC)
        mean_p = load_as(partial_ptr, at, mask, ACC)
        if start == 0:
            share = count_p / tl.sum(count_p, axis=0)
            base = pivot_of(base, mean_p, mask, share[:, None])
        mean_p = (mean_p - base[None, :]) + load_as(partial_ptr, P * stride + at, mask, ACC)
        mean_p = tl.where(mask, mean_p, 0.0)
        std_p = load_as(partial_ptr, 2 * P * stride + at, mask, ACC)
        count_b, mean_b, std_b = merge_partials(count_p[:, None], mean_p, std_p)
        count, mean, std = merge_two(count, mean, std, count_b, mean_b, std_b)
    mean, rest = two_sum(base, mean)
    save_statistics(mean, rest, std, rstd_of(std, eps), r, rmask, R, stats_ptr, std_ptr)


# One program owns the tiles of BLOCK_C channels that it reduced before.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_fwd_apply_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr,                       # (N, C, S), (3, N·G): mean, rest, rstd
    N, C, S, G, K, P, tiles, tiles_per_program,
    ACT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    _, n, block, first, last = share_of_sample(N, P, tiles, tiles_per_program)
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    c, cmask = channels_of(block, C, BLOCK_C)
    # in int32: a 64-bit division is a function call on a GPU
    r = n.to(tl.int64) * G + c.to(tl.int32) // K
    mean, rest, rstd = load_stats(stats_ptr, r, cmask, N * G)
    w, b = load_affine(w_ptr, b_ptr, c, cmask, ACC)
    normalize_tiles(
        x_ptr, residual_ptr, y_ptr, first, last, c, cmask, mean, rest, rstd, w, b, N, C, S,
        ACT, 1, BLOCK_S, COLUMNS, LEAD,
    )  # fmt: skip


# One program owns BLOCK_C channels of InstanceNorm's running statistics: averages over N samples.
@triton.jit(do_not_specialize=GROUP_SIZES)
def instance_norm_running_kernel(
    stats_ptr, std_ptr,                     # (3, N·C): mean, rest, rstd; (N·C,)
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (C,), (C,), ()
    momentum: tl.float64,
    N, C, S,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    C = C.to(tl.int64)
    c, cmask = channels_of(tl.program_id(0), C, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), ACC)
    var = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, N, BLOCK_P):
        n = start + tl.arange(0, BLOCK_P)
        at = (n.to(tl.int64) * C)[:, None] + c[None, :]
        mask = (n < N)[:, None] & cmask[None, :]
        # divided first: the sum of finite means may not be finite
        mean_n = load_as(stats_ptr, at, mask, ACC) + load_as(stats_ptr, N * C + at, mask, ACC)
        mean += tl.sum(mean_n / N, axis=0)
        std = load_as(std_ptr, at, mask, ACC)
        var += tl.sum(std * std / N, axis=0)
    S = S.to(ACC)
    unbiased = var * (S / (S - 1.0))
    moving_average(running_mean_ptr, c, cmask, mean, momentum, momentum_ptr)
    moving_average(running_var_ptr, c, cmask, unbiased, momentum, momentum_ptr)
