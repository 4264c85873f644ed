"""Every operation on another device than the CPU, without one: run in a process of its own.

Tensors are on the meta device. What a launcher or an autograd function makes without saying where
is on the CPU, and does not go with them; and there are no values for the host to wait for.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from case import Case
from grid import OPTION_CASES, SMALL_CASES
from launches import H200, recording
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm.kernels.devices import assume


class AsOnAGpu(TorchDispatchMode):
    """Refuses what torch's kernels of a GPU refuse, and those of no device do not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        operands: list[Any] = []
        if name == "native_layer_norm":
            operands = [args[0], *args[2:4]]
        elif name == "native_group_norm":
            operands = list(args[:3])
        elif name in ("native_batch_norm", "_native_batch_norm_legit"):
            wide = args[0] if args[0].dtype is torch.float64 else torch.empty(0)
            operands = [wide, *args[1:5]]  # of any input but float64, float32
        dtypes = {t.dtype for t in operands if isinstance(t, Tensor)}
        if len(dtypes) > 1:
            raise RuntimeError(f"{name} of {dtypes}")
        return func(*args, **(kwargs or {}))


WAITS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
)
"""Of a tensor: what it asks the host waits for."""


class NothingOnTheHost(TorchFunctionMode):
    """Refuses what makes the host wait for a GPU, or copies to one: no CUDA graph captures it.

    It sees calls from Python, and is no dispatch mode, for which kernels would be operators.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the device")
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, (tuple, list)) else (found,)
        if any(isinstance(t, Tensor) and not t.is_meta for t in (*args, *made)):
            raise RuntimeError(f"{name} has a tensor on the host")
        return found


@contextlib.contextmanager
def launching() -> Iterator[list[Any]]:
    with recording() as launches, NothingOnTheHost():
        yield launches


@contextlib.contextmanager
def eager() -> Iterator[list[Any]]:
    with fastnorm.use_backend("eager"), assume(H200), AsOnAGpu():
        yield []


def check(case: Case, how: Any) -> int:
    """How many launches the case took, whose tensors are all where its input is."""
    found: list[Tensor] = []

    def kept(outputs: Any, leaves: Any, seeds: Any) -> Any:
        # not `grad`, which hides what it runs from the mode around it
        gradients = _engine_run_backward(
            tuple(outputs), tuple(seeds), False, False, tuple(leaves), False, accumulate_grad=False
        )
        found.extend((*outputs, *gradients))
        return gradients

    with how() as launches, mock.patch.object(torch.autograd, "grad", kept):
        case.forward_and_backward(case.inputs("meta"))
    assert found, case
    for launch in launches:
        found += [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    assert all(tensor.is_meta for tensor in found), case
    return len(launches)


def main() -> None:
    cases = (*SMALL_CASES, *OPTION_CASES)
    launches = sum(check(case, launching) for case in cases)
    for case in cases:
        check(case, eager)
    print(len(cases), launches)


if __name__ == "__main__":
    main()
