r"""How many values a layer sums for one output, and how many outputs one input takes part in.

    y_i = Σ_j w_ij x_j     Var y = fan_in · Var w · E[x²]     Var dx = fan_out · Var w · E[dy²]

for independent, centred weights. In a convolution with kernel k, stride s and g groups an output
sums C_in/g · ∏k products; an input value meets C_out/g · ∏k/∏s outputs, borders aside. A transposed
convolution is the same with the two exchanged. torch.nn.init counts from the weight's shape alone,
which knows neither groups nor strides, and which a transposed convolution has the other way round.
"""

import math
from typing import NamedTuple

from torch import Tensor, nn


class Fans(NamedTuple):
    """Terms of one output, and outputs of one input; a stride makes them fractions.

    >>> import torch, fastnorm
    >>> fastnorm.init.he_normal_(torch.empty(3, 4), fans=fastnorm.init.Fans(8, 3)).shape
    torch.Size([3, 4])
    """

    fan_in: float
    fan_out: float


def fans(module: nn.Module) -> Fans:
    """The fans of a layer, from its sizes, groups and stride.

    Raises:
        TypeError: `module` is not a Linear, Bilinear, Embedding or convolution.

    >>> import torch, fastnorm
    >>> fastnorm.init.fans(torch.nn.Conv2d(8, 16, 3, groups=4))
    Fans(fan_in=18.0, fan_out=36.0)
    >>> fastnorm.init.fans(torch.nn.ConvTranspose2d(8, 16, 2, stride=2))
    Fans(fan_in=8.0, fan_out=64.0)
    """
    if isinstance(module, nn.Linear):
        return Fans(module.in_features, module.out_features)
    if isinstance(module, nn.Bilinear):
        return Fans(module.in1_features * module.in2_features, module.out_features)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Fans(1, module.embedding_dim)  # an output copies one weight
    if isinstance(module, nn.modules.conv._ConvNd):
        taps = math.prod(module.kernel_size) / module.groups
        reached = taps / math.prod(module.stride)
        if module.transposed:
            return Fans(module.in_channels * reached, module.out_channels * taps)
        return Fans(module.in_channels * taps, module.out_channels * reached)
    raise TypeError(
        "fans are known of Linear, Bilinear, Embedding and convolutions, "
        f"but got {type(module).__name__}"
    )


def fans_of_shape(tensor: Tensor) -> Fans:
    """The fans of a weight (out, in, *kernel) of one group and stride 1."""
    if tensor.dim() < 2:
        raise ValueError(
            "fan in and fan out need a weight (out, in, *kernel) with at least 2 axes, "
            f"but got {list(tensor.shape)}"
        )
    taps = math.prod(tensor.shape[2:])
    return Fans(tensor.shape[1] * taps, tensor.shape[0] * taps)
