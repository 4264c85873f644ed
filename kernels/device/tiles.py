"""Tiles of a dense (N, C, S) tensor: which sample, position and address belongs to a lane.

An index set of one channel is all (n, s). A tile is BLOCK_N × BLOCK_S of it, flattened to one axis
of lanes, times BLOCK_C channels. Either s is innermost in memory (rows: NCHW and its like) or c is
(columns: channels_last; or short planes side by side, see columns_of_block). BLOCK_N > 1 only where
one block covers S.
"""

import triton
import triton.language as tl

# Loops over tiles load two tiles ahead, asynchronously, into shared memory: what a multiprocessor
# has under way then depends neither on its registers nor on what it computes in between.
STAGES = tl.constexpr(3)


@triton.jit
def start_of_tile(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """(n, s, samples, positions): where tile number `tile` starts, and how many it has of each.

    The latter are int32, as lanes are: two 64-bit comparisons an element cost more than arithmetic.
    """
    n, s = tile, 0
    if BLOCK_N == 1:
        # in 32 bits, without a sign: a 64-bit division is a function call on a GPU
        across = tl.cdiv(S, BLOCK_S).to(tl.uint32)
        tile = tl.cast(tile, tl.uint32)
        n, s = tile // across, tile % across
    n, s = tl.cast(n, tl.int64) * BLOCK_N, tl.cast(s, tl.int64) * BLOCK_S
    samples, positions = tl.minimum(N - n, BLOCK_N), tl.minimum(S - s, BLOCK_S)
    return n, s, samples.to(tl.int32), positions.to(tl.int32)


@triton.jit
def lanes_of_tile(
    tile, N, S, lane, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, FULL: tl.constexpr = False
):
    """(n, s, inside) of some lanes of tile number `tile`; n and s as int64.

    FULL: the tile reaches beyond neither, as the compiler can see.
    """
    n, s, samples, positions = start_of_tile(tile, N, S, BLOCK_N, BLOCK_S)
    inside = tl.full(lane.shape, 1, tl.int1) if FULL else lane % BLOCK_S < positions
    if BLOCK_N > 1 and not FULL:
        inside &= lane // BLOCK_S < samples
    return n + lane // BLOCK_S, s + lane % BLOCK_S, inside


@triton.jit
def row_of_tile(tile, N, C, S, c, BLOCK_S: tl.constexpr, LEAD: tl.constexpr):
    """(row, lead, first): where a tile's row begins, that within its vector, and the first lane."""
    n, s, _, _ = start_of_tile(tile, N, S, 1, BLOCK_S)
    row = (n * C + c) * S
    return row, (row % LEAD).to(tl.int32), s.to(tl.int32)


@triton.jit
def places_of_tile(
    tile, N, C, S, c, cmask, lane, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr, LEAD: tl.constexpr, FULL: tl.constexpr = False,
):  # fmt: skip
    """(at, mask, read, rmask), (lanes, channels): a tile's elements, and what is read for them.

    They are the same but where rows, the positions of one channel, begin anywhere within vectors of
    LEAD elements. There lanes count from the vector that a row begins in, lane LEAD - 1 or before;
    whole vectors are read, as the compiler can see, and lanes of the rows before and behind are not
    inside. BLOCK_N and the channels are 1, and no vector reaches beyond a sample.
    """
    if LEAD == 1:
        n, s, inside = lanes_of_tile(tile, N, S, lane, BLOCK_N, BLOCK_S, FULL)
        at, mask = tile_offsets(n, s, c, C, S, COLUMNS), inside[:, None] & cmask[None, :]
        return at, mask, at, mask
    else:
        row, lead, first = row_of_tile(tile, N, C, S, c, BLOCK_S, LEAD)
        lane += first
        inside = (lane - lead).to(tl.uint32) < S.to(tl.uint32)
        rmask = lane // LEAD * LEAD < lead + S.to(tl.int32)
        at, read = row - lead + lane, row // LEAD * LEAD + lane
        return at[:, None], inside[:, None], read[:, None], rmask[:, None]


@triton.jit
def count_of_tile(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many lanes of a tile are inside."""
    _, _, samples, positions = start_of_tile(tile, N, S, BLOCK_N, BLOCK_S)
    return samples * positions


@triton.jit
def is_full(
    tile, N, C, S, c, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, LEAD: tl.constexpr
):  # fmt: skip
    """Whether all lanes of a tile are inside."""
    if LEAD == 1:
        return count_of_tile(tile, N, S, BLOCK_N, BLOCK_S) == BLOCK_N * BLOCK_S
    else:
        _, lead, first = row_of_tile(tile, N, C, S, c, BLOCK_S, LEAD)
        inside = (first >= lead) & (first + BLOCK_S <= lead + S.to(tl.int32))
        return tl.min(inside.to(tl.int32), axis=0) > 0


@triton.jit
def count_of_groups(
    tile, N, S, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    FOLD: tl.constexpr, RUN: tl.constexpr, c, C, LEAD: tl.constexpr,
):  # fmt: skip
    """How many lanes of each group that `fold` sums are inside: (lanes / FOLD, 1).

    A run is inside or outside as a whole: RUN divides S, or is 1. With a LEAD it may be in part.
    """
    GROUPS: tl.constexpr = BLOCK_N * BLOCK_S // FOLD
    run = tl.arange(0, GROUPS)
    found = tl.zeros((GROUPS,), tl.int32)
    for k in tl.static_range(FOLD // RUN):
        lane = (k * GROUPS + run) * RUN
        if LEAD == 1:
            _, _, inside = lanes_of_tile(tile, N, S, lane, BLOCK_N, BLOCK_S)
            found += inside.to(tl.int32) * RUN
        else:
            _, lead, first = row_of_tile(tile, N, C, S, c, BLOCK_S, LEAD)
            lane += first
            end = tl.minimum(lead + S.to(tl.int32), lane + RUN)
            found += tl.maximum(end - tl.maximum(lead, lane), 0)
    return found.to(ACC)[:, None]


@triton.jit
def tile_offsets(n, s, c, C, S, COLUMNS: tl.constexpr):
    """Element offsets (lanes, channels)."""
    if COLUMNS:
        return ((n * S + s) * C)[:, None] + c[None, :]
    return (n * C * S + s)[:, None] + (c * S)[None, :]


@triton.jit
def fold(t, FOLD: tl.constexpr, RUN: tl.constexpr):
    """Sum a (lanes, channels) tile to (lanes / FOLD, channels), within each thread's registers.

    A thread owns runs of RUN neighbouring lanes, lanes / FOLD runs from one to the next.
    """
    t = tl.reshape(t, (FOLD // RUN, t.shape[0] // FOLD, RUN, t.shape[1]))
    return tl.sum(tl.sum(t, axis=2), axis=0)


@triton.jit
def unfold(t, FOLD: tl.constexpr, RUN: tl.constexpr):
    """Repeat (lanes / FOLD, channels) to the lanes that `fold` would sum."""
    L: tl.constexpr = t.shape[0]
    C: tl.constexpr = t.shape[1]
    wide = tl.broadcast_to(t[None, :, None, :], (FOLD // RUN, L, RUN, C))
    return tl.reshape(wide, (L * FOLD, C))


@triton.jit
def load_as(ptr, at, mask, ACC: tl.constexpr):
    """Masked load, 0 outside, in the type that is computed in."""
    return tl.load(ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_or(ptr, at, mask, default: tl.constexpr, ACC: tl.constexpr):
    """`load_as`, or the default where the tensor is absent."""
    if ptr is None:
        return tl.full(at.shape, default, ACC)
    else:  # compiled too, were it not a branch
        return tl.load(ptr + at, mask=mask, other=default).to(ACC)


@triton.jit
def store_cast(ptr, at, value, mask):
    """Store with the one rounding to the tensor's dtype; nothing where the tensor is absent."""
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)
