"""The float64 oracle: textbook formulas with + − × ÷ √ and mean. It knows no fused operator.

The tests and `fastnorm verify` judge by it, and nothing that computes imports it. Comparisons are
written such that a NaN fails them and passes through.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SQRT_2 = math.sqrt(2)


def _gelu_tanh(z: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
    return z / 2 * (1 + torch.tanh(inner))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": lambda z: torch.where(z <= 0, 0, z),
    "relu6": lambda z: torch.where(z >= 6, 6, torch.where(z <= 0, 0, z)),
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "elu": lambda z: torch.where(z > 0, z, torch.expm1(torch.where(z > 0, 0, z))),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z / 2 * (1 + torch.erf(z / SQRT_2)),
    "gelu_tanh": _gelu_tanh,
    "tanh": torch.tanh,
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "hardswish": lambda z: z * torch.where(z > 3, 6, torch.where(z <= -3, 0, z + 3)) / 6,
}


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, new running_mean, new running_var); nothing is changed in place."""
    axes = [0, *range(2, x.ndim)]
    column = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    if training:
        mean = x.mean(axes)
        var = ((x - mean.reshape(column)) ** 2).mean(axes)
        if running_mean is not None and running_var is not None:
            m = x.numel() // x.shape[1]
            running_mean = (1 - momentum) * running_mean + momentum * mean.detach()
            running_var = (1 - momentum) * running_var + momentum * var.detach() * m / (m - 1)
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean, running_var
    z = (x - mean.reshape(column)) / torch.sqrt(var.reshape(column) + eps)
    z = z if weight is None else z * weight.reshape(column)
    z = z if bias is None else z + bias.reshape(column)
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation](z), running_mean, running_var


def layer_norm(
    x: Tensor,
    axes: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    center: bool = True,
) -> Tensor:
    """Layer norm over the last `axes`; without `center` RMS norm."""
    over = tuple(range(-axes, 0))
    if center:
        x = x - x.mean(over, keepdim=True)
    z = x / torch.sqrt((x**2).mean(over, keepdim=True) + eps)
    z = z if weight is None else z * weight
    return ACTIVATIONS[activation](z if bias is None else z + bias)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    groups = x.reshape(x.shape[0], num_groups, -1)
    mean = groups.mean(2, keepdim=True)
    var = ((groups - mean) ** 2).mean(2, keepdim=True)
    z = ((groups - mean) / torch.sqrt(var + eps)).reshape(x.shape)
    column = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
    z = z if weight is None else z * weight.reshape(column)
    z = z if bias is None else z + bias.reshape(column)
    z = z if residual is None else z + residual
    return ACTIVATIONS[activation](z)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, new running_mean, new running_var); nothing is changed in place."""
    if not use_input_stats:
        return batch_norm(
            x, running_mean, running_var, weight, bias, False, 0.0, eps, residual, activation
        )
    if running_mean is not None and running_var is not None:
        instances = x.detach().reshape(*x.shape[:2], -1)
        s = instances.shape[2]
        mean = instances.mean(2)
        var = ((instances - mean[..., None]) ** 2).mean(2)
        running_mean = (1 - momentum) * running_mean + momentum * mean.mean(0)
        running_var = (1 - momentum) * running_var + momentum * var.mean(0) * s / (s - 1)
    y = group_norm(x, x.shape[1], weight, bias, eps, residual, activation)
    return y, running_mean, running_var


def linear_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, new running_mean, new running_var) of rows x (M, K)."""
    z = x @ weight.T
    z = z if bias is None else z + bias
    return batch_norm(
        z, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, None,
        activation,
    )  # fmt: skip
