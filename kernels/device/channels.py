"""Loops over the tiles of BLOCK_C channels of a dense (N, C, S) tensor (see tiles.py).

What the kernels of one program per channel and those that share a channel have in common.
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.moments import (
    fold_moments,
    merge_counted,
    merge_lanes,
    merge_partials,
    pivot_of,
    scale_of,
    two_sum,
)
from fastnorm.kernels.device.tiles import (
    STAGES,
    count_of_groups,
    count_of_tile,
    fold,
    is_full,
    load_as,
    load_or,
    places_of_tile,
    store_cast,
)


@triton.jit
def as_int64(N, C, S):
    """Sizes whose products pass 2³¹ before a tensor's bytes do."""
    return N.to(tl.int64), C.to(tl.int64), S.to(tl.int64)


@triton.jit
def wide_sizes(N, C, S, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    """(N, C, S) as int64; a division that changes nothing shows that no vector straddles a mask."""
    N, C, S = as_int64(N, C, S)
    if COLUMNS:
        return N, C // ALIGN * ALIGN, S
    return N, C, S // ALIGN * ALIGN


@triton.jit
def channels_of(block, C, BLOCK_C: tl.constexpr):
    c = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


@triton.jit
def columns_of_block(
    block, N, C, S, ALIGN: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """(j, c, inside, C, S) of the columns of a block of CHANNELS channels, and sizes by column.

    A column is a channel; or, where a block has fewer channels than columns, one position of one of
    them: the planes of a sample's channels, S long, are one run in memory.
    """
    if CHANNELS == BLOCK_C:
        _, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
        c, inside = channels_of(block, C, BLOCK_C)
        return c, c, inside, C, S
    else:
        own = CHANNELS * S // ALIGN * ALIGN
        columns = C * S // ALIGN * ALIGN
        lane = tl.arange(0, BLOCK_C)
        j = block * own + lane
        c = block * CHANNELS + lane // S.to(tl.int32)
        return j, c, (lane < own) & (j < columns), columns, tl.full((), 1, tl.int64)


@triton.jit
def planes_of(t, S, CHANNELS: tl.constexpr):
    """(t, inside): what is by column as (positions, channels), and which of the positions exist.

    Transposed from (channels, positions): else Triton 3.6 has each thread hold far too many.
    """
    POSITIONS: tl.constexpr = t.shape[0] // CHANNELS
    s = tl.arange(0, POSITIONS)
    column = (tl.arange(0, CHANNELS) * S.to(tl.int32))[:, None] + s[None, :]
    t = tl.gather(t, tl.reshape(column, (t.shape[0],)), axis=0)
    return tl.trans(tl.reshape(t, (CHANNELS, POSITIONS))), (s < S)[:, None]


@triton.jit
def by_channel(t, S, CHANNELS: tl.constexpr):
    """Sums over the columns of each channel."""
    if t.shape[0] == CHANNELS:
        return t
    else:
        t, inside = planes_of(t, S, CHANNELS)
        return tl.sum(tl.where(inside, t, 0.0), axis=0)


@triton.jit
def by_column(t, S, BLOCK_C: tl.constexpr):
    """What the channel of each column has."""
    CHANNELS: tl.constexpr = t.shape[0]
    if CHANNELS == BLOCK_C:
        return t
    else:
        channel = tl.arange(0, BLOCK_C) // S.to(tl.int32)
        return tl.gather(t, tl.minimum(channel, CHANNELS - 1), axis=0)


@triton.jit
def merge_columns(count, mean, rest, std, S, CHANNELS: tl.constexpr):
    """(count, mean, rest, std) of channels, from those of their columns; count is (1,)."""
    if mean.shape[0] == CHANNELS:
        return count, mean, rest, std
    else:
        mean, inside = planes_of(mean, S, CHANNELS)
        rest, _ = planes_of(rest, S, CHANNELS)
        std, _ = planes_of(std, S, CHANNELS)
        s = tl.arange(0, mean.shape[0])[:, None]
        first = tl.sum(tl.where(s == 0, mean, 0.0), axis=0)
        base = pivot_of(first, mean, inside, 1.0 / S.to(mean.dtype))
        mean = tl.where(inside, (mean - base[None, :]) + rest, 0.0)
        each = tl.where(inside, count, 0.0)
        _, mean, std = merge_partials(each, mean, tl.where(inside, std, 0.0))
        mean, rest = two_sum(base, mean)
        return count * S.to(count.dtype), mean, rest, std


@triton.jit
def share_of_program(P, tiles, tiles_per_program):
    """(p, block, first, last): which of the P shares of which block this program owns."""
    pid = tl.program_id(0)
    p = pid % P
    first = p * tiles_per_program
    return p, pid // P, first, tl.minimum(first + tiles_per_program, tiles)


@triton.jit
def load_affine(w_ptr, b_ptr, c, cmask, ACC: tl.constexpr):
    return load_or(w_ptr, c, cmask, 1.0, ACC), load_or(b_ptr, c, cmask, 0.0, ACC)


@triton.jit
def load_stats(stats_ptr, c, cmask, C):
    """(mean, rest, rstd) that the forward saved."""
    mean = tl.load(stats_ptr + c, mask=cmask, other=0.0)
    rest = tl.load(stats_ptr + C + c, mask=cmask, other=0.0)
    rstd = tl.load(stats_ptr + 2 * C + c, mask=cmask, other=0.0)
    return mean, rest, rstd


@triton.jit
def pivot_of_tile(
    tile, N, S, x, mask, lane, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, LEAD: tl.constexpr
):  # fmt: skip
    """(scale, unit, pivot) of each channel, by the elements of a tile."""
    samples = count_of_tile(tile, N, S, BLOCK_N, BLOCK_S)
    if LEAD > 1:
        x, samples = tl.where(mask, x, 0.0), tl.sum(mask.to(tl.int32), axis=0)
    scale, unit = scale_of(tl.max(tl.abs(x), axis=0))
    x *= unit[None, :]
    pivot = tl.sum(tl.where((lane == LEAD - 1)[:, None], x, 0.0), axis=0)
    return scale, unit, pivot_of(pivot, x, mask, 1.0 / samples.to(x.dtype))


@triton.jit
def moments_of_tiles(
    x_ptr, first, last, c, cmask, N, C, S, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr, LEAD: tl.constexpr,
    FULL: tl.constexpr = False,
):  # fmt: skip
    """(count, mean, rest, std) of each channel over the tiles first … last-1; count is (1,).

    Elements are taken relative to a pivot, the mean of the first tile, so that a large mean costs
    no digits, and in a unit in which the squares of that tile do not overflow.
    """
    LANES: tl.constexpr = BLOCK_N * BLOCK_S
    lane = tl.arange(0, LANES)
    _, mask, read, rmask = places_of_tile(
        first, N, C, S, c, cmask, lane, BLOCK_N, BLOCK_S, COLUMNS, LEAD, FULL
    )
    x = load_as(x_ptr, read, rmask, ACC)
    scale, unit, pivot = pivot_of_tile(first, N, S, x, mask, lane, BLOCK_N, BLOCK_S, LEAD)
    count = tl.zeros((LANES // FOLD, 1), ACC)
    mean = tl.zeros((LANES // FOLD, BLOCK_C), ACC)
    m2 = tl.zeros((LANES // FOLD, BLOCK_C), ACC)
    for tile in tl.range(first, last, num_stages=STAGES):
        _, mask, read, rmask = places_of_tile(
            tile, N, C, S, c, cmask, lane, BLOCK_N, BLOCK_S, COLUMNS, LEAD, FULL
        )
        x = load_as(x_ptr, read, rmask, ACC)
        d = x * unit[None, :] - pivot[None, :]
        if FULL:
            count_t = tl.full((LANES // FOLD, 1), FOLD, ACC)
        else:  # not within the branch below: Triton's compiler for AMD would not come to an end
            count_t = count_of_groups(tile, N, S, ACC, BLOCK_N, BLOCK_S, FOLD, RUN, c, C, LEAD)
        if not FULL and (BLOCK_N > 1 or not is_full(tile, N, C, S, c, 1, BLOCK_S, LEAD)):
            mean_t, m2_t = fold_moments(d, mask, count_t, FOLD, RUN)
        else:
            mean_t, m2_t = fold_moments(d, None, count_t, FOLD, RUN)
        count, mean, m2 = merge_counted(count, mean, m2, count_t, mean_t, m2_t)

    count, mean, std = merge_lanes(count, mean, m2)
    mean, rest = two_sum(pivot * scale, mean * scale)
    return count, mean, rest, std * scale


@triton.jit
def normalize_tiles(
    x_ptr, residual_ptr, y_ptr, first, last, c, cmask, mean, rest, rstd, w, b, N, C, S,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    """y of the tiles, last tile first: what was read before is still in the cache."""
    ACC: tl.constexpr = mean.dtype
    lane = tl.arange(0, BLOCK_N * BLOCK_S)
    for i in tl.range(first, last, num_stages=STAGES):
        at, mask, read, rmask = places_of_tile(
            first + last - 1 - i, N, C, S, c, cmask, lane, BLOCK_N, BLOCK_S, COLUMNS, LEAD
        )
        x = load_as(x_ptr, read, rmask, ACC)
        z = ((x - mean[None, :]) - rest[None, :]) * rstd[None, :] * w[None, :] + b[None, :]
        if residual_ptr is not None:
            z += load_as(residual_ptr, read, rmask, ACC)
        store_cast(y_ptr, at, ACT(z), mask)


@triton.jit
def load_xhat_dz(
    dy_ptr, x_ptr, y_ptr, residual_ptr, read, rmask, mask, mean, rest, rstd, w, b,
    ACT_GRAD: tl.constexpr,
):  # fmt: skip
    """x̂ and dz of a tile, 0 outside; ACT_GRAD is given y where that is enough, else z.

    mean … b are given as broadcast to the tile; what is read may be more than is inside.
    """
    ACC: tl.constexpr = mean.dtype
    dy = load_as(dy_ptr, read, rmask, ACC)
    xhat = tl.zeros(dy.shape, ACC)
    if x_ptr is not None:
        x = load_as(x_ptr, read, rmask, ACC)
        xhat = tl.where(mask, ((x - mean) - rest) * rstd, 0.0)
    if y_ptr is not None:
        return xhat, tl.where(mask, ACT_GRAD(dy, load_as(y_ptr, read, rmask, ACC)), 0.0)
    z = xhat * w + b
    if residual_ptr is not None:
        z += load_as(residual_ptr, read, rmask, ACC)
    return xhat, tl.where(mask, ACT_GRAD(dy, z), 0.0)


@triton.jit
def gradient_sums_of_tiles(
    dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
    first, last, c, cmask, mean, rest, rstd, w, b, N, C, S,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, COLUMNS: tl.constexpr, LEAD: tl.constexpr,
):  # fmt: skip
    """(Σ dz·x̂, Σ dz) of each channel over the tiles; stores dz, and dx of fixed statistics."""
    ACC: tl.constexpr = mean.dtype
    LANES: tl.constexpr = BLOCK_N * BLOCK_S // FOLD
    dw = tl.zeros((LANES, BLOCK_C), ACC)
    db = tl.zeros((LANES, BLOCK_C), ACC)
    lane = tl.arange(0, BLOCK_N * BLOCK_S)
    for tile in tl.range(first, last, num_stages=STAGES):
        at, mask, read, rmask = places_of_tile(
            tile, N, C, S, c, cmask, lane, BLOCK_N, BLOCK_S, COLUMNS, LEAD
        )
        xhat, dz = load_xhat_dz(
            dy_ptr, x_ptr, y_ptr, residual_ptr, read, rmask, mask,
            mean[None, :], rest[None, :], rstd[None, :], w[None, :], b[None, :], ACT_GRAD,
        )  # fmt: skip
        store_cast(dx_ptr, at, dz * (rstd * w)[None, :], mask)
        store_cast(dz_ptr, at, dz, mask)
        dw += fold(dz * xhat, FOLD, RUN)
        db += fold(dz, FOLD, RUN)
    return tl.sum(dw, axis=0), tl.sum(db, axis=0)


@triton.jit
def input_gradient_of_tiles(
    dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
    first, last, c, cmask, mean, rest, rstd, w, b, inner, outer, slope, shift, N, C, S,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, COLUMNS: tl.constexpr,
    LEAD: tl.constexpr,
):  # fmt: skip
    """dx = (inner·dz − shift − x̂·slope)·outer of the tiles, last tile first.

    inner · outer is w · rstd; slope and shift are the means of inner·dz·x̂ and inner·dz over what
    the statistics were taken of. inner is None where that is one channel, and w can wait.
    """
    lane = tl.arange(0, BLOCK_N * BLOCK_S)
    for i in tl.range(first, last, num_stages=STAGES):
        at, mask, read, rmask = places_of_tile(
            first + last - 1 - i, N, C, S, c, cmask, lane, BLOCK_N, BLOCK_S, COLUMNS, LEAD
        )
        xhat, dz = load_xhat_dz(
            dy_ptr, x_ptr, y_ptr, residual_ptr, read, rmask, mask,
            mean[None, :], rest[None, :], rstd[None, :], w[None, :], b[None, :], ACT_GRAD,
        )  # fmt: skip
        g = dz
        if inner is not None:
            g *= inner[None, :]
        dx = (g - shift[None, :] - xhat * slope[None, :]) * outer[None, :]
        store_cast(dx_ptr, at, dx, mask)
        store_cast(dz_ptr, at, dz, mask)
