"""LinearBatchNorm, and the same after a convolution."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.modules.attributes import (
    as_node,
    child,
    convolves_as,
    is_exported,
    is_hooked,
    is_symbolic,
    operands,
    parameter,
)
from fastnorm.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.modules.scripted import is_scripting
from fastnorm.modules.sync_batch_norm import SyncBatchNorm

FORWARDS = (BatchNorm1d.forward, SyncBatchNorm.forward)
"""Of the norms whose part in the whole is known."""


def are_apart(
    layer: torch.nn.Module, norm: torch.nn.Module, kind: type[torch.nn.Module], input: Tensor
) -> bool:
    """Whether a layer and its norm are to be called: one has hooks, or a forward of its own.

    By hooks torch.nn.utils.prune computes a weight anew; an adapter is a layer of its own, and
    torch's convert_sync_batchnorm, or whoever freezes batch norms, puts another norm in. To
    torch.fx, of a whole that is all it traces, they are nodes. And torch.export names operators by
    the modules that call them, where a quantizer looks for layers.
    """
    return (
        type(layer).forward is not kind.forward
        or type(norm).forward not in FORWARDS
        or is_hooked(layer)
        or is_hooked(norm)
        or isinstance(input, torch.fx.Proxy)
        or is_exported(input)
    )


class LinearBatchNorm(torch.nn.Module):
    r"""Linear layer, batch norm of its output, activation: `Sequential(Linear, BatchNorm1d, act)`.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(x W^\top + b)\bigr)

    Input (*, in_features), output (*, out_features), statistics over all leading axes. Submodules
    `linear` and `norm` hold the parameters; `norm` also knows the activation. Where one of them has
    hooks, or a forward that is not its class's here, both are called, one after the other. Without
    a bias by default: batch norm removes it. Errors: `fastnorm.functional.linear_batch_norm`.

    >>> import torch, fastnorm
    >>> layer = fastnorm.LinearBatchNorm(4, 8)
    >>> layer(torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, out_features, bias, device, dtype)
        self.norm = BatchNorm1d(
            out_features, eps, momentum, affine, track_running_stats, device, dtype,
            activation=activation,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            y = self.as_written(input)
        elif is_symbolic(self, input):
            y = as_node(self, input)
        elif are_apart(child(self, "linear"), child(self, "norm"), torch.nn.Linear, input):
            y = self.as_written(input)
        else:
            norm = child(self, "norm")
            if isinstance(input, Tensor) and input.ndim < 2:
                raise ValueError(
                    f"expected input (*, in_features) with at least 2 axes, got {input.ndim}"
                )
            weight, bias = operands(child(self, "linear"))
            mean, var, training, momentum, count = norm.statistics()
            y = functional.linear_batch_norm(
                input, weight, bias, mean, var, parameter(norm, "weight"), parameter(norm, "bias"),
                training, momentum, norm.eps,
                activation=norm.activation, num_batches_tracked=count, process_group=norm.group(),
            )  # fmt: skip
        return y

    def as_written(self, input: Tensor) -> Tensor:
        z = self.linear(input)
        y: Tensor = self.norm(z.flatten(0, -2)).view_as(z)
        return y


class _ConvBatchNorm(torch.nn.Module):
    """What the three convolutions share."""

    _conv: ClassVar[type[torch.nn.modules.conv._ConvNd]]
    _norm: ClassVar[type[BatchNorm1d] | type[BatchNorm2d] | type[BatchNorm3d]]
    _axes: ClassVar[int]  # of an input, with the batch

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        conv: Any = self._conv
        self.conv = conv(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = self._norm(
            out_channels, eps, momentum, affine, track_running_stats, device, dtype,
            activation=activation,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            y = self.as_written(input)
        elif is_symbolic(self, input):
            y = as_node(self, input)
        elif are_apart(child(self, "conv"), child(self, "norm"), self._conv, input):
            y = self.as_written(input)
        elif not convolves_as(child(self, "conv"), self._conv) or (
            isinstance(input, Tensor) and input.ndim != self._axes
        ):
            y = self.as_written(input)  # it is for torch's layers to say what is wrong
        else:
            conv, norm = child(self, "conv"), child(self, "norm")
            if isinstance(input, Tensor):
                norm.check_rank(input)
            weight, bias = operands(conv)
            mean, var, training, momentum, count = norm.statistics()
            y = functional.conv_batch_norm(
                input, weight, bias, mean, var, parameter(norm, "weight"), parameter(norm, "bias"),
                training, momentum, norm.eps, stride=conv.stride, padding=conv.padding,
                dilation=conv.dilation, groups=conv.groups, activation=norm.activation,
                num_batches_tracked=count, process_group=norm.group(),
            )  # fmt: skip
        return y

    def as_written(self, input: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(input))
        return y


class Conv1dBatchNorm(_ConvBatchNorm):
    r"""`Sequential(Conv1d, BatchNorm1d, act)` with submodules `conv` and `norm`.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(W * x + b)\bigr)

    Input (N, in_channels, L). Errors: `fastnorm.functional.conv_batch_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.Conv1dBatchNorm(2, 4, 3)(torch.randn(2, 2, 9)).shape
    torch.Size([2, 4, 7])
    """

    _conv, _norm, _axes = torch.nn.Conv1d, BatchNorm1d, 3


class Conv2dBatchNorm(_ConvBatchNorm):
    r"""`Sequential(Conv2d, BatchNorm2d, act)` with submodules `conv` and `norm`.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(W * x + b)\bigr)

    Input (N, in_channels, H, W). Errors: `fastnorm.functional.conv_batch_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.Conv2dBatchNorm(3, 8, 3, padding=1)(torch.randn(2, 3, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
    """

    _conv, _norm, _axes = torch.nn.Conv2d, BatchNorm2d, 4


class Conv3dBatchNorm(_ConvBatchNorm):
    r"""`Sequential(Conv3d, BatchNorm3d, act)` with submodules `conv` and `norm`.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(W * x + b)\bigr)

    Input (N, in_channels, D, H, W). Errors: `fastnorm.functional.conv_batch_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.Conv3dBatchNorm(1, 2, 1)(torch.randn(2, 1, 2, 2, 2)).shape
    torch.Size([2, 2, 2, 2, 2])
    """

    _conv, _norm, _axes = torch.nn.Conv3d, BatchNorm3d, 5
