"""Operands of a matrix product: tiles of dense (B, C, S) tensors and of row-major matrices.

The rows of X, Y and dY are all (b, s), as in tiles.py; their columns, c, are innermost in memory
(COLUMNS: (M, K), channels_last) or lie S apart (NCHW), and either way no copy is made. A tile keeps
the dtype it is loaded in: that is what a tensor core multiplies, and it accumulates in float32.
"""

import triton
import triton.language as tl

from fastnorm.kernels.device.tiles import fold, tile_offsets


@triton.jit
def aligned(size, ALIGN: tl.constexpr):
    """A size, as a known multiple of ALIGN: it shows the compiler that no mask splits a vector."""
    return size // ALIGN * ALIGN


@triton.jit
def rows_of_tile(tile, B, S, row, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr):
    """(b, s, inside) of some rows of tile number `tile`, as int64.

    As `lanes_of_tile` has them, but compared in int64 and divided with a sign: beside a product
    that costs nothing, and what it would save compilers put on the stack.
    """
    across = tl.cdiv(S, BLOCK_S).to(tl.int32)
    b = (tile // across).to(tl.int64) * BLOCK_B + row // BLOCK_S
    s = (tile % across).to(tl.int64) * BLOCK_S + row % BLOCK_S
    if BLOCK_B == 1:
        return b, s, s < S
    return b, s, (b < B) & (s < S)


@triton.jit
def load_rows(ptr, n, s, inside, c, C, S, COLUMNS: tl.constexpr):
    """(rows, c) of a (B, C, S) tensor, 0 outside."""
    mask = inside[:, None] & (c < C)[None, :]
    return tl.load(ptr + tile_offsets(n, s, c, C, S, COLUMNS), mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, value, n, s, inside, c, C, S, COLUMNS: tl.constexpr):
    mask = inside[:, None] & (c < C)[None, :]
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + tile_offsets(n, s, c, C, S, COLUMNS), value, mask=mask)


@triton.jit
def matrix_offsets(i, j, I, J):  # noqa: E741
    """(offsets, mask) of (i, j) in a row-major (I, J) matrix."""
    return i.to(tl.int64)[:, None] * J + j[None, :], (i < I)[:, None] & (j < J)[None, :]


@triton.jit
def load_matrix(ptr, i, j, I, J):  # noqa: E741
    """(i, j) of a row-major (I, J) matrix, 0 outside."""
    at, mask = matrix_offsets(i, j, I, J)
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def store_matrix(ptr, value, i, j, I, J):  # noqa: E741
    at, mask = matrix_offsets(i, j, I, J)
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_joined(ptr, value, row, stride, inside, c, C):
    """Some columns of a matrix whose rows are longer than C."""
    value = value.to(ptr.dtype.element_ty)
    at = (row * stride)[:, None] + c[None, :]
    tl.store(ptr + at, value, mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def as_float64(t):
    """An operand of a product in float64.

    Triton 3.7 moves a plain conversion of 16-bit elements behind the layout that the product wants,
    and fails: no tensor core has that one for float64. A sum over an axis of one stays in place.
    """
    if t.dtype.primitive_bitwidth == 16:
        return tl.sum(t.to(tl.float64)[None, :, :], axis=0)
    else:
        return t.to(tl.float64)


@triton.jit
def less(x, shift_ptr, k, K):
    """x − shift of each column; masked rows are revived, which the other operand's zeros undo."""
    if shift_ptr is None:
        return x
    else:  # compiled too, were it not a branch
        return x - tl.load(shift_ptr + k, mask=k < K, other=0.0)[None, :]


@triton.jit
def fold_rows(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum a tile to ROWS rows in the registers of each thread; no shuffle in the loop."""
    FOLD: tl.constexpr = t.shape[0] // ROWS
    return fold(t, FOLD, 1 if COLUMNS else FOLD)


@triton.jit
def upper_pair(p):
    """p = 0, 1, 2, … to (i, j) with i ≤ j: (0, 0), (0, 1), (1, 1), (0, 2), …"""
    j = ((tl.sqrt(8.0 * p + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > p, j - 1, j)  # the root may be off by an ulp, either way
    j = tl.where((j + 1) * (j + 2) // 2 <= p, j + 1, j)
    return p - j * (j + 1) // 2, j


@triton.jit
def block_of_program(tiles, BLOCKS, GROUP: tl.constexpr):
    """(row tile, column block): GROUP row tiles at a time, so that both operands stay in L2."""
    pid = tl.program_id(0)
    return tl.swizzle2d(pid // BLOCKS, pid % BLOCKS, tiles, BLOCKS, GROUP)


@triton.jit
def product_of_rows(
    z, x_ptr, w_ptr, shift_ptr, n, s, inside, cols, N, K, S,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z + (X − shift) Wᵀ for some rows of X (B, K, S) and of W (N, K)."""
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = less(load_rows(x_ptr, n, s, inside, k, K, S, COLUMNS), shift_ptr, k, K)
        w = load_matrix(w_ptr, cols, k, N, K)
        z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION, out_dtype=z.dtype)
    return z


@triton.jit
def gated(dy, y_ptr, n, s, inside, c, C, S, GATE: tl.constexpr, COLUMNS: tl.constexpr):
    """g = dy ∘ act′(y), in dy's dtype."""
    if y_ptr is None:
        return dy
    else:
        return GATE(dy, load_rows(y_ptr, n, s, inside, c, C, S, COLUMNS)).to(dy.dtype)


@triton.jit
def any_flag(flags_ptr, F, BLOCK_F: tl.constexpr):
    """Whether one of F programs raised its flag; never where there are no flags."""
    if flags_ptr is None:
        return False
    else:
        f = tl.arange(0, BLOCK_F)
        return tl.max(tl.load(flags_ptr + f, mask=f < F, other=0), axis=0) != 0


@triton.jit
def unit_of(sizes_ptr, F, BLOCK_F: tl.constexpr):
    """(unit, 1 / unit): the power of two that makes the largest of F sizes 1 to 2; 1 for zeros."""
    f = tl.arange(0, BLOCK_F)
    size = tl.max(tl.load(sizes_ptr + f, mask=f < F, other=0.0), axis=0)
    bits = size.to(tl.int64, bitcast=True) & 0x7FF0000000000000
    unit = tl.where(bits == 0, 1.0, bits.to(tl.float64, bitcast=True))
    # exponents of a number and of its reciprocal add up to twice the bias; no division, so no call
    inverse = (0x7FE0000000000000 - bits).to(tl.float64, bitcast=True)
    return unit, tl.where(bits == 0, 1.0, inverse)
