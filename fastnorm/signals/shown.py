"""A recording as a table, a picture by depth, and a page."""

import io
import math
from collections.abc import Callable, Sequence

from fastnorm import tables
from fastnorm.signals.findings import Finding
from fastnorm.signals.layers import LayerSignal

COLUMNS: dict[str, Callable[[LayerSignal], str]] = {
    "layer": lambda layer: layer.name or "(model)",
    "kind": lambda layer: layer.kind,
    "mean": lambda layer: _number(layer.mean),
    "std": lambda layer: _number(layer.std),
    "zeros": lambda layer: _share(layer.zeros),
    "saturated": lambda layer: _share(layer.saturated),
    "dead": lambda layer: _share(layer.dead),
    "|dy|": lambda layer: _number(layer.gradient_norm),
    "|W|": lambda layer: _number(layer.weight_norm),
    "|dW|": lambda layer: _number(layer.weight_gradient_norm),
    "|ΔW|/|W|": lambda layer: _number(layer.update_ratio),
}


def rows(layers: Sequence[LayerSignal]) -> list[list[str]]:
    return [[column(layer) for column in COLUMNS.values()] for layer in layers]


def table(layers: Sequence[LayerSignal]) -> str:
    return tables.text(tuple(COLUMNS), rows(layers), ("kind",))


def plot(layers: Sequence[LayerSignal]) -> bytes:
    """A PNG: the output's deviation and the gradient's norm at each layer, in order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [layer for layer in layers if layer.weighted] or list(layers)
    places = range(len(steps))
    pictures = (
        (upper, [layer.std for layer in steps], "standard deviation of the output"),
        (lower, [layer.gradient_norm for layer in steps], "norm of the output's gradient"),
    )
    for axes, values, name in pictures:
        axes.plot(places, values, "o-", color="#08306b", markersize=3, linewidth=1)
        if any(math.isfinite(value) and value > 0 for value in values):
            axes.set_yscale("log")
        axes.set_ylabel(name)
        axes.grid(color="#e5e5e5")
        axes.spines[["top", "right"]].set_visible(False)
    each = max(1, math.ceil(len(steps) / 30))
    names = [layer.name or "(model)" for layer in steps]
    lower.set_xticks(places[::each], names[::each], rotation=90, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def page(title: str, layers: Sequence[LayerSignal], findings: Sequence[Finding]) -> str:
    lead = f"{len(layers)} layers, {len(findings)} findings"
    found = [(f.layer or "(model)", f.problem, f.evidence, f.remedy) for f in findings]
    parts = [tables.heading("Findings")]
    if found:
        parts.append(tables.table(("layer", "problem", "evidence", "remedy"), found))
    else:
        parts.append(tables.paragraph("None."))
    parts.append(tables.picture("By depth", plot(layers)))
    parts += [tables.heading("Layers"), tables.table(tuple(COLUMNS), rows(layers))]
    return tables.page(f"Signals of {title}", lead, parts)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"
