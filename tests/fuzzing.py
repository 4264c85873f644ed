"""What random calls are made of: layouts, kinks, and the run itself."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastnorm

KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}
"""Where a derivative jumps: there rounding decides which of two it is."""

LAYOUTS = ("contiguous", "channels innermost", "permuted", "sliced", "expanded", "offset")


def laid_out(values: Tensor, layout: str, axis: int) -> Tensor:
    """The values (with "expanded" the first of the axis) at other strides, among NaN."""
    axis = min(axis, values.ndim - 1)
    if layout == "channels innermost" and values.ndim > 1:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return values.movedim(axis, 0).contiguous().movedim(0, axis)
    if layout == "expanded" and values.shape[axis] > 0:
        return values.narrow(axis, 0, 1).clone().expand(values.shape)
    if layout == "sliced":
        shape = list(values.shape)
        shape[axis] = 2 * shape[axis] + 1
        wide = values.new_full(shape, float("nan"))
        inner = wide.narrow(axis, 1, shape[axis] - 1)
        inner = inner.unflatten(axis, (values.shape[axis], 2)).select(axis + 1, 0)
        return inner.copy_(values)
    if layout == "offset":
        flat = values.new_full((values.numel() + 2,), float("nan"))
        return flat[1:-1].view(values.shape).copy_(values)
    return values.contiguous()


def fuzz(cases: st.SearchStrategy[Any], check: Callable[[Any], None], examples: int) -> None:
    """Check so many cases, the same ones every time."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        check(case)

    run()


def at_length(device: torch.device) -> int:
    """Examples of a long run: a GPU compiles for most of them, the interpreter takes a second."""
    if device.type == "cuda":
        return 200
    return 400 if fastnorm.backend_for(torch.ones(1, device=device)) == "triton" else 1500
