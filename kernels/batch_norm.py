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

Bytes. Where one tile holds an index set, one kernel reads everything once. Else training reads x
twice, forward and backward (reduce, apply). act′ is never saved: without a residual z is recomputed
from x, which the backward reads anyway. With one, z needs x and the residual; where act′ is a
function of y (relu, leaky_relu, …) y is read instead, which the next layer keeps alive anyway. That
pass writes dz, the residual's gradient, and the apply pass reads dz in place of dy and y: 7 passes,
where masks would take 6 of training data and 1/8 byte per element, packed, twice, plus a store in
the forward.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnorm.kernels.device.activations import ACTIVATIONS
from fastnorm.kernels.device.moments import (
    finite_or_zero,
    merge_lanes,
    merge_partials,
    merge_two,
    rstd_of,
    scale_of,
    sqrt,
    tile_moments,
    two_sum,
    welford_update,
)
from fastnorm.kernels.device.tiles import (
    elements_before,
    load_as,
    load_or,
    store_cast,
    tile_lanes,
    tile_offsets,
)
from fastnorm.kernels.launch import ChannelPlan, channel_plan, device_of

# Sizes that change from batch to batch must not make Triton compile again for 1 or multiples of 16.
SIZES = ("N", "C", "S", "P", "tiles", "tiles_per_program")


class ChannelView(NamedTuple):
    """A dense tensor as (N, C, S); `columns`: channels are innermost in memory."""

    N: int
    C: int
    S: int
    columns: bool


@triton.jit
def channels_of(block, C, BLOCK_C: tl.constexpr):
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return c, c < C


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
    mean, rest, std, count, eps, c, cmask, C,
    stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
):  # fmt: skip
    """Save a channel's statistics and move its running ones: one program a channel does this."""
    rstd = rstd_of(std, tl.full((), eps, std.dtype))
    tl.store(stats_ptr + c, mean, mask=cmask)
    tl.store(stats_ptr + C + c, rest, mask=cmask)
    tl.store(stats_ptr + 2 * C + c, rstd, mask=cmask)
    moving_average(running_mean_ptr, c, cmask, mean + rest, momentum, momentum_ptr)
    unbiased = std * std * (count / (count - 1.0))
    moving_average(running_var_ptr, c, cmask, unbiased, momentum, momentum_ptr)


@triton.jit
def affine(x, mean, rest, rstd, w, b):
    """z of a (lanes, channels) tile."""
    xhat = ((x - mean[None, :]) - rest[None, :]) * rstd[None, :]
    return xhat * w[None, :] + b[None, :]


# ---- forward -------------------------------------------------------------------------------------
# One program owns BLOCK_C channels: all of their elements, in registers.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    y_ptr, stats_ptr,                       # (N, C, S), (3, C): mean, rest, rstd
    running_mean_ptr, running_var_ptr, count_ptr, momentum_ptr,  # (C,), (C,), (), ()
    momentum: tl.float64, eps: tl.float64,
    N, C, S,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    if COLUMNS:
        C = C // ALIGN * ALIGN  # true, and lets the compiler see that vectors never straddle a mask
    else:
        S = S // ALIGN * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    c, cmask = channels_of(pid, C, BLOCK_C)
    n, s, inside = tile_lanes(pid * 0, N, S, BLOCK_N, BLOCK_S)
    mask = inside[:, None] & cmask[None, :]
    at = tile_offsets(n, s, c, C, S, COLUMNS)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)

    x = load_as(x_ptr, at, mask, ACC)
    count = (N * S).to(ACC)
    mean, rest, std = tile_moments(x, mask, count)
    finalize(
        mean, rest, std, count, eps, c, cmask, C,
        stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
    )  # fmt: skip
    z = affine(x, mean, rest, rstd_of(std, tl.full((), eps, ACC)), w, b)
    if residual_ptr is not None:
        z += load_as(residual_ptr, at, mask, ACC)
    store_cast(y_ptr, at, ACT(z), mask)
    if count_ptr is not None:
        if pid == 0:
            tl.store(count_ptr, tl.load(count_ptr) + 1)


# One program owns BLOCK_C channels of some consecutive tiles, and leaves their partial statistics.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_moments_kernel(
    x_ptr, partial_ptr, count_ptr,          # (N, C, S), (3, P, C): mean, rest, std, ()
    N, C, S, P, tiles, tiles_per_program,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    if COLUMNS:
        C = C // ALIGN * ALIGN
    else:
        S = S // ALIGN * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)

    # Elements are taken relative to the first one (if finite), so that a large mean costs no
    # digits, and in a unit in which the squares of the first tile do not overflow.
    n, s, inside = tile_lanes(first, N, S, BLOCK_N, BLOCK_S)
    at = tile_offsets(n, s, c, C, S, COLUMNS)
    x = load_as(x_ptr, at, inside[:, None] & cmask[None, :], ACC)
    scale = scale_of(tl.max(tl.abs(x), axis=0))
    lane = tl.arange(0, BLOCK_N * BLOCK_S)
    pivot = finite_or_zero(tl.sum(tl.where((lane == 0)[:, None], x, 0.0), axis=0))
    unit = (1.0 / scale)[None, :]
    shift = pivot[None, :] * unit

    count = tl.zeros((BLOCK_N * BLOCK_S, 1), ACC)
    mean = tl.zeros((BLOCK_N * BLOCK_S, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_N * BLOCK_S, BLOCK_C), ACC)
    for tile in range(first, last):
        n, s, inside = tile_lanes(tile, N, S, BLOCK_N, BLOCK_S)
        mask = inside[:, None] & cmask[None, :]
        x = load_as(x_ptr, tile_offsets(n, s, c, C, S, COLUMNS), mask, ACC)
        count, mean, m2 = welford_update(x * unit - shift, mask, count, mean, m2)

    _, mean, std = merge_lanes(count, mean, m2)
    mean, rest = two_sum(pivot, mean * scale)
    at = p * C + c
    tl.store(partial_ptr + at, mean, mask=cmask)
    tl.store(partial_ptr + P * C + at, rest, mask=cmask)
    tl.store(partial_ptr + 2 * P * C + at, std * scale, mask=cmask)
    if count_ptr is not None:
        if pid == 0:
            tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def merged_moments(
    partial_ptr, c, cmask, N, C, S, P, tiles, tiles_per_program,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(mean, rest, std) of whole channels from their partials."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    base = finite_or_zero(tl.load(partial_ptr + c, mask=cmask, other=0.0))
    total = tl.zeros((BLOCK_C,), ACC)
    mean = tl.zeros((BLOCK_C,), ACC)  # relative to base
    std = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        tile = p * tiles_per_program
        end = tl.minimum(tile + tiles_per_program, tiles)
        held = elements_before(end, N, S, BLOCK_N, BLOCK_S)
        held -= elements_before(tl.minimum(tile, tiles), N, S, BLOCK_N, BLOCK_S)
        count = tl.where(p < P, held, 0).to(ACC)[:, None]
        at = (p * C)[:, None] + c[None, :]
        mask = (p < P)[:, None] & cmask[None, :]
        mean_p = load_as(partial_ptr, at, mask, ACC)
        rest_p = load_as(partial_ptr, P * C + at, mask, ACC)
        std_p = load_as(partial_ptr, 2 * P * C + at, mask, ACC)
        relative = tl.where(mask, (mean_p - base[None, :]) + rest_p, 0.0)
        total_p, mean_p, std_p = merge_partials(count, relative, std_p)
        total, mean, std = merge_two(total, mean, std, total_p, mean_p, std_p)
    mean, rest = two_sum(base, mean)
    return mean, rest, std


# One program owns BLOCK_C channels of the tiles that it reduced before, last tile first: that is
# what the cache still holds. The first program of a channel keeps its statistics.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_fwd_apply_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr,      # (N, C, S), (N, C, S), (C,), (C,)
    partial_ptr,                            # (3, P, C) in training, None in evaluation
    y_ptr, stats_ptr,                       # (N, C, S), (3, C): mean, rest, rstd
    running_mean_ptr, running_var_ptr, momentum_ptr,  # (C,), (C,), ()
    momentum: tl.float64, eps: tl.float64,
    N, C, S, P, tiles, tiles_per_program,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    if COLUMNS:
        C = C // ALIGN * ALIGN
    else:
        S = S // ALIGN * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)

    if partial_ptr is not None:
        mean, rest, std = merged_moments(
            partial_ptr, c, cmask, N, C, S, P, tiles, tiles_per_program,
            BLOCK_N, BLOCK_S, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        rstd = rstd_of(std, tl.full((), eps, ACC))
        if p == 0:
            finalize(
                mean, rest, std, (N * S).to(ACC), eps, c, cmask, C,
                stats_ptr, running_mean_ptr, running_var_ptr, momentum_ptr, momentum,
            )  # fmt: skip
    else:
        mean = load_as(running_mean_ptr, c, cmask, ACC)
        rest = tl.zeros((BLOCK_C,), ACC)
        var = load_or(running_var_ptr, c, cmask, 1.0, ACC)
        rstd = 1.0 / sqrt(var + tl.full((), eps, ACC))
        if p == 0:
            tl.store(stats_ptr + c, mean, mask=cmask)
            tl.store(stats_ptr + C + c, rest, mask=cmask)
            tl.store(stats_ptr + 2 * C + c, rstd, mask=cmask)

    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    for i in range(first, last):
        n, s, inside = tile_lanes(first + last - 1 - i, N, S, BLOCK_N, BLOCK_S)
        mask = inside[:, None] & cmask[None, :]
        at = tile_offsets(n, s, c, C, S, COLUMNS)
        z = affine(load_as(x_ptr, at, mask, ACC), mean, rest, rstd, w, b)
        if residual_ptr is not None:
            z += load_as(residual_ptr, at, mask, ACC)
        store_cast(y_ptr, at, ACT(z), mask)


# ---- backward ------------------------------------------------------------------------------------
@triton.jit
def load_stats(stats_ptr, c, cmask, C):
    mean = tl.load(stats_ptr + c, mask=cmask, other=0.0)
    rest = tl.load(stats_ptr + C + c, mask=cmask, other=0.0)
    rstd = tl.load(stats_ptr + 2 * C + c, mask=cmask, other=0.0)
    return mean, rest, rstd


@triton.jit
def load_xhat_dz(
    dy_ptr, x_ptr, y_ptr, residual_ptr, at, mask, mean, rest, rstd, w, b, ACT_GRAD: tl.constexpr
):
    """x̂ and dz of a tile; ACT_GRAD takes y where y_ptr is given, z otherwise."""
    ACC: tl.constexpr = mean.dtype
    dy = load_as(dy_ptr, at, mask, ACC)
    xhat = tl.zeros(dy.shape, ACC)
    if x_ptr is not None:
        x = load_as(x_ptr, at, mask, ACC)
        xhat = tl.where(mask, ((x - mean[None, :]) - rest[None, :]) * rstd[None, :], 0.0)
    if y_ptr is not None:
        return xhat, tl.where(mask, ACT_GRAD(dy, load_as(y_ptr, at, mask, ACC)), 0.0)
    z = xhat * w[None, :] + b[None, :]
    if residual_ptr is not None:
        z += load_as(residual_ptr, at, mask, ACC)
    return xhat, tl.where(mask, ACT_GRAD(dy, z), 0.0)


# One program owns BLOCK_C channels: all of their elements, in registers.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, C)
    dx_ptr, dz_ptr, dw_ptr, db_ptr,         # (N, C, S), (N, C, S), (C,), (C,); None: not wanted
    N, C, S,
    ACT_GRAD: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    if COLUMNS:
        C = C // ALIGN * ALIGN
    else:
        S = S // ALIGN * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    c, cmask = channels_of(pid, C, BLOCK_C)
    n, s, inside = tile_lanes(pid * 0, N, S, BLOCK_N, BLOCK_S)
    mask = inside[:, None] & cmask[None, :]
    at = tile_offsets(n, s, c, C, S, COLUMNS)
    mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)

    xhat, dz = load_xhat_dz(
        dy_ptr, x_ptr, y_ptr, residual_ptr, at, mask, mean, rest, rstd, w, b, ACT_GRAD
    )
    db = tl.sum(dz, axis=0)
    dw = tl.sum(dz * xhat, axis=0)
    dx = dz
    if TRAINING:
        count = (N * S).to(ACC)
        dx = dz - (db / count)[None, :] - xhat * (dw / count)[None, :]
    store_cast(dx_ptr, at, dx * (rstd * w)[None, :], mask)
    store_cast(dz_ptr, at, dz, mask)
    store_cast(dw_ptr, c, dw, cmask)
    store_cast(db_ptr, c, db, cmask)


# One program owns BLOCK_C channels of some consecutive tiles, and leaves their partial sums.
# In evaluation dx does not depend on the sums and is written here.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_reduce_kernel(
    dy_ptr, x_ptr, y_ptr, residual_ptr,     # each (N, C, S); y or residual where act′ needs it
    w_ptr, b_ptr, stats_ptr,                # (C,), (C,), (3, C)
    dx_ptr, dz_ptr, partial_ptr,            # (N, C, S), (N, C, S), (2, P, C): Σ dz·x̂, Σ dz
    N, C, S, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    if COLUMNS:
        C = C // ALIGN * ALIGN
    else:
        S = S // ALIGN * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    p = pid % P
    c, cmask = channels_of(pid // P, C, BLOCK_C)
    mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
    w = load_or(w_ptr, c, cmask, 1.0, ACC)
    b = load_or(b_ptr, c, cmask, 0.0, ACC)

    dw = tl.zeros((BLOCK_N * BLOCK_S, BLOCK_C), ACC)
    db = tl.zeros((BLOCK_N * BLOCK_S, BLOCK_C), ACC)
    first = p * tiles_per_program
    last = tl.minimum(first + tiles_per_program, tiles)
    for tile in range(first, last):
        n, s, inside = tile_lanes(tile, N, S, BLOCK_N, BLOCK_S)
        mask = inside[:, None] & cmask[None, :]
        at = tile_offsets(n, s, c, C, S, COLUMNS)
        xhat, dz = load_xhat_dz(
            dy_ptr, x_ptr, y_ptr, residual_ptr, at, mask, mean, rest, rstd, w, b, ACT_GRAD
        )
        store_cast(dx_ptr, at, dz * (rstd * w)[None, :], mask)
        store_cast(dz_ptr, at, dz, mask)
        dw += dz * xhat
        db += dz

    if partial_ptr is not None:
        tl.store(partial_ptr + p * C + c, tl.sum(dw, axis=0), mask=cmask)
        tl.store(partial_ptr + (P + p) * C + c, tl.sum(db, axis=0), mask=cmask)


@triton.jit
def merged_sum(partial_ptr, c, cmask, C, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    total = tl.zeros((BLOCK_C,), partial_ptr.dtype.element_ty)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P).to(tl.int64)
        at = (p * C)[:, None] + c[None, :]
        mask = (p < P)[:, None] & cmask[None, :]
        total += tl.sum(tl.load(partial_ptr + at, mask=mask, other=0.0), axis=0)
    return total


# One program owns BLOCK_C channels of the tiles that it reduced before, last tile first. The first
# program of a channel keeps its parameter gradients. Without dx, only that one runs.
@triton.jit(do_not_specialize=SIZES)
def batch_norm_bwd_apply_kernel(
    dy_ptr, x_ptr, w_ptr, b_ptr, stats_ptr, partial_ptr,  # dy is dz where reduce wrote it
    dx_ptr, dw_ptr, db_ptr,                 # (N, C, S), (C,), (C,); None: not wanted
    N, C, S, P, tiles, tiles_per_program,
    ACT_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, ALIGN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    if COLUMNS:
        C = C // ALIGN * ALIGN
    else:
        S = S // ALIGN * ALIGN
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.cdiv(tiles, tiles_per_program) if dx_ptr is not None else 1
    p = pid % programs
    c, cmask = channels_of(pid // programs, C, BLOCK_C)
    dw = merged_sum(partial_ptr, c, cmask, C, P, BLOCK_C, BLOCK_P)
    db = merged_sum(partial_ptr + P * C, c, cmask, C, P, BLOCK_C, BLOCK_P)
    if p == 0:
        store_cast(dw_ptr, c, dw, cmask)
        store_cast(db_ptr, c, db, cmask)

    if dx_ptr is not None:
        mean, rest, rstd = load_stats(stats_ptr, c, cmask, C)
        w = load_or(w_ptr, c, cmask, 1.0, ACC)
        b = load_or(b_ptr, c, cmask, 0.0, ACC)
        count = (N * S).to(ACC)
        c1 = (db / count)[None, :]
        c2 = (dw / count)[None, :]
        first = p * tiles_per_program
        last = tl.minimum(first + tiles_per_program, tiles)
        for i in range(first, last):
            n, s, inside = tile_lanes(first + last - 1 - i, N, S, BLOCK_N, BLOCK_S)
            mask = inside[:, None] & cmask[None, :]
            at = tile_offsets(n, s, c, C, S, COLUMNS)
            xhat, dz = load_xhat_dz(
                dy_ptr, x_ptr, None, None, at, mask, mean, rest, rstd, w, b, ACT_GRAD
            )
            store_cast(dx_ptr, at, (dz - c1 - xhat * c2) * (rstd * w)[None, :], mask)


# ---- launchers -----------------------------------------------------------------------------------
def _plan(x: Tensor, view: ChannelView) -> ChannelPlan:
    return channel_plan(*view, x.element_size(), device_of(x.device))


def _sizes(view: ChannelView, plan: ChannelPlan) -> tuple[int, ...]:
    return (*view[:3], plan.programs, plan.tiles, plan.tiles_per_program)


def _tile(view: ChannelView, plan: ChannelPlan) -> dict[str, int | bool]:
    return {
        "BLOCK_N": plan.block_n,
        "BLOCK_S": plan.block_s,
        "BLOCK_C": plan.block_c,
        "ALIGN": plan.align,
        "COLUMNS": view.columns,
        "num_warps": plan.num_warps,
    }


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


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
    plan = _plan(x, view)
    act, _, _ = ACTIVATIONS[activation]
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=y_dtype)
    stats = torch.empty(3, view.C, dtype=_accumulator(x), device=x.device)
    on_device = isinstance(momentum, Tensor)
    moving = (momentum if on_device else None, 0.0 if on_device else momentum, eps)
    if training and plan.whole:
        batch_norm_fwd_kernel[plan.grid](
            x, residual, weight, bias, y, stats,
            running_mean, running_var, num_batches_tracked, *moving, *view[:3],
            ACT=act, **_tile(view, plan),
        )  # fmt: skip
        return y, stats
    partial = None
    if training:
        partial = torch.empty(3, plan.programs, view.C, dtype=stats.dtype, device=x.device)
        batch_norm_fwd_moments_kernel[plan.grid](
            x, partial, num_batches_tracked, *_sizes(view, plan), **_tile(view, plan)
        )
    batch_norm_fwd_apply_kernel[plan.grid](
        x, residual, weight, bias, partial, y, stats,
        running_mean, running_var, *moving, *_sizes(view, plan),
        ACT=act, BLOCK_P=plan.block_p, **_tile(view, plan),
    )  # fmt: skip
    return y, stats


def saved_for_gate(activation: str, has_residual: bool) -> str:
    """Which tensor besides x the backward needs for act′: "", "output" or "residual"."""
    if not has_residual or activation == "identity":
        return ""
    return "residual" if ACTIVATIONS[activation][2] is None else "output"


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
    plan = _plan(x, view)
    _, from_z, from_y = ACTIVATIONS[activation]
    gate = from_z if y is None else from_y
    wants_dx, dz_dtype, wants_dw, wants_db = wanted
    dx = torch.empty_like(x) if wants_dx else None
    dw = torch.empty_like(weight) if weight is not None and wants_dw else None
    db = torch.empty_like(bias) if bias is not None and wants_db else None
    sums = dw is not None or db is not None or (training and wants_dx)
    two_passes = training and not plan.whole and wants_dx
    dz = None
    if (y is not None or residual is not None) and (dz_dtype is not None or two_passes):
        dz = torch.empty_like(dy, dtype=dz_dtype or dy.dtype)
    sources = (dy, x if sums or (y is None and activation != "identity") else None, y, residual)
    tile = _tile(view, plan)

    if plan.whole:
        batch_norm_bwd_kernel[plan.grid](
            *sources, weight, bias, stats, dx, dz, dw, db, *view[:3],
            ACT_GRAD=gate, TRAINING=training, **tile,
        )  # fmt: skip
        return dx, dz, dw, db

    partial = None
    if sums:
        partial = torch.empty(2, plan.programs, view.C, dtype=stats.dtype, device=x.device)
    batch_norm_bwd_reduce_kernel[plan.grid](
        *sources, weight, bias, stats, None if training else dx, dz, partial, *_sizes(view, plan),
        ACT_GRAD=gate, **tile,
    )  # fmt: skip
    if sums:
        remaining = dx if training else None
        batch_norm_bwd_apply_kernel[plan.grid if two_passes else (plan.channel_blocks,)](
            dy if dz is None else dz, x, weight, bias, stats, partial, remaining, dw, db,
            *_sizes(view, plan),
            ACT_GRAD=gate if dz is None else ACTIVATIONS["identity"][1],
            BLOCK_P=plan.block_p, **tile,
        )  # fmt: skip
    return dx, dz, dw, db
