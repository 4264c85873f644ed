"""Contiguous groups: runs of K channels of S positions, L elements.

In registers a run is a row (see rows.py), and BLOCK_G of a sample lie side by side in a tile. The
parameters of a row are not those of the next, nor one a column: WITHIN neighbours, a vector or
fewer, are of one channel. A longer run is taken tile by tile.
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.channels import load_affine


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
def rows_of_runs(tile, g, N, G, L, col, inside, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):
    """(row, rmask, at, mask) of a tile: BLOCK_G groups g of each sample of a block, as rows."""
    n = tl.cast(tile, tl.int64) * (BLOCK_M // BLOCK_G) + tl.arange(0, BLOCK_M) // BLOCK_G
    row = n * G + g
    rmask = (n < N) & (g < G)
    return row, rmask, (row * L)[:, None] + col[None, :], rmask[:, None] & inside[None, :]


@triton.jit
def channels_at(at, S):
    """The channel of each element of a group."""
    # in 32 bits, without a sign: a 64-bit division is a function call on a GPU
    return (at.to(tl.uint32) // S.to(tl.uint32)).to(tl.int32)


@triton.jit
def affine_of_run(
    w_ptr, b_ptr, start, g, gmask, K, S, L, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """(w, b) of the elements from `start` of contiguous groups g: (groups, BLOCK_N / WITHIN).

    So many neighbours are of one channel.
    """
    at = start + tl.arange(0, BLOCK_N // WITHIN) * WITHIN
    c = (g * K)[:, None] + channels_at(at, S)[None, :]
    return load_affine(w_ptr, b_ptr, c, gmask[:, None] & (at < L)[None, :], ACC)


@triton.jit
def affine_of_rows(
    w_ptr, b_ptr, first, G, K, S, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """The same of BLOCK_M rows that are whole groups, BLOCK_G of each sample from the first."""
    g, k = first + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    c, cmask = (g * K)[:, None] + k[None, :], (g < G)[:, None] & (k < K)[None, :]
    w, b = load_affine(w_ptr, b_ptr, c, cmask, ACC)
    return (
        elements_of_channels(w, S, BLOCK_M, BLOCK_N, WITHIN),
        elements_of_channels(b, S, BLOCK_M, BLOCK_N, WITHIN),
    )


@triton.jit
def elements_of_channels(
    t, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WITHIN: tl.constexpr
):  # fmt: skip
    """(BLOCK_M, BLOCK_N / WITHIN): t, which is (groups, channels), at each element of the rows.

    Were each element loaded where it is wanted, the loads would say how threads lie, and Triton 3.6
    computes twice what is multiplied by them.
    """
    G: tl.constexpr = t.shape[0]
    K: tl.constexpr = t.shape[1]
    N: tl.constexpr = BLOCK_N // WITHIN
    if N == K:
        return tl.reshape(tl.broadcast_to(t[None], (BLOCK_M // G, G, N)), (BLOCK_M, N))
    else:  # along one axis: a gather along one of two goes by shuffles, many
        k = tl.minimum(channels_at(tl.arange(0, N) * WITHIN, S), K - 1)
        at = (tl.arange(0, BLOCK_M) % G * K)[:, None] + k[None, :]
        found = tl.gather(tl.reshape(t, (G * K,)), tl.reshape(at, (BLOCK_M * N,)), axis=0)
        return tl.reshape(found, (BLOCK_M, N))


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
