"""Watch: the hooks on one layer, and what they add up."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm.signals.layers import LayerSignal
from fastnorm.signals.moments import Moments, Norms, Number, number
from fastnorm.signals.samples import Samples, units_axis
from fastnorm.signals.weights import Weight, alike
from fastnorm.structure import activations, layers
from fastnorm.structure.activations import Activation

BOUNDS = {
    "tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0), "hardtanh": (-1.0, 1.0), "hardsigmoid": (0.0, 1.0),
    "softsign": (-1.0, 1.0),
}  # fmt: skip
SMALL_PLANE = 200
"""Positions, below which torch reduces over samples and positions at once 5 to 25 times slower."""
DYING = frozenset(("relu", "relu6"))
WEIGHTED = (
    nn.Linear, nn.Bilinear, *layers.CONVOLUTIONS, *layers.RECURRENT, *layers.FUSED,
    nn.MultiheadAttention,
)  # fmt: skip


class Watch:
    """What one layer, or one function called after it, was seen to do."""

    def __init__(self, name: str, module: nn.Module | None, activation: Activation | None) -> None:
        self.name, self.module = name, module
        self.kind = str(activation) if module is None else type(module).__name__
        self.bounds = _bounds(module, activation)
        self.dying = activation is not None and activation.name in DYING
        self.output, self.gradient = Moments(), Norms()
        self.peak: Tensor | None = None  # by unit, of a ReLU
        self.values = 0
        self.weight = _weight(module)
        self.batch_norm: BatchNormGap | None = None
        if isinstance(module, (*layers.BATCH_NORMS, *layers.FUSED)):
            self.batch_norm = BatchNormGap(module)

    def forward(self, output: Tensor, event: int, last: bool, samples: Samples) -> Tensor:
        """See a call's output, detached; the sample of it, (values, units)."""
        axis = units_axis(output, last)
        picked = samples.take(output, axis)
        samples.later(lambda: self.output.add(picked, self.bounds, samples.scratch(picked)))
        self.output.failed.add(number(total(output)), event)
        if self.dying and output.dim() > 1 and output.numel():
            peak = _peak(output, axis)
            same = self.peak is not None and self.peak.shape == peak.shape
            self.peak = torch.maximum(self.peak, peak) if same and self.peak is not None else peak
            self.values += output.numel() // output.shape[axis]
        return picked

    def backward(self, gradient: Tensor, event: int) -> None:
        self.gradient.add(gradient.detach(), event)

    def parts(self) -> list[list[Number]]:
        """All that has to come from the device: groups of numbers, and last the projections."""
        weight = self.weight
        return [
            self.output.parts,
            self.output.failed.parts,
            self.gradient.parts,
            self.gradient.failed.parts,
            [(self.peak <= 0).sum()] if self.peak is not None else [],
            [] if weight is None else weight.norm(),
            [] if weight is None or weight.gradient_norm is None else [weight.gradient_norm],
            [] if weight is None or weight.ratio is None else [weight.ratio],
            [] if self.batch_norm is None else self.batch_norm.gaps,
            [] if weight is None else list(weight.projections or ()),
        ]

    def signal(self, values: list[list[Number]]) -> LayerSignal:
        """The numbers, from the values of `parts()` on the CPU."""
        numbers = [[float(v) for v in group if _is_number(v)] for group in values]
        output = self.output.numbers(numbers[0])
        dead = _only(numbers[4])
        gaps = self.batch_norm.numbers(numbers[8]) if self.batch_norm is not None else {}
        return LayerSignal(
            name=self.name,
            kind=self.kind,
            calls=self.output.calls,
            mean=output["mean"],
            std=output["std"],
            zeros=output["zeros"],
            saturated=output["saturated"] if self.bounds else math.nan,
            dead=dead / self.peak.numel() if self.peak is not None else math.nan,
            values=self.values,
            gradient_norm=self.gradient.number(numbers[2]),
            weight_norm=_only(numbers[5]),
            weight_gradient_norm=_only(numbers[6]),
            update_ratio=_only(numbers[7]),
            identical=alike(*map(torch.as_tensor, values[9])) if values[9] else 0.0,
            failed=self.output.failed.number(numbers[1]),
            gradient_failed=self.gradient.failed.number(numbers[3]),
            bounded=bool(self.bounds),
            weighted=isinstance(self.module, WEIGHTED),
            **gaps,
        )


class BatchNormGap:
    """How a BatchNorm's running statistics differ from its last batch's, and how few values it had.

    Of a layer fused with its norm only the latter is seen: the norm's input exists nowhere.
    """

    def __init__(self, module: Any) -> None:
        parts = layers.fused_parts(module)
        self.norm: Any = module if parts is None else getattr(module, parts[1])
        self.fused = parts is not None
        self.samples: int | None = None
        self.values = self.batch = 0
        self.gaps: list[Number] = []
        self._picked: Tensor | None = None  # a sample of the last batch, until it is settled

    def see(self, input: Tensor, picked: Tensor | None, samples: Samples) -> None:
        """A call of the norm; of a fused layer, its output stands for the norm's input.

        `picked` is a sample of the input, where there is one already.
        """
        axis = input.dim() - 1 if self.fused and isinstance(self.norm, nn.BatchNorm1d) else 1
        axis = min(axis, input.dim() - 1)
        if input.numel() == 0:
            return
        batch, values = input.shape[0], input.numel() // input.shape[axis]
        if self.norm.training:
            self.samples = batch if self.samples is None else min(self.samples, batch)
            self.values = values if not self.values else min(self.values, values)
        if self.fused or self.norm.running_mean is None or values < 2:
            return
        self._picked = samples.take(input, axis) if picked is None else picked
        self.batch = min(batch, len(self._picked))
        samples.later(lambda: self._settle(samples))

    @torch.no_grad()
    def _settle(self, samples: Samples) -> None:
        picked, self._picked = self._picked, None
        mean, var = self.norm.running_mean, self.norm.running_var
        if picked is None or mean is None or var is None:
            return
        batch_mean = picked.mean(0)
        centred = torch.sub(picked, batch_mean, out=samples.scratch(picked))
        batch_var = centred.square_().mean(0)
        running = var.to(picked.dtype) + self.norm.eps
        mean_gap = ((batch_mean - mean.to(picked.dtype)).square() / running).mean().sqrt()
        var_gap = ((batch_var + self.norm.eps) / running).log2().abs().mean()
        tracked = self.norm.num_batches_tracked
        count = math.nan if tracked is None else number(tracked.clone())
        self.gaps = [number(mean_gap), number(var_gap), count]

    def numbers(self, numbers: list[float]) -> dict[str, Any]:
        seen: dict[str, Any] = {
            "samples": self.samples, "channel_values": self.values,
            "training": bool(self.norm.training), "momentum": self.norm.momentum,
        }  # fmt: skip
        if self.gaps:
            seen["mean_gap"], seen["var_gap"], seen["batches_tracked"] = numbers[:3]
            seen["gap_samples"] = self.batch
        return seen


def _peak(output: Tensor, axis: int) -> Tensor:
    """The largest value of each unit."""
    others = [a for a in range(output.dim()) if a != axis]
    plane = output[0, 0].numel()
    if axis == 1 and 1 < plane < SMALL_PLANE and output.is_contiguous():
        output = output.amax(0, keepdim=True)  # vectorized along channels and positions
    return output.amax(others)


def _bounds(module: Any, activation: Activation | None) -> tuple[float, ...]:
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return module.min_val, module.max_val
    return BOUNDS.get(activation.name, ()) if activation is not None else ()


def _weight(module: Any) -> Weight | None:
    if module is None:
        return None
    parts = layers.fused_parts(module)
    module = getattr(module, parts[0]) if parts is not None else module
    for name in ("weight", "in_proj_weight", "weight_ih_l0", "weight_ih"):
        parameter = module._parameters.get(name)
        if parameter is not None:
            return Weight(module, parameter)
    return None


def total(tensor: Tensor) -> Tensor:
    """The sum of all elements: not finite where one of them is not. The fastest pass there is."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


def _is_number(value: Number) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _only(values: list[float]) -> float:
    return values[0] if values else math.nan


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, or that a norm or fused layer of fastnorm ends with."""
    parts = layers.fused_parts(module)
    if parts is not None:
        return activations.of_norm(getattr(module, parts[1]))
    if isinstance(module, layers.NORMS):
        return activations.of_norm(module)
    return activations.of_module(module)


def units_last(module: nn.Module) -> bool:
    """Whether a layer's units are on the last axis; in convolutions and channel norms on axis 1."""
    channels = (nn.modules.batchnorm._NormBase, nn.GroupNorm, *layers.CONVOLUTIONS)
    parts = layers.fused_parts(module)
    return parts == ("linear", "norm") or (parts is None and not isinstance(module, channels))


def is_watched(module: nn.Module) -> bool:
    if isinstance(module, (*layers.LAYERS, *layers.NORMS, *layers.FUSED)):
        return True
    passing = (*layers.VIEWS, *layers.DROPOUTS, *layers.POOLS)
    return activations.of_module(module) is not None and not isinstance(module, passing)
