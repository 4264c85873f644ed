"""What each norm asks of its arguments: shapes, sizes, dtypes, devices and modes."""

import contextlib
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm.checks.refusals import COMPLEX, FLOATS, refuse, require_tensors, scalar_type


def batch_statistics(
    shape: Sequence[int],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    alone: bool = True,
) -> None:
    """What batch norm of a tensor of `shape`, like `input` otherwise, asks of its arguments.

    Where it is not `alone`, other processes may have more values of a channel.
    """
    axes = len(shape)
    if training:
        if alone and axes and shape[0] <= 1 and _per_channel(shape) == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, "
                f"got input size torch.Size({list(shape)})"
            )
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None"
            )
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    else:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"{missing} must be defined in evaluation mode")
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"\"batch_norm\" not implemented for '{scalar_type(input)}'")
    _channel_vectors(input, shape, running_mean, running_var, weight, bias)
    if axes < 2 and shape != (0,):  # which torch passes on: it has no channel
        raise IndexError(f"batch_norm needs an input (N, C) or (N, C, *), but got {list(shape)}")


def group_count(num_groups: Any) -> int:
    """An int of any library, as torch takes it."""
    if isinstance(num_groups, torch.SymInt):
        return num_groups  # type: ignore[return-value]
    if type(num_groups) is not bool and hasattr(num_groups, "__index__"):
        with contextlib.suppress(TypeError):  # a tensor of floats
            return operator.index(num_groups)
    raise TypeError(f"num_groups must be an int, but got {type(num_groups).__name__}")


def group_statistics(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None
) -> None:
    """What group norm asks of its arguments."""
    shape = input.shape
    if len(shape) < 2:
        raise RuntimeError(
            "Expected at least 2 dimensions for input tensor but received "
            f"{len(shape)}: group_norm needs (N, C) or (N, C, *)"
        )
    if num_groups == 0:  # torch's own way to say so
        raise ZeroDivisionError("Expected num groups to be greater than 0, got 0")
    if num_groups < 0:
        raise RuntimeError(f"Expected num groups to be greater than 0, got {num_groups}")
    channels = shape[1]
    if num_groups <= shape[0] * channels < 2 * num_groups and math.prod(shape[2:]) == 1:
        # torch's rule, and its sizes: as if all groups were those of one sample
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {[1, num_groups, *shape[2:]]}"
        )
    if channels % num_groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, "
            f"but got input of shape {list(shape)} and num_groups={num_groups}"
        )
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"\"group_norm\" not implemented for '{scalar_type(input)}'")
    for tensor in (weight, bias):
        if tensor is None or (
            tensor.shape == (channels,) and tensor.dtype in FLOATS and tensor.device == input.device
        ):
            continue
        name = "weight" if tensor is weight else "bias"
        if tensor.shape != (channels,):
            raise RuntimeError(
                f"Expected {name} to be a vector of size equal to the number of channels in "
                f"input, but got {name} of shape {list(tensor.shape)} and input of shape "
                f"{list(shape)}"
            )
        refuse(name, tensor, input)


def instance_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
) -> None:
    """What instance norm asks of its arguments."""
    shape = input.shape
    if use_input_stats:
        if math.prod(shape[2:]) == 1:
            raise ValueError(
                "Expected more than 1 spatial element when training, "
                f"got input size torch.Size({list(shape)})"
            )
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None"
            )
    elif running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(
            "Expected running_mean and running_var to be defined when use_input_stats is false, "
            f"but {missing} is None"
        )
    if len(shape) < 2:
        raise IndexError(f"instance_norm needs an input (N, C) or (N, C, *), got {list(shape)}")
    if input.dtype not in FLOATS:
        raise NotImplementedError(f"\"instance_norm\" not implemented for '{scalar_type(input)}'")
    _channel_vectors(input, shape, running_mean, running_var, weight, bias)


def _channel_vectors(
    input: Tensor,
    shape: Sequence[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """running_mean, running_var, weight and bias of a tensor of `shape`, where they are there."""
    if (
        (running_mean is not None and running_mean.requires_grad)
        or (running_var is not None and running_var.requires_grad)
    ) and torch.is_grad_enabled():
        raise RuntimeError(
            "running_mean and running_var must not require a gradient: the output is not "
            "differentiable with respect to them"
        )
    small = (running_mean, running_var, weight, bias)
    channels = shape[1] if len(shape) > 1 else 0
    device = input.device
    for tensor in small:
        if tensor is not None and (
            tensor.numel() != channels or tensor.dtype not in FLOATS or tensor.device != device
        ):
            names = ("running_mean", "running_var", "weight", "bias")
            name = next(n for n, t in zip(names, small, strict=True) if t is tensor)
            if tensor.numel() != channels:
                raise RuntimeError(
                    f"{name} should contain {channels} elements not {tensor.numel()}: "
                    f"one for each channel of an input of shape {list(shape)}"
                )
            refuse(name, tensor, input)


def row_statistics(
    name: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """What `name`, layer norm or RMS norm, asks of its arguments."""
    if type(normalized_shape) is not tuple and not isinstance(normalized_shape, Sequence):
        raise TypeError(
            "normalized_shape must be a tuple or list of ints, "
            f"but got {type(normalized_shape).__name__}"
        )
    axes = len(normalized_shape)
    if axes == 0:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one "
            f"element, but got normalized_shape = {list(normalized_shape)}"
        )
    size = torch.Size(normalized_shape)
    try:  # costs nothing until it fails
        device = input.device
        for tensor in (weight, bias):
            if tensor is not None and (
                tensor.shape != size
                or (tensor.dtype not in FLOATS and not _is_complex(name, input, tensor))
                or tensor.device != device
            ):
                small = "weight" if tensor is weight else "bias"
                if tensor.shape != size:
                    raise RuntimeError(
                        f"Expected {small} to be of same shape as normalized_shape, but got "
                        f"{small} of shape {list(tensor.shape)} and "
                        f"normalized_shape = {list(normalized_shape)}"
                    )
                refuse(small, tensor, input)
        if input.shape[-axes:] != size:
            _refuse_shape(name, input.shape, normalized_shape)
        if input.dtype not in FLOATS and not _is_complex(name, input):
            raise NotImplementedError(f"\"{name}\" not implemented for '{scalar_type(input)}'")
    except AttributeError:
        require_tensors(input=input, weight=weight, bias=bias)
        raise


def _is_complex(name: str, *tensors: Tensor) -> bool:
    """Whether these are complex numbers, of which torch has an RMS norm, but no layer norm."""
    return name == "rms_norm" and all(tensor.dtype in COMPLEX for tensor in tensors)


def _refuse_shape(name: str, shape: Sequence[int], normalized_shape: Sequence[int]) -> None:
    wanted = ", ".join(["*", *map(str, normalized_shape)])
    # torch's rms_norm counts the axes first, with an error of its own
    kind = ValueError if name == "rms_norm" and len(shape) < len(normalized_shape) else RuntimeError
    raise kind(
        f"Given normalized_shape={list(normalized_shape)}, expected input with shape [{wanted}], "
        f"but got input of size {list(shape)}"
    )


def _per_channel(shape: Sequence[int]) -> int:
    count = shape[0]
    for size in shape[2:]:
        count *= size
    return count
