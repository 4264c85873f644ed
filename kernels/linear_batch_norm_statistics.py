"""What the gram algorithm takes from X and W before its product; formulas in linear_batch_norm.py.

x̄ and S, then the vectors of N channels that normalize, float64.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels.devices import device_of
from fastnorm.kernels.launch import ChannelView, cdiv, divisor_class, power_of_two
from fastnorm.kernels.linear_batch_norm_gram import (
    linear_batch_norm_fwd_gram_kernel,
    linear_batch_norm_fwd_gram_reduce_kernel,
)
from fastnorm.kernels.linear_batch_norm_small import linear_batch_norm_fwd_fold_kernel
from fastnorm.kernels.products import (
    FOLD_COLUMNS,
    FOLD_ROWS,
    MERGE_ROWS,
    Sum,
    align_of_positions,
    compute_dtype,
    product_block,
    product_plan,
)


class Folded(NamedTuple):
    """What a forward leaves for its backward, besides X, Y and W; float64 where nothing is said."""

    x_mean: Tensor | None  # (K,): x̄, None in evaluation
    # (N, K): W S over a unit of each row, in what is computed in; None in evaluation
    ws: Tensor | None
    stats: Tensor  # (5, N): W x̄ (b − mean in evaluation, negative), var, rstd, α, unit of W S
    sizes: Tensor  # (F,): max |α∘W| of each program of the fold
    flags: Tensor | None  # (F,): whether W cancels most of X, for 16 bits in training
    shift: Tensor | None  # (K,): what wider elements of X are less as they are loaded
    # (): rows of all processes, where the statistics are theirs; stats is (6, N) then
    rows: Tensor | None = None


def _gram_matrix(x: Tensor, view: ChannelView, F: int) -> Callable[[Tensor | None], Any]:
    """A function that leaves x̄ and S, float64, in the two tensors it returns.

    Given flags, it does so again where one is up, multiplying 16-bit elements in float64 too.
    """
    B, K, S = view[:3]
    itemsize = x.element_size()
    rows, most = (64, 64) if itemsize == 2 else (32, 32)
    block = product_block(K, most)
    device = device_of(x.device)
    roomy = device.shared >= 4 * rows * block * 8  # for operands in float64, beside their exchange
    pairs = cdiv(K, block) * (cdiv(K, block) + 1) // 2
    partial_dtype = torch.float32 if itemsize == 2 else torch.float64
    plan = product_plan(
        view, rows, 2 * rows * block * itemsize, device,
        Sum(pairs, pairs * block**2 * partial_dtype.itemsize, x.numel() * itemsize, itemsize == 2),
        num_warps=8 if block == 64 else 4,  # float64 takes the registers of two
    )  # fmt: skip
    empty = partial(torch.empty, dtype=torch.float64, device=x.device)
    sum_partial, s, mean = empty((plan.programs, K)), empty((K, K)), empty((K,))

    def compute(flags: Tensor | None) -> tuple[Tensor, Tensor]:
        again = flags is not None  # its operands are four times as wide
        dtype = torch.float64 if again else partial_dtype
        s_partial = empty((plan.programs, pairs, block, block), dtype=dtype)
        options = plan.options | ({"num_stages": 2 if roomy else 1} if again else {})
        linear_batch_norm_fwd_gram_kernel[(pairs * plan.programs,)](
            x, flags, s_partial, sum_partial, B, K, S, F, plan.tiles, plan.tiles_per_program,
            WIDE=itemsize > 2 or again, BLOCK_F=power_of_two(F), BLOCK_K=block,
            ALIGN_K=divisor_class(K), ALIGN_S=align_of_positions(view), COLUMNS=view.columns,
            **options,
        )  # fmt: skip
        linear_batch_norm_fwd_gram_reduce_kernel[(pairs * block,)](
            x if itemsize > 2 else None, flags, s_partial, sum_partial, s, mean,
            1.0 / (B * S), K, S, plan.programs, F,
            BLOCK_P=MERGE_ROWS, BLOCK_F=power_of_two(F), BLOCK_K=block, COLUMNS=view.columns,
            num_warps=4,
        )  # fmt: skip
        return mean, s

    return compute


def fold_weight(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    view: ChannelView,
    shared: bool,
) -> tuple[Tensor, Folded]:
    """(centre, α and β of what is computed in (3, N), what the backward needs)."""
    B, K, S = view[:3]
    N = weight.shape[0]
    F, rows = cdiv(N, FOLD_ROWS), B * S
    narrow = x.element_size() == 2
    wide = partial(torch.empty, dtype=torch.float64, device=x.device)
    compute = partial(torch.empty, dtype=compute_dtype(x.dtype), device=x.device)
    affine = compute((3, N))
    folded = Folded(
        None,
        compute((N, K)) if training else None,
        wide((6 if shared else 5, N)),
        wide((F,)),
        torch.empty(F, dtype=torch.int32, device=x.device) if training and narrow else None,
        compute((K,)) if training and not narrow else None,
    )
    moving = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)

    def fold(mean: Tensor | None, s: Tensor | None, again: bool, final: bool) -> None:
        linear_batch_norm_fwd_fold_kernel[(F,)](
            weight, s, mean, bias, norm_weight, norm_bias, running_mean, running_var, moving[0],
            folded.flags if again else None, None if again else folded.flags,
            folded.stats, folded.ws, folded.shift, affine, folded.sizes,
            float(rows), 1.0 / rows, rows / (rows - 1) if rows > 1 else math.inf, moving[1], eps,
            N, K, F,
            FINAL=final, BLOCK_N=FOLD_ROWS, BLOCK_K=FOLD_COLUMNS, BLOCK_F=power_of_two(F),
            ALIGN_K=divisor_class(K), num_warps=4, num_stages=4,
        )  # fmt: skip

    if not training:
        fold(None, None, again=False, final=False)
        return affine, folded
    gram_matrix = _gram_matrix(x, view, F)
    mean, s = gram_matrix(None)
    fold(mean, s, again=False, final=not narrow)
    if narrow:
        gram_matrix(folded.flags)
        fold(mean, s, again=True, final=True)
    return affine, folded._replace(x_mean=mean)
