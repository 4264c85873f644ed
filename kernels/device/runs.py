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
