"""BatchNorm in torch operators (placeholder until the fast one lands)."""

import torch.nn.functional as F
from torch import Tensor

from fastnorm.eager.activations import ACTIVATIONS


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / num_batches_tracked
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, float(momentum), eps)
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[activation](z)
