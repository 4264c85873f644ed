"""What dX of the gram algorithm takes besides G and X; the formulas are in linear_batch_norm.py."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels import cost
from fastnorm.kernels.devices import device_of
from fastnorm.kernels.launch import TILE_BYTES, ChannelView, cdiv, divisor_class, power_of_two
from fastnorm.kernels.linear_batch_norm_bwd import linear_batch_norm_bwd_join_kernel
from fastnorm.kernels.linear_batch_norm_small_bwd import (
    linear_batch_norm_bwd_products_kernel,
    linear_batch_norm_bwd_round_kernel,
)
from fastnorm.kernels.linear_batch_norm_statistics import Folded
from fastnorm.kernels.products import (
    FOLD_COLUMNS,
    FOLD_ROWS,
    JOINED_LINE,
    PIECES,
    compute_dtype,
    precision,
)


class Rounded(NamedTuple):
    """What dX takes in training besides α∘W."""

    parts: Tensor | None = None  # (1 or 2, K, K): −A
    unit: Tensor | None = None  # (): theirs over that of α∘W
    offset: Tensor | None = None  # (K,)
    flag: Tensor | None = None  # (): whether the second part counts
    todo: Tensor | None = None  # (): whether a library's product, where there is one, will not do


def folded_for_input(
    x: Tensor,
    weight: Tensor,
    aw: Tensor,
    folded: Folded,
    vectors: Tensor | None,
    matrix: Tensor | None,
    small: dict[str, Any],
) -> Rounded:
    """Rounds A and the offset, into the last rows of `matrix` too where there is one."""
    if vectors is None:
        return Rounded()
    N, K = weight.shape
    blocks = cdiv(K, FOLD_COLUMNS)
    wide = partial(torch.empty, dtype=torch.float64, device=x.device)
    a, dx_mean, a_sizes = wide((K, K)), wide((K,)), wide((blocks * blocks,))
    linear_batch_norm_bwd_products_kernel[(blocks * blocks,)](
        weight, aw, vectors, a, dx_mean, a_sizes, N, K,
        BLOCK_N=FOLD_ROWS, BLOCK_K=FOLD_COLUMNS, ALIGN_K=divisor_class(K), num_warps=8,
    )  # fmt: skip
    compute = partial(torch.empty, dtype=compute_dtype(x.dtype), device=x.device)
    flag = partial(torch.empty, (), dtype=torch.int32, device=x.device)
    rounded = Rounded(
        torch.empty((1 if folded.flags is None else 2, K, K), dtype=x.dtype, device=x.device),
        compute(()),
        compute((K,)),
        None if folded.flags is None else flag(),
        None if matrix is None else flag(),
    )
    linear_batch_norm_bwd_round_kernel[(blocks,)](
        a, folded.x_mean, dx_mean, folded.sizes, a_sizes, folded.flags, *rounded[:4],
        None if matrix is None else matrix[N:], rounded.todo,
        K, folded.sizes.numel(), a_sizes.numel(),
        PIECES=PIECES, BLOCK_T=power_of_two(a_sizes.numel()), **small,
    )  # fmt: skip
    return rounded


def is_joined(x: Tensor, view: ChannelView, N: int, training: bool) -> bool:
    """Whether dX is a library's product."""
    B, K, S = view[:3]
    asked = precision(x.dtype)
    device = device_of(x.device)
    p = cost.problem(B * S, K, N, x.dtype, device, training, True, asked, view.columns)
    return cost.joins(p)


def joined_operands(
    x: Tensor, view: ChannelView, N: int, x_mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """[G | X − x̄ | 1] (M, N + K + PIECES) but for G, and the empty matrix (·, K) of its product.

    In evaluation there is only G.
    """
    K, M = view.C, view.S
    depth = N if x_mean is None else N + K + PIECES
    # oneDNN's product of 16 bits on AMX tiles reads beyond a row's end: 0 · NaN, were there a gap
    line = 1 if x.device.type == "cpu" and x.element_size() == 2 else JOINED_LINE
    stride = cdiv(depth, line) * line
    h = torch.empty_strided((M, depth), (stride, 1), dtype=x.dtype, device=x.device)
    if x_mean is not None:
        h[:, N + K :].fill_(1.0)  # in a kernel that few columns would be narrow stores
        elements = TILE_BYTES // x.element_size()
        block_k = min(power_of_two(K), elements // 4)
        block_s = elements // block_k
        linear_batch_norm_bwd_join_kernel[(cdiv(M, block_s) * cdiv(K, block_k),)](
            x, x_mean, h, N, K, M, stride,
            BLOCK_S=block_s, BLOCK_K=block_k,
            ALIGN_N=divisor_class(N), ALIGN_K=divisor_class(K), num_warps=4,
        )  # fmt: skip
    return h, torch.empty((depth, K), dtype=x.dtype, device=x.device)
