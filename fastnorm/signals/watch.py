"""Watch: the hooks on one layer, and what they add up."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from fastnorm.signals.gaps import BatchNormGap
from fastnorm.signals.layers import LayerSignal
from fastnorm.signals.moments import First, Moments, Norms, Number, moments_of, number
from fastnorm.signals.samples import Samples, units_axis
from fastnorm.signals.tensors import OnCpu
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


class Kind(NamedTuple):
    """What a module is by its class alone; asked of every module of a model."""

    watched: bool
    units_last: bool | None
    """Whether units are on the last axis; in convolutions and channel norms they are on axis 1.
    None: as in the layer before."""
    weighted: bool
    batch_norm: bool
    activates: bool
    """Whether it may be, or end with, an activation."""
    open: bool = False
    """Whether the functions that it calls are seen, too."""


def kind(module: nn.Module) -> Kind:
    of = type(module)
    if of not in _KINDS:
        _KINDS[of] = _kind(of)
    known = _KINDS[of]
    own = not (known.watched or module._modules) and module._parameters
    return _own(module._parameters) if own else known


def _own(parameters: Mapping[str, nn.Parameter | None]) -> Kind:
    """Of a layer that someone has written, with parameters and no parts."""
    weight = parameters.get("weight")
    matrix = weight is not None and not isinstance(weight, UninitializedParameter)
    weighted = bool(matrix and weight is not None and weight.dim() > 1)
    return Kind(True, None, weighted, batch_norm=False, activates=False, open=True)


def _kind(of: type[nn.Module]) -> Kind:
    signal = issubclass(of, (*layers.LAYERS, *layers.NORMS, *layers.FUSED))
    passing = issubclass(of, (*layers.VIEWS, *layers.DROPOUTS, *layers.POOLS))
    channels = (nn.modules.batchnorm._NormBase, nn.GroupNorm, *layers.CONVOLUTIONS)
    fused = layers.FUSED_CONVOLUTIONS
    activation = activations.name_of(of) is not None
    return Kind(
        watched=signal or (activation and not passing),
        units_last=not issubclass(of, (*channels, *fused)) if signal else None,
        weighted=issubclass(of, WEIGHTED),
        batch_norm=issubclass(of, (*layers.BATCH_NORMS, *layers.FUSED)),
        activates=activation or issubclass(of, (*layers.NORMS, *layers.FUSED)),
    )


_KINDS: dict[type[nn.Module], Kind] = {}


class Watch:
    """What one layer, or one function called after it, was seen to do."""

    def __init__(
        self, name: str, module: nn.Module | None, activation: Activation | None = None
    ) -> None:
        self.name = name
        self.kind = str(activation) if module is None else type(module).__name__
        self.units_last, self.weighted, self.batch_norm, self.open = None, False, None, False
        if module is not None:
            _, self.units_last, self.weighted, batch_norm, activates, self.open = kind(module)
            self.batch_norm = BatchNormGap.of(module) if batch_norm else None
            activation = activation_of(module) if activates else None
        self.bounds = _bounds(module, activation) if activation is not None else ()
        self.dying = activation is not None and activation.name in DYING
        self.output, self.gradient = Moments(), Norms()
        self.peak: Tensor | None = None  # by unit, of a ReLU
        self.dead: Number = math.nan
        self.values = 0
        self.weight = _weight(module)

    def attach(self) -> list[RemovableHandle]:
        """A hook on the weight, where there is one, and none yet."""
        return [] if self.weight is None else self.weight.attach()

    def forward(self, output: Tensor, event: int, last: bool, samples: Samples) -> Tensor:
        """See a call's output, detached; the sample of it, (values, units)."""
        axis = units_axis(output, last)
        picked = samples.take(output, axis)
        samples.later(_add, (self, picked))
        sum_of = output
        if self.dying and output.dim() > 1 and output.numel():
            # nothing is below 0 here: what is not finite is a unit's largest value, too
            sum_of = peak = _peak(output, axis)
            same = self.peak is not None and self.peak.shape == peak.shape
            self.peak = torch.maximum(self.peak, peak) if same and self.peak is not None else peak
            self.values += output.numel() // output.shape[axis]
        self.output.failed.add(number(total(sum_of)), event)
        return picked

    def backward(self, gradient: Tensor, event: int) -> None:
        self.gradient.add(gradient.detach(), event)

    def finish(self) -> None:
        """What remains to be computed at the end of a recording."""
        if self.peak is not None:
            self.dead = number((self.peak <= 0).sum())
        if self.weight is not None:
            self.weight.finish()

    def parts(self) -> list[Number]:
        """All that may have to come from a device."""
        parts = [self.dead, self.gradient.squares, *self.output.parts]
        parts += [*self.output.failed.parts, *self.gradient.failed.parts]
        if self.weight is not None:
            parts += self.weight.parts
        return parts if self.batch_norm is None else parts + self.batch_norm.parts

    def read(self, value: Callable[[Number], float], identical: float) -> LayerSignal:
        """The numbers, `value` being that of one of `parts()`."""
        output = self.output.read(value)
        more: dict[str, Any] = self.weight.read(value) if self.weight is not None else {}
        if self.batch_norm is not None:
            more |= self.batch_norm.read(value)
        return LayerSignal(
            name=self.name,
            kind=self.kind,
            calls=self.output.calls,
            mean=output["mean"],
            std=output["std"],
            zeros=output["zeros"],
            saturated=output["saturated"] if self.bounds else math.nan,
            dead=value(self.dead) / self.peak.numel() if self.peak is not None else math.nan,
            values=self.values,
            gradient_norm=self.gradient.read(value),
            identical=identical,
            failed=self.output.failed.read(value),
            gradient_failed=self.gradient.failed.read(value),
            bounded=bool(self.bounds),
            weighted=self.weighted,
            **more,
        )


@torch.no_grad()
def collect(watches: Sequence[Watch], inputs: First) -> tuple[list[LayerSignal], float]:
    """Every layer's numbers, and when an input was not finite: by one transfer from each device."""
    for watch in watches:
        watch.finish()
    pairs = [watch.weight.projections if watch.weight else None for watch in watches]
    vectors = [vector for pair in pairs if pair is not None for vector in pair]
    parts = [part for watch in watches for part in watch.parts()]
    home = OnCpu([*inputs.parts, *parts, *vectors])
    vectors = [home.vector(vector) for vector in vectors]
    shares = iter(alike(list(zip(vectors[::2], vectors[1::2], strict=True))))
    found = [
        watch.read(home.number, 0.0 if pair is None else next(shares))
        for watch, pair in zip(watches, pairs, strict=True)
    ]
    return found, inputs.read(home.number)


@torch.no_grad()
def _add(items: Sequence[tuple[Watch, Tensor]], samples: Samples) -> None:
    bounded: dict[tuple[float, ...], list[tuple[Watch, Tensor]]] = {}
    for watch, picked in items:
        bounded.setdefault(watch.bounds, []).append((watch, picked.view(-1)))
    for bounds, group in bounded.items():
        for places, stack in samples.stacks([sample for _, sample in group]):
            for place, found in zip(places, moments_of(stack, bounds), strict=True):
                group[place][0].output.add(stack.shape[1], *found)


def _peak(output: Tensor, axis: int) -> Tensor:
    """The largest value of each unit."""
    others = [a for a in range(output.dim()) if a != axis]
    plane = output[0, 0].numel()
    if axis == 1 and 1 < plane < SMALL_PLANE and output.is_contiguous():
        output = output.amax(0, keepdim=True)  # vectorized along channels and positions
    return output.amax(others)


def _bounds(module: Any, activation: Activation) -> tuple[float, ...]:
    if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
        return module.min_val, module.max_val
    return BOUNDS.get(activation.name, ())


def _weight(module: Any) -> Weight | None:
    if module is None:
        return None
    parts = layers.fused_parts(module)
    module = getattr(module, parts[0]) if parts is not None else module
    for name in ("weight", "in_proj_weight", "weight_ih_l0", "weight_ih"):
        parameter = module._parameters.get(name)
        if parameter is not None and parameter.dtype.itemsize > 1:  # torch sums no float8
            return Weight(module, parameter)
    return None


def total(tensor: Tensor) -> Tensor:
    """The sum of all elements: not finite where one of them is not. The fastest pass there is."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module is, or that a norm or fused layer of fastnorm ends with."""
    parts = layers.fused_parts(module)
    if parts is not None:
        return activations.of_norm(getattr(module, parts[1]))
    if isinstance(module, layers.NORMS):
        return activations.of_norm(module)
    return activations.of_module(module)
