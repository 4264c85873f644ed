"""What a study is given and what it leaves; means and deviations over seeds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastnorm.cli.data import Images, digits
from fastnorm.cli.report import Table

COLOURS = ("#08306b", "#cb181d", "#238b45", "#e6850e", "#6a51a3", "#7f7f7f", "#17becf")


@dataclass(frozen=True)
class Settings:
    """Whether the study is the short one, and how many seeds it takes."""

    quick: bool
    seeds: int

    @cached_property
    def images(self) -> Images:
        return digits()


@dataclass(frozen=True)
class Outcome:
    """Tables, pictures (title, file name, PNG), sentences made from the numbers, the numbers."""

    tables: Sequence[Table]
    pictures: Sequence[tuple[str, str, bytes]]
    seen: Sequence[str]
    numbers: Mapping[str, object]


def mean(values: Iterable[float]) -> float:
    """The mean of those that are finite; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.nan


def deviation(values: Iterable[float]) -> float:
    """The sample standard deviation of those that are finite; 0 of one."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.stdev(finite) if len(finite) > 1 else 0.0


def spread(values: Sequence[float], form: str = ".1f", scale: float = 1.0) -> str:
    """`mean ± deviation` over the seeds; with how many of them, where some have no number."""
    finite = [value * scale for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    shown = f"{mean(finite):{form}} ± {deviation(finite):{form}}"
    return shown if len(finite) == len(values) else f"{shown} ({len(finite)} of {len(values)})"


def geometric(values: Iterable[float]) -> float:
    """The geometric mean of numbers that span many powers of ten; 0 where one is 0."""
    found = list(values)
    if not found or any(value <= 0 or not math.isfinite(value) for value in found):
        return 0.0 if found and all(value >= 0 for value in found) else math.nan
    return math.exp(statistics.fmean(math.log(value) for value in found))


def figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with its panels in reading order."""
    drawn = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    panels = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(color="#e5e5e5")
        panel.spines[["top", "right"]].set_visible(False)
    return drawn, panels


def line(
    panel: Axes, places: Sequence[float], values: Sequence[Sequence[float]], label: str, colour: str
) -> None:
    """The mean over seeds at each place, and a band of one deviation."""
    middle = [mean(seeds) for seeds in values]
    wide = [deviation(seeds) for seeds in values]
    panel.plot(places, middle, "o-", color=colour, markersize=3, linewidth=1.2, label=label)
    low = [m - w for m, w in zip(middle, wide, strict=True)]
    high = [m + w for m, w in zip(middle, wide, strict=True)]
    panel.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def listed(words: Sequence[str]) -> str:
    """`a, b and c`; `none` where there is none."""
    if not words:
        return "none"
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
