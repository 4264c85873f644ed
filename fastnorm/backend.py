"""The only place that asks which implementation serves a tensor."""

import functools
import importlib
import importlib.util
import os
import threading
from types import ModuleType, TracebackType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastnorm import eager

BACKENDS = ("auto", "triton", "eager")
TRITON_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but got {name!r}")
    return name


class _Asked(threading.local):
    """.name: what this thread's innermost use_backend() asked for; before any, the environment."""

    name = _checked(os.environ.get("FASTNORM_BACKEND", "auto"), "FASTNORM_BACKEND")

    def __init__(self) -> None:  # once in each thread
        self.outer: list[str] = []


_asked = _Asked()


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
        _asked.outer.append(_asked.name)
        _asked.name = self.name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _asked.name = _asked.outer.pop()


def backend_for(tensor: Tensor) -> str:
    """The backend, `"triton"` or `"eager"`, that an operation on `tensor` takes now.

    `auto` is Triton for CUDA and HIP tensors of float16, bfloat16, float32 or float64 where Triton
    imports, else eager. Empty tensors, tensors that wrap others (DTensor), and tensors inside
    `torch.func` transforms or forward-mode differentiation are always served by eager.

    Raises:
        RuntimeError: Triton was asked for by name and cannot run on the tensor's device.

    >>> import torch, fastnorm
    >>> fastnorm.backend_for(torch.ones(0, 3))
    'eager'
    """
    name = _asked.name
    if name == "eager" or (name == "auto" and not tensor.is_cuda):
        return "eager"
    if tensor.dtype not in TRITON_DTYPES or tensor.numel() == 0:
        return "eager"
    if _transformed() or hasattr(tensor, "__tensor_flatten__"):  # a DTensor has no memory itself
        return "eager"
    if name == "auto":
        return "triton" if _has_triton() else "eager"
    _require_triton(tensor)
    return "triton"


def implementation(tensor: Tensor) -> ModuleType:
    """`fastnorm.ops` or `fastnorm.eager`: two modules with the same functions."""
    if _asked.name == "auto" and not tensor.is_cuda:  # a CPU's calls are short
        return eager
    return _ops() if backend_for(tensor) == "triton" else eager


def _transformed() -> bool:
    """Kernels see raw memory: inside vmap, jvp and the like it is not the caller's tensor."""
    in_transform: bool = torch._C._functorch.peek_interpreter_stack() is not None
    return in_transform or forward_ad._current_level >= 0


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _ops() -> ModuleType:
    return importlib.import_module("fastnorm.ops")


def _require_triton(tensor: Tensor) -> None:
    if not _has_triton():
        raise RuntimeError("the triton backend was asked for, but triton is not installed")
    if not tensor.is_cuda and not (tensor.is_cpu and _interpreting()):
        raise RuntimeError(
            f"the triton backend was asked for a tensor on {tensor.device}: it needs a CUDA or HIP "
            "tensor, or Triton's interpreter (set TRITON_INTERPRET=1 before triton is imported)"
        )


@functools.cache
def _interpreting() -> bool:
    """Whether Triton, and what it decorates from now on, are interpreted: asked of functions."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def probe() -> None:
        pass

    return type(probe).__name__ == type(tl.cdiv).__name__ == "InterpretedFunction"
