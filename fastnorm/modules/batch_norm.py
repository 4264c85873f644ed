"""BatchNorm1d, BatchNorm2d and BatchNorm3d."""

from typing import Any

import torch
from torch import Tensor

from fastnorm import checks, functional
from fastnorm.modules.attributes import as_node, buffer, is_symbolic, parameter
from fastnorm.modules.scripted import finished, is_scripting, method_of


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three share: torch's parameters, buffers and rules, our function."""

    forward_of_torch = method_of(torch.nn.modules.batchnorm._BatchNorm.forward)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
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

    def statistics(
        self,
    ) -> tuple[Tensor | None, Tensor | None, bool, float | None, Tensor | None]:
        """(running_mean, running_var, training, momentum, num_batches_tracked) of this call."""
        mean, var = buffer(self, "running_mean"), buffer(self, "running_var")
        momentum = self.momentum
        if not self.training:
            return mean, var, mean is None and var is None, momentum or 0.0, None
        count = buffer(self, "num_batches_tracked") if self.track_running_stats else None
        if count is None and momentum is None:
            momentum = 0.0  # nothing counts the batches, so nothing moves: torch's rule
        if not self.track_running_stats:
            mean = var = None
        return mean, var, True, momentum, count

    def group(self) -> Any:
        """The processes whose batches this call normalizes together; None: this one alone."""
        return None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_scripting():
            y = finished(self.forward_of_torch(input), residual, self.activation)
        elif is_symbolic(self, input):
            y = as_node(self, input, residual)
        else:
            self.check_rank(input)
            mean, var, training, momentum, count = self.statistics()
            weight, bias = parameter(self, "weight"), parameter(self, "bias")
            y = functional.batch_norm(
                input, mean, var, weight, bias, training, momentum, self.eps,
                residual=residual, activation=self.activation, num_batches_tracked=count,
            )  # fmt: skip
        return y

    def check_rank(self, input: Tensor) -> None:
        """Raise torch's ValueError where `input` has another rank than this class normalizes."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()  # type: ignore[no-untyped-call]
        if self.activation == "identity":
            return shown
        return f"{shown}, activation={self.activation!r}"


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    r"""`torch.nn.BatchNorm1d` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(x) + r\bigr)

    Input and residual (N, C) or (N, C, L); same parameters, buffers and state dict as torch.nn's.
    Formula, dtypes and errors: `fastnorm.functional.batch_norm`.

    >>> import torch, fastnorm
    >>> norm = fastnorm.BatchNorm1d(3, activation="relu")
    >>> norm(torch.randn(8, 3), residual=torch.randn(8, 3)).min() >= 0
    tensor(True)
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""`torch.nn.BatchNorm2d` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(x) + r\bigr)

    Input and residual (N, C, H, W), contiguous or channels_last; the output keeps the format. Same
    parameters, buffers and state dict as torch.nn's. Formula, dtypes and errors:
    `fastnorm.functional.batch_norm`.

    >>> import torch, fastnorm
    >>> x = torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last)
    >>> fastnorm.BatchNorm2d(3, activation="silu")(x).stride() == x.stride()
    True
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    r"""`torch.nn.BatchNorm3d` with a fused residual sum and activation.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(x) + r\bigr)

    Input and residual (N, C, D, H, W), contiguous or channels_last_3d; the output keeps the format.
    Same parameters, buffers and state dict as torch.nn's. Formula, dtypes and errors:
    `fastnorm.functional.batch_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.BatchNorm3d(2)(torch.randn(2, 2, 3, 4, 5)).shape
    torch.Size([2, 2, 3, 4, 5])
    """
