"""Findings: what is wrong with a model's signals, by what was recorded and by its structure.

Each limit stands beside its reason. They are wide: a healthy model gives no finding.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from fastnorm.signals.layers import LayerSignal
from fastnorm.structure import NormPair, double_norms, read, redundant_biases

FACTOR = 100.0
"""Across all layers; a sound initialization keeps the signal within about 10."""
TINY = 1e-300
DEAD = 0.1
SEEN = 64
"""Values of a unit before it is called dead: of those active 1 time in 10, 0.1 % look dead."""
SATURATED = 0.25
"""A tanh of unit normal inputs has 2 % there, a sigmoid none."""
IDENTICAL = 0.1
FEW_SAMPLES = 8
"""Wu & He 2018: ImageNet error with 8 images a device is 1.2 points above that with 32."""
FEW_VALUES = 16
"""The variance of n values is off by √(2/n): a third at 16."""
SETTLED = 20
"""Batches before running statistics are held to what they see: the buffers start at (0, 1)."""
MEAN_GAP = 0.5
VAR_GAP = 1.0
"""Half a deviation, and a factor of 2 in the variance; more in batches so small that chance is."""


@dataclass(frozen=True)
class Finding:
    """A problem at a layer, what shows it, and what helps.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    >>> with fastnorm.signals.record(model) as signals:
    ...     _ = model(torch.randn(4, 2))
    >>> found = signals.findings()[0]
    >>> found.layer, found.problem, found.evidence
    ('0', 'too few samples', 'Batches of 4 samples, 4 values a channel')
    """

    layer: str
    problem: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.layer or '(model)'}: {self.problem}. {self.evidence}. Remedy: {self.remedy}."


Signals = Sequence[LayerSignal]


def find(model: nn.Module, signals: Signals, input_failed: float) -> list[Finding]:
    """All findings, those first that explain others."""
    found = [*_not_finite(signals, input_failed), *_forward(signals), *_backward(signals)]
    rules: tuple[Callable[[Signals], Iterator[Finding]], ...] = (
        _dead, _saturated, _identical, _few_samples, _gap,
    )  # fmt: skip
    for rule in rules:
        found += rule(signals)
    return [*found, *_structural(model)]


def _not_finite(signals: Signals, input_failed: float) -> Iterator[Finding]:
    """The first event alone: NaN spreads to all that follows."""
    remedy = "look at this layer first; a smaller learning rate, bfloat16 or float32 for float16"
    scaled = "; none for the first steps of a GradScaler, which it skips while it looks for a scale"
    events = [(layer.failed, "output", layer) for layer in signals]
    events += [(layer.gradient_failed, "gradient", layer) for layer in signals]
    when, what, layer = min(events, key=lambda event: event[0], default=(math.inf, "", None))
    # an input may have infinities of its own, as a mask has, and a weight NaN that it did not bring
    broken = layer is not None and layer.weighted and math.isnan(layer.weight_norm)
    if input_failed < when < math.inf and not broken:
        evidence = "The sum of the model's input is not finite before any layer's is"
        yield Finding("", "NaN or infinity", evidence, "clean the data")
    elif layer is not None and when < math.inf:
        evidence = f"The sum of its {what} is the first that is not finite"
        if not math.isfinite(layer.weight_norm) and layer.weight_norm == layer.weight_norm:
            evidence += "; so is the norm of its weight"
        elif broken:
            evidence += "; its weight holds NaN"
        remedy += scaled if what == "gradient" else ""
        yield Finding(layer.name, "NaN or infinity", evidence, remedy)


def _forward(signals: Signals) -> Iterator[Finding]:
    depth = [layer for layer in signals if layer.weighted and math.isfinite(layer.std)]
    # without the last: an output may be of any scale, and often starts at zero
    yield from _trend(depth[:-1], [layer.std for layer in depth[:-1]], "signal", "deviation")


def _backward(signals: Signals) -> Iterator[Finding]:
    depth = [layer for layer in signals if layer.weighted and math.isfinite(layer.gradient_norm)]
    depth.reverse()
    yield from _trend(depth, [layer.gradient_norm for layer in depth], "gradient", "gradient norm")


def _trend(
    layers: Sequence[LayerSignal], values: list[float], what: str, unit: str
) -> Iterator[Finding]:
    """Whether `values`, in the direction in which the signal runs, grow or shrink without end."""
    if len(values) < 3:
        return
    ends = 3 if len(values) >= 9 else 1
    first, last = _middle(values[:ends]), _middle(values[-ends:])
    if first == 0 or 1 / FACTOR <= last / first <= FACTOR:
        return
    ratio = last / first
    grows = ratio > 1
    like = statistics.median(_repeated(layers, values) or [ratio])
    if (like if grows else 1 / max(like, TINY)) < math.sqrt(FACTOR):
        return
    where = next(
        layer
        for layer, value in zip(layers, values, strict=True)
        if (value and (value > FACTOR * first if grows else value < first / FACTOR))
        or (not value and not grows)
    )
    steps = len(values) - ends
    rate = f"a factor of {ratio ** (1 / steps):.3g} a layer" if ratio else "nothing is left"
    evidence = (
        f"The {unit} goes from {first:.2g} at {layers[0].name} to {last:.2g} at "
        f"{layers[-1].name}, {rate}"
    )
    remedy = (
        "fastnorm.init.initialize (He before ReLU, Xavier before tanh), a norm after each layer, "
        "or residual branches"
    )
    yield Finding(where.name, f"{'exploding' if grows else 'vanishing'} {what}", evidence, remedy)


def _repeated(layers: Sequence[LayerSignal], values: list[float]) -> list[float]:
    """From the first to the last layer of the same name but for numbers, the ratio of values.

    Like with like: an attention's queries have smaller gradients than what follows, in every block.
    """
    found: dict[str, list[float]] = {}
    for layer, value in zip(layers, values, strict=True):
        found.setdefault(re.sub(r"\d+", "", layer.name), []).append(value)
    return [same[-1] / same[0] for same in found.values() if len(same) > 1 and same[0]]


def _middle(values: list[float]) -> float:
    """The median of those that are not 0: a branch that starts at zero gives its layers none."""
    alive = [value for value in values if value]
    return statistics.median(alive) if alive else 0.0


def _dead(signals: Signals) -> Iterator[Finding]:
    for layer in signals:
        if layer.dead >= DEAD and layer.values >= SEEN:
            yield Finding(
                layer.name,
                "dead units",
                f"{layer.dead:.0%} of the units were 0 for all of their {layer.values:,} values",
                "a smaller learning rate, a norm before the ReLU, leaky_relu, or a bias of 0",
            )


def _saturated(signals: Signals) -> Iterator[Finding]:
    for layer in signals[:-1]:  # an output may well be certain
        if layer.saturated >= SATURATED:
            yield Finding(
                layer.name,
                "saturated units",
                f"{layer.saturated:.0%} of the outputs are within 1 % of the span from a bound",
                "smaller weights (Xavier), a norm before the activation, or standardized inputs",
            )


def _identical(signals: Signals) -> Iterator[Finding]:
    for layer in signals:
        if layer.identical >= IDENTICAL:
            yield Finding(
                layer.name,
                "identical units",
                f"{layer.identical:.0%} of the units have the weights of another one, and get the "
                "same gradient",
                "random weights (fastnorm.init.initialize): equal units stay equal",
            )


def _few_samples(signals: Signals) -> Iterator[Finding]:
    for layer in signals:
        if layer.samples is not None and (
            layer.samples < FEW_SAMPLES or layer.channel_values < FEW_VALUES
        ):
            yield Finding(
                layer.name,
                "too few samples",
                f"Batches of {layer.samples} samples, {layer.channel_values} values a channel",
                "larger batches, GroupNorm or LayerNorm, or SyncBatchNorm across devices",
            )


def _gap(signals: Signals) -> Iterator[Finding]:
    for layer in signals:
        if layer.training and not layer.batches_tracked >= SETTLED:
            continue
        # what chance alone makes of a batch's mean and variance, three times
        chance = 3 / math.sqrt(max(layer.gap_samples, 1))
        wide = layer.mean_gap > max(MEAN_GAP, chance)
        if wide or layer.var_gap > max(VAR_GAP, chance * math.sqrt(2) / math.log(2)):
            evidence = (
                f"The batch's means are {layer.mean_gap:.2g} running deviations away, its "
                f"variances a factor of {2**layer.var_gap:.2g}, after {layer.batches_tracked:.0f} "
                f"batches with momentum {layer.momentum}"
            )
            remedy = (
                "a larger momentum, or momentum=None and one pass over training data before eval"
            )
            yield Finding(layer.name, "running statistics differ", evidence, remedy)


def _structural(model: nn.Module) -> Iterator[Finding]:
    structure = read(model)
    modules = dict(model.named_modules())
    for layer, norm in redundant_biases(model, structure):
        if modules[norm].running_mean is not None and not modules[norm].training:
            continue  # its mean is the buffer's, whatever the bias
        own = getattr(modules[norm], "bias", None) is not None
        yield Finding(
            layer,
            "redundant bias",
            f"{norm} subtracts each channel's mean, and this bias with it",
            f"bias=False: {'the norm has one itself, which serves' if own else 'nothing is lost'}",
        )
    for pair in double_norms(model, structure):
        yield _twice(pair)


def _twice(pair: NormPair) -> Finding:
    """What two norms in a row come to, which may well be meant."""
    evidence = f"No layer or activation is between it and {pair.first}"
    remedy = "drop one of the two"
    if pair.idle == pair.second:
        evidence += (
            ", whose output is normalized over the same values or parts of them: it only removes "
            "what that one's weight and bias do to means and scales"
        )
        remedy = f"drop {pair.second}"
    elif pair.idle:
        evidence += (
            ", and it normalizes parts of the values that are one set there: but for its weight "
            "and bias, that one has no effect"
        )
        remedy = f"drop {pair.first}"
    remedy += ", unless both are meant or a checkpoint has both"
    return Finding(pair.second, "normalized twice", evidence, remedy)
