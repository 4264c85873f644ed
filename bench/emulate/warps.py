"""What a warp does together: exchanges, 8 × 8 matrices of shared memory, matrix products."""

import re

import numpy as np

from emulate.numbers import Array, of_bits, to_bits

LANE = np.arange(32)


def exchange(bits: Array, kind: str, by: Array) -> Array:
    """`shfl.sync`: what another lane of the same warp has."""
    warps = bits.reshape(-1, 32)
    by = np.broadcast_to(by, bits.shape).reshape(-1, 32).astype(np.intp)
    source = LANE ^ by if kind == "bfly" else by & 31
    return np.take_along_axis(warps, source, 1).reshape(-1)


def reduce(values: Array, kind: str) -> Array:
    """`redux.sync`: one number for all lanes of a warp."""
    warps = values.reshape(-1, 32)
    found = {"add": np.add, "min": np.minimum, "max": np.maximum}[kind].reduce(
        warps, axis=1, dtype=values.dtype
    )
    return np.repeat(found, 32)


def rows_of(addresses: Array, count: int) -> list[Array]:
    """Addresses of the 8 rows of each of `count` matrices, as its lanes (4 a row) want them."""
    warps = addresses.reshape(-1, 32)
    return [warps[:, 8 * i + LANE // 4].reshape(-1) for i in range(count)]


def transposed(words: Array) -> Array:
    """Of each warp's 8 x 8 matrix, two numbers a lane, the lanes' words of its transpose."""
    matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.uint32).reshape(-1)


def fragment(registers: list[Array], row: Array, column: Array, shape: tuple[int, int]) -> Array:
    """Matrices of all warps; `row` and `column` are (registers, 32): where a lane's number is."""
    values = np.stack([r.reshape(-1, 32) for r in registers], 1)
    matrix = np.empty((len(values), *shape), values.dtype)
    matrix[:, row, column] = values
    return matrix


def places(shape: tuple[int, int], run: int) -> tuple[Array, Array]:
    """Rows and columns of the numbers of a lane in a matrix of 8-row blocks of 4 lanes a row.

    A lane has `run` neighbours; blocks follow down the rows first, then along the columns.
    """
    rows, columns = shape
    blocks = [(r, c) for c in range(columns // (4 * run)) for r in range(rows // 8)]
    row = [8 * r + LANE // 4 for r, c in blocks for _ in range(run)]
    column = [4 * run * c + LANE % 4 * run + k for r, c in blocks for k in range(run)]
    return np.array(row), np.array(column)


def multiply(
    shape: str, kinds: tuple[str, str], a: list[Array], b: list[Array], c: list[Array]
) -> list[Array]:
    """`mma.sync`: the bits of A · B + C, from a warp's registers; kinds of A and B, and of C.

    The sum is rounded once: a device rounds (or cuts) each step of it.
    """
    m, n, k = (int(size) for size in re.findall(r"\d+", shape))
    kind, total = kinds
    run = 2 if kind in ("f16", "bf16") else 1
    left = fragment(unpacked(a, kind), *places((m, k), run), (m, k))
    row, column = places((n, k), run)  # B is given by columns
    right = fragment(unpacked(b, kind), row, column, (n, k))
    place = places((m, n), 2)
    product = fragment(unpacked(c, total), *place, (m, n)) + left @ right.transpose(0, 2, 1)
    return [to_bits(product[:, r, s].reshape(-1), total) for r, s in zip(*place, strict=True)]


def unpacked(registers: list[Array], kind: str) -> list[Array]:
    """float64 of each number in a lane's registers, in order."""
    if kind in ("f16", "bf16"):
        pairs = [of_bits(r, f"{kind}x2") for r in registers]
        return [pair[:, i].astype(np.float64) for pair in pairs for i in range(2)]
    return [of_bits(r, kind).astype(np.float64) for r in registers]
