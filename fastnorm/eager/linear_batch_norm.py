"""Linear or convolution → batch norm → activation, in torch operators."""

import torch.nn.functional as F
from torch import Tensor

from fastnorm.eager.batch_norm import batch_norm


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
    z = F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
    y = batch_norm(
        z.flatten(0, -2), running_mean, running_var, norm_weight, norm_bias,
        training, momentum, eps, None, activation, num_batches_tracked,
    )  # fmt: skip
    return y.view(z.shape)
