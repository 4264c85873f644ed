"""BatchNorm over the (N, S) index sets of the C channels of a dense (N, C, S) tensor.

Forward, per channel, with M = N·S:
    mean = Σ x / M        std² = Σ (x - mean)² / M        rstd = 1 / √(std² + eps)
    x̂ = (x - mean) · rstd
    z = x̂ · w + b (+ residual)
    y = act(z)
    running_mean ← (1 - m) · running_mean + m · mean
    running_var  ← (1 - m) · running_var  + m · std² · M / (M - 1)

Backward, with dz = dy · act′(z), which is also the residual's gradient:
    db = Σ dz             dw = Σ dz · x̂
    dx = (dz - db / M - x̂ · dw / M) · rstd · w         in training
    dx = dz · rstd · w                                 in evaluation, mean and rstd from the buffers

Bytes. Where one program owns a channel, one kernel does everything, and what it reads a second time
is in a cache. Else training reads x twice, forward (moments, apply) and backward (reduce, apply).
act′ is never saved. Without a residual z is recomputed from x, which the backward reads anyway.
With one, z needs x and the residual; where the sign of z is enough (relu, leaky_relu) y is read
instead, which the next layer keeps alive anyway. The reduce pass writes dz, the residual's
gradient, and the apply pass reads dz in place of dy and y: 7 passes in all. A packed mask would
take 6, plus 1/8 byte an element at three places, and a kernel that packs bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnorm.kernels.device.activations import ACTIVATIONS, SIGN_GATES
from fastnorm.kernels.device.channels import (
    channels_of,
    gradient_sums_of_tiles,
    input_gradient_of_tiles,
    moments_of_tiles,
    normalize_tiles,
    wide_sizes,
)
from fastnorm.kernels.device.moments import (
    finite_or_zero,
    merge_partials,
    merge_two,
    rstd_of,
    sqrt,
    two_sum,
)
from fastnorm.kernels.device.tiles import elements_before, load_as, load_or, store_cast
from fastnorm.kernels.launch import (
    MERGE_CHANNELS,
    MERGE_PARTIALS,
    MERGE_WARPS,
    ChannelPlan,
    cdiv,
    channel_plan,
    device_of,
)

# Sizes change from batch to batch: none of them may make Triton compile for 1 or multiples of 16.
SIZES = ("N", "C", "S", "P", "tiles", "tiles_per_program", "block_n", "block_s")


class ChannelView(NamedTuple):
    """A dense tensor as (N, C, S); `columns`: channels are innermost in memory."""

    N: int
    C: int
    S: int
    columns: bool


# ---- forward -------------------------------------------------------------------------------------
@triton.jit
def moving_average(running_ptr, c, cmask, value, momentum, momentum_ptr):
    if running_ptr is not None:
        m = tl.full((), momentum, value.dtype)
        if momentum_ptr is not None:
            m = tl.load(momentum_ptr).to(value.dtype)
        old = tl.load(running_ptr + c, mask=cmask, other=0.0).to(value.dtype)
        store_cast(running_ptr, c, (1.0 - m) * old + m * value, cmask)


@triton.jit
def finalize(
    mean, rest, std, M, eps, c, cmask, C,
    stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
):  # fmt: skip
    """Save the statistics of channels of M elements, and move their running ones; returns rstd."""
    rstd = rstd_of(std, tl.full((), eps, std.dtype))
    tl.store(stats_ptr + c, mean, mask=cmask)
    tl.store(stats_ptr + C + c, rest, mask=cmask)
    tl.store(stats_ptr + 2 * C + c, rstd, mask=cmask)
    moving_average(running_mean_ptr, c, cmask, mean + rest, momentum, momentum_ptr)
    unbiased = std * std * (M / (M - 1.0))
    moving_average(running_var_ptr, c, cmask, unbiased, momentum, momentum_ptr)
    return rstd


@triton.jit
def count_batch(count_ptr, pid):
    if count_ptr is not None:
        if pid == 0:
            tl.store(count_ptr, tl.load(count_ptr) + 1)


# One program owns BLOCK_C channels.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr,                       # (N, C, S), (3, C): mean, rest, rstd
    running_mean_ptr, running_var_ptr, count_ptr, momentum_ptr,  # (C,), (C,), (), ()
    momentum: tl.float64, eps: tl.float64,
    N, C, S, tiles,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    c, cmask = channels_of(pid, C, BLOCK_C)
    mean, rest, std = moments_of_tiles(
        x_ptr, pid * 0, tiles, c, cmask, N, C, S, ACC, BLOCK_N, BLOCK_S, BLOCK_C, FOLD, COLUMNS
    )
    rstd = finalize(
        mean, rest, std, (N * S).to(ACC), eps, c, cmask, C,
        stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
    )  # fmt: skip
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)
    normalize_tiles(
        x_ptr, residual_ptr, y_ptr, pid * 0, tiles, c, cmask, mean, rest, rstd, w, b, N, C, S,
        ACT, BLOCK_N, BLOCK_S, COLUMNS,
    )  # fmt: skip
    count_batch(count_ptr, pid)


# One program owns some consecutive tiles of BLOCK_C channels, and leaves their partial statistics.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_moments_kernel(
    x_ptr, partial_ptr, count_ptr,          # (N, C, S), (3, P, C): mean, rest, std, ()
    N, C, S, P, tiles, tiles_per_program,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    mean, rest, std = moments_of_tiles(
        x_ptr, first, last, c, cmask, N, C, S, ACC, BLOCK_N, BLOCK_S, BLOCK_C, FOLD, COLUMNS
    )
    at = p * C + c
    tl.store(partial_ptr + at, mean, mask=cmask)
    tl.store(partial_ptr + P * C + at, rest, mask=cmask)
    tl.store(partial_ptr + 2 * P * C + at, std, mask=cmask)
    count_batch(count_ptr, pid)


# One program owns BLOCK_C channels of the statistics.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_finalize_kernel(
    partial_ptr, stats_ptr,                 # (3, P, C), (3, C)
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (C,), (C,), ()
    momentum: tl.float64, eps: tl.float64,
    N, C, S, P, tiles, tiles_per_program, block_n, block_s,  # how the partials were tiled
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, 1, False)
    c, cmask = channels_of(tl.program_id(0).to(tl.int64), C, BLOCK_C)
    base = finite_or_zero(tl.load(partial_ptr + c, mask=cmask, other=0.0))
    count = tl.zeros((BLOCK_C,), ACC)
    mean = tl.zeros((BLOCK_C,), ACC)  # relative to base
    std = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        first = tl.minimum(p * tiles_per_program, tiles)
        last = tl.minimum(first + tiles_per_program, tiles)
        held = elements_before(last, N, S, block_n, block_s)
        held -= elements_before(first, N, S, block_n, block_s)
        at = (p * C)[:, None] + c[None, :]
        mask = (p < P)[:, None] & cmask[None, :]
        mean_p = load_as(partial_ptr, at, mask, ACC) - base[None, :]
        mean_p = tl.where(mask, mean_p + load_as(partial_ptr, P * C + at, mask, ACC), 0.0)
        std_p = load_as(partial_ptr, 2 * P * C + at, mask, ACC)
        count_b, mean_b, std_b = merge_partials(held.to(ACC)[:, None], mean_p, std_p)
        count, mean, std = merge_two(count, mean, std, count_b, mean_b, std_b)
    mean, rest = two_sum(base, mean)
    finalize(
        mean, rest, std, (N * S).to(ACC), eps, c, cmask, C,
        stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
    )  # fmt: skip


# One program owns the tiles of BLOCK_C channels that it reduced before. In evaluation the first
# program of a channel saves the running statistics, which may have moved when the backward runs.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_apply_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr,                       # (N, C, S), (3, C): mean, rest, rstd
    running_mean_ptr, running_var_ptr,      # (C,), (C,); None in training
    eps: tl.float64,
    N, C, S, P, tiles, tiles_per_program,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    if running_mean_ptr is None:
        mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
    else:
        mean = load_as(running_mean_ptr, c, cmask, ACC)
        rest = tl.zeros((BLOCK_C,), ACC)
        var = tl.load(running_var_ptr + c, mask=cmask, other=1.0).to(ACC)
        rstd = 1.0 / sqrt(var + tl.full((), eps, ACC))
        if p == 0:
            tl.store(stats_ptr + c, mean, mask=cmask)
            tl.store(stats_ptr + C + c, rest, mask=cmask)
            tl.store(stats_ptr + 2 * C + c, rstd, mask=cmask)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    normalize_tiles(
        x_ptr, residual_ptr, y_ptr, first, last, c, cmask, mean, rest, rstd, w, b, N, C, S,
        ACT, BLOCK_N, BLOCK_S, COLUMNS,
    )  # fmt: skip


# ---- backward ------------------------------------------------------------------------------------
@triton.jit
def load_stats(stats_ptr, c, cmask, C):
    mean = tl.load(stats_ptr + c, mask=cmask, other=0.0)
    rest = tl.load(stats_ptr + C + c, mask=cmask, other=0.0)
    rstd = tl.load(stats_ptr + 2 * C + c, mask=cmask, other=0.0)
    return mean, rest, rstd


# One program owns BLOCK_C channels. In evaluation the first loop writes dx, and there is no second.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, C)
    dx_ptr, dz_ptr, dw_ptr, db_ptr,         # (N, C, S), (N, C, S), (C,), (C,); None: not wanted
    N, C, S, tiles,
    ACT_GRAD: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    c, cmask = channels_of(pid, C, BLOCK_C)
    mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)
    dw, db = gradient_sums_of_tiles(
        dy_ptr, x_ptr, y_ptr, residual_ptr,
        None if TRAINING else dx_ptr, None if TRAINING else dz_ptr,
        pid * 0, tiles, c, cmask, mean, rest, rstd, w, b, N, C, S,
        ACT_GRAD, BLOCK_N, BLOCK_S, BLOCK_C, FOLD, COLUMNS,
    )  # fmt: skip
    store_cast(dw_ptr, c, dw, cmask)
    store_cast(db_ptr, c, db, cmask)
    if TRAINING:
        M = (N * S).to(ACC)
        input_gradient_of_tiles(
            dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
            pid * 0, tiles, c, cmask, mean, rest, rstd, w, b, dw / M, db / M, N, C, S,
            ACT_GRAD, BLOCK_N, BLOCK_S, COLUMNS,
        )  # fmt: skip


# One program owns some consecutive tiles of BLOCK_C channels, and leaves their partial sums.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_reduce_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, C)
    dx_ptr, dz_ptr, partial_ptr,            # (N, C, S) in evaluation, (N, C, S), (2, P, C)
    N, C, S, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    dw, db = gradient_sums_of_tiles(
        dy_ptr, x_ptr, y_ptr, residual_ptr, dx_ptr, dz_ptr,
        first, last, c, cmask, mean, rest, rstd, w, b, N, C, S,
        ACT_GRAD, BLOCK_N, BLOCK_S, BLOCK_C, FOLD, COLUMNS,
    )  # fmt: skip
    if partial_ptr is not None:
        tl.store(partial_ptr + p * C + c, dw, mask=cmask)
        tl.store(partial_ptr + (P + p) * C + c, db, mask=cmask)


# One program owns BLOCK_C channels of the sums.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_finalize_kernel(
    partial_ptr, sums_ptr, dw_ptr, db_ptr,  # (2, P, C), (2, C): Σ dz·x̂, Σ dz; (C,), (C,)
    C, P,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    C = C.to(tl.int64)
    c, cmask = channels_of(tl.program_id(0).to(tl.int64), C, BLOCK_C)
    dw = tl.zeros((BLOCK_C,), ACC)
    db = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        at = (p * C)[:, None] + c[None, :]
        mask = (p < P)[:, None] & cmask[None, :]
        dw += tl.sum(load_as(partial_ptr, at, mask, ACC), axis=0)
        db += tl.sum(load_as(partial_ptr, P * C + at, mask, ACC), axis=0)
    store_cast(sums_ptr, c, dw, cmask)
    store_cast(sums_ptr, C + c, db, cmask)
    store_cast(dw_ptr, c, dw, cmask)
    store_cast(db_ptr, c, db, cmask)


# One program owns the tiles of BLOCK_C channels that it reduced before.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_apply_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr,            # dy is dz where reduce wrote it
    stats_ptr, sums_ptr, dx_ptr,            # (3, C), (2, C), (N, C, S)
    N, C, S, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    FOLD: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    N, C, S = wide_sizes(N, C, S, ALIGN, COLUMNS)
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)
    M = (N * S).to(ACC)
    dw = load_as(sums_ptr, c, cmask, ACC)
    db = load_as(sums_ptr, C + c, cmask, ACC)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    input_gradient_of_tiles(
        dy_ptr, x_ptr, None, None, dx_ptr, None,
        first, last, c, cmask, mean, rest, rstd, w, b, dw / M, db / M, N, C, S,
        ACT_GRAD, BLOCK_N, BLOCK_S, COLUMNS,
    )  # fmt: skip


# ---- launchers -----------------------------------------------------------------------------------
class _Launch(NamedTuple):
    """What the launches of one tensor share."""

    plan: ChannelPlan
    sizes: tuple[int, ...]
    tile: dict[str, int | bool]
    merge_grid: tuple[int]
    merge: dict[str, int]
    dtype: torch.dtype  # of what is computed in


def _launch(x: Tensor, view: ChannelView) -> _Launch:
    plan = channel_plan(*view, x.element_size(), device_of(x.device))
    sizes = (*view[:3], plan.programs, plan.tiles, plan.tiles_per_program)
    tile = {
        "BLOCK_N": plan.block_n, "BLOCK_S": plan.block_s, "BLOCK_C": plan.block_c,
        "FOLD": plan.fold, "ALIGN": plan.align, "COLUMNS": view.columns,
        "num_warps": plan.num_warps,
    }  # fmt: skip
    merge = {"BLOCK_C": MERGE_CHANNELS, "BLOCK_P": MERGE_PARTIALS, "num_warps": MERGE_WARPS}
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    return _Launch(plan, sizes, tile, (cdiv(view.C, MERGE_CHANNELS),), merge, dtype)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
) -> tuple[Tensor, Tensor]:
    """Return (y, stats): y laid out as x, stats (3, C) with the rows mean, rest, rstd."""
    plan, sizes, tile, merge_grid, merge, dtype = _launch(x, view)
    act, _ = ACTIVATIONS[activation]
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=y_dtype)
    stats = torch.empty(3, view.C, dtype=dtype, device=x.device)
    running = (running_mean, running_var)
    moving = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)
    operands = (x, residual, weight, bias, y, stats)
    if training and plan.whole:
        batch_norm_fwd_kernel[plan.grid](
            *operands, *running, num_batches_tracked, *moving, eps, *view[:3], plan.tiles,
            ACT=act, **tile,
        )  # fmt: skip
        return y, stats
    if training:
        partial = torch.empty(3, plan.programs, view.C, dtype=dtype, device=x.device)
        batch_norm_fwd_moments_kernel[plan.grid](x, partial, num_batches_tracked, *sizes, **tile)
        batch_norm_fwd_finalize_kernel[merge_grid](
            partial, stats, *running, *moving, eps, *sizes, plan.block_n, plan.block_s,
            **merge,
        )  # fmt: skip
        running = (None, None)
    batch_norm_fwd_apply_kernel[plan.grid](*operands, *running, eps, *sizes, ACT=act, **tile)
    return y, stats


def saved_for_gate(activation: str, has_residual: bool) -> str:
    """Which tensor besides x the backward needs for act′: "", "output" or "residual"."""
    if not has_residual or activation == "identity":
        return ""
    return "output" if activation in SIGN_GATES else "residual"


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str,
    view: ChannelView,
    wanted: tuple[bool, torch.dtype | None, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return (dx, dz, dweight, dbias), None where not `wanted`; dy, y and residual laid out as x.

    y or residual is given as `saved_for_gate` says; only then is there a dz other than dy, the
    residual's gradient, `wanted` in the given dtype.
    """
    plan, sizes, tile, merge_grid, merge, dtype = _launch(x, view)
    _, gate = ACTIVATIONS[activation]
    wants_dx, dz_dtype, wants_dw, wants_db = wanted
    dx = torch.empty_like(x) if wants_dx else None
    dw = torch.empty_like(weight) if weight is not None and wants_dw else None
    db = torch.empty_like(bias) if bias is not None and wants_db else None
    through_statistics = training and wants_dx
    sums = dw is not None or db is not None or through_statistics
    dz = None
    gated = y is not None or residual is not None
    if gated and (dz_dtype is not None or (through_statistics and not plan.whole)):
        dz = torch.empty_like(dy, dtype=dz_dtype or dy.dtype)
    sources = (dy, x if sums or (y is None and activation != "identity") else None, y, residual)

    if plan.whole:
        batch_norm_bwd_kernel[plan.grid](
            *sources, weight, bias, stats, dx, dz, dw, db, *view[:3], plan.tiles,
            ACT_GRAD=gate, TRAINING=training, **tile,
        )  # fmt: skip
        return dx, dz, dw, db

    partial = total = None
    if sums:
        partial = torch.empty(2, plan.programs, view.C, dtype=dtype, device=x.device)
    batch_norm_bwd_reduce_kernel[plan.grid](
        *sources, weight, bias, stats, None if training else dx, dz, partial, *sizes,
        ACT_GRAD=gate, **tile,
    )  # fmt: skip
    if through_statistics:
        total = torch.empty(2, view.C, dtype=dtype, device=x.device)
    if sums:
        batch_norm_bwd_finalize_kernel[merge_grid](
            partial, total, dw, db, view.C, plan.programs, **merge
        )
    if through_statistics:
        batch_norm_bwd_apply_kernel[plan.grid](
            dy if dz is None else dz, x, weight, bias, stats, total, dx, *sizes,
            ACT_GRAD=gate if dz is None else ACTIVATIONS["identity"][1], **tile,
        )  # fmt: skip
    return dx, dz, dw, db
