"""The only place that asks which implementation serves a tensor."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnorm import eager, environment
from fastnorm.eager import native

BACKENDS = ("auto", "triton", "eager")
TRITON_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but got {name!r}")
    return name


DEFAULT = os.environ.get("FASTNORM_BACKEND", "auto")


def _is_command() -> bool:
    """Whether this process is the `fastnorm` command, which says in one line what is wrong.

    While Python looks for the module of `python -m`, the command line alone has its name.
    """
    if sys.argv[:1] == ["-m"]:
        return "fastnorm" in sys.orig_argv
    return Path(*sys.argv[:1]).stem == "fastnorm"


if not _is_command():
    _checked(DEFAULT, "FASTNORM_BACKEND")
_thread = environment.thread
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_interpreter = torch._C._functorch.peek_interpreter_stack
environment.Thread.default = _thread.name = DEFAULT


class use_backend:  # noqa: N801  a context manager, named like torch.no_grad
    """Within the block, and in this thread, choose the backend of every operation.

    Args:
        name: `"triton"`, `"eager"`, or `"auto"` (Triton where it can serve).

    Raises:
        ValueError: `name` is none of these.

    Blocks nest. The choice is made by the forward call; its backward follows it.

    >>> import torch, fastnorm
    >>> with fastnorm.use_backend("eager"):
    ...     fastnorm.backend_for(torch.ones(2, 3))
    'eager'
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "backend")

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            environment.traced.append(self.name)
        else:
            environment.thread.outer.append(environment.thread.name)
            environment.thread.name = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            environment.traced.pop()
        else:
            environment.thread.name = environment.thread.outer.pop()


def _name() -> str:
    """What was asked for. What is compiled is compiled again where that has changed."""
    if torch.compiler.is_dynamo_compiling():
        traced = environment.traced
        return traced[-1] if traced else cast(str, environment.name)
    return environment.thread.name


def backend_for(tensor: Tensor) -> str:
    """The backend, `"triton"` or `"eager"`, that an operation on `tensor` takes now.

    `auto` is Triton for CUDA and HIP tensors of float16, bfloat16, float32 or float64 where Triton
    imports, else eager. Empty tensors, nested and sparse ones, tensors that wrap others (DTensor),
    and tensors inside `torch.func` transforms, forward-mode differentiation or `torch.jit.trace`
    are always served by eager.

    Raises:
        RuntimeError: Triton was asked for by name and cannot run on the tensor's device.

    >>> import torch, fastnorm
    >>> fastnorm.backend_for(torch.ones(0, 3))
    'eager'
    """
    name = _name()
    if name == "eager" or (name == "auto" and not tensor.is_cuda):
        return "eager"
    if tensor.dtype not in TRITON_DTYPES or tensor.numel() == 0:
        return "eager"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "eager"
    # kernels see raw memory: a DTensor has none itself, and what vmap has is not the caller's
    if native.transformed() or hasattr(tensor, "__tensor_flatten__"):
        return "eager"
    if native.traced():  # TorchScript has no kernels
        return "eager"
    if name == "auto":
        return "triton" if environment.has_triton else "eager"
    _require_triton(tensor)
    return "triton"


def implementation(tensor: Tensor) -> ModuleType:
    """`fastnorm.ops`, its `operators` or `fastnorm.eager`: modules with the same functions."""
    if _name() == "auto" and not tensor.is_cuda:  # a CPU's calls are short
        return eager
    if backend_for(tensor) != "triton":
        return eager
    triton = environment.operators if torch.compiler.is_compiling() else environment.ops
    return cast(ModuleType, triton)


_REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)
"""What torch, and whoever looks at an argument, raises where it is wrong."""


def at_once(
    operation: Callable[..., Tensor | None], input: Tensor, *arguments: Any
) -> Tensor | None:
    """What `operation`, a `direct` of eager, makes of arguments that nobody has checked yet.

    torch's operators check theirs themselves, before they change anything, and a short call is over
    before we have looked at its arguments once more. None where more than one operator is needed,
    or a transform watches, or an argument is wrong: how is for `checks` to say. Other errors, such
    as the one by which a checkpoint ends its second forward, are not ours. A nested tensor has no
    shape that could be looked at: it is torch's wherever it is.
    """
    if (
        _is_dynamo_compiling()
        or type(input) is not Tensor
        or not (input.is_nested or (input.is_cpu and _thread.name != "triton"))
        or _interpreter() is not None  # these are `native.transformed`
        or forward_ad._current_level >= 0
    ):
        return None
    try:
        return operation(input, *arguments)
    except _REFUSALS:
        return None


def _require_triton(tensor: Tensor) -> None:
    if not environment.has_triton:
        raise RuntimeError("the triton backend was asked for, but triton is not installed")
    if not tensor.is_cuda and not (tensor.is_cpu and environment.interpreting):
        raise RuntimeError(
            f"the triton backend was asked for a tensor on {tensor.device}: it needs a CUDA or HIP "
            "tensor, or Triton's interpreter (set TRITON_INTERPRET=1 before triton is imported)"
        )
