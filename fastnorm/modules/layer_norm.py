"""LayerNorm, RMSNorm, and both of a residual sum."""

from typing import Any

import torch
from torch import Tensor

from fastnorm import checks, functional
from fastnorm.modules.attributes import as_node, is_symbolic, parameter, with_activation


class LayerNorm(torch.nn.LayerNorm):
    r"""`torch.nn.LayerNorm` with a fused activation.

    .. math:: y = \mathrm{act}(\mathrm{LN}(x))

    Input (*, *normalized_shape); same parameters and state dict as torch.nn's. Formula, dtypes and
    errors: `fastnorm.functional.layer_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.LayerNorm(8, activation="gelu")(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        *args: Any,
        activation: str = "identity",
        **kwargs: Any,
    ) -> None:
        checks.activation(activation)
        super().__init__(normalized_shape, *args, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if is_symbolic(self, input):
            return as_node(self, input)  # type: ignore[no-any-return]
        return functional.layer_norm(
            input, self.normalized_shape, parameter(self, "weight"), parameter(self, "bias"),
            self.eps, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return with_activation(super().extra_repr(), self.activation)


class RMSNorm(torch.nn.RMSNorm):
    r"""`torch.nn.RMSNorm` with a fused activation.

    .. math:: y = \mathrm{act}(\mathrm{RMSNorm}(x))

    Input (*, *normalized_shape); same parameters and state dict as torch.nn's. Formula, dtypes and
    errors: `fastnorm.functional.rms_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.RMSNorm(4)(torch.full((1, 4), 3.0)).detach()
    tensor([[1., 1., 1., 1.]])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        *args: Any,
        activation: str = "identity",
        **kwargs: Any,
    ) -> None:
        checks.activation(activation)
        super().__init__(normalized_shape, *args, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if is_symbolic(self, x):
            return as_node(self, x)  # type: ignore[no-any-return]
        return functional.rms_norm(
            x, self.normalized_shape, parameter(self, "weight"), self.eps,
            activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return with_activation(super().extra_repr(), self.activation)


class AddLayerNorm(LayerNorm):
    r"""`LayerNorm` of a residual sum, which is returned too: the pre-norm transformer step.

    .. math:: s = x + r, \qquad y = \mathrm{act}(\mathrm{LN}(s))

    Input and residual (*, *normalized_shape); same parameters and state dict as torch.nn.LayerNorm.
    Errors: `fastnorm.functional.add_layer_norm`.

    >>> import torch, fastnorm
    >>> output, sum = fastnorm.AddLayerNorm(4)(torch.ones(2, 4), torch.ones(2, 4))
    >>> sum[0]
    tensor([2., 2., 2., 2.])
    """

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if is_symbolic(self, input):
            return as_node(self, input, residual)  # type: ignore[no-any-return]
        return functional.add_layer_norm(
            input, residual, self.normalized_shape,
            parameter(self, "weight"), parameter(self, "bias"), self.eps,
            activation=self.activation,
        )  # fmt: skip


class AddRMSNorm(RMSNorm):
    r"""`RMSNorm` of a residual sum, which is returned too: the pre-norm transformer step.

    .. math:: s = x + r, \qquad y = \mathrm{act}(\mathrm{RMSNorm}(s))

    Input and residual (*, *normalized_shape); same parameters and state dict as torch.nn.RMSNorm.
    Errors: `fastnorm.functional.add_rms_norm`.

    >>> import torch, fastnorm
    >>> output, sum = fastnorm.AddRMSNorm(4)(torch.ones(2, 4), torch.ones(2, 4))
    >>> output[0].detach()
    tensor([1., 1., 1., 1.])
    """

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if is_symbolic(self, input):
            return as_node(self, input, residual)  # type: ignore[no-any-return]
        return functional.add_rms_norm(
            input, residual, self.normalized_shape, parameter(self, "weight"), self.eps,
            activation=self.activation,
        )  # fmt: skip
