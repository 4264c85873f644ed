"""The pictures of `fastnorm bench`: bandwidth over size, speed-up by operation, a roofline."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnorm.bench.suite import BASELINE, OURS
from fastnorm.cli.bench_groups import SMALL, geometric, groups, others, speedups
from fastnorm.cli.report import png

INK, TORCH, SOFT = "#08306b", "#e6850e", "#7f7f7f"
PEERS = ("#e6850e", "#238b45", "#cb181d", "#6a51a3", "#17becf", "#8c564b", "#bcbd22", "#7f7f7f")


def pictures(result: Mapping[str, Any]) -> list[tuple[str, str, bytes]]:
    """(title, file name, PNG) of each."""
    return [
        ("Bandwidth over size", "bandwidth.png", _bandwidth(result)),
        ("Speed-up by operation", "speedup.png", _bars(result)),
        ("Roofline", "roofline.png", _roofline(result)),
    ]


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bandwidth(result: Mapping[str, Any]) -> bytes:
    """Each case a point: fewest bytes over the time; a line for copies of so many bytes."""
    figure, axes = _panel(8, 4.5)
    for name, colour in ((BASELINE, TORCH), (OURS, INK)):
        cases = [case for case in result["results"] if name in case["costs"]]
        sizes = [case["bytes"] for case in cases]
        rates = [case["bytes"] / case["costs"][name]["best_s"] / 1e9 for case in cases]
        axes.plot(sizes, rates, "o", color=colour, markersize=4, alpha=0.7, label=name)
    copy = result["ceilings"]["copy"]
    rates = [point["bytes_per_s"] / 1e9 for point in copy]
    axes.plot([point["bytes"] for point in copy], rates, color=SOFT, label="copy")
    axes.set(xscale="log", yscale="log", ylabel="GB/s")
    axes.set_xlabel("fewest bytes of the pass, read and written")
    axes.legend(frameon=False)
    return png(figure)


def _bars(result: Mapping[str, Any]) -> bytes:
    """Geometric means by operation, forward and step, a bar for each library."""
    rows = [
        (f"{name}, {'step' if step else 'forward'}", chosen)
        for name, cases in groups(result["results"]).items()
        for step in (False, True)
        if (chosen := [case for case in cases if (case["pass"] == "step") == step])
    ]
    names = others(result)
    figure, axes = _panel(8, 1 + 0.16 * len(rows) * (1 + len(names)))
    height = 0.85 / len(names)
    for index, (other, colour) in enumerate(zip(names, PEERS, strict=False)):
        places = [row + index * height for row in range(len(rows))]
        means = [geometric(speedups(chosen, other)) for _, chosen in rows]
        axes.barh(places, means, height, color=colour, label=f"over {other}")
    axes.axvline(1, color=INK, linewidth=1)
    middles = [row + 0.425 - height / 2 for row in range(len(rows))]
    axes.set_yticks(middles, [name for name, _ in rows], fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("speed of fastnorm over the library's")
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def _roofline(result: Mapping[str, Any]) -> bytes:
    """Operations a second over operations a byte, below what memory and products allow."""
    figure, axes = _panel(8, 4.5)
    cases = [case for case in result["results"] if case["name"] != SMALL]
    intensity = {id(case): case["flops"] / case["bytes"] for case in cases}
    low = min(intensity.values(), default=0.1) / 2
    high = max([*intensity.values(), 10.0]) * 4
    memory = result["ceilings"]["memory_bytes_per_s"]
    for (dtype, top), style in zip(
        result["ceilings"]["flop_per_s"].items(), ("-", "--"), strict=False
    ):
        corner = top / memory
        edges = [low, corner, max(high, 2 * corner)]
        roof = [memory * low / 1e9, top / 1e9, top / 1e9]
        axes.plot(edges, roof, style, color=SOFT, label=f"ceiling, {dtype}")
    _scatter(axes, cases, intensity)
    axes.set(xscale="log", yscale="log", ylabel="Gflop/s")
    axes.set_xlabel("flops a byte, of the fewest bytes")
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def _scatter(axes: Axes, cases: Sequence[Mapping[str, Any]], intensity: dict[int, float]) -> None:
    for name, colour in ((BASELINE, TORCH), (OURS, INK)):
        reached = [case["flops"] / case["costs"][name]["best_s"] / 1e9 for case in cases]
        places = [intensity[id(case)] for case in cases]
        axes.plot(places, reached, "o", color=colour, markersize=4, alpha=0.7, label=name)
