"""A linear layer or a convolution, then batch normalization and activation."""

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import checks
from fastnorm.backend import implementation
from fastnorm.distributed import group_of
from fastnorm.functional.batch_norm import batch_norm

LINEAR_ALGORITHMS = ("auto", "gram", "epilogue", "unfused")


def linear_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    activation: str = "relu",
    algorithm: str = "auto",
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Linear layer, batch norm of its output over all leading axes, activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}_{\gamma,\beta}(x W^\top + b)\bigr)

    Args:
        input: (*, in_features).
        weight, bias: W (out_features, in_features) and b (out_features,).
        norm_weight, norm_bias: γ and β, (out_features,).
        algorithm: "gram" takes the statistics from the second moment of x and never forms the
            pre-activation; "epilogue" writes it once, with its statistics; "unfused" is torch's
            product, then `batch_norm` of this library. "auto" picks what a model of flops and bytes
            finds fastest (docs/linear_batch_norm.md).
        running_mean, running_var, training, momentum, eps, activation, num_batches_tracked,
            process_group: as in `batch_norm`.

    Raises:
        ValueError, RuntimeError: as `batch_norm` and `torch.nn.functional.linear`; ValueError where
            "gram" is asked for an activation whose derivative takes more than its output: silu,
            gelu, gelu_tanh, hardswish.

    b has no effect in training but on running_mean; its gradient is zero then.

    >>> import torch, fastnorm.functional as FF
    >>> x, w = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [-2.0]])
    >>> FF.linear_batch_norm(x, w, training=True, eps=1e-12)
    tensor([[0., 1.],
            [1., 0.]])
    """
    checks.linear(input, weight, bias)
    shape = (math.prod(input.shape[:-1]), weight.shape[0])
    group = group_of(process_group) if training and process_group is not None else None
    checks.batch_statistics(
        shape, input, running_mean, running_var, norm_weight, norm_bias, training, eps,
        group is None,
    )  # fmt: skip
    checks.activation(activation)
    checks.algorithm(algorithm, LINEAR_ALGORITHMS, activation)
    if type(momentum) is not float:
        momentum = checks.momentum(momentum, num_batches_tracked, input)
    if type(eps) is not float:
        eps = checks.epsilon(eps)
    input, weight, bias = _of_one_dtype(input, weight, bias)
    rows = input if input.ndim == 2 else input.flatten(0, -2)
    y: Tensor = _implementation(rows, group).linear_batch_norm(
        rows, weight, bias, running_mean, running_var, norm_weight, norm_bias,
        training, momentum, eps, activation, algorithm, num_batches_tracked, group,
    )  # fmt: skip
    return y if input.ndim == 2 else y.view(*input.shape[:-1], weight.shape[0])


def _implementation(input: Tensor, group: Any) -> ModuleType:
    """With other processes, that for a part that is not empty: all of them find the same bits."""
    return implementation(input if group is None or input.numel() else input.new_empty(1))


def _of_one_dtype(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of a product, which asks for one dtype: input's, or autocast's."""
    dtype, kind = input.dtype, input.device.type
    if dtype is not torch.float64 and _casts(kind):
        dtype = torch.get_autocast_dtype(kind)
        input = input.to(dtype)
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return input, weight, bias


def _casts(kind: str) -> bool:
    """Whether autocast is on for such a device; not every one has it."""
    if torch.compiler.is_dynamo_compiling():  # before torch 2.12 it cannot ask for that
        return kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def conv_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor | None = 0.1,
    eps: float = 1e-5,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: str | int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    activation: str = "relu",
    num_batches_tracked: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    r"""Convolution (1d, 2d or 3d by the weight's rank), batch norm of its output, activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}_{\gamma,\beta}(W * x + b)\bigr)

    Args:
        input: (N, in_channels, *) with one to three positions' axes.
        weight: (out_channels, in_channels / groups, *kernel_size).
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`.
        the rest: as in `linear_batch_norm`.

    Raises:
        ValueError, RuntimeError: as `batch_norm` and torch's convolution.

    >>> import torch, fastnorm.functional as FF
    >>> x, w = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0]]])
    >>> FF.conv_batch_norm(x, w, training=True, eps=1e-12)
    tensor([[[0., 1.]]])
    """
    checks.convolution(input, weight, bias)
    checks.activation(activation)
    if _is_linear(input, weight, stride, padding, groups):
        shape = (input.shape[0], weight.shape[0], *input.shape[2:])
        group = group_of(process_group) if training and process_group is not None else None
        checks.batch_statistics(
            shape, input, running_mean, running_var, norm_weight, norm_bias, training, eps,
            group is None,
        )  # fmt: skip
        if type(momentum) is not float:
            momentum = checks.momentum(momentum, num_batches_tracked, input)
        input, weight, bias = _of_one_dtype(input, weight, bias)
        y: Tensor = _implementation(input, group).linear_batch_norm(
            input, weight.flatten(1), bias, running_mean, running_var, norm_weight, norm_bias,
            training, momentum, checks.epsilon(eps), activation, "auto", num_batches_tracked, group,
        )  # fmt: skip
        return y
    convolution = _CONVOLUTIONS[weight.ndim]
    input, weight, bias = _of_one_dtype(input, weight, bias)
    z = convolution(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm(
        z, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps,
        activation=activation, num_batches_tracked=num_batches_tracked,
        process_group=process_group,
    )  # fmt: skip


def _is_linear(
    input: Tensor,
    weight: Tensor,
    stride: int | tuple[int, ...],
    padding: str | int | tuple[int, ...],
    groups: int,
) -> bool:
    """Whether the convolution is a linear layer at each position."""
    return (
        weight.shape[2:].numel() == 1
        and input.shape[1] == weight.shape[1]
        and groups == 1
        and (stride == 1 or (isinstance(stride, tuple) and set(stride) == {1}))
        and (
            padding in (0, "valid", "same") or (isinstance(padding, tuple) and set(padding) == {0})
        )
    )
