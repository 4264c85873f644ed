"""Batch, layer and group norm in plain operators: right to any order, under any transform.

torch's own operators (2.13) are not: their derivatives treat the saved mean and rstd as constants
where forward-mode AD is nested or run backwards, and the batching rule of their backward loses a
part of second derivatives, without an error (pytorch#196699 and #196700, functorch#534); group
norm's backward has no tangent. So inside torch.func and forward-mode AD the formulas are written
out.
"""

from torch import Tensor

from fastnorm.eager import native


def batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Of the batch's own statistics."""
    column = [-1, *[1] * (input.dim() - 2)]
    z = _normalized(input, (0, *range(2, input.dim())), eps)
    z = z if weight is None else z * weight.reshape(column)
    return (z if bias is None else z + bias.reshape(column)).to(input.dtype)


def layer_norm(
    input: Tensor, axes: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Over the last `axes`."""
    z = _normalized(input, tuple(range(-axes, 0)), eps)
    z = z if weight is None else z * weight
    return (z if bias is None else z + bias).to(native.output_dtype(input))


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Over the channels of a group and all positions."""
    column = [-1, *[1] * (input.dim() - 2)]
    groups = input.reshape(input.shape[0], num_groups, -1, *input.shape[2:])
    z = _normalized(groups, tuple(range(2, groups.dim())), eps).flatten(1, 2)
    z = z if weight is None else z * weight.reshape(column)
    return (z if bias is None else z + bias.reshape(column)).to(native.output_dtype(input))


def _normalized(input: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    x = input.to(native.WIDER.get(input.dtype, input.dtype))
    x = x - x.mean(axes, keepdim=True)
    x = x - x.mean(axes, keepdim=True)  # what the rounding of a large mean has left
    return x * (x.square().mean(axes, keepdim=True) + eps).rsqrt()
