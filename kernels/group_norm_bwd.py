"""GroupNorm's backward kernels; the formulas are in group_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.channels import (
    channels_of,
    gradient_sums_of_tiles,
    input_gradient_of_tiles,
    load_affine,
    load_stats,
    load_xhat_dz,
    wide_sizes,
)
from fastnorm.kernels.device.groups import (
    channels_of_groups,
    positions_of_lanes,
    samples_of_lanes,
    share_of_sample,
    sum_of_group,
    sum_of_samples,
    wide_channels,
)
from fastnorm.kernels.device.rows import columns_of, wide_rows
from fastnorm.kernels.device.runs import (
    affine_of_rows,
    repeat,
    rows_of_runs,
    sum_of_blocks,
    sum_within,
    sums_of_run,
    tile_of_run,
)
from fastnorm.kernels.device.tiles import load_as, load_or, store_cast
from fastnorm.kernels.launch import GROUP_SIZES


# One program owns BLOCK_C // BLOCK_K groups, channels innermost, and one block of BLOCK_N
# samples after the other; it leaves the parameters' partial sums over its samples.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, N·G)
    dx_ptr, dz_ptr, partial_ptr,            # (N, C, S), (N, C, S), (2, P, C); None: not wanted
    N, C, S, G, K, P, tiles, blocks_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr, PADDED: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    LANES: tl.constexpr = BLOCK_N * BLOCK_C
    last = tl.cdiv(N, BLOCK_N)
    N, C, S = wide_sizes(N, C, S, ALIGN, True)
    K = wide_channels(K, ALIGN, PADDED)
    L = (K * S).to(ACC)
    pid = tl.program_id(0)
    p = pid % P
    g, c, cmask = channels_of_groups(pid // P, C, K, BLOCK_N, BLOCK_C, BLOCK_K, PADDED)
    w, b = load_affine(w_ptr, b_ptr, c, cmask, ACC)
    dw = tl.zeros((LANES,), ACC)
    db = tl.zeros((LANES,), ACC)
    first = p * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, last)):
        n = samples_of_lanes(block, BLOCK_N, BLOCK_C)
        mask = cmask & (n < N)
        at = positions_of_lanes(n, c, C, S)
        mean, rest, rstd = load_stats(stats_ptr, n * G + g, mask, N * G)
        dw_n, db_n = gradient_sums_of_tiles(
            dy_ptr, x_ptr, y_ptr, residual_ptr, None, dz_ptr if dx_ptr is None else None,
            0, tiles, at, mask, mean, rest, rstd, w, b, 1, C, S,
            ACT_GRAD, 1, BLOCK_S, LANES, FOLD, RUN, True, 1,
        )  # fmt: skip
        dw += dw_n
        db += db_n
        if dx_ptr is not None:
            slope, shift = sum_of_group(w * dw_n, BLOCK_K), sum_of_group(w * db_n, BLOCK_K)
            input_gradient_of_tiles(
                dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
                0, tiles, at, mask, mean, rest, rstd, w, b, w, rstd, slope / L, shift / L, 1, C, S,
                ACT_GRAD, 1, BLOCK_S, True, 1,
            )  # fmt: skip
    if partial_ptr is not None:
        _, c, cmask = channels_of_groups(pid // P, C, K, 1, BLOCK_C, BLOCK_K, PADDED)
        tl.store(partial_ptr + p * C + c, sum_of_samples(dw, BLOCK_N), mask=cmask)
        tl.store(partial_ptr + (P + p) * C + c, sum_of_samples(db, BLOCK_N), mask=cmask)


# One program owns BLOCK_G groups, each contiguous, of some consecutive blocks of samples, keeps
# each block in registers, and leaves the parameters' partial sums over its samples. WITHIN
# neighbours have the same parameters.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_bwd_rows_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, N·G)
    dx_ptr, dz_ptr, partial_ptr,            # (N, C, S), (N, C, S), (2, P, C); None: not wanted
    N, C, S, G, K, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, FULL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    ALIGN: tl.constexpr, WITHIN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    R, L = wide_rows(N.to(tl.int64) * G, K * S, ALIGN)
    pid = tl.program_id(0)
    p = pid % P
    g = pid // P * BLOCK_G + tl.arange(0, BLOCK_M) % BLOCK_G
    col, inside = columns_of(0, L, BLOCK_N, FULL)
    w, b = affine_of_rows(
        w_ptr, b_ptr, pid // P * BLOCK_G, G, K, S, ACC, BLOCK_M, BLOCK_G, BLOCK_N, BLOCK_K, WITHIN
    )
    dw = tl.zeros((BLOCK_M, BLOCK_N // WITHIN), ACC)
    db = tl.zeros((BLOCK_M, BLOCK_N // WITHIN), ACC)
    first = p * tiles_per_program
    for tile in tl.range(first, tl.minimum(first + tiles_per_program, tiles), num_stages=STAGES):
        row, rmask, at, mask = rows_of_runs(tile, g, N, G, L, col, inside, BLOCK_M, BLOCK_G)
        mean, rest, rstd = load_stats(stats_ptr, row, rmask, R)
        xhat, dz = load_xhat_dz(
            dy_ptr, x_ptr, y_ptr, residual_ptr, at, mask, mask, mean[:, None], rest[:, None],
            rstd[:, None], repeat(w, WITHIN), repeat(b, WITHIN), ACT_GRAD,
        )  # fmt: skip
        store_cast(dz_ptr, at, dz, mask)
        if dx_ptr is not None:
            wdz = dz * repeat(w, WITHIN)
            slope = tl.sum(wdz * xhat, axis=1) / L.to(ACC)
            shift = tl.sum(wdz, axis=1) / L.to(ACC)
            dx = (wdz - shift[:, None] - xhat * slope[:, None]) * rstd[:, None]
            store_cast(dx_ptr, at, dx, mask)
        dw += sum_within(dz * xhat, WITHIN)
        db += sum_within(dz, WITHIN)
    if partial_ptr is not None:
        g = pid // P * BLOCK_G + tl.arange(0, BLOCK_G)
        k = tl.arange(0, BLOCK_K)
        at = p.to(tl.int64) * C + (g * K)[:, None] + k[None, :]
        mask = (g < G)[:, None] & (k < K)[None, :]
        dw = sums_of_run(sum_of_blocks(dw, BLOCK_G), K, S, BLOCK_K, BLOCK_S, WITHIN)
        db = sums_of_run(sum_of_blocks(db, BLOCK_G), K, S, BLOCK_K, BLOCK_S, WITHIN)
        tl.store(partial_ptr + at, dw, mask=mask)
        tl.store(partial_ptr + P.to(tl.int64) * C + at, db, mask=mask)


# One program owns a group that is contiguous, and reads its tiles twice, the second time from a
# cache: each is one of P parts of BLOCK_C channels, and it leaves the sums of each part.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_bwd_run_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, N·G)
    dx_ptr, dz_ptr, partial_ptr,            # (N, C, S), (N, C, S), (2, P, N, C); None: not wanted
    N, C, S, G, K, P, tiles,
    ACT_GRAD: tl.constexpr, FULL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, False)
    L = (K * S).to(ACC)
    row = tl.program_id(0) + tl.arange(0, 1)
    mean, rest, rstd = load_stats(stats_ptr, row, row < N * G, N * G)
    c = tl.program_id(0) % G * K
    first = tl.program_id(0) // G * C + c
    slope = tl.zeros((BLOCK_C,), ACC)
    shift = tl.zeros((BLOCK_C,), ACC)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        part, k, inside, at, mask = tile_of_run(tile, first, P, K, S, BLOCK_S, BLOCK_C, FULL)
        w, b = load_affine(w_ptr, b_ptr, c + k, inside, ACC)
        xhat, dz = load_xhat_dz(
            dy_ptr, x_ptr, y_ptr, residual_ptr, at, mask, mask,
            mean[None, :], rest[None, :], rstd[None, :], w[None, :], b[None, :], ACT_GRAD,
        )  # fmt: skip
        if dx_ptr is None:
            store_cast(dz_ptr, at, dz, mask)
        dw, db = tl.sum(dz * xhat, axis=0), tl.sum(dz, axis=0)
        if partial_ptr is not None:
            at = part * N * C + first + k
            tl.store(partial_ptr + at, dw, mask=inside)
            tl.store(partial_ptr + P * N * C + at, db, mask=inside)
        slope += w * dw
        shift += w * db
    if dx_ptr is not None:
        slope, shift = tl.sum(slope, axis=0) / L, tl.sum(shift, axis=0) / L
        for i in tl.range(0, tiles, num_stages=STAGES):
            _, k, inside, at, mask = tile_of_run(
                tiles - 1 - i, first, P, K, S, BLOCK_S, BLOCK_C, FULL
            )
            w, b = load_affine(w_ptr, b_ptr, c + k, inside, ACC)
            xhat, dz = load_xhat_dz(
                dy_ptr, x_ptr, y_ptr, residual_ptr, at, mask, mask,
                mean[None, :], rest[None, :], rstd[None, :], w[None, :], b[None, :], ACT_GRAD,
            )  # fmt: skip
            store_cast(dx_ptr, at, (dz * w[None, :] - shift - xhat * slope) * rstd[None, :], mask)
            store_cast(dz_ptr, at, dz, mask)


# One program owns some consecutive tiles of BLOCK_C channels of a sample, and leaves their sums.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_bwd_reduce_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, N·G)
    dz_ptr, partial_ptr,                    # (N, C, S), (2, P, N·C)
    N, C, S, G, K, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    p, n, block, first, last = share_of_sample(N, P, tiles, tiles_per_program)
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    c, cmask = channels_of(block, C, BLOCK_C)
    r = n.to(tl.int64) * G + c.to(tl.int32) // K
    mean, rest, rstd = load_stats(stats_ptr, r, cmask, N * G)
    w, b = load_affine(w_ptr, b_ptr, c, cmask, ACC)
    dw, db = gradient_sums_of_tiles(
        dy_ptr, x_ptr, y_ptr, residual_ptr, None, dz_ptr,
        first, last, c, cmask, mean, rest, rstd, w, b, N, C, S,
        ACT_GRAD, 1, BLOCK_S, BLOCK_C, FOLD, RUN, COLUMNS, LEAD,
    )  # fmt: skip
    if partial_ptr is not None:
        at = (p * N + n) * C + c
        tl.store(partial_ptr + at, dw, mask=cmask)
        tl.store(partial_ptr + P * N * C + at, db, mask=cmask)


# One program owns BLOCK_R groups: their means of w·dz·x̂ and w·dz, from P · K partial sums each.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_bwd_finalize_kernel(
    partial_ptr, w_ptr, means_ptr,          # (2, P, R·K), (C,), (2, R)
    R, G, K, S, P,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    r, rmask = channels_of(tl.program_id(0), R, BLOCK_R)
    g = r.to(tl.int32) % G
    stride = R.to(tl.int64) * K
    slope = tl.zeros((BLOCK_R,), ACC)
    shift = tl.zeros((BLOCK_R,), ACC)
    for start in range(0, P * K, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        k = part % K
        at = ((part // K).to(tl.int64) * stride + k)[:, None] + (r * K)[None, :]
        mask = (part < P * K)[:, None] & rmask[None, :]
        w = load_or(w_ptr, k[:, None] + (g * K)[None, :], mask, 1.0, ACC)
        slope += tl.sum(w * load_as(partial_ptr, at, mask, ACC), axis=0)
        shift += tl.sum(w * load_as(partial_ptr, P * stride + at, mask, ACC), axis=0)
    L = (K * S.to(tl.int64)).to(ACC)
    tl.store(means_ptr + r, slope / L, mask=rmask)
    tl.store(means_ptr + R + r, shift / L, mask=rmask)


# One program owns the tiles of BLOCK_C channels that it reduced before.
@triton.jit(do_not_specialize=GROUP_SIZES)
def group_norm_bwd_apply_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr,            # dy is dz where reduce wrote it
    stats_ptr, means_ptr, dx_ptr,           # (3, N·G), (2, N·G), (N, C, S)
    N, C, S, G, K, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    _, n, block, first, last = share_of_sample(N, P, tiles, tiles_per_program)
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    c, cmask = channels_of(block, C, BLOCK_C)
    r = n.to(tl.int64) * G + c.to(tl.int32) // K
    mean, rest, rstd = load_stats(stats_ptr, r, cmask, N * G)
    w, b = load_affine(w_ptr, b_ptr, c, cmask, ACC)
    slope = load_as(means_ptr, r, cmask, ACC)
    shift = load_as(means_ptr, N * G + r, cmask, ACC)
    input_gradient_of_tiles(
        dy_ptr, x_ptr, None, None, dx_ptr, None,
        first, last, c, cmask, mean, rest, rstd, w, b, w, rstd, slope, shift, N, C, S,
        ACT_GRAD, 1, BLOCK_S, COLUMNS, LEAD,
    )  # fmt: skip
