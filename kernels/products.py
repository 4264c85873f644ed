"""Launch policy of matrix products, and what their launchers share: tiles by sizes and device."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels.devices import Device, device_of
from fastnorm.kernels.launch import ChannelView, cdiv, divisor_class, power_of_two


@dataclass(frozen=True)
class ProductPlan:
    """How programs share a product of the rows of a (B, C, S) tensor (see device/matmul.py)."""

    block_b: int
    block_s: int  # times block_b: rows of a tile
    tiles: int
    programs: int  # that share the rows, where those are summed over
    tiles_per_program: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {
            "BLOCK_B": self.block_b, "BLOCK_S": self.block_s,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


class Sum(NamedTuple):
    """A product whose result is a sum over the rows, which programs share."""

    blocks: int  # tiles of the result, which have programs of their own
    partial_bytes: int  # of one partial result, all tiles
    operand_bytes: int  # of the rows
    narrow: bool  # 16 bits, whose products are so fast that memory and cache are waited for


FOLD_ROWS = 16  # of W, that one program folds
FOLD_COLUMNS = 32
FOLD_PARTIALS = 6  # partial sums on their way at a time; with eight, ptxas takes a stack
GRADIENT_ROWS = 4  # of W, whose partial sums one program adds up
GRADIENT_COLUMNS = 128
MERGE_ROWS = 16  # partial Gram matrices that a program adds up at a time
PARTIAL_BYTES = 1 / 16
PARTIAL_PROGRAMS = 0.6
GROUP = 8  # row tiles that run together, so that both operands stay in the second-level cache
PIECES = 8
"""Columns of ones beside G and X, whose rows of the other matrix are added to every row of dX.

Three rows of bfloat16 hold the digits of a float32; eight keep vectors of 16 bytes whole.
"""
JOINED_LINE = 64  # elements that rows of G and X are a multiple of: whole lines of memory


def product_block(size: int, most: int) -> int:
    """Columns of a tile: a power of two that a tensor core takes."""
    return min(max(power_of_two(size), 16), most)


def sharers(total: Sum, resident: int, device: Device) -> int:
    """How many programs share the rows, for each tile of a sum over them.

    As many as run at a time, `resident` a multiprocessor: one more, and all would wait for it. Each
    leaves a partial sum of its own, which is written and read. Where those are more than
    PARTIAL_BYTES of what a narrow product reads, PARTIAL_PROGRAMS of that have to do: they keep
    memory nearly as busy, and there is less to move.
    """
    programs = resident * device.multiprocessors
    most = max(programs // total.blocks, 1)
    many = 2 * most * total.partial_bytes > PARTIAL_BYTES * total.operand_bytes
    if total.narrow and many:
        return min(most, cdiv(round(PARTIAL_PROGRAMS * programs), total.blocks))
    return most


def product_plan(
    view: ChannelView,
    rows: int,
    step: int,
    device: Device,
    total: Sum | None = None,
    *,
    num_warps: int = 8,
    stages: int = 4,
) -> ProductPlan:
    """Tiles of `rows` rows; a step of the product's loop loads `step` bytes.

    `total`: the result is a sum over the rows, and programs share those.
    """
    block_s = min(power_of_two(view.S), rows)
    block_b = rows // block_s
    tiles = cdiv(view.N, block_b) * cdiv(view.S, block_s)
    resident = 2 if num_warps == 4 else 1  # programs a multiprocessor
    wanted = 1 if total is None else sharers(total, resident, device)
    tiles_per_program = cdiv(tiles, min(wanted, tiles))
    return ProductPlan(
        block_b, block_s, tiles, cdiv(tiles, tiles_per_program), tiles_per_program,
        num_warps, max(min(stages, device.shared // step), 1),
    )  # fmt: skip


def output_tiles(
    x: Tensor, view: ChannelView, N: int, most_n: int = 128
) -> tuple[ProductPlan, dict[str, int]]:
    """Tiles of X Wᵀ, of at most `most_n` columns."""
    itemsize = x.element_size()
    device = device_of(x.device)
    if itemsize > 2 or N % 256 or not device.wgmma or not view.columns:
        most_n = 128
    rows, most_n, most_k = {2: (128, most_n, 64), 4: (128, 128, 32), 8: (64, 32, 16)}[itemsize]
    block_n, block_k = product_block(N, most_n), product_block(view.C, most_k)
    step = (rows + block_n) * block_k * itemsize
    plan = product_plan(view, rows, step, device, stages=3 if block_n == 256 else 4)
    return plan, {"BLOCK_N": block_n, "BLOCK_K": block_k, **plan.options}


def input_tiles(x: Tensor, view: ChannelView, N: int) -> tuple[ProductPlan, dict[str, int]]:
    """Tiles of dX."""
    itemsize = x.element_size()
    device = device_of(x.device)
    wide = (128, 128 if device.wgmma else 64, 64)
    rows, most_k, most_n = {2: wide, 4: (64, 64, 32), 8: (64, 32, 16)}[itemsize]
    block_n, block_k = product_block(N, most_n), product_block(view.C, most_k)
    step = (2 * rows + block_k) * block_n * itemsize
    plan = product_plan(view, rows, step, device, stages=3)
    return plan, {"BLOCK_N": block_n, "BLOCK_K": block_k, **plan.options}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How tensor cores may read float32: what torch was told for its own products."""
    if dtype is not torch.float32:
        return "ieee"
    for settings in (torch.backends.cuda.matmul, torch.backends):
        # the newer of torch's two settings: once it is used, reading the older one raises
        asked = getattr(settings, "fp32_precision", "none")
        if asked != "none":
            return "tf32" if asked == "tf32" else "ieee"
    return "ieee"


def empty_rows(x: Tensor, N: int, view: ChannelView) -> Tensor:
    """An empty tensor laid out as x, with N channels."""
    batch, positions = x.shape[0], x.shape[2:]
    if view.columns:
        return torch.empty(batch, *positions, N, dtype=x.dtype, device=x.device).movedim(-1, 1)
    return torch.empty(batch, N, *positions, dtype=x.dtype, device=x.device)


def align_of_positions(view: ChannelView) -> int:
    return 1 if view.columns else divisor_class(view.S)


def aligns(view: ChannelView, N: int, K: int) -> dict[str, int]:
    """The largest vectors that no mask splits, and the layout."""
    return {
        "ALIGN_N": divisor_class(N), "ALIGN_K": divisor_class(K),
        "ALIGN_S": align_of_positions(view), "COLUMNS": view.columns,
    }  # fmt: skip
