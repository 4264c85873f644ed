"""Linear + BatchNorm + activation: Z = X Wᵀ + b over the M rows of X, normalized by columns.

X is (M, K), W (N, K). With x̄ the column means of X and S = Σ (x − x̄)(x − x̄)ᵀ (K, K), "gram" is
    mean = W x̄ + b        var = rowsum(W S ∘ W) / M        r = 1 / √(var + eps)       α = γ ∘ r
    y = act((X Wᵀ − W x̄) ∘ α + β)
and backward, with G = dY ∘ act′, act′ a function of Y:
    dβ = 1ᵀ G             P = Gᵀ(X − x̄)                    dγ = r ∘ rowsum(P ∘ W)
    c₁ = dβ / M           c₂ = dγ / M
    dW = α ∘ (P − c₂ r ∘ W S)                              A = Wᵀ diag(α r c₂) W
    dX = G (α∘W) − (X − x̄) A − 1 ⊗ (α c₁)ᵀ W              db = 0
In evaluation mean and r are the buffers', and
    y = act((X Wᵀ + b − mean) ∘ α + β)
    dγ = r ∘ (rowsum(GᵀX ∘ W) + dβ ∘ (b − mean))    dW = α ∘ GᵀX    dX = G (α∘W)    db = α ∘ dβ

Neither Z nor dZ is written: forward reads X twice and writes Y, backward reads dY, Y and X twice
and writes dX. The N×K and K×K arithmetic, float64, takes a few small kernels.

"epilogue" writes Z once, with the (count, mean, std) of each tile's columns, and goes on as
batch_norm.py does; two products finish its backward. Its Z stands where gram has none: for any
activation.

16-bit operands are multiplied as they are, and scaled in float32 afterwards: a weight folded to 16
bits would cost up to 2.4 times torch's own error. Those of 32 and 64 bits are centred as they are
loaded. α∘W and A are rounded to the operands' dtype in the backward, each in a unit, a power of
two, that keeps float16 from underflow; x̄ A is of the rounded A, so that the rounding cancels on
the mean.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastnorm.kernels.device.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.kernels.launch import ChannelView, cdiv, device_of, divisor_class, power_of_two
from fastnorm.kernels.linear_batch_norm_bwd import (
    linear_batch_norm_bwd_input_kernel,
    linear_batch_norm_bwd_weight_kernel,
)
from fastnorm.kernels.linear_batch_norm_fwd import linear_batch_norm_fwd_kernel
from fastnorm.kernels.linear_batch_norm_gram import (
    linear_batch_norm_fwd_gram_kernel,
    linear_batch_norm_fwd_gram_reduce_kernel,
)
from fastnorm.kernels.linear_batch_norm_shared import share
from fastnorm.kernels.linear_batch_norm_small import (
    linear_batch_norm_bwd_fold_kernel,
    linear_batch_norm_bwd_products_kernel,
    linear_batch_norm_bwd_round_kernel,
    linear_batch_norm_fwd_fold_kernel,
)
from fastnorm.kernels.products import (
    FOLD_COLUMNS,
    FOLD_ROWS,
    GROUP,
    MERGE_ROWS,
    align_of_positions,
    aligns,
    compute_dtype,
    empty_rows,
    input_tiles,
    output_tiles,
    precision,
    product_block,
    product_plan,
)


class Folded(NamedTuple):
    """What a forward leaves for its backward, besides X, Y and W; float64 but for the flags."""

    x_mean: Tensor | None  # (K,): x̄, None in evaluation
    ws: Tensor | None  # (N, K): W S, None in evaluation
    stats: Tensor  # (4, N): W x̄ (b − mean in evaluation, negative), var, rstd, α
    sizes: Tensor  # (F,): max |α∘W| of each program of the fold
    flags: Tensor | None  # (F,): whether W cancels most of X, for 16 bits in training
    shift: Tensor | None  # (K,): what wider elements of X are less as they are loaded
    # (): rows of all processes, where the statistics are theirs; stats is (5, N) then
    rows: Tensor | None = None


def fixed_moments(folded: Folded, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (mean, var) of Z in evaluation, eps within var."""
    centre, _, rstd, _ = folded.stats
    return centre if bias is None else centre + bias.detach(), rstd**-2


def _gram_matrix(x: Tensor, view: ChannelView, F: int) -> Callable[[Tensor | None], Any]:
    """A function that leaves x̄ and S, float64, in the two tensors it returns.

    Given flags, it does so again where one is up, multiplying 16-bit elements in float64 too.
    """
    B, K, S = view[:3]
    itemsize = x.element_size()
    rows, most = (64, 64) if itemsize == 2 else (32, 32)
    block = product_block(K, most)
    pairs = cdiv(K, block) * (cdiv(K, block) + 1) // 2
    plan = product_plan(
        view, rows, 2 * rows * block * itemsize, device_of(x.device), pairs,
        num_warps=8 if block == 64 else 4,  # float64 takes the registers of two
    )  # fmt: skip
    empty = partial(torch.empty, dtype=torch.float64, device=x.device)
    s_partial, sum_partial = empty((plan.programs, pairs, block, block)), empty((plan.programs, K))
    s, mean = empty((K, K)), empty((K,))

    def compute(flags: Tensor | None) -> tuple[Tensor, Tensor]:
        again = flags is not None  # its operands are four times as wide
        options = plan.options | ({"num_stages": 2} if again else {})
        linear_batch_norm_fwd_gram_kernel[(pairs * plan.programs,)](
            x, flags, s_partial, sum_partial, B, K, S, F, plan.tiles, plan.tiles_per_program,
            WIDE=itemsize > 2 or again, BLOCK_F=power_of_two(F), BLOCK_K=block,
            ALIGN_K=divisor_class(K), ALIGN_S=align_of_positions(view), COLUMNS=view.columns,
            **options,
        )  # fmt: skip
        linear_batch_norm_fwd_gram_reduce_kernel[(pairs * block,)](
            x, flags, s_partial, sum_partial, s, mean, 1.0 / (B * S), K, S, plan.programs, F,
            BLOCK_P=MERGE_ROWS, BLOCK_F=power_of_two(F), BLOCK_K=block, COLUMNS=view.columns,
            num_warps=4,
        )  # fmt: skip
        return mean, s

    return compute


def _fold(
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
    F = cdiv(N, FOLD_ROWS)
    narrow = x.element_size() == 2
    wide = partial(torch.empty, dtype=torch.float64, device=x.device)
    compute = partial(torch.empty, dtype=compute_dtype(x.dtype), device=x.device)
    affine = compute((3, N))
    folded = Folded(
        None,
        wide((N, K)) if training else None,
        wide((5 if shared else 4, N)),
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
            float(B * S), moving[1], eps, N, K, F,
            FINAL=final, BLOCK_N=FOLD_ROWS, BLOCK_K=FOLD_COLUMNS, BLOCK_F=power_of_two(F),
            ALIGN_K=divisor_class(K), num_warps=4,
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


def gram_forward(
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
    activation: str,
    view: ChannelView,
    gathered: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Folded]:
    """Return (y, folded): y (B, N, *) laid out as x (B, K, *), folded for the backward.

    `gathered` makes (processes, n) of everybody's (n,), where the statistics are to be of all.
    """
    B, K, S = view[:3]
    N = weight.shape[0]
    shared = gathered is not None
    buffers = (None, None) if shared else (running_mean, running_var)
    affine, folded = _fold(
        x, weight, bias, norm_weight, norm_bias, *buffers, training, momentum, eps, view, shared
    )
    if gathered is not None:
        total = share(
            weight, bias, norm_weight, affine, folded.stats, folded.sizes,
            running_mean, running_var, momentum, eps, B * S, gathered,
        )  # fmt: skip
        folded = folded._replace(rows=total)
    y = empty_rows(x, N, view)
    plan, tile = output_tiles(x, view, N, 256)
    act, _ = ACTIVATIONS[activation]
    linear_batch_norm_fwd_kernel[(plan.tiles * cdiv(N, tile["BLOCK_N"]),)](
        x, weight, folded.shift, affine, y, B, N, K, S, plan.tiles,
        ACT=act, PRECISION=precision(x.dtype), GROUP=GROUP, **tile, **aligns(view, N, K),
    )  # fmt: skip
    return y, folded


def gram_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias_dtype: torch.dtype | None,
    folded: Folded,
    activation: str,
    view: ChannelView,
    wanted: tuple[bool, bool, bool, bool, bool],
    summed: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return (dx, dweight, dbias, dγ, dβ), None where not `wanted`; there is no dbias in training.

    dy and y are laid out as x is. `summed` adds up (2, N) over all processes, where the statistics
    are theirs.
    """
    B, K, S = view[:3]
    N = weight.shape[0]
    training = folded.x_mean is not None
    wants_dx, wants_dw, wants_db, wants_dgamma, wants_dbeta = wanted
    # who waits for the sums of this process: those of the other algorithms too
    joins = summed is not None and (wants_dx or wants_dw or wants_db)
    wants_db = wants_db and not training
    if not joins and not (wants_dx or wants_dw or wants_db or wants_dgamma or wants_dbeta):
        return (None,) * 5
    wants_p = wants_dw or wants_dgamma or (training and wants_dx) or joins
    operands = (dy, y, x, folded.shift)
    options = {
        "GATE": OUTPUT_GRADS[activation], "PRECISION": precision(x.dtype), **aligns(view, N, K),
    }  # fmt: skip
    p = total = vectors = None
    if wants_p or wants_db or wants_dbeta:
        p, total = _gated_sums(operands, weight, view, wants_p, options)
    if training and wants_dx:
        vectors = torch.empty((2, N), dtype=torch.float64, device=x.device)
    aw = torch.empty_like(weight) if wants_dx else None
    dw = torch.empty_like(weight) if wants_dw else None
    db = torch.empty(N, dtype=bias_dtype, device=x.device) if wants_db else None
    dgamma = torch.empty_like(norm_weight) if wants_dgamma and norm_weight is not None else None
    dbeta = torch.empty_like(norm_bias) if wants_dbeta and norm_bias is not None else None
    small = {
        "SHIFTED": folded.shift is not None, "BLOCK_K": FOLD_COLUMNS,
        "BLOCK_F": power_of_two(folded.sizes.numel()), "ALIGN_K": divisor_class(K), "num_warps": 4,
    }  # fmt: skip
    outputs: tuple[Tensor | None, ...] = (dw, db, dgamma, dbeta, aw, vectors)
    sums = None
    if folded.rows is not None:
        own = torch.empty((2, N), dtype=compute_dtype(x.dtype), device=x.device)
        first = (None, None, dgamma, dbeta, None, None)
        _fold_gradients(p, total, weight, folded, first, own, None, B * S, small)
        outputs = (dw, None, None, None, aw, vectors)
        sums = summed(own) if summed is not None and joins else None
    if folded.rows is None or wants_dw or wants_dx:
        _fold_gradients(p, total, weight, folded, outputs, None, sums, B * S, small)
    if aw is None:
        return None, dw, db, dgamma, dbeta
    parts, unit, offset, flag = _folded_for_input(x, weight, folded, vectors, small)
    dx = torch.empty_like(x)
    plan, tile = input_tiles(x, view, N)
    linear_batch_norm_bwd_input_kernel[(plan.tiles * cdiv(K, tile["BLOCK_K"]),)](
        *operands, aw, parts, unit, folded.sizes, offset, flag, dx,
        B, N, K, S, folded.sizes.numel(), plan.tiles,
        GROUP=GROUP, BLOCK_F=small["BLOCK_F"], **tile, **options,
    )  # fmt: skip
    return dx, dw, db, dgamma, dbeta


def _fold_gradients(
    p: Tensor | None,
    total: Tensor | None,
    weight: Tensor,
    folded: Folded,
    outputs: tuple[Tensor | None, ...],
    own: Tensor | None,
    sums: Tensor | None,
    rows: int,
    small: dict[str, Any],
) -> None:
    N, K = weight.shape
    linear_batch_norm_bwd_fold_kernel[(cdiv(N, FOLD_ROWS),)](
        p, total, weight, folded.x_mean, folded.ws, folded.stats, folded.sizes,
        *outputs, own, sums, folded.rows, float(rows), N, K, folded.sizes.numel(),
        BLOCK_N=FOLD_ROWS, **small,
    )  # fmt: skip


def _folded_for_input(
    x: Tensor, weight: Tensor, folded: Folded, vectors: Tensor | None, small: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """What dX takes in training: parts of −A, their unit over that of α∘W, offset and flag."""
    if vectors is None:
        return None, None, None, None
    N, K = weight.shape
    blocks = cdiv(K, FOLD_COLUMNS)
    wide = partial(torch.empty, dtype=torch.float64, device=x.device)
    a, dx_mean, a_sizes = wide((K, K)), wide((K,)), wide((blocks * blocks,))
    linear_batch_norm_bwd_products_kernel[(blocks * blocks,)](
        weight, vectors, a, dx_mean, a_sizes, N, K,
        BLOCK_N=FOLD_ROWS, BLOCK_K=FOLD_COLUMNS, ALIGN_K=divisor_class(K), num_warps=8,
    )  # fmt: skip
    compute = partial(torch.empty, dtype=compute_dtype(x.dtype), device=x.device)
    count = 1 if folded.flags is None else 2
    parts = torch.empty((count, K, K), dtype=x.dtype, device=x.device)
    unit, offset = compute(()), compute((K,))
    flag = None if folded.flags is None else torch.empty((), dtype=torch.int32, device=x.device)
    linear_batch_norm_bwd_round_kernel[(blocks,)](
        a, folded.x_mean, dx_mean, folded.sizes, a_sizes, folded.flags,
        parts, unit, offset, flag, K, folded.sizes.numel(), a_sizes.numel(),
        BLOCK_T=power_of_two(a_sizes.numel()), **small,
    )  # fmt: skip
    return parts, unit, offset, flag


def _gated_sums(
    operands: tuple[Tensor | None, ...],
    weight: Tensor,
    view: ChannelView,
    wants_p: bool,
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor]:
    """P = Gᵀ(X − shift), where it is wanted, and dβ = 1ᵀG, float64."""
    x = operands[2]
    assert x is not None
    B, K, S = view[:3]
    N = weight.shape[0]
    itemsize = x.element_size()
    device = device_of(x.device)
    wide = (64, 128, 256 if device.wgmma else 64)
    rows, most_n, most_k = {2: wide, 4: (32, 64, 64), 8: (32, 32, 32)}[itemsize]
    block_n, block_k = product_block(N, most_n), product_block(K, most_k)
    blocks = cdiv(N, block_n) * (cdiv(K, block_k) if wants_p else 1)
    step = rows * (2 * block_n + block_k) * itemsize
    plan = product_plan(view, rows, step, device, blocks, stages=3)
    dtype = compute_dtype(x.dtype)
    p_partial = None
    if wants_p:
        p_partial = torch.empty(plan.programs, N, K, dtype=dtype, device=x.device)
    dbeta_partial = torch.empty(plan.programs, N, dtype=dtype, device=x.device)
    linear_batch_norm_bwd_weight_kernel[(blocks * plan.programs,)](
        *operands, p_partial, dbeta_partial, B, N, K, S, plan.tiles, plan.tiles_per_program,
        BLOCK_N=block_n, BLOCK_K=block_k, **plan.options, **options,
    )  # fmt: skip
    p = None if p_partial is None else p_partial.sum(0, dtype=torch.float64)
    return p, dbeta_partial.sum(0, dtype=torch.float64)
