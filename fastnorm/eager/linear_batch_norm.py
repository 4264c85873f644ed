"""Linear + BatchNorm + activation in torch operators, without the pre-activation where that pays.

The formulas are in fastnorm/kernels/linear_batch_norm.py. What pays on a CPU are fewer passes over
the large (M, N) tensors: a product of BLOCK_BYTES of rows at a time is activated, and in the
backward gated, reduced and multiplied again, while it is in a cache. fastnorm/kernels/cost.py says
where: K is narrow. Elsewhere, and under torch.compile, torch.func, forward-mode AD and tracing, it
is torch's product and `batch_norm` of this package ("unfused"; so is "epilogue": a product of torch
has no epilogue).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.distributed import gathered, summed
from fastnorm.eager import gram, native
from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS
from fastnorm.eager.batch_norm import batch_norm
from fastnorm.eager.native import STEPS
from fastnorm.eager.sync_batch_norm import (
    count_batch,
    merged,
    move_buffers,
    sync_batch_norm,
    told,
)
from fastnorm.eager.sync_formulas import gradients_about
from fastnorm.kernels import cost

BLOCK_BYTES = 1 << 20
"""Of the product: what a core's second-level cache holds with room to spare."""

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def linear_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    activation: str,
    algorithm: str,
    num_batches_tracked: Tensor | None,
    group: Any = None,
) -> Tensor:
    """`act(batch_norm(input weightᵀ + bias))` over axis 1 of input (M, K) or (B, K, *).

    Arguments are those that `functional.linear_batch_norm` has checked; input, weight and bias have
    one dtype. With a `group` of processes, the statistics of training are everybody's.
    """
    if algorithm != "epilogue" and algorithm != "unfused":
        rows = _rows(input)
        if rows is not None and _takes_gram(rows, weight, training, activation, algorithm):
            momentum = count_batch(num_batches_tracked, training, momentum)
            y: Tensor = GramFunction.apply(  # type: ignore[no-untyped-call]
                rows, weight, bias, norm_weight, norm_bias, running_mean, running_var,
                training, momentum, eps, activation, group,
            )  # fmt: skip
            if input.ndim == 2:
                return y
            return y.view(input.shape[0], *input.shape[2:], -1).movedim(-1, 1)
    z = product(input, weight, bias, training)
    if group is not None:
        return sync_batch_norm(
            z, running_mean, running_var, norm_weight, norm_bias,
            momentum, eps, None, activation, num_batches_tracked, group,
        )  # fmt: skip
    return batch_norm(
        z, running_mean, running_var, norm_weight, norm_bias,
        training, momentum, eps, None, activation, num_batches_tracked,
    )  # fmt: skip


def product(input: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """torch's product over axis 1; in training no gradient reaches the bias but exact zeros."""
    constant = training and bias is not None and bias.requires_grad and torch.is_grad_enabled()
    constant = constant and not torch.compiler.is_compiling() and not native.observed(input)
    b = bias.detach() if constant and bias is not None else bias
    if input.ndim == 2:
        z = F.linear(input, weight, b)
    else:
        kernel = weight.view(*weight.shape, *[1] * (input.ndim - 2))
        z = CONVOLUTIONS[input.ndim](input, kernel, b)
    return _ZeroGradient.apply(z, bias) if constant else z  # type: ignore[no-untyped-call]


class _ZeroGradient(torch.autograd.Function):
    """z, in the graph of a bias that batch norm removes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_like = bias.shape, bias.dtype, bias.device
        ctx.set_materialize_grads(False)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dz,) = grads
        if dz is None:  # nothing depends on the output
            return None, None
        shape, dtype, device = ctx.bias_like
        return dz, torch.zeros(shape, dtype=dtype, device=device)


def _rows(input: Tensor) -> Tensor | None:
    """(M, K) with K innermost, as a view; None where memory has another order."""
    if input.ndim > 2:
        input = input.movedim(1, -1)
        if not input.is_contiguous():
            return None
        return input.flatten(0, -2)
    return input


def _takes_gram(
    rows: Tensor, weight: Tensor, training: bool, activation: str, algorithm: str
) -> bool:
    if torch.compiler.is_compiling() or rows.numel() == 0 or weight.numel() == 0:
        return False
    M, K, N = *rows.shape, weight.shape[0]
    if algorithm == "auto":
        if M * N < cost.SMALL or not rows.is_cpu:  # elsewhere the kernels have it
            return False
        backward = torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)
        options = (rows.dtype, activation, cost.CPU, training, backward)
        if cost.choose(M, K, N, *options) != "gram":
            return False
    # gram asks its numbers for their size
    return not (native.observed(rows) or rows.is_meta)


def _blocks(N: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Some rows of each tensor at a time, such that (rows, N) float32 are BLOCK_BYTES."""
    size = max(BLOCK_BYTES // (4 * N), 64)
    rows = next(t.shape[0] for t in tensors if t is not None)
    for start in range(0, rows, size):
        yield tuple(None if t is None else t[start : start + size] for t in tensors)


def _gram_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    """x̄ and S in float64, about the first row, so that a large mean costs no digits."""
    M, K = x.shape
    pivot = x[0].double().nan_to_num(0.0, 0.0, 0.0)
    total = torch.zeros(K, dtype=torch.float64, device=x.device)
    s = torch.zeros(K, K, dtype=torch.float64, device=x.device)
    for (block,) in _blocks(2 * K, x):
        assert block is not None
        d = block - pivot  # float64
        total += d.sum(0)
        s.addmm_(d.T, d)
    offset = total / M
    return pivot + offset, s.addr_(offset, offset, alpha=-M)


def _shifted(x: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if shift is None else x - shift


class GramFunction(torch.autograd.Function):
    """The gram algorithm on rows (M, K), with its gradient; the buffers change in place."""

    @staticmethod
    def forward(
        ctx: Any,
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
        group: Any,
    ) -> Tensor:
        M = x.shape[0]

        def shared(centre: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean = centre if bias is None else centre + bias
            own = told(mean, var.sqrt(), M, gram.compute_dtype(x.dtype))
            mean, rest, var, count = merged(gathered(own, group))
            mean = mean + rest
            move_buffers(running_mean, running_var, mean, var, count, momentum)
            return mean if bias is None else mean - bias, var, count

        if training and group is not None:
            statistics, _ = gram.batch_statistics(*_gram_matrix(x), weight, M, eps, shared)
        elif training:
            statistics, var = gram.batch_statistics(*_gram_matrix(x), weight, M, eps)
            mean = statistics.centre if bias is None else statistics.centre + bias
            gram.move_buffers(running_mean, running_var, mean, var, M, momentum)
        else:
            assert running_mean is not None
            assert running_var is not None
            statistics = gram.fixed_statistics(running_mean, running_var, bias, eps)
        y = _forward(x, weight, norm_weight, norm_bias, statistics, activation)
        ctx.save_for_backward(
            x, y if activation != "identity" else None, weight, None if training else bias,
            norm_weight, norm_bias, *statistics,
        )  # fmt: skip
        ctx.bias_like = None if bias is None else (bias.shape, bias.dtype, bias.device)
        ctx.training, ctx.eps, ctx.activation, ctx.group = training, eps, activation, group
        ctx.set_materialize_grads(group is not None)  # where others may wait for this one's sums
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        if dy is None:  # nothing depends on the output
            return (None,) * 12
        buffers_and_options = (None,) * 7
        if native.is_differentiated(dy) and ctx.group is not None:
            x, _, weight, _, norm_weight, norm_bias, *found = ctx.saved_tensors
            return *differentiable_shared(
                (x, weight, norm_weight, norm_bias), ctx.needs_input_grad[:5],
                gram.Statistics(*found).centre,
                ctx.bias_like, ctx.eps, ctx.activation, ctx.group, dy,
            ), *buffers_and_options  # fmt: skip
        if native.is_differentiated(dy):
            x, _, weight, bias, norm_weight, norm_bias, *found = ctx.saved_tensors
            fixed = None if ctx.training else gram.fixed_moments(gram.Statistics(*found), bias)
            return *differentiable_gradients(
                (x, weight, bias, norm_weight, norm_bias), ctx.needs_input_grad[:5], fixed,
                ctx.bias_like, ctx.eps, ctx.activation, dy,
            ), *buffers_and_options  # fmt: skip
        return *_gradients(ctx, dy), *buffers_and_options


def _forward(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: gram.Statistics,
    activation: str,
) -> Tensor:
    """y from rows less their mean: act((x − x̄) (α∘W)ᵀ + shift)."""
    dtype = gram.compute_dtype(x.dtype)
    folded = gram.scale_of(statistics, norm_weight)[:, None] * weight.double()
    w = folded.to(dtype).T
    x_mean = None if statistics.x_mean is None else statistics.x_mean.to(dtype)
    if statistics.x_mean is None or x_mean is None:
        shift = -gram.scale_of(statistics, norm_weight) * statistics.centre
    else:  # what the rounding of x̄ leaves
        shift = folded @ (x_mean - statistics.x_mean)
        if statistics.apart is not None:
            shift += gram.scale_of(statistics, norm_weight) * statistics.apart
    if norm_bias is not None:
        shift = shift + norm_bias.double().reshape(-1)
    shift = shift.to(dtype)
    N = weight.shape[0]
    y = native.on_huge_pages(torch.empty(x.shape[0], N, dtype=x.dtype, device=x.device))
    for x_block, y_block in _blocks(N, x, y):
        assert x_block is not None
        assert y_block is not None
        operands = (shift, _shifted(x_block, x_mean, dtype), w)
        in_place = y.dtype is dtype
        z = torch.addmm(*operands, out=y_block) if in_place else torch.addmm(*operands)
        z = STEPS[activation][0](z) if activation in STEPS else ACTIVATIONS[activation](z)
        if z is not y_block:
            y_block.copy_(z)
    return y


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dW, db, dγ and dβ."""
    x, y, weight, _, norm_weight, norm_bias, *kept = ctx.saved_tensors  # once: see checkpoint
    statistics = gram.Statistics(*kept)
    wants_dx, wants_dw, wants_db, wants_dgamma, wants_dbeta = ctx.needs_input_grad[:5]
    wants_db_sum = wants_db and not ctx.training
    # who waits for the sums of this process: those of the other algorithms too
    joins = ctx.group is not None and (wants_dx or wants_dw or wants_db)
    wants_p = wants_dw or wants_dgamma or (ctx.training and wants_dx) or joins
    alpha = gram.scale_of(statistics, norm_weight)
    dw = db = dgamma = dbeta = dx = small = None
    shift = gram.shift_of(statistics, gram.compute_dtype(x.dtype))
    if wants_p or wants_dx or wants_dbeta or wants_db_sum:
        dx, unit, p, total = _sweep(ctx, dy, x, y, weight, statistics, alpha, shift, wants_p)
    if wants_p:
        rows = x.shape[0]
        sums = partial(summed, group=ctx.group) if joins else None
        small = gram.gradients(p, total, shift, weight, alpha, statistics, rows, wants_dx, sums)
        dw = small.dweight.to(weight.dtype) if wants_dw else None
        if wants_dgamma:
            dgamma = small.dgamma.view_as(norm_weight).to(norm_weight.dtype)
    if dx is not None:
        dx = _through_statistics(dx, unit, x, shift, small, statistics).to(x.dtype)
    if wants_db:
        db = bias_gradient(alpha * total if wants_db_sum else None, wants_db, ctx.bias_like)
    if wants_dbeta:
        dbeta = total.view_as(norm_bias).to(norm_bias.dtype)
    return dx, dw, db, dgamma, dbeta


def _sweep(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    statistics: gram.Statistics,
    alpha: Tensor,
    shift: Tensor | None,
    wants_p: bool,
) -> tuple[Tensor | None, float, Tensor, Tensor]:
    """(G α∘W in a unit, that unit, P, 1ᵀG): one pass over dY and Y."""
    dtype = gram.compute_dtype(x.dtype)
    aw, unit = gram.folded_weight(weight, alpha, dtype)
    N, K = weight.shape
    dx = torch.empty_like(x, dtype=dtype) if ctx.needs_input_grad[0] else None
    total = torch.zeros(N, dtype=torch.float64, device=x.device)
    p = torch.zeros(N, K, dtype=torch.float64, device=x.device)
    gate = OUTPUT_GRADS[ctx.activation]
    # where W cancels a signal in P's rows, too, only their last digits count
    p_dtype = p.dtype if statistics.cancels is not None and statistics.cancels else dtype
    for dy_block, y_block, x_block, dx_block in _blocks(N, dy, y, x, dx):
        assert dy_block is not None
        assert x_block is not None
        g = dy_block.to(dtype)
        if y_block is not None:
            g = gate(g, y_block.to(dtype))
        total += g.sum(0)
        if wants_p:
            p += g.T.to(p_dtype) @ _shifted(x_block, shift, dtype).to(p_dtype)
        if dx_block is not None:
            torch.mm(g, aw, out=dx_block)
    return dx, unit, p, total


def _through_statistics(
    dx: Tensor,
    unit: float,
    x: Tensor,
    shift: Tensor | None,
    small: gram.Gradients | None,
    statistics: gram.Statistics,
) -> Tensor:
    """dX in place of G α∘W, which is in a unit."""
    if small is None or shift is None:
        return dx.mul_(unit)
    a, a_unit, offset = gram.folded_for_input(small, statistics, shift, dx.dtype)
    for x_block, dx_block in _blocks(a.shape[0], x, dx):
        assert x_block is not None
        assert dx_block is not None
        dx_block.addmm_(_shifted(x_block, shift, dx.dtype), a, alpha=a_unit / unit)
        dx_block.mul_(unit).add_(offset)
    return dx


def bias_gradient(
    found: Tensor | None, wanted: bool, like: tuple[torch.Size, torch.dtype, torch.device] | None
) -> Tensor | None:
    """What was found, in the bias's dtype; where batch norm removes the bias, exact zeros."""
    if not wanted or like is None:
        return None
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device) if found is None else found.to(dtype)


def differentiable_gradients(
    leaves: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    fixed: tuple[Tensor, Tensor] | None,
    bias_like: Any,
    eps: float,
    activation: str,
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias, norm_weight and norm_bias by differentiable operators.

    Product and norm are computed once more, and that is differentiated. `fixed` are the mean and
    variance of evaluation, which have eps in them; in training the bias is None.
    """
    mean, var = (None, None) if fixed is None else fixed
    gradients = native.gradients_again(
        lambda x, weight, bias, norm_weight, norm_bias: batch_norm(
            product(x, weight, bias, training=False), mean, var, norm_weight, norm_bias,
            fixed is None, 0.0, eps if fixed is None else 0.0, None, activation, None,
        ),
        leaves, wanted, dy,
    )  # fmt: skip
    gradients[2] = bias_gradient(gradients[2], wanted[2], bias_like)
    return tuple(gradients)


def differentiable_shared(
    leaves: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    centre: Tensor,
    bias_like: Any,
    eps: float,
    activation: str,
    group: Any,
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """The same in training with other processes, through Z: as all algorithms do, so that their
    sums meet. `leaves` without the bias; `centre` is of Z less the bias.
    """
    x, weight, norm_weight, norm_bias = leaves
    assert x is not None
    assert weight is not None
    wants_dx, wants_dw, wants_db, *affine = wanted
    joins = wants_dx or wants_dw or wants_db
    rows = x.movedim(1, -1)
    dz, _, dgamma, dbeta = gradients_about(
        centre, dy, (rows @ weight.T).movedim(-1, 1), None, None, norm_weight, norm_bias,
        eps, activation, group, (joins, False, *affine),
    )  # fmt: skip
    dx = dw = None
    if dz is not None:
        dz = dz.movedim(1, -1)
        dx = (dz @ weight).movedim(-1, 1) if wants_dx else None
        dw = dz.flatten(0, -2).T @ rows.flatten(0, -2) if wants_dw else None
    return dx, dw, bias_gradient(None, wants_db, bias_like), dgamma, dbeta
