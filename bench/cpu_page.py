"""bench/results/cpu*.md: torch.nn's own norm layers on a CPU, each against fastnorm's.

Three goals are judged, from one run: calls that torch.nn serves in less than 20 µs within 1.3 times
its time; no other slower than 0.97 of torch.nn's speed, beyond noise; and 1.5 times its speed, in
the geometric mean, where torch's operator leaves something to gain.

Best times judge: whoever else uses the machine only adds to the others. Noise is what torch.nn
shows against itself, in the same rounds of the same case, and at least what it shows in nine of ten
cases of the run. A case that only noise above LOUD excuses is named too: it is undecided.
"""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markdown import paragraph, table

from fastnorm.cli.bench_groups import SMALL, geometric

BASELINE, OURS = "torch.nn", "fastnorm"
NORMS = (
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "RMSNorm",
)  # fmt: skip
LEAST = 0.97
LOUD = 0.05
SHORT, MOST_TIMES = 20e-6, 1.3
GOAL = 1.5
MEMORY_SPEED = 0.5
"""Share of the rate of a plain copy from which an operator counts as running at memory speed."""

Result = dict[str, Any]


def norms(result: Result) -> list[Result]:
    """The cases of layers that torch.nn has as they are."""
    return [case for case in result["results"] if case["operation"] in NORMS]


def ratio(case: Result) -> float:
    """Our speed over torch.nn's, of best times."""
    return float(case["costs"][BASELINE]["speedup"])


def run_noise(cases: Sequence[Result]) -> float:
    """What torch.nn against itself does not exceed in nine of ten cases."""
    return statistics.quantiles([case["noise"] for case in cases], n=10)[-1]


def is_short(case: Result) -> bool:
    """Whether what Python does around the operator counts as much as the operator."""
    return bool(case["costs"][BASELINE]["best_s"] < SHORT)


def slower(cases: Sequence[Result], excused: float = 1.0) -> list[Result]:
    """Those below the goal by more than noise, of which no more than `excused` counts."""
    common = run_noise(cases)
    return [
        case
        for case in cases
        if ratio(case)
        < (1 / MOST_TIMES if is_short(case) else LEAST) - min(max(case["noise"], common), excused)
    ]


def operators(cases: Iterable[Result]) -> dict[tuple[str, ...], list[Result]]:
    """By what torch computes in one way: layer, layout, dtype and pass; small calls left out."""
    found: dict[tuple[str, ...], list[Result]] = {}
    for case in cases:
        if case["name"] != SMALL:
            key = (case["operation"], case["layout"], case["dtype"], case["pass"])
            found.setdefault(key, []).append(case)
    return found


def share(cases: Sequence[Result], name: str = BASELINE) -> float:
    """Of the speed of a copy: the geometric mean over an operator's shapes."""
    return geometric(case["costs"][name]["of_ceiling"] for case in cases)


def verdict(result: Result) -> str:
    """The goals, met or missed, in a list."""
    cases = norms(result)
    below, loud = slower(cases), slower(cases, LOUD)
    short, long = ([c for c in cases if is_short(c) is kind] for kind in (True, False))
    found = operators(cases)
    rest = [group for group in found.values() if share(group) < MEMORY_SPEED]
    mean = geometric(geometric(ratio(case) for case in group) for group in rest)
    points = [
        f"""Slower than {LEAST} of torch.nn's speed, beyond noise: {_those(below, loud, long)}.
        Noise: {run_noise(cases):.1%} in nine of ten cases.""",
        f"""Of calls that torch.nn serves in less than {SHORT * 1e6:.0f} µs, at more than
        {MOST_TIMES} times its time, beyond noise: {_those(below, loud, short)}. All of
        them: {geometric(1 / ratio(case) for case in short):.2f} times, in the geometric mean.""",
        f"""Where torch's operator runs below {MEMORY_SPEED:.0%} of the speed of a copy,
        {len(rest)} of {len(found)} operators, ours is {mean:.2f} times as fast in the geometric
        mean; the goal is {GOAL}.""",
    ]
    return "\n".join(paragraph(point, "- ") for point in points)


def _those(below: Sequence[Result], loud: Sequence[Result], cases: Sequence[Result]) -> str:
    """How many of the cases are below the goal, and which; then those that are undecided."""
    found = [case for case in cases if case in below]
    undecided = [case for case in cases if case in loud and case not in below]
    told = f"{len(found)} of {len(cases)} cases{_named(found)}"
    if undecided:
        told += f"; undecided, for noise above {LOUD:.0%}: {len(undecided)}{_named(undecided)}"
    return told


def _named(cases: Sequence[Result]) -> str:
    named = "; ".join(f"{_name(case)} {ratio(case):.2f}" for case in cases)
    return f" ({named})" if named else ""


def _name(case: Result) -> str:
    shape = "×".join(map(str, case["shape"]))
    return f"{case['operation']} {shape} {case['layout']} {case['dtype']} {case['pass']}"


def page(result: Result, machine: str, place: Path) -> str:
    """The whole file, of a run that left its results at that place."""
    cases = norms(result)
    parts = [
        "# torch.nn's norm layers on a CPU",
        machine,
        paragraph(f"""Remake with `fastnorm bench --device cpu --peers none --out {place}` and
            `make results`. Calls of both libraries take turns in one process, over buffers
            larger than the cache, {result["arguments"]["rounds"]} rounds. Ratio: torch.nn's time
            over fastnorm's, of best times, and in brackets the median over rounds. Noise: how far
            torch.nn's ratio to itself is from 1, in the same rounds, the worse of the two ways.
            Forward is in training, eval in evaluation, step is forward and backward."""),
        "## Goals",
        verdict(result),
        "## Operators",
        paragraph(f"""The share of a copy's speed ({_memory(result)}) at which torch and fastnorm
            move the fewest bytes that the pass needs: the geometric mean over shapes, small calls
            left out. An operator of torch that reaches {MEMORY_SPEED:.0%} counts as running at
            memory speed already: less than a factor of {1 / MEMORY_SPEED:.0f} is left to gain."""),
        _operators(cases),
        "## Every case",
        _every(cases),
    ]
    return "\n\n".join(parts) + "\n"


def _memory(result: Result) -> str:
    return f"{result['ceilings']['memory_bytes_per_s'] / 1e9:.1f} GB/s"


def _operators(cases: Sequence[Result]) -> str:
    rows = []
    for key, group in operators(cases).items():
        mean = geometric(ratio(case) for case in group)
        told = "yes" if share(group) >= MEMORY_SPEED else "no"
        rows.append([*key, f"{share(group):.0%}", f"{share(group, OURS):.0%}", f"{mean:.2f}", told])
    columns = ["layer", "layout", "dtype", "pass", "torch.nn", "fastnorm", "ratio"]
    return table([*columns, "torch at memory speed"], rows, left=4)


def _every(cases: Sequence[Result]) -> str:
    common, below, loud = run_noise(cases), slower(cases), slower(cases, LOUD)
    rows = []
    for case in cases:
        best, median = ratio(case), case["costs"][BASELINE]["median_speedup"]
        rows.append([
            case["operation"], "×".join(map(str, case["shape"])), case["layout"], case["dtype"],
            case["pass"],
            *(f"{case['costs'][name]['best_s'] * 1e6:,.1f}" for name in (BASELINE, OURS)),
            f"{best:.2f} ({median:.2f})", f"{max(case['noise'], common):.1%}",
            "slower" if case in below else "undecided" if case in loud else "",
        ])  # fmt: skip
    columns = ["layer", "shape", "layout", "dtype", "pass", "torch.nn µs", "fastnorm µs"]
    return table([*columns, "ratio", "noise", ""], rows, left=5)
