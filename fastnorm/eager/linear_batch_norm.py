"""Linear or convolution → batch norm → activation, in torch operators."""

import torch.nn.functional as F
from torch import Tensor

from fastnorm.eager.batch_norm import batch_norm


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch's product, also where the parameters have another dtype than the input."""
    dtype = input.dtype
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return F.linear(input, weight, bias)


def linear_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    activation: str,
    algorithm: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """Statistics over all leading axes of `input`; `algorithm` can only be "unfused" here."""
    z = linear(input, weight, bias)
    y = batch_norm(
        z if z.ndim == 2 else z.flatten(0, -2), running_mean, running_var, norm_weight, norm_bias,
        training, momentum, eps, None, activation, num_batches_tracked,
    )  # fmt: skip
    return y if z.ndim == 2 else y.view(z.shape)
