"""BatchNorm's backward kernels; the formulas are in batch_norm.py."""

import triton
import triton.language as tl

from fastnorm.kernels.device.channels import (
    as_int64,
    by_channel,
    by_column,
    channels_of,
    columns_of_block,
    gradient_sums_of_tiles,
    input_gradient_of_tiles,
    load_affine,
    load_stats,
    share_of_program,
)
from fastnorm.kernels.device.tiles import load_as, store_cast
from fastnorm.kernels.launch import SIZES


# One program owns CHANNELS channels. In evaluation the first loop writes dx; there is no second.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, C)
    dx_ptr, dz_ptr, dw_ptr, db_ptr,         # (N, C, S), (N, C, S), (C,), (C,); None: not wanted
    N, C, S, tiles,
    ACT_GRAD: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = as_int64(N, C, S)
    pid = tl.program_id(0)
    j, c, inside, W, T = columns_of_block(pid, N, C, S, ALIGN, COLUMNS, BLOCK_C, CHANNELS)
    mean, rest, rstd = load_stats(stats_ptr, c, inside, C)
    w, b = load_affine(w_ptr, b_ptr, c, inside, ACC)
    dw, db = gradient_sums_of_tiles(
        dy_ptr, x_ptr, y_ptr, residual_ptr,
        None if TRAINING else dx_ptr, None if TRAINING else dz_ptr,
        0, tiles, j, inside, mean, rest, rstd, w, b, N, W, T,
        ACT_GRAD, BLOCK_N, BLOCK_S, BLOCK_C, FOLD, RUN, COLUMNS, LEAD,
    )  # fmt: skip
    dw, db = by_channel(dw, S, CHANNELS), by_channel(db, S, CHANNELS)
    k, kmask = channels_of(pid, C, CHANNELS)
    store_cast(dw_ptr, k, dw, kmask)
    store_cast(db_ptr, k, db, kmask)
    if TRAINING:
        M = (N * S).to(ACC)
        dw, db = by_column(dw, S, BLOCK_C), by_column(db, S, BLOCK_C)
        input_gradient_of_tiles(
            dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
            0, tiles, j, inside, mean, rest, rstd, w, b,
            None, rstd * w, dw / M, db / M, N, W, T,
            ACT_GRAD, BLOCK_N, BLOCK_S, COLUMNS, LEAD,
        )  # fmt: skip


# One program owns some consecutive tiles of CHANNELS channels, and leaves their partial sums.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_reduce_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, C)
    dx_ptr, dz_ptr, partial_ptr,            # (N, C, S) in evaluation, (N, C, S), (2, P, C)
    N, C, S, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = as_int64(N, C, S)
    p, block, first, last = share_of_program(P, tiles, tiles_per_program)
    j, c, inside, W, T = columns_of_block(block, N, C, S, ALIGN, COLUMNS, BLOCK_C, CHANNELS)
    mean, rest, rstd = load_stats(stats_ptr, c, inside, C)
    w, b = load_affine(w_ptr, b_ptr, c, inside, ACC)
    dw, db = gradient_sums_of_tiles(
        dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
        first, last, j, inside, mean, rest, rstd, w, b, N, W, T,
        ACT_GRAD, BLOCK_N, BLOCK_S, BLOCK_C, FOLD, RUN, COLUMNS, LEAD,
    )  # fmt: skip
    if partial_ptr is not None:
        dw, db = by_channel(dw, S, CHANNELS), by_channel(db, S, CHANNELS)
        k, kmask = channels_of(block, C, CHANNELS)
        tl.store(partial_ptr + p.to(tl.int64) * C + k, dw, mask=kmask)
        tl.store(partial_ptr + (P + p).to(tl.int64) * C + k, db, mask=kmask)


# One program owns the tiles of CHANNELS channels that it reduced before.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_apply_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr,            # dy is dz where reduce wrote it
    stats_ptr, sums_ptr, count_ptr, dx_ptr,  # (3, C), (2, C), () or None: N·S; (N, C, S)
    N, C, S, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr, FOLD: tl.constexpr, RUN: tl.constexpr, ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = as_int64(N, C, S)
    _, block, first, last = share_of_program(P, tiles, tiles_per_program)
    j, c, inside, W, T = columns_of_block(block, N, C, S, ALIGN, COLUMNS, BLOCK_C, CHANNELS)
    mean, rest, rstd = load_stats(stats_ptr, c, inside, C)
    w, b = load_affine(w_ptr, b_ptr, c, inside, ACC)
    M = (N * S).to(ACC)
    if count_ptr is not None:  # other processes have parts of the batch
        M = tl.load(count_ptr)
    dw = load_as(sums_ptr, c, inside, ACC)
    db = load_as(sums_ptr, C + c, inside, ACC)
    input_gradient_of_tiles(
        dy_ptr, x_ptr, None, None, dx_ptr, None,
        first, last, j, inside, mean, rest, rstd, w, b,
        None, rstd * w, dw / M, db / M, N, W, T,
        ACT_GRAD, BLOCK_N, BLOCK_S, COLUMNS, LEAD,
    )  # fmt: skip
