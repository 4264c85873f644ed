"""How the cases of a benchmark's JSON are grouped, and their mean speed-ups."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastnorm.bench.suite import BASELINE

SMALL = "small call"
Result = Mapping[str, Any]
"""One case of the JSON."""


def others(result: Mapping[str, Any]) -> list[str]:
    """torch.nn, and the peers that took part."""
    return [BASELINE, *result["peers"]]


def geometric(values: Iterable[float]) -> float:
    """The geometric mean; NaN of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def speedups(results: Iterable[Result], other: str) -> list[float]:
    """Our speed over the other's, of each case that it took part in."""
    return [r["costs"][other]["speedup"] for r in results if other in r["costs"]]


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """By operation; small calls, which cost the call and not the operation, by themselves."""
    found: dict[str, list[Result]] = {}
    for result in results:
        name = "small calls" if result["name"] == SMALL else result["operation"]
        found.setdefault(name, []).append(result)
    return found
