"""What random calls are made of: layouts, tensors, tolerances, kinks, and the run itself."""

from collections.abc import Callable
from typing import Any

import torch
from cases import compute_dtype, tolerance
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


class Call:
    """The tensors of a case, drawn from its seed."""

    LEAVES = ("x", "weight", "bias", "residual")

    def __init__(self, case: Any, device: torch.device) -> None:
        self.case, self.device = case, device
        self.dtype = case.dtype  # that decides what is computed in
        self.generator = torch.Generator().manual_seed(case.seed)

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def large(self, values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
        return laid_out(values.to(self.device, dtype), layout, self.case.axis)

    def vector(self, values: Tensor, dtype: torch.dtype | None, layout: str) -> Tensor | None:
        return None if dtype is None else laid_out(values.to(self.device, dtype), layout, 0)

    def leaves(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self.LEAVES}
        if self.residual is self.x:
            del found["residual"]
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def wanted(self) -> list[str]:
        return [name for name in self.leaves() if name in self.case.wanted]


class Bounds:
    """How large the intermediate results are, and so what errors are allowed.

    `z` is the size of what the activation sees. Where values are stored in between, in 16 bits say,
    `between` and `between_dz` are what that costs, in units of half an ulp each.
    """

    z: Tensor
    between = between_dz = 0.0

    def __init__(self, call: Call) -> None:
        self.call = call

    def unit(self, dtype: torch.dtype) -> float:
        """What cases.py allows a result of size one."""
        compute = compute_dtype(self.call.dtype)
        return tolerance(dtype, torch.ones(1), compute=compute)["atol"]

    def uncertainty(self) -> Tensor:
        """Of z."""
        return self.unit(self.call.dtype) * self.z.clamp(min=1) + self.between * self.z

    def worst(self, value: Tensor, want: Tensor, allowed: Tensor) -> float:
        """The largest error, in units of what is allowed."""
        compute = compute_dtype(self.call.dtype)
        relative = tolerance(value.dtype, torch.ones(1), compute=compute)["rtol"]
        error = (value.double() - want).abs() - relative * want.abs()
        return (error / allowed).max().item()


def near_a_kink(activation: str, z: Tensor, band: Tensor) -> Tensor:
    """Where rounding decides which of two derivatives it is."""
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(activation, ()):
        near |= (z - kink).abs() <= band
    return near


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
