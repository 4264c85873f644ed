"""What a layer's weight does: its norm, its gradient's, its last update, and units that are alike.

Two units stay alike for ever when their weights are equal and get equal gradients. Each row of the
weight, and of its gradient, is projected onto one fixed vector: equal rows have equal projections,
and different rows do not, but by a coincidence in both.
"""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastnorm.signals.moments import Number, flat, norm
from fastnorm.signals.tensors import is_plain

ALIKE = 1e-5
"""Projections that differ by less, of the largest, are equal: rounding moves them by 1e-7."""
WIDE = 2.0**37
"""More than the keys of a layer span: (4/ALIKE + 1) times twice 1/ALIKE."""
COLUMNS = 128
"""Of a long row about so many elements serve: those in its middle, since the first inputs of all
may be the dark border of an image."""
RUN = 16
"""Elements of a cache line, in float32."""
_ALONE = nullcontext()


class Weight:
    """Watches one parameter named `weight`; tensors stay on its device."""

    def __init__(self, module: nn.Module, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.rows = None if parameter.is_complex() else _rows_of(module)
        self.attached = False
        self.norm: Number = math.nan
        self.gradient_norm: Number = math.nan
        self.ratio: Number = math.nan
        self.projections: tuple[Tensor, Tensor] | None = None
        """Rows of the weight and of its last gradient, as numbers that are equal where they are."""
        self.projected: Tensor | None = None  # the gradient
        self._kept: Tensor | None = None  # its memory, taken before the model takes its own
        if self.rows is not None and not self.lazy:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _ALONE:
                units = parameter.shape[self.rows]
                self._kept = torch.empty(units, dtype=wide, device=parameter.device)
        self._before: Tensor | None = None

    @property
    def lazy(self) -> bool:
        """Whether the parameter has no shape yet."""
        return isinstance(self.parameter, nn.UninitializedParameter)

    def attach(self) -> list[RemovableHandle]:
        """Have `after_backward` called; nothing where it is, or while the weight has no shape."""
        parameter: Any = self.parameter
        if self.attached or self.lazy or not parameter.requires_grad:
            return []

        def seen(parameter: Tensor) -> None:
            with torch._C.DisableTorchFunction():
                self.after_backward(parameter)

        self.attached = True
        return [parameter.register_post_accumulate_grad_hook(seen)]

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
            self.projected = _project(gradient, self.rows, self._kept)

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

    def finish(self) -> None:
        """Look at the weight as it is at the end: units that an update told apart are not alike."""
        whole = self.parameter.detach()
        if is_plain(whole):
            self.norm = norm(whole)
            if self.projected is not None and self.rows is not None:
                self.projections = _project(whole, self.rows, None), self.projected

    @property
    def parts(self) -> list[Number]:
        return [self.norm, self.gradient_norm, self.ratio]

    def read(self, value: Callable[[Number], float]) -> dict[str, Any]:
        return {
            "weight_norm": value(self.norm),
            "weight_gradient_norm": value(self.gradient_norm),
            "update_ratio": value(self.ratio),
        }

    def _part(self, sample: int) -> Tensor:
        """About `sample` elements in runs that share cache lines, evenly spread over the weight."""
        whole = self.parameter.detach()
        dense = flat(whole)
        if dense is None or len(dense) <= sample:
            return whole
        runs = max(1, sample // RUN)
        stride = max(1, (len(dense) - RUN) // max(1, runs - 1))
        return dense.as_strided((runs, RUN), (stride, 1), dense.storage_offset())


def alike(projections: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """By layer, the share of units that have a twin, from (weight, gradient) on the CPU."""
    if not projections:
        return []
    sizes = torch.tensor([len(weight) for weight, _ in projections], device="cpu")
    layer = torch.arange(len(projections), device="cpu").repeat_interleave(sizes)
    both = torch.stack([torch.cat([pair[k] for pair in projections]).double() for k in (0, 1)])
    finite = torch.ones_like(sizes, dtype=torch.bool)
    finite[layer[~both.isfinite().all(0)]] = False
    largest = both.new_zeros(2, len(projections))
    largest.scatter_reduce_(1, layer.expand(2, -1), both.abs(), "amax")
    largest.clamp_(min=torch.finfo(torch.float64).tiny)
    steps = (both / (ALIKE * largest[:, layer])).round().nan_to_num_(0.0, 0.0, 0.0)
    # all layers in one sort, each in a range of its own: exact in float64 up to 60,000 layers
    keys = (layer * WIDE + steps[0] * (4 / ALIKE) + steps[1]).sort().values
    same = keys.diff() == 0
    twins = nn.functional.pad(same, (1, 0)) | nn.functional.pad(same, (0, 1))
    count = both.new_zeros(len(projections)).index_add_(0, layer, twins.double())
    shares: list[float] = (count / sizes).where(finite & (sizes > 0), 0.0).tolist()
    return shares


def _rows_of(module: Any) -> int | None:
    """The axis of the weight that counts units; None where that has no meaning."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1 if module.groups == 1 else None
    kinds = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
    return 0 if isinstance(module, kinds) and getattr(module, "groups", 1) == 1 else None


def _project(weight: Tensor, axis: int, out: Tensor | None) -> Tensor:
    rows = _rows(weight, axis)
    wide = torch.promote_types(rows.dtype, torch.float32)
    if out is not None and (out.dtype is not wide or out.device != rows.device):
        out = None  # the model has been moved
    vector, device = _vector(rows.shape[1], wide, rows.device), rows.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _ALONE:
        return torch.mv(rows.to(wide), vector, out=out)  # in 16 bits units would look alike


def _rows(weight: Tensor, axis: int) -> Tensor:
    """The middle of each unit's weights, in any order that is the same for all units."""
    whole = flat(weight) if axis == 0 else None
    if whole is not None:
        units, length = weight.shape[0], len(whole) // weight.shape[0]
        count = min(COLUMNS, length)
        start = whole.storage_offset() + (length - count) // 2
        return whole.as_strided((units, count), (length, 1), start)
    first = weight.movedim(axis, 0)
    count = max(1, COLUMNS // first[0, 0].numel())
    start = max(0, (first.shape[1] - count) // 2)
    return first[:, start : start + count].flatten(1)


@functools.cache
def _vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The fractional parts of k·φ: spread evenly, without a pattern that a weight could have."""
    index = torch.arange(size, device=device, dtype=torch.float32)
    return (index * 0.6180339887).frac_().to(dtype).add_(0.5)
