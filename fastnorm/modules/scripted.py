"""What torch.jit.script compiles of the modules: torch.nn's forward, then residual and activation.

TorchScript has no kernels and no tables of functions. It takes the branch of a forward in which
`is_scripting()` is true, and does not read the others.
"""

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import is_scripting as is_scripting


def method_of(forward: Callable[..., Any]) -> Callable[..., Tensor]:
    """torch.nn's `forward` as a method of another name, by which TorchScript tells them apart."""
    assert isinstance(forward, types.FunctionType)
    method = types.FunctionType(
        forward.__code__, forward.__globals__, "forward_of_torch", forward.__defaults__
    )
    method.__annotations__ = forward.__annotations__
    return method


def finished(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """`activation(z + residual)`."""
    if residual is not None:
        z = z + residual
    if activation == "relu":
        z = F.relu(z)
    elif activation == "relu6":
        z = F.relu6(z)
    elif activation == "leaky_relu":
        z = F.leaky_relu(z)
    elif activation == "elu":
        z = F.elu(z)
    elif activation == "silu":
        z = F.silu(z)
    elif activation == "gelu":
        z = F.gelu(z)
    elif activation == "gelu_tanh":
        z = F.gelu(z, approximate="tanh")
    elif activation == "tanh":
        z = z.tanh()
    elif activation == "sigmoid":
        z = z.sigmoid()
    elif activation == "hardswish":
        z = F.hardswish(z)
    return z
