"""LayerNorm, RMSNorm, and both of a residual sum."""

from typing import Any

import torch
from torch import Tensor

from fastnorm import checks, functional
from fastnorm.modules.attributes import as_node, is_symbolic, parameter, with_activation
from fastnorm.modules.scripted import finished, is_scripting, method_of


class LayerNorm(torch.nn.LayerNorm):
    r"""`torch.nn.LayerNorm` with a fused activation.

    .. math:: y = \mathrm{act}(\mathrm{LN}(x))

    Input (*, *normalized_shape); same parameters and state dict as torch.nn's. Formula, dtypes and
    errors: `fastnorm.functional.layer_norm`.

    >>> import torch, fastnorm
    >>> fastnorm.LayerNorm(8, activation="gelu")(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    forward_of_torch = method_of(torch.nn.LayerNorm.forward)

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "identity",
        **kwargs: Any,  # what a newer torch's constructor accepts besides
    ) -> None:
        checks.activation(activation)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype, **kwargs)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            y = finished(self.forward_of_torch(input), None, self.activation)
        elif is_symbolic(self, input):
            y = as_node(self, input)
        else:
            y = functional.layer_norm(
                input, self.normalized_shape, parameter(self, "weight"), parameter(self, "bias"),
                self.eps, activation=self.activation,
            )  # fmt: skip
        return y

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

    forward_of_torch = method_of(torch.nn.RMSNorm.forward)

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "identity",
        **kwargs: Any,  # what a newer torch's constructor accepts besides
    ) -> None:
        checks.activation(activation)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if is_scripting():
            y = finished(self.forward_of_torch(x), None, self.activation)
        elif is_symbolic(self, x):
            y = as_node(self, x)
        else:
            y = functional.rms_norm(
                x, self.normalized_shape, parameter(self, "weight"), self.eps,
                activation=self.activation,
            )  # fmt: skip
        return y

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
        if is_scripting():
            total = input + residual
            both = finished(self.forward_of_torch(total), None, self.activation), total
        elif is_symbolic(self, input):
            both = as_node(self, input, residual)
        else:
            both = functional.add_layer_norm(
                input, residual, self.normalized_shape,
                parameter(self, "weight"), parameter(self, "bias"), self.eps,
                activation=self.activation,
            )  # fmt: skip
        return both


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
        if is_scripting():
            total = input + residual
            both = finished(self.forward_of_torch(total), None, self.activation), total
        elif is_symbolic(self, input):
            both = as_node(self, input, residual)
        else:
            both = functional.add_rms_norm(
                input, residual, self.normalized_shape, parameter(self, "weight"), self.eps,
                activation=self.activation,
            )  # fmt: skip
        return both
