"""Tiles of a dense (N, C, S) tensor: which sample, position and address belongs to a lane.

An index set of one channel is all (n, s). A tile is BLOCK_N × BLOCK_S of it, flattened to one axis
of lanes, times BLOCK_C channels. Either s is innermost in memory (rows: NCHW and its like) or c is
(columns: channels_last). BLOCK_N > 1 only where one block covers S.
"""

import triton
import triton.language as tl


@triton.jit
def lanes_of_tile(tile, N, S, lane, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """(n, s, inside) of some lanes of tile number `tile`, as int64."""
    # tiles are counted in int32: a 64-bit division is a function call on a GPU
    across = tl.cdiv(S, BLOCK_S).to(tl.int32)
    n = (tile // across).to(tl.int64) * BLOCK_N + lane // BLOCK_S
    s = (tile % across).to(tl.int64) * BLOCK_S + lane % BLOCK_S
    if BLOCK_N == 1:
        return n, s, s < S
    return n, s, (n < N) & (s < S)


@triton.jit
def count_of_tile(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many lanes of a tile are inside."""
    n, s, _ = lanes_of_tile(tile, N, S, 0, BLOCK_N, BLOCK_S)
    return tl.minimum(N - n, BLOCK_N) * tl.minimum(S - s, BLOCK_S)


@triton.jit
def count_of_groups(
    tile, N, S, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    FOLD: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """How many lanes of each group that `fold` sums are inside: (lanes / FOLD, 1)."""
    GROUPS: tl.constexpr = BLOCK_N * BLOCK_S // FOLD
    group = tl.arange(0, GROUPS)
    count = tl.zeros((GROUPS,), ACC)
    for k in tl.static_range(FOLD):
        lane = k * GROUPS + group if COLUMNS else group * FOLD + k
        _, _, inside = lanes_of_tile(tile, N, S, lane, BLOCK_N, BLOCK_S)
        count += inside.to(ACC)
    return count[:, None]


@triton.jit
def tile_offsets(n, s, c, C, S, COLUMNS: tl.constexpr):
    """Element offsets (lanes, channels)."""
    if COLUMNS:
        return ((n * S + s) * C)[:, None] + c[None, :]
    return (n * C * S + s)[:, None] + (c * S)[None, :]


@triton.jit
def fold(t, FOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum a (lanes, channels) tile to (lanes / FOLD, channels), within each thread's registers.

    A thread owns neighbouring lanes where those are innermost, else lanes a stride apart.
    """
    if COLUMNS:
        return tl.sum(tl.reshape(t, (FOLD, t.shape[0] // FOLD, t.shape[1])), axis=0)
    return tl.sum(tl.reshape(t, (t.shape[0] // FOLD, FOLD, t.shape[1])), axis=1)


@triton.jit
def unfold(t, FOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """Repeat (lanes / FOLD, channels) to the lanes that `fold` would sum."""
    L: tl.constexpr = t.shape[0]
    C: tl.constexpr = t.shape[1]
    if COLUMNS:
        wide = tl.broadcast_to(t[None, :, :], (FOLD, L, C))
    else:
        wide = tl.broadcast_to(t[:, None, :], (L, FOLD, C))
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
