"""Linear + BatchNorm + activation in torch operators, without the pre-activation where that pays.

The formulas are in fastnorm/kernels/linear_batch_norm.py. What pays on a CPU are fewer passes over
the large (M, N) tensors: a product of BLOCK_BYTES of rows at a time is activated, and in the
backward gated, reduced and multiplied again, while it is in a cache. fastnorm/kernels/cost.py says
where: K is narrow. Elsewhere, and under torch.compile, torch.func, forward-mode AD and tracing, it
is torch's product and `batch_norm` of this package ("unfused"; so is "epilogue": a product of torch
has no epilogue).
"""

from typing import Any

import torch
from torch import Tensor

from fastnorm.eager import native
from fastnorm.eager.batch_norm import batch_norm
from fastnorm.eager.linear_batch_norm_gram import GramFunction
from fastnorm.eager.linear_batch_norm_unfused import product
from fastnorm.eager.sync_batch_norm import count_batch, sync_batch_norm
from fastnorm.kernels import cost


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
