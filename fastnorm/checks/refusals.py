"""Errors that any check may raise about a tensor."""

from typing import NoReturn

import torch
from torch import Tensor

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""What is computed with."""
COMPLEX = frozenset({torch.complex64, torch.complex128})
"""What torch has an RMS norm of besides."""


def refuse(name: str, tensor: Tensor, input: Tensor) -> NoReturn:
    """Raise what is wrong with the device, dtype or type of `name`, the `tensor`."""
    require_tensors(**{"input": input, name: tensor})  # an array has a device, too
    if tensor.device != input.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{input.device} and {tensor.device} (of {name})!"
        )
    raise RuntimeError(f"{name} must be of a floating-point type, but got {scalar_type(tensor)}")


def require_tensors(**arguments: object) -> None:
    """All of them, by name: tensors, or None where it is not the input."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, but got {type(value).__name__}")
    if arguments["input"] is None:
        raise TypeError("input must be a Tensor, but got None")


def require_operands(input: object, weight: object, bias: object) -> None:
    """A linear layer or a convolution does not go without a weight."""
    if weight is None:
        raise TypeError("weight must be a Tensor, but got None")
    require_tensors(input=input, weight=weight, bias=bias)


def scalar_type(tensor: Tensor) -> str:
    """torch's own name of a dtype, such as Long or ComplexFloat."""
    require_tensors(input=tensor)  # an array has a dtype, too
    return torch.empty(0, dtype=tensor.dtype).type().split(".")[-1].removesuffix("Tensor")
