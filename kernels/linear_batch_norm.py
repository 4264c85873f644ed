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

Of wide K, dX is a library's product instead: P's kernel stores G in passing, into a buffer that
lives as long as the backward, and
    dX = [G | X − x̄ | 1] [α∘W ; −A ; −(αc₁)ᵀW]            (in evaluation G (α∘W))
of which the left is stored, and the right rounded, in the operands' dtype, x̄ too; what is lost of
it goes to the last rows. cost.py says where. The fused kernel then returns at once, but for an A
that wants a unit or a second part.

"epilogue" writes Z once, with the (count, mean, std) of each tile's columns, and goes on as
batch_norm.py does; two products finish its backward. Its Z stands where gram has none: for any
activation.

16-bit operands are multiplied as they are, and scaled in float32 afterwards: a weight folded to 16
bits would cost up to 2.4 times torch's own error. Those of 32 and 64 bits are centred as they are
loaded, and where float32 is to keep its digits, P is float64: W may cancel most of it in dγ. α∘W
and A are rounded to the operands' dtype in the backward, each in a unit, a power of two, that keeps
float16 from underflow; x̄ A is of the rounded A, so that the rounding cancels on the mean.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastnorm.kernels.device.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.kernels.devices import device_of
from fastnorm.kernels.launch import ChannelView, cdiv, divisor_class, power_of_two
from fastnorm.kernels.linear_batch_norm_bwd import (
    linear_batch_norm_bwd_input_kernel,
    linear_batch_norm_bwd_weight_kernel,
)
from fastnorm.kernels.linear_batch_norm_fwd import linear_batch_norm_fwd_kernel
from fastnorm.kernels.linear_batch_norm_input import (
    folded_for_input,
    is_joined,
    joined_operands,
)
from fastnorm.kernels.linear_batch_norm_shared import share
from fastnorm.kernels.linear_batch_norm_small_bwd import linear_batch_norm_bwd_fold_kernel
from fastnorm.kernels.linear_batch_norm_statistics import Folded as Folded
from fastnorm.kernels.linear_batch_norm_statistics import fold_weight
from fastnorm.kernels.products import (
    FOLD_COLUMNS,
    FOLD_PARTIALS,
    GRADIENT_COLUMNS,
    GRADIENT_ROWS,
    GROUP,
    Sum,
    aligns,
    compute_dtype,
    empty_rows,
    input_tiles,
    output_tiles,
    precision,
    product_block,
    product_plan,
)


def fixed_moments(folded: Folded, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (mean, var) of Z in evaluation, eps within var."""
    centre, _, rstd, *_ = folded.stats
    return centre if bias is None else centre + bias.detach(), rstd**-2


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
    affine, folded = fold_weight(
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
    partials: tuple[Tensor | None, Tensor | None] = (None, None)
    vectors = None
    h = matrix = None
    if wants_dx and wants_p and is_joined(x, view, N, training):
        h, matrix = joined_operands(x, view, N, folded.x_mean)
    if wants_p or wants_db or wants_dbeta:
        partials = _gated_sums(operands, weight, view, wants_p, folded.sizes, h, options)
    if training and wants_dx:
        vectors = torch.empty((2, N), dtype=torch.float64, device=x.device)
    aw = None
    if wants_dx:
        aw = torch.empty_like(weight) if matrix is None else matrix[:N]
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
        _fold_gradients(partials, weight, folded, first, own, None, B * S)
        outputs = (dw, None, None, None, aw, vectors)
        sums = summed(own) if summed is not None and joins else None
    if folded.rows is None or wants_dw or wants_dx:
        _fold_gradients(partials, weight, folded, outputs, None, sums, B * S)
    if aw is None:
        return None, dw, db, dgamma, dbeta
    rounded = folded_for_input(x, weight, aw, folded, vectors, matrix, small)
    dx = torch.empty_like(x)
    if h is not None and matrix is not None:
        # into a given tensor autocast leaves the operands' dtype alone
        torch.mm(h, matrix, out=dx.movedim(1, -1).view(B * S, K))
        if not training:
            return dx, dw, db, dgamma, dbeta
        del h
    plan, tile = input_tiles(x, view, N)
    linear_batch_norm_bwd_input_kernel[(plan.tiles * cdiv(K, tile["BLOCK_K"]),)](
        *operands, aw, rounded.parts, rounded.unit, folded.sizes, rounded.offset, rounded.flag,
        rounded.todo, dx, B, N, K, S, folded.sizes.numel(), plan.tiles,
        GROUP=GROUP, BLOCK_F=small["BLOCK_F"], **tile, **options,
    )  # fmt: skip
    return dx, dw, db, dgamma, dbeta


def _fold_gradients(
    partials: tuple[Tensor | None, Tensor | None],
    weight: Tensor,
    folded: Folded,
    outputs: tuple[Tensor | None, ...],
    own: Tensor | None,
    sums: Tensor | None,
    rows: int,
) -> None:
    N, K = weight.shape
    F = folded.sizes.numel()
    linear_batch_norm_bwd_fold_kernel[(cdiv(N, GRADIENT_ROWS),)](
        *partials, weight, folded.x_mean, folded.ws, folded.stats, folded.sizes,
        *outputs, own, sums, folded.rows, float(rows), 1.0 / rows, N, K,
        0 if partials[1] is None else partials[1].shape[0], F,
        SHIFTED=folded.shift is not None, BLOCK_N=GRADIENT_ROWS,
        BLOCK_K=min(power_of_two(K), GRADIENT_COLUMNS), BLOCK_F=power_of_two(F),
        UNROLL=FOLD_PARTIALS, ALIGN_K=divisor_class(K), num_warps=4,
    )  # fmt: skip


def _gated_sums(
    operands: tuple[Tensor | None, ...],
    weight: Tensor,
    view: ChannelView,
    wants_p: bool,
    sizes: Tensor,
    h: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor | None, Tensor]:
    """Partial sums over the rows: of P = Gᵀ(X − shift), where it is wanted, and of dβ = 1ᵀG.

    G goes into h in passing.
    """
    x = operands[2]
    assert x is not None
    B, K, S = view[:3]
    N = weight.shape[0]
    itemsize = x.element_size()
    device = device_of(x.device)
    # Of wide K, G is stored as a rule, and with 64 rows that takes every register there is. Stored
    # or not, P has the same bits.
    rows, stages = (32, 4) if itemsize == 2 and K > 256 else (64, 3)
    wide = (rows, 128, 256 if device.wgmma else 64)
    rows, most_n, most_k = {2: wide, 4: (32, 64, 64), 8: (32, 32, 32)}[itemsize]
    block_n, block_k = product_block(N, most_n), product_block(K, most_k)
    blocks = cdiv(N, block_n) * (cdiv(K, block_k) if wants_p else 1)
    step = rows * (2 * block_n + block_k) * itemsize
    exact = x.dtype is torch.float32 and options["PRECISION"] == "ieee"
    dtype = torch.float64 if exact else compute_dtype(x.dtype)
    read = itemsize * B * S * (N * sum(t is not None for t in operands[:2]) + K)
    total = Sum(blocks, dtype.itemsize * N * (K if wants_p else 1), read, itemsize == 2)
    plan = product_plan(view, rows, step, device, total, stages=stages)
    p_partial = None
    if wants_p:
        p_partial = torch.empty(plan.programs, N, K, dtype=dtype, device=x.device)
    dbeta_partial = torch.empty(plan.programs, N, dtype=dtype, device=x.device)
    linear_batch_norm_bwd_weight_kernel[(blocks * plan.programs,)](
        *operands, p_partial, dbeta_partial, h, None if h is None else sizes,
        B, N, K, S, sizes.numel(), 0 if h is None else h.stride(0),
        plan.tiles, plan.tiles_per_program, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_F=power_of_two(sizes.numel()), **plan.options, **options,
    )  # fmt: skip
    return p_partial, dbeta_partial
