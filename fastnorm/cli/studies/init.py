"""Signal and gradient through 100 layers, by how the weights start, under tanh and ReLU."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastnorm import init, signals
from fastnorm.cli.progress import Progress
from fastnorm.cli.report import Table, png
from fastnorm.cli.studies.outcome import (
    COLOURS,
    Outcome,
    Settings,
    figure,
    geometric,
    listed,
    spread,
)

DEPTH, WIDTH = 100, 128
KEPT = 100.0
"""A signal that stays within this factor over all layers is called kept."""
SHOWN = (1e-12, 1e12)
"""What the picture spans; the table has the rest."""


def _small(weight: Tensor) -> None:
    nn.init.normal_(weight, 0.0, 0.01)


def _large(weight: Tensor) -> None:
    nn.init.normal_(weight, 0.0, 3 / math.sqrt(weight.shape[1]))


SCHEMES: dict[str, Callable[[Tensor], object]] = {
    "zero": nn.init.zeros_,
    "constant": lambda weight: nn.init.constant_(weight, 1 / weight.shape[1]),
    "too small": _small,
    "too large": _large,
    "torch default": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
    "Xavier": init.xavier_uniform_,
    "He": init.he_normal_,
}
NOTES = {
    "constant": "1/fan_in",
    "too small": "std 0.01",
    "too large": "std 3/√fan_in",
    "torch default": "kaiming_uniform_(a=√5), without its bias",
}
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def steps(settings: Settings) -> int:
    return len(SCHEMES) * len(ACTIVATIONS) * settings.seeds


def run(settings: Settings, progress: Progress) -> Outcome:
    """One forward and one backward pass of each network, recorded by fastnorm.signals."""
    found: dict[tuple[str, str], list[Seen]] = {}
    for activation in ACTIVATIONS:
        for scheme in SCHEMES:
            for seed in range(settings.seeds):
                seen = _measure(settings, activation, scheme, seed)
                found.setdefault((activation, scheme), []).append(seen)
                progress.advance(f"{activation}, {scheme}: {seen.forward[-1]:.2g} at the end")
    return Outcome(
        [_table(found)],
        [("By depth", "init.png", _plot(found))],
        [_sentence(activation, found) for activation in ACTIVATIONS],
        {
            f"{activation}, {scheme}": [
                {"forward": s.forward, "gradient": s.gradient, "findings": s.problems} for s in seen
            ]
            for (activation, scheme), seen in found.items()
        },
    )


class Seen:
    """One network: deviations of the activations and norms of their gradients, by depth."""

    def __init__(self, recorded: signals.Signals, kind: str) -> None:
        layers = [layer for layer in recorded.layers if layer.kind == kind]
        self.forward = [layer.std for layer in layers]
        self.gradient = [layer.gradient_norm for layer in layers]
        self.problems = sorted({finding.problem for finding in recorded.findings()})


def _measure(settings: Settings, activation: str, scheme: str, seed: int) -> Seen:
    torch.manual_seed(seed)
    images = settings.images
    sizes = [images.shape.numel(), *[WIDTH] * DEPTH]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=False), ACTIVATIONS[activation]()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, images.classes, bias=False))
    # float64: signals of 1e30 and 1e-40 are measured, not lost
    model.double()
    for module in model:
        if isinstance(module, nn.Linear):
            SCHEMES[scheme](module.weight)
    chosen = torch.randperm(len(images.train_labels))[: 64 if settings.quick else 256]
    with signals.record(model) as recorded:
        scores = model(images.train_images[chosen].double())
        nn.functional.cross_entropy(scores, images.train_labels[chosen]).backward()  # type: ignore[no-untyped-call]
    return Seen(recorded, ACTIVATIONS[activation].__name__)


def _at(found: list[Seen], what: str, layer: int) -> float:
    return geometric(getattr(seen, what)[layer - 1] for seen in found)


def _span(values: list[float]) -> float:
    """The largest factor between any layer's value and the first one's; inf where one is lost."""
    first = values[0]
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.inf
    return max(max(value / first, first / value) for value in values)


def _kept(found: list[Seen]) -> bool:
    """Whether forward and backward signal stay within KEPT, of units that differ, in every seed."""
    return all(
        _span(seen.forward) < KEPT
        and _span(seen.gradient) < KEPT
        and "identical units" not in seen.problems
        for seen in found
    )


def _table(found: dict[tuple[str, str], list[Seen]]) -> Table:
    rows = []
    for (activation, scheme), seen in found.items():
        cells = [_logarithms(seen, "forward", layer) for layer in (1, DEPTH)]
        cells += [_logarithms(seen, "gradient", layer) for layer in (DEPTH, 1)]
        alike = sum("identical units" in one.problems for one in seen)
        rows.append((f"{activation}, {scheme}", *cells, f"{alike} of {len(seen)}"))
    columns = ("", "std 1", f"std {DEPTH}", f"|dy| {DEPTH}", "|dy| 1", "alike")
    notes = "; ".join(f"{scheme}: {words}" for scheme, words in NOTES.items())
    note = (
        f"{DEPTH} layers of {WIDTH} units without biases, on digits. Powers of ten, mean ± "
        "deviation over seeds, of the standard deviation of a layer's activations (std) and of the "
        "norm of the loss's gradient with respect to them (|dy|), at the layer named. alike: runs "
        f"with identical units. {notes}."
    )
    return Table("Signal by depth, log10", columns, rows, note)


def _logarithms(found: list[Seen], what: str, layer: int) -> str:
    values = [getattr(seen, what)[layer - 1] for seen in found]
    if not all(values):
        return "-inf"
    return spread([math.log10(value) for value in values])


def _plot(found: dict[tuple[str, str], list[Seen]]) -> bytes:
    drawn, panels = figure(2, len(ACTIVATIONS))
    depths = range(1, DEPTH + 1)
    for row, (what, unit) in enumerate(
        (("forward", "std of activations"), ("gradient", "norm of their gradient"))
    ):
        for column, activation in enumerate(ACTIVATIONS):
            panel = panels[row * len(ACTIVATIONS) + column]
            absent = []
            for scheme, colour in zip(SCHEMES, COLOURS, strict=True):
                values = [_at(found[activation, scheme], what, layer) for layer in depths]
                shown = [value if value > 0 else math.nan for value in values]
                panel.plot(depths, shown, color=colour, linewidth=1.2, label=scheme)
                absent += [f"{scheme}: {words}" for words in _absent(values)]
            panel.text(
                *(0.98 if row == 0 else 0.02, 0.28, "\n".join(absent)),
                transform=panel.transAxes,
                horizontalalignment="right" if row == 0 else "left",
                fontsize=7,
            )
            panel.set_yscale("log")
            panel.set_ylim(*SHOWN)
            panel.set_ylabel(unit if column == 0 else "")
            panel.set_xlabel("layer" if row else "")
            panel.set_title(activation if row == 0 else "")
    panels[0].legend(frameon=False, fontsize=7, ncols=2)
    return png(drawn)


def _absent(values: list[float]) -> list[str]:
    """Why a curve has no point in the picture; nothing where it has one."""
    low, high = SHOWN
    if any(low <= value <= high for value in values):
        return []
    if all(value == 0 for value in values):
        return ["0 at every layer, not drawn"]
    if all(value < low for value in values):
        return [f"below {low:.0e} at every layer, not drawn"]
    return ["outside of the picture, or not finite, at every layer"]


def _sentence(activation: str, found: dict[tuple[str, str], list[Seen]]) -> str:
    kept, rest = [], []
    for scheme in SCHEMES:
        seen = found[activation, scheme]
        if _kept(seen):
            kept.append(scheme)
        else:
            rest.append(f"{scheme} ({_lost(seen)})")
    return (
        f"Under {activation}, these kept signal and gradient within a factor of {KEPT:g} through "
        f"{DEPTH} layers, with units that differ: {listed(kept)}. These did not: {listed(rest)}."
    )


def _lost(found: list[Seen]) -> str:
    """What a scheme made of the signal, and of the gradient on its way back."""
    if any("identical units" in seen.problems for seen in found):
        return "identical units"
    forward = _at(found, "forward", DEPTH) / _at(found, "forward", 1)
    backward = _at(found, "gradient", 1) / _at(found, "gradient", DEPTH)
    return f"signal times {forward:.0e}, gradient times {backward:.0e}"
