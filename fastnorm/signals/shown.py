"""A recording as a table, a picture by depth, and a page."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from fastnorm import tables
from fastnorm.signals.findings import Finding
from fastnorm.signals.layers import LayerSignal

COLUMNS: dict[str, Callable[[LayerSignal], str]] = {
    "layer": lambda layer: layer.name or "(model)",
    "kind": lambda layer: layer.kind,
    "mean": lambda layer: _number(layer.mean, layer.failed),
    "std": lambda layer: _number(layer.std, layer.failed),
    "zeros": lambda layer: _share(layer.zeros),
    "saturated": lambda layer: _share(layer.saturated),
    "dead": lambda layer: _share(layer.dead),
    "|dy|": lambda layer: _number(layer.gradient_norm, layer.gradient_failed),
    "|W|": lambda layer: _number(layer.weight_norm),
    "|dW|": lambda layer: _number(layer.weight_gradient_norm),
    "|ΔW|/|W|": lambda layer: _number(layer.update_ratio),
}


def rows(layers: Sequence[LayerSignal]) -> list[list[str]]:
    return [[column(layer) for column in COLUMNS.values()] for layer in layers]


def table(layers: Sequence[LayerSignal]) -> str:
    return tables.text(tuple(COLUMNS), rows(layers), ("kind",))


def plot(layers: Sequence[LayerSignal]) -> bytes:
    """A PNG: the output's deviation and the gradient's norm at each layer, in order.

    Crosses at the lower edge are zeros, which have no logarithm; those at the upper are not finite.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    steps = [layer for layer in layers if layer.weighted] or list(layers)
    deviations = [(layer.std, layer.failed) for layer in steps]
    gradients = [(layer.gradient_norm, layer.gradient_failed) for layer in steps]
    _panel(upper, deviations, "standard deviation of the output")
    _panel(lower, gradients, "norm of the output's gradient")
    places = range(len(steps))
    each = max(1, math.ceil(len(steps) / 30))
    names = [layer.name or "(model)" for layer in steps]
    lower.set_xticks(places[::each], names[::each], rotation=90, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _panel(axes: Any, seen: Sequence[tuple[float, float]], name: str) -> None:
    """One curve; `seen` has each value, and when the signal was not finite first."""
    infinite = [failed < math.inf or math.isinf(value) for value, failed in seen]
    pairs = list(zip(seen, infinite, strict=True))
    drawn = [v if v > 0 and not lost else math.nan for (v, _), lost in pairs]
    axes.plot(range(len(seen)), drawn, "o-", color="#08306b", markersize=3, linewidth=1)
    marks = (
        ("0", 0.02, "#7f7f7f", [value == 0 and not lost for (value, _), lost in pairs]),
        ("not finite", 0.98, "#cb181d", infinite),
    )
    for label, height, colour, marked in marks:
        places = [place for place, one in enumerate(marked) if one]
        if places:
            edge = axes.get_xaxis_transform()
            options = {"color": colour, "label": label, "transform": edge, "clip_on": False}
            axes.plot(places, [height] * len(places), "x", markersize=5, **options)
            axes.legend(frameon=False, fontsize=8)
    if any(math.isfinite(value) for value in drawn):
        axes.set_yscale("log")
    axes.set_ylabel(name)
    axes.grid(color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)


def page(title: str, layers: Sequence[LayerSignal], findings: Sequence[Finding]) -> str:
    lead = f"{len(layers)} layers, {len(findings)} findings"
    found = [(f.layer or "(model)", f.problem, f.evidence, f.remedy) for f in findings]
    parts = [tables.heading("Findings")]
    if found:
        columns = ("layer", "problem", "evidence", "remedy")
        parts.append(tables.table(columns, found, left=columns))
    else:
        parts.append(tables.paragraph("None."))
    parts.append(tables.picture("By depth", plot(layers)))
    parts += [tables.heading("Layers"), tables.table(tuple(COLUMNS), rows(layers), ("kind",))]
    return tables.page(f"Signals of {title}", lead, parts)


def _number(value: float, failed: float = math.inf) -> str:
    """Nothing for what was not seen; for what was not finite, "nan" or "inf"."""
    return "" if math.isnan(value) and failed == math.inf else f"{value:.3g}"


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"
