"""What a layer's weight does: its norm, its gradient's, its last update, and units that are alike.

Two units stay alike for ever when their weights are equal and get equal gradients. Each row of the
weight, and of its gradient, is projected onto one fixed vector: equal rows have equal projections,
and different rows do not, but by a coincidence in both.
"""

import functools
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm.signals.moments import Number, flat, norm
from fastnorm.signals.tensors import is_plain

ALIKE = 1e-5
"""Projections that differ by less, of the largest, are equal: rounding moves them by 1e-7."""
COLUMNS = 128
"""Of a long row about the first so many elements serve."""
_ALONE = nullcontext()


class Weight:
    """Watches one parameter named `weight`; tensors stay on its device."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.rows = None if parameter.is_complex() else _rows_of(module)
        self.attached = False
        self.gradient_norm: Number | None = None
        self.ratio: Number | None = None
        self.projections: tuple[Tensor, ...] | None = None
        self._kept: Tensor | None = None  # their memory, taken before the model takes its own
        if self.rows is not None and not self.lazy:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            units = parameter.shape[self.rows]
            with torch.inference_mode(False):
                self._kept = torch.empty(2, units, dtype=wide, device=parameter.device)
        self._before: Tensor | None = None

    @property
    def lazy(self) -> bool:
        """Whether the parameter has no shape yet."""
        return isinstance(self.parameter, nn.UninitializedParameter)

    def after_backward(self, parameter: Tensor) -> None:
        """Called when the gradient is complete, and still there."""
        gradient = parameter.grad
        if gradient is None:
            return
        gradient = gradient.detach()
        if gradient.is_sparse:
            self.gradient_norm = norm(gradient.coalesce().values())
            return
        if not is_plain(gradient):
            return
        self.gradient_norm = norm(gradient)
        if self.rows is not None and gradient.numel():
            both = (parameter.detach(), gradient)
            kept = self._kept if self._kept is not None else (None, None)
            self.projections = tuple(
                _project(t, self.rows, place) for t, place in zip(both, kept, strict=True)
            )

    def before_step(self, sample: int) -> None:
        self._before = self._part(sample).clone() if is_plain(self.parameter) else None

    def after_step(self, sample: int) -> None:
        if self._before is None:
            return
        change, before = norm(self._part(sample) - self._before), norm(self._before)
        if isinstance(before, float) and before == 0:
            self.ratio = math.inf if change else math.nan
        else:
            self.ratio = change / before
        self._before = None

    def norm(self) -> list[Number]:
        return [norm(self.parameter.detach())] if is_plain(self.parameter) else []

    def _part(self, sample: int) -> Tensor:
        whole = self.parameter.detach()
        step = max(1, math.ceil(whole.numel() / sample))
        return whole[:: min(step, len(whole))] if whole.dim() and len(whole) else whole


def alike(weights: Tensor, gradients: Tensor) -> float:
    """The share of units that have a twin, from the projections, on the CPU."""
    if len(weights) < 2:
        return 0.0
    ordered = weights.sort().values
    largest = max(-ordered[0].item(), ordered[-1].item())
    if (ordered.diff() > ALIKE * largest).all():  # most have none; NaN comes last
        return 0.0
    if not (weights.isfinite().all() and gradients.isfinite().all()):
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


def _project(weight: Tensor, axis: int, out: Tensor | None) -> Tensor:
    units = weight.shape[axis]
    whole = flat(weight) if axis == 0 else None
    if whole is not None:  # no copy; the order within a row is any, the same for all rows
        rows = whole.view(units, -1)[:, :COLUMNS]
    else:
        first = weight.movedim(axis, 0)
        taps = first[0, 0].numel()
        rows = first[:, : max(1, COLUMNS // taps)].flatten(1)
    wide = torch.promote_types(rows.dtype, torch.float32)
    if out is not None and (out.dtype is not wide or out.device != rows.device):
        out = None  # the model has been moved
    vector, device = _vector(rows.shape[1], wide, rows.device), rows.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _ALONE:
        return torch.mv(rows.to(wide), vector, out=out)  # in 16 bits units would look alike


@functools.cache
def _vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The fractional parts of k·φ: spread evenly, without a pattern that a weight could have."""
    index = torch.arange(size, device=device, dtype=torch.float32)
    return (index * 0.6180339887).frac_().to(dtype).add_(0.5)
