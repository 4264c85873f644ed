"""Calls that one operator of torch serves as they are: the shortest way to it.

A short call is over before Python has looked at its arguments twice, and torch's operators check
them, before they change anything. So nobody has checked these arguments yet; asked for is what
decides the way, and what an operator of torch does not refuse where its function does. The answer
is None where something is to be cast, or a longer way is faster or more precise; where an argument
is wrong, it is an error (see `backend.at_once`).

Inputs are plain CPU tensors, which no transform and no compiler watches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm.eager import batch_norm_cpu, native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.batch_norm import ROUNDED, rounds_between
from fastnorm.eager.group_norm import channels_are_last
from fastnorm.eager.group_norm_cpu import GroupNormFunction, of_torch
from fastnorm.eager.native import STEPS
from fastnorm.eager.rms_norm import SMALL

SHORT = 1 << 17
"""Elements below which what Python does counts more than a pass over them."""


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    activation: str,
    num_batches_tracked: Tensor | None,
) -> Tensor | None:
    """`functional.batch_norm` without a residual."""
    size, given = input.numel(), input.dtype
    if given in native.WIDER:  # of parameters in 16 bits, statistics would be, too
        if weight is None or activation not in ROUNDED:
            return None
        given = weight.dtype
        if given is not torch.float32 and (
            training or not (input.is_contiguous() or native.needs_no_gradient(input, weight, bias))
        ):
            return None
    if type(momentum) is not float or eps <= 0.0 or native.is_mistaken(input):
        return None
    if size >= batch_norm_cpu.SMALL and (
        activation != "identity"
        or (given is not torch.float32 and given is not torch.float64)
        or not native.is_dense(input)
        or batch_norm_cpu.is_column(input)
        or batch_norm_cpu.is_slow(input, training, eps)
    ):
        return None
    for t in (running_mean, running_var, weight, bias):
        # torch's operator reads strided ones as if they were dense, and moves buffers before it
        # finds a parameter elsewhere
        if t is not None and not (t.dtype is given and t.is_contiguous() and t.is_cpu):
            return None
    if (running_mean is None) is not (running_var is None):
        return None
    if size <= input.size(1) if training else running_mean is None:
        return None
    act = ACTIVATIONS[activation]
    counted = num_batches_tracked if training else None
    if counted is not None:
        counted.add_(1)
    try:
        z = native.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
    except (RuntimeError, TypeError):  # it has refused an argument
        if counted is not None:
            counted.sub_(1)
        raise
    return z if activation == "identity" else act(z)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor | None:
    """`functional.group_norm` without a residual."""
    size, dtype = input.numel(), input.dtype
    given = dtype if weight is None else weight.dtype
    if (
        type(num_groups) is not int
        or size == 0
        or size < 2 * num_groups  # one value a group
        or (size >= SHORT and (activation in STEPS or native.is_huge(input)))
        or (bias is not None and (weight is None or bias.dtype is not given))
        or (weight is not None and not weight.is_contiguous())
        or (bias is not None and not bias.is_contiguous())
    ):
        return None
    own = not (input.is_contiguous() or native.needs_no_gradient(weight, bias))
    if own and (native.observed(input) or not channels_are_last(input)):
        return None
    if dtype in native.WIDER:
        if activation != "identity" and rounds_between(input, None, activation):
            return None
        if given is dtype:
            # torch computes in float32, but what it keeps for the backward is in 16 bits, too
            if not native.needs_no_gradient(input, weight, bias):
                if weight is None:
                    return None
                weight, bias = weight.float(), None if bias is None else bias.float()
        elif given is not torch.float32:
            return None
    elif given is not dtype:
        return None
    if own:
        z = GroupNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, None, "identity", num_groups, eps
        )
    elif num_groups == input.size(1) and not native.observed(input):
        z = of_torch(input, num_groups, weight, bias, eps)[0]
    else:
        z = torch.group_norm(input, num_groups, weight, bias, eps, False)
    return z if activation == "identity" else ACTIVATIONS[activation](z)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    eps: float,
    activation: str,
) -> Tensor | None:
    """`functional.instance_norm` without a residual, by the other norms' operators."""
    if not use_input_stats:
        if input.dtype in native.WIDER and not native.needs_no_gradient(weight, bias):
            return None
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, 0.0, eps, activation, None
        )
    channels = input.size(1)
    if (
        running_mean is not None
        or running_var is not None
        or input.numel() <= input.size(0) * channels  # one position
        or not input.is_contiguous()
    ):
        return None
    return group_norm(input, channels, weight, bias, eps, activation)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor | None:
    """`functional.layer_norm`."""
    dtype = input.dtype
    if (weight is not None and weight.dtype is not dtype) or (
        bias is not None and bias.dtype is not dtype
    ):
        return None
    z = torch.layer_norm(input, normalized_shape, weight, bias, eps, False)
    return z if activation == "identity" else ACTIVATIONS[activation](z)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    activation: str,
) -> Tensor | None:
    """`functional.rms_norm`."""
    dtype, size = input.dtype, input.numel()
    if (
        (weight is not None and weight.dtype is not dtype)
        or type(size) is not int  # in a trace, for which ONNX has no RMS norm
        or not 0 < size < SMALL
        or not dtype.is_floating_point  # torch has one of complex numbers, too
    ):
        return None
    if activation == "identity":
        return torch.rms_norm(input, normalized_shape, weight, eps)
    if dtype in native.WIDER:  # z would be rounded
        return None
    return ACTIVATIONS[activation](torch.rms_norm(input, normalized_shape, weight, eps))
