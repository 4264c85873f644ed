"""What a layer's weight does: its norm, its gradient's, its last update, and units that are alike.

Two units stay alike for ever when their weights are equal and get equal gradients. Each row of the
weight, and of its gradient, is projected onto one fixed vector: equal rows have equal projections,
and different rows do not, but by a coincidence in both.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm.signals.moments import Number, number, vector_norm

ALIKE = 1e-5
"""Projections that differ by less, of the largest, are equal: rounding moves them by 1e-7."""
COLUMNS = 128
"""Of a long row about the first so many elements serve."""


class Weight:
    """Watches one parameter named `weight`; tensors stay on its device."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.rows = _rows_of(module)
        self.gradient_norm: Number | None = None
        self.ratio: Number | None = None
        self.projections: tuple[Tensor, ...] | None = None
        self._kept: Tensor | None = None  # their memory, taken before the model takes its own
        if self.rows is not None and not isinstance(parameter, nn.UninitializedParameter):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            units = parameter.shape[self.rows]
            self._kept = torch.empty(2, units, dtype=wide, device=parameter.device)
        self._before: Tensor | None = None

    @torch.no_grad()
    def after_backward(self, parameter: Tensor) -> None:
        """Called when the gradient is complete, and still there."""
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
            self.gradient_norm = number(vector_norm(gradient))
            return
        self.gradient_norm = number(vector_norm(gradient))
        if self.rows is not None:
            found = [_project(t, self.rows) for t in (parameter, gradient)]
            kept = self._kept
            if kept is not None and kept.shape[1:] == found[0].shape:
                found = [k.copy_(t) for k, t in zip(kept, found, strict=True)]
            self.projections = tuple(found)

    @torch.no_grad()
    def before_step(self, sample: int) -> None:
        self._before = self._part(sample).clone()

    @torch.no_grad()
    def after_step(self, sample: int) -> None:
        if self._before is None:
            return
        change = vector_norm(self._part(sample) - self._before)
        self.ratio = number(change / vector_norm(self._before))
        self._before = None

    def norm(self) -> Number:
        return number(vector_norm(self.parameter.detach()))

    def _part(self, sample: int) -> Tensor:
        whole = self.parameter.detach()
        step = max(1, math.ceil(whole.numel() / sample))
        return whole[:: min(step, len(whole))] if whole.dim() else whole


def alike(weights: Tensor, gradients: Tensor) -> float:
    """The share of units that have a twin, from the projections, on the CPU."""
    if len(weights) < 2 or not (weights.isfinite().all() and gradients.isfinite().all()):
        return 0.0
    keys = _steps(weights) * (4 / ALIKE) + _steps(gradients)
    _, counts = torch.unique(keys, return_counts=True)
    return float(counts[counts > 1].sum()) / len(weights)


def _steps(values: Tensor) -> Tensor:
    values = values.double()
    scale = values.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return (values / (ALIKE * scale)).round()


def _rows_of(module: Any) -> int | None:
    """The axis of the weight that counts units; None where that has no meaning."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1 if module.groups == 1 else None
    kinds = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
    return 0 if isinstance(module, kinds) and getattr(module, "groups", 1) == 1 else None


def _project(weight: Tensor, axis: int) -> Tensor:
    units = weight.detach().movedim(axis, 0)
    # cut before it is flattened, which copies a weight in channels_last
    taps = units[0, 0].numel() if units.numel() else 1
    rows = units[:, : max(1, COLUMNS // taps)].flatten(1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide) @ _vector(rows.shape[1], wide, rows.device)


@functools.cache
def _vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The fractional parts of k·φ: spread evenly, without a pattern that a weight could have."""
    index = torch.arange(size, device=device, dtype=torch.float32)
    return (index * 0.6180339887).frac_().to(dtype).add_(0.5)
