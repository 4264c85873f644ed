"""Linear → batch norm → activation: torch's product, then our kernels."""

from torch import Tensor

from fastnorm.eager.linear_batch_norm import linear
from fastnorm.ops.batch_norm import batch_norm


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
