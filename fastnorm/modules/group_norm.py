"""GroupNorm, InstanceNorm1d, InstanceNorm2d and InstanceNorm3d."""

import warnings
from typing import Any

import torch
from torch import Tensor

from fastnorm import checks, functional
from fastnorm.modules.attributes import as_node, buffer, is_symbolic, parameter, with_activation
from fastnorm.modules.scripted import finished, is_scripting, method_of


class GroupNorm(torch.nn.GroupNorm):
    r"""`torch.nn.GroupNorm` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{GN}(x) + r\bigr)

    Input and residual (N, C, *), contiguous or channels_last; the output keeps the format. Same
    parameters and state dict as torch.nn's. Formula, dtypes and errors:
    `fastnorm.functional.group_norm`.

    >>> import torch, fastnorm
    >>> x = torch.randn(2, 6, 5, 5).to(memory_format=torch.channels_last)
    >>> fastnorm.GroupNorm(3, 6, activation="silu")(x).stride() == x.stride()
    True
    """

    forward_of_torch = method_of(torch.nn.GroupNorm.forward)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "identity",
        **kwargs: Any,  # what a newer torch's constructor accepts besides (2.13: bias)
    ) -> None:
        checks.activation(activation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_scripting():
            y = finished(self.forward_of_torch(input), residual, self.activation)
        elif is_symbolic(self, input):
            y = as_node(self, input, residual)
        else:
            y = functional.group_norm(
                input, self.num_groups, parameter(self, "weight"), parameter(self, "bias"),
                self.eps, residual=residual, activation=self.activation,
            )  # fmt: skip
        return y

    def extra_repr(self) -> str:
        return with_activation(super().extra_repr(), self.activation)


class _InstanceNorm(torch.nn.modules.instancenorm._InstanceNorm):
    """What the three share: torch's parameters, buffers and rules, our function."""

    forward_of_torch = method_of(torch.nn.modules.instancenorm._InstanceNorm.forward)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "identity",
        **kwargs: Any,  # what a newer torch's constructor accepts besides (2.13: bias)
    ) -> None:
        checks.activation(activation)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs
        )
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_scripting():
            y = finished(self.forward_of_torch(input), residual, self.activation)
        elif is_symbolic(self, input):
            y = as_node(self, input, residual)
        else:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            unbatched = input.dim() == self._get_no_batch_dim()  # type: ignore[no-untyped-call]
            self._check_features(input.shape[0 if unbatched else 1], 0 if unbatched else 1)
            if unbatched:
                residual = None if residual is None else residual.unsqueeze(0)
                y = self._normalized(input.unsqueeze(0), residual).squeeze(0)
            else:
                y = self._normalized(input, residual)
        return y

    def _normalized(self, input: Tensor, residual: Tensor | None) -> Tensor:
        use_input_stats = self.training or not self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum  # torch counts no batches here
        return functional.instance_norm(
            input, buffer(self, "running_mean"), buffer(self, "running_var"),
            parameter(self, "weight"), parameter(self, "bias"), use_input_stats, momentum, self.eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip

    def _check_features(self, features: int, axis: int) -> None:
        if features == self.num_features:
            return
        if self.affine:
            raise ValueError(
                f"expected input's size at dim={axis} to match num_features"
                f" ({self.num_features}), but got: {features}."
            )
        warnings.warn(
            f"input's size at dim={axis} does not match num_features ({self.num_features}): "
            f"{features}. Without affine parameters num_features is not used",
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return with_activation(shown, self.activation)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    r"""`torch.nn.InstanceNorm1d` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{IN}(x) + r\bigr)

    Input and residual (N, C, L) or (C, L); same parameters, buffers and state dict as torch.nn's.
    Formula, dtypes and errors: `fastnorm.functional.instance_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.InstanceNorm1d(3)(torch.randn(3, 8)).shape
    torch.Size([3, 8])
    """


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    r"""`torch.nn.InstanceNorm2d` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{IN}(x) + r\bigr)

    Input and residual (N, C, H, W), contiguous or channels_last, whose format the output keeps, or
    (C, H, W). Same parameters, buffers and state dict as torch.nn's. Formula, dtypes and errors:
    `fastnorm.functional.instance_norm`.

    >>> import torch, fastnorm
    >>> norm = fastnorm.InstanceNorm2d(3, affine=True, activation="relu")
    >>> norm(torch.randn(2, 3, 5, 5), residual=torch.randn(2, 3, 5, 5)).min() >= 0
    tensor(True)
    """


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    r"""`torch.nn.InstanceNorm3d` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{IN}(x) + r\bigr)

    Input and residual (N, C, D, H, W), contiguous or channels_last_3d, whose format the output
    keeps, or (C, D, H, W). Same parameters, buffers and state dict as torch.nn's. Formula, dtypes
    and errors: `fastnorm.functional.instance_norm`.

    >>> import torch, fastnorm
    >>> norm = fastnorm.InstanceNorm3d(2, track_running_stats=True)
    >>> norm(torch.randn(2, 2, 3, 4, 5)).shape
    torch.Size([2, 2, 3, 4, 5])
    """
