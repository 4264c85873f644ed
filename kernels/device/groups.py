"""Groups of K neighbouring channels, on the channel axis of a tile (see tiles.py and channels.py).

A program that owns whole groups lays BLOCK_N samples × BLOCK_C channels along that axis. A group
takes BLOCK_K lanes, a power of two ≥ K: lanes that are PADDED where K is none. The tiles of such a
program are those of one sample; where the others lie is in a lane's position, which tile_offsets
multiplies by S (rows) or adds (columns).
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.channels import load_affine
from fastnorm.kernels.device.moments import merge_partials, pivot_of, two_sum


@triton.jit
def wide_channels(K, ALIGN: tl.constexpr, PADDED: tl.constexpr):
    """K, shown to be a multiple of ALIGN where lanes are padded (see wide_sizes)."""
    return K // ALIGN * ALIGN if PADDED else K


@triton.jit
def channels_of_groups(
    block, C, K, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """(g, c, inside) of the lanes of a block of groups: group and channel of each."""
    lane = tl.arange(0, BLOCK_N * BLOCK_C) % BLOCK_C
    first = block.to(tl.int64) * (BLOCK_C // BLOCK_K)
    if PADDED:
        g = first + lane // BLOCK_K
        k = lane % BLOCK_K
        c = g * K + k
        return g, c, (k < K) & (c < C)
    c = first * BLOCK_K + lane  # contiguous across groups, as the compiler can see
    return c // BLOCK_K, c, c < C


@triton.jit
def samples_of_lanes(block, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sample of each lane, in block number `block` of BLOCK_N samples."""
    return (tl.arange(0, BLOCK_N * BLOCK_C) // BLOCK_C).to(tl.int64) + block * BLOCK_N


@triton.jit
def positions_of_lanes(n, c, C, S):
    """Where a lane's first element lies, where channels are innermost."""
    return n * (S * C) + c


@triton.jit
def share_of_sample(N, P, tiles, tiles_per_program):
    """(p, n, block, first, last): which tiles of which sample, and block of channels, are owned."""
    pid = tl.program_id(0)
    p = pid % P
    n = pid // P % N
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    return p, n, pid // P // N, n * tiles + first, n * tiles + last


@triton.jit
def by_group(v, BLOCK_K: tl.constexpr):
    """Values of lanes as (BLOCK_K, groups)."""
    return tl.trans(tl.reshape(v, (v.shape[0] // BLOCK_K, BLOCK_K)))


@triton.jit
def on_lanes(v, BLOCK_K: tl.constexpr):
    """Values of groups on all the lanes of each."""
    GROUPS: tl.constexpr = v.shape[0]
    return tl.reshape(tl.broadcast_to(v[:, None], (GROUPS, BLOCK_K)), (GROUPS * BLOCK_K,))


@triton.jit
def sum_of_group(v, BLOCK_K: tl.constexpr):
    """The sum over each group, on all its lanes; v is 0 outside."""
    if BLOCK_K == 1:
        return v
    return on_lanes(tl.sum(tl.reshape(v, (v.shape[0] // BLOCK_K, BLOCK_K)), axis=1), BLOCK_K)


@triton.jit
def sum_of_samples(v, BLOCK_N: tl.constexpr):
    """(BLOCK_C,): the sum over the samples of the lanes."""
    if BLOCK_N == 1:
        return v
    return tl.sum(tl.reshape(v, (BLOCK_N, v.shape[0] // BLOCK_N)), axis=0)


@triton.jit
def moments_of_groups(mean, rest, std, K, BLOCK_K: tl.constexpr):
    """(mean, rest, std) of each group, on all its lanes, from those of channels of one count."""
    if BLOCK_K == 1:
        return mean, rest, std
    k = tl.arange(0, BLOCK_K)[:, None]
    mean_k = by_group(mean, BLOCK_K)
    base = tl.sum(tl.where(k == 0, mean_k, 0.0), axis=0)
    base = pivot_of(base, mean_k, k < K, 1.0 / K.to(mean.dtype))
    mean_k = tl.where(k < K, (mean_k - base[None, :]) + by_group(rest, BLOCK_K), 0.0)
    std_k = by_group(std, BLOCK_K)
    _, mean_g, std_g = merge_partials((k < K).to(mean.dtype), mean_k, std_k)
    mean_g, rest_g = two_sum(base, mean_g)
    return on_lanes(mean_g, BLOCK_K), on_lanes(rest_g, BLOCK_K), on_lanes(std_g, BLOCK_K)


@triton.jit
def tile_of_run(
    tile, first, P, K, S, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, FULL: tl.constexpr
):
    """(part, k, inside, at, mask): tile number `tile` of a contiguous group.

    It is part number `part` of the P parts of S of BLOCK_C channels; `first` is the group's first
    channel, of all samples'. FULL: no tile reaches beyond the group, as the compiler can see.
    """
    part = tile % P
    k = tile // P * BLOCK_C + tl.arange(0, BLOCK_C)
    s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    at = s[:, None] + ((first + k) * S)[None, :]
    inside = tl.full((BLOCK_C,), 1, tl.int1) if FULL else k < K
    mask = inside[None, :] if FULL else (s < S)[:, None] & inside[None, :]
    return part, k, inside, at, tl.broadcast_to(mask, (BLOCK_S, BLOCK_C))


@triton.jit
def affine_of_run(
    w_ptr, b_ptr, start, g, gmask, K, S, L, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """(w, b) of the elements from `start` of contiguous groups g: (groups, BLOCK_N / WITHIN).

    So many neighbours are of one channel.
    """
    at = start + tl.arange(0, BLOCK_N // WITHIN) * WITHIN
    # in 32 bits, without a sign: a 64-bit division is a function call on a GPU
    k = (at.to(tl.uint32) // S.to(tl.uint32)).to(tl.int32)
    c = (g * K)[:, None] + k[None, :]
    return load_affine(w_ptr, b_ptr, c, gmask[:, None] & (at < L)[None, :], ACC)


@triton.jit
def repeat(t, WITHIN: tl.constexpr):
    """Each number of (rows, columns) so many times, side by side."""
    if WITHIN == 1:
        return t
    M: tl.constexpr = t.shape[0]
    N: tl.constexpr = t.shape[1]
    return tl.reshape(tl.broadcast_to(t[:, :, None], (M, N, WITHIN)), (M, N * WITHIN))


@triton.jit
def sum_within(t, WITHIN: tl.constexpr):
    """The sums of so many neighbours: what `repeat` repeats."""
    if WITHIN == 1:
        return t
    return tl.sum(tl.reshape(t, (t.shape[0], t.shape[1] // WITHIN, WITHIN)), axis=2)


@triton.jit
def sum_of_blocks(t, BLOCK_G: tl.constexpr):
    """(BLOCK_G, columns): the sum over the blocks of BLOCK_G rows."""
    if t.shape[0] == BLOCK_G:
        return t
    return tl.sum(tl.reshape(t, (t.shape[0] // BLOCK_G, BLOCK_G, t.shape[1])), axis=0)


@triton.jit
def sums_of_run(t, K, S, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, WITHIN: tl.constexpr):
    """(groups, BLOCK_K): what is by element of contiguous groups, summed over each channel's S.

    t is (groups, elements / WITHIN) already.
    """
    G: tl.constexpr = t.shape[0]
    if BLOCK_S == 1:
        return t
    else:
        positions = S // WITHIN
        g = tl.arange(0, G)[:, None, None]
        k, s = tl.arange(0, BLOCK_K)[None, :, None], tl.arange(0, BLOCK_S)[None, None, :]
        inside = (k < K) & (s < positions)
        # along one axis: a gather along one of two goes by shuffles, many
        at = tl.reshape(
            g * t.shape[1] + tl.where(inside, k * positions + s, 0), (G * BLOCK_K * BLOCK_S,)
        )
        found = tl.gather(tl.reshape(t, (G * t.shape[1],)), at, axis=0)
        found = tl.reshape(found, (G, BLOCK_K, BLOCK_S))
        return tl.sum(tl.where(inside, found, 0.0), axis=2)
