"""Batch normalization."""

from typing import Any

from torch import Tensor

from fastnorm import checks
from fastnorm.backend import at_once, implementation
from fastnorm.distributed import group_of
from fastnorm.eager import direct


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Normalize each channel over the batch and all positions, then add, then activate.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}}\,\gamma_c
              + \beta_c + r\Bigr)

    In training μ and σ² (biased) are those of the batch, and the buffers move by `momentum` towards
    μ and the unbiased variance; otherwise they are the buffers.

    Args:
        input: (N, C) or (N, C, *), any floating dtype. Its memory format is kept.
        running_mean, running_var: (C,) buffers, moved in place in training, where both may be None.
        weight, bias: γ and β, (C,), of any floating dtype.
        momentum: share of the batch in the buffers. A 0-dimensional tensor stays on its device.
            None is the cumulative average 1/n with n from `num_batches_tracked`.
        residual: r, of input's shape; the output's dtype is the promotion of both.
        activation: "identity", "relu", "relu6", "leaky_relu" (slope 0.01), "elu", "silu", "gelu"
            (erf), "gelu_tanh", "tanh", "sigmoid" or "hardswish".
        num_batches_tracked: 0-dimensional integer buffer, incremented in training.
        process_group: a `torch.distributed` group whose processes all call this; in training the
            batch is that of all of them, whose parts may differ in size and be empty. One
            collective forward and one backward. Gradients of weight and bias are of the own part.

    Raises:
        ValueError: one value per channel in training; one running buffer without the other; an eps
            that torch refuses; an unknown activation.
        RuntimeError: a parameter, buffer or residual of the wrong size; no buffers in evaluation.

    Source: Ioffe & Szegedy 2015, "Batch Normalization".

    >>> import torch, fastnorm.functional as FF
    >>> x = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    >>> FF.batch_norm(x, None, None, training=True, eps=1e-12, activation="relu")
    tensor([[0., 0.],
            [1., 1.]])
    """
    if residual is None and process_group is None:
        done = at_once(
            direct.batch_norm, input, running_mean, running_var, weight, bias,
            training, momentum, eps, activation, num_batches_tracked,
        )  # fmt: skip
        if done is not None:
            return done
    shape = input.shape
    group = group_of(process_group) if training and process_group is not None else None
    checks.batch_statistics(
        shape, input, running_mean, running_var, weight, bias, training, eps, group is None
    )
    if residual is not None:
        checks.residual(residual, shape, input)
    if activation != "identity":
        checks.activation(activation)
    if type(momentum) is not float:
        momentum = checks.momentum(momentum, num_batches_tracked, input)
    if type(eps) is not float:
        eps = checks.epsilon(eps)
    if group is None:
        y: Tensor = implementation(input).batch_norm(
            input, running_mean, running_var, weight, bias,
            training, momentum, eps, residual, activation, num_batches_tracked,
        )  # fmt: skip
    else:  # an empty part as any other: all processes find the same bits
        like = input if input.numel() else input.new_empty(1)
        y = implementation(like).sync_batch_norm(
            input, running_mean, running_var, weight, bias,
            momentum, eps, residual, activation, num_batches_tracked, group,
        )  # fmt: skip
    return y
