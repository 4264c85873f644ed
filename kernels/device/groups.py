"""Groups of K neighbouring channels, innermost in memory, on the channel axis of a tile.

A program that owns whole groups lays BLOCK_N samples × BLOCK_C channels along that axis (see
tiles.py and channels.py). A group takes BLOCK_K lanes, a power of two ≥ K: lanes that are PADDED
where K is none. The tiles of such a program are those of one sample; where the others lie is in a
lane's position, which tile_offsets adds. For contiguous groups see runs.py.
"""

import triton
import triton.language as tl

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
