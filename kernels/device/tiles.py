"""Tiles of a dense (N, C, S) tensor: which sample, position and address belongs to a lane.

An index set of one channel is all (n, s). A tile is BLOCK_N × BLOCK_S of it, flattened to one axis
of lanes, times BLOCK_C channels. Either s is innermost in memory (rows: NCHW and its like) or c is
(columns: channels_last). BLOCK_N > 1 only where one block covers S.
"""

import triton
import triton.language as tl


@triton.jit
def tile_lanes(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """(n, s, inside) of each lane of tile number `tile` (int64)."""
    across = tl.cdiv(S, BLOCK_S)
    lane = tl.arange(0, BLOCK_N * BLOCK_S)
    n = (tile // across) * BLOCK_N + lane // BLOCK_S
    s = (tile % across) * BLOCK_S + lane % BLOCK_S
    if BLOCK_N == 1:
        return n, s, s < S
    return n, s, (n < N) & (s < S)


@triton.jit
def tile_offsets(n, s, c, C, S, COLUMNS: tl.constexpr):
    """Element offsets (lanes, channels)."""
    if COLUMNS:
        return ((n * S + s) * C)[:, None] + c[None, :]
    return (n * C * S + s)[:, None] + (c * S)[None, :]


@triton.jit
def elements_before(tile, N, S, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr):
    """How many elements of one channel the tiles 0 … tile-1 hold."""
    across = tl.cdiv(S, BLOCK_S)
    n = tl.minimum((tile // across) * BLOCK_N, N)
    return n * S + tl.minimum((tile % across) * BLOCK_S, S) * tl.minimum(N - n, BLOCK_N)


@triton.jit
def load_as(ptr, at, mask, ACC: tl.constexpr):
    """Masked load, 0 outside, in the type that is computed in."""
    return tl.load(ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_or(ptr, at, mask, default: tl.constexpr, ACC: tl.constexpr):
    """`load_as`, or the default where the tensor is absent."""
    if ptr is None:
        return tl.full(at.shape, default, ACC)
    return tl.load(ptr + at, mask=mask, other=default).to(ACC)


@triton.jit
def store_cast(ptr, at, value, mask):
    """Store with the one rounding to the tensor's dtype; nothing where the tensor is absent."""
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)
