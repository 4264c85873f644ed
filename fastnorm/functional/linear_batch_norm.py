"""A linear layer or a convolution, then batch normalization and activation."""

import torch.nn.functional as F
from torch import Tensor

from fastnorm import checks
from fastnorm.backend import implementation
from fastnorm.functional.batch_norm import batch_norm

LINEAR_ALGORITHMS = ("auto", "unfused")


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
) -> Tensor:
    r"""Linear layer, batch norm of its output over all leading axes, activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}_{\gamma,\beta}(x W^\top + b)\bigr)

    Args:
        input: (*, in_features).
        weight, bias: W (out_features, in_features) and b (out_features,).
        norm_weight, norm_bias: γ and β, (out_features,).
        algorithm: "auto", or "unfused": torch's product, then `batch_norm` of this library.
        running_mean, running_var, training, momentum, eps, activation, num_batches_tracked: as in
            `batch_norm`.

    Raises:
        ValueError, RuntimeError: as `batch_norm` and `torch.nn.functional.linear`.

    >>> import torch, fastnorm.functional as FF
    >>> x, w = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [-2.0]])
    >>> FF.linear_batch_norm(x, w, training=True, eps=1e-12)
    tensor([[0., 1.],
            [1., 0.]])
    """
    checks.linear(input, weight, bias)
    shape = (input.shape[:-1].numel(), weight.shape[0])
    checks.batch_statistics(
        shape, input, running_mean, running_var, norm_weight, norm_bias, training, eps
    )
    checks.activation(activation)
    if algorithm not in LINEAR_ALGORITHMS:
        raise ValueError(
            f"algorithm must be one of {', '.join(LINEAR_ALGORITHMS)}, but got {algorithm!r}"
        )
    if type(momentum) is not float:
        momentum = checks.momentum(momentum, num_batches_tracked, input)
    if type(eps) is not float:
        eps = float(eps)
    z = F.linear(input, *_of_dtype(input, weight, bias))
    rows = z if z.ndim == 2 else z.flatten(0, -2)
    y: Tensor = implementation(rows).batch_norm(
        rows, running_mean, running_var, norm_weight, norm_bias,
        training, momentum, eps, None, activation, num_batches_tracked,
    )  # fmt: skip
    return y if z.ndim == 2 else y.view(z.shape)


def _of_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The operands of torch's product, which asks for one dtype."""
    dtype = input.dtype
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return weight, bias


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
    if weight.ndim not in _CONVOLUTIONS or input.ndim != weight.ndim:
        raise RuntimeError(
            "conv_batch_norm needs an input (N, in_channels, *) and a weight (out_channels, "
            "in_channels / groups, *kernel_size) of the same rank, 3 to 5, "
            f"but got {list(input.shape)} and {list(weight.shape)}"
        )
    checks.product(input, weight, bias)
    checks.activation(activation)
    convolution = _CONVOLUTIONS[weight.ndim]
    z = convolution(input, *_of_dtype(input, weight, bias), stride, padding, dilation, groups)
    return batch_norm(
        z, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps,
        activation=activation, num_batches_tracked=num_batches_tracked,
    )  # fmt: skip
