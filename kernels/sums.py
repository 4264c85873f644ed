"""The last step of every parameter gradient: partial sums of programs, added in a fixed order."""

import triton
import triton.language as tl
from torch import Tensor

from fastnorm.kernels.device.channels import channels_of
from fastnorm.kernels.device.tiles import load_as, store_cast
from fastnorm.kernels.launch import MERGE_CHANNELS, MERGE_PARTIALS, MERGE_WARPS, SIZES, cdiv


@triton.jit
def column_sum(partial_ptr, c, cmask, C, P, BLOCK_P: tl.constexpr):
    """Σ over p of (P, C) partials."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    total = tl.zeros(c.shape, ACC)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = (p.to(tl.int64) * C)[:, None] + c[None, :]
        mask = (p < P)[:, None] & cmask[None, :]
        total += tl.sum(load_as(partial_ptr, at, mask, ACC), axis=0)
    return total


# One program owns BLOCK_C columns.
@triton.jit(do_not_specialize=SIZES)
def sum_partials_kernel(
    dw_partial_ptr, db_partial_ptr,         # (P, C), (P, C)
    sums_ptr, dw_ptr, db_ptr,               # (2, C), (C,), (C,); None: not wanted
    C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    C = C.to(tl.int64)
    c, cmask = channels_of(tl.program_id(0), C, BLOCK_C)
    if dw_partial_ptr is not None:
        dw = column_sum(dw_partial_ptr, c, cmask, C, P, BLOCK_P)
        store_cast(sums_ptr, c, dw, cmask)
        store_cast(dw_ptr, c, dw, cmask)
    if db_partial_ptr is not None:
        db = column_sum(db_partial_ptr, c, cmask, C, P, BLOCK_P)
        if sums_ptr is not None:
            store_cast(sums_ptr + C, c, db, cmask)
        store_cast(db_ptr, c, db, cmask)


def sum_partials(
    dw_partial: Tensor | None,
    db_partial: Tensor | None,
    sums: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    """Add up (P, C) partials over P: into dw and db (C,), and both into `sums` (2, C)."""
    partial = db_partial if dw_partial is None else dw_partial
    if partial is None:
        return
    programs, columns = partial.shape
    sum_partials_kernel[(cdiv(columns, MERGE_CHANNELS),)](
        dw_partial, db_partial, sums, dw, db, columns, programs,
        BLOCK_C=MERGE_CHANNELS, BLOCK_P=MERGE_PARTIALS, num_warps=MERGE_WARPS,
    )  # fmt: skip
