"""What a rewritten forward calls: several modules as one operation, where their tensors allow.

Each has the modules' own calls beside the fused one, for what only a call knows: ranks that mean
another axis, shapes that broadcast, dtypes that differ.
"""

import torch
from torch import Tensor, nn

from fastnorm import functional
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.existing.foreign import ForeignGroupNorm, ForeignRMSNorm
from fastnorm.modules.attributes import convolves_as, parameter
from fastnorm.modules.batch_norm import _BatchNorm
from fastnorm.modules.group_norm import GroupNorm
from fastnorm.modules.layer_norm import LayerNorm, RMSNorm

BATCH = (nn.modules.batchnorm._BatchNorm.forward, _BatchNorm.forward)
GROUP = (nn.GroupNorm.forward, GroupNorm.forward, ForeignGroupNorm.forward)
LAYER = (nn.LayerNorm.forward, LayerNorm.forward)
RMS = (nn.RMSNorm.forward, RMSNorm.forward, ForeignRMSNorm.forward)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_norm_activation(
    layer: nn.Module, norm: nn.Module, input: Tensor, activation: str
) -> Tensor:
    """act(norm(layer(input))) of a linear layer or convolution and a batch norm."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    bias = parameter(layer, "bias")
    if isinstance(layer, nn.Linear) and input.ndim == 2:
        mean, var, training, momentum, count = _BatchNorm.statistics(norm)  # type: ignore[arg-type]
        norm._check_input_dim(input)  # type: ignore[no-untyped-call]
        return functional.linear_batch_norm(
            input, layer.weight, bias, mean, var, parameter(norm, "weight"),
            parameter(norm, "bias"), training, momentum, norm.eps,
            activation=activation, num_batches_tracked=count,
        )  # fmt: skip
    if (
        isinstance(layer, CONVOLUTIONS)
        and input.ndim == layer.weight.ndim
        and convolves_as(layer, type(layer))
    ):
        mean, var, training, momentum, count = _BatchNorm.statistics(norm)  # type: ignore[arg-type]
        norm._check_input_dim(input)  # type: ignore[no-untyped-call]
        return functional.conv_batch_norm(
            input, layer.weight, bias, mean, var, parameter(norm, "weight"),
            parameter(norm, "bias"), training, momentum, norm.eps, stride=layer.stride,
            padding=layer.padding, dilation=layer.dilation, groups=layer.groups,
            activation=activation, num_batches_tracked=count,
        )  # fmt: skip
    # of (N, L, C) torch's BatchNorm1d normalizes axis 1, so this is no LinearBatchNorm
    return norm_activation(norm, layer(input), None, activation)


def norm_activation(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None,
    activation: str,
    in_place: bool = False,
) -> Tensor:
    """act(norm(input) + residual) of a norm without an activation of its own.

    `in_place`: the sum was written so, and has the dtype and shape of the norm's output.
    """
    if residual is not None and not _alike(input, residual):
        return ACTIVATIONS[activation](_sum(norm(input), residual, in_place))
    weight = parameter(norm, "weight")
    if isinstance(norm, nn.RMSNorm):
        return functional.rms_norm(
            input, norm.normalized_shape, weight, norm.eps, activation=activation
        )
    bias = parameter(norm, "bias")
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        norm._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, var, training, momentum, count = _BatchNorm.statistics(norm)  # type: ignore[arg-type]
        return functional.batch_norm(
            input, mean, var, weight, bias, training, momentum, norm.eps,
            residual=residual, activation=activation, num_batches_tracked=count,
        )  # fmt: skip
    if isinstance(norm, nn.GroupNorm):
        return functional.group_norm(
            input, norm.num_groups, weight, bias, norm.eps, residual=residual, activation=activation
        )
    assert isinstance(norm, nn.LayerNorm)
    return functional.layer_norm(
        input, norm.normalized_shape, weight, bias, norm.eps, activation=activation
    )


def add_norm(
    norm: nn.Module, input: Tensor, residual: Tensor, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """(norm(sum), sum) of the sum of both, for LayerNorm and RMSNorm."""
    if not _alike(input, residual) or torch.is_autocast_enabled(input.device.type):
        total = _sum(input, residual, in_place)
        return norm(total), total
    if isinstance(norm, ForeignRMSNorm):
        return norm.added(input, residual)
    activation = getattr(norm, "activation", "identity")
    weight = parameter(norm, "weight")
    if isinstance(norm, nn.LayerNorm):
        return functional.add_layer_norm(
            input, residual, norm.normalized_shape, weight, norm.bias, norm.eps,
            activation=activation,
        )  # fmt: skip
    assert isinstance(norm, nn.RMSNorm)
    return functional.add_rms_norm(
        input, residual, norm.normalized_shape, weight, norm.eps, activation=activation
    )


def _sum(input: Tensor, residual: Tensor, in_place: bool) -> Tensor:
    return input.add_(residual) if in_place else input + residual


def _alike(input: Tensor, residual: Tensor) -> bool:
    """Whether a sum has the shape and dtype of both: nothing is broadcast, nothing promoted."""
    return (
        isinstance(input, Tensor)
        and isinstance(residual, Tensor)
        and input.shape == residual.shape
        and input.dtype is residual.dtype
        and input.dtype.is_floating_point
    )
