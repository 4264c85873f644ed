"""Interleaved timing: is a candidate faster than a baseline on a machine that is never quiet?

Two runs a minute apart differ by more than most improvements. So every candidate is timed in every
round, the order rotates and alternates in direction, and the baseline takes part twice: its ratio
to itself is the noise of the comparison, and no other ratio means more than that gauge allows.

    ratio = best time of the baseline / best time of the candidate      above 1: it is faster
"""

import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GAUGE = "baseline again"
"""Name under which the second copy of the baseline is reported."""


@dataclass(frozen=True)
class Timing:
    """What one candidate took: best and median in seconds a call, and how the baseline compares."""

    best: float
    median: float
    ratio: float
    """Best sample of the baseline over best sample of this candidate."""
    median_ratio: float
    """Median over rounds of the baseline's sample over this candidate's in the same round."""


@dataclass(frozen=True)
class Comparison:
    """Timings by name, with what is needed to read them."""

    timings: dict[str, Timing]
    samples: dict[str, list[float]]
    """Seconds a call, by name, one for each round."""
    calls: int
    """Calls in one sample."""
    threads: int
    device: str

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def extra_info(self, name: str, **more: Any) -> dict[str, Any]:
        """The numbers of one candidate, for `benchmark.extra_info` or a JSON file."""
        timing = self.timings[name]
        return {
            "ratio": timing.ratio,
            "median_ratio": timing.median_ratio,
            "gauge": self.timings[GAUGE].ratio,
            "best_s": timing.best,
            "median_s": timing.median,
            "threads": self.threads,
            "device": self.device,
            **more,
        }


def compare(
    candidates: Mapping[str, Callable[..., object]],
    baseline: str,
    *,
    inputs: Sequence[Sequence[Any]] = ((),),
    device: torch.device | str = "cpu",
    rounds: int = 15,
    min_sample: float = 2e-3,
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> Comparison:
    """Time every candidate `rounds` times, interleaved, and relate each to `baseline`.

    Each call gets the set of buffers after that of the call before, whosever that was: with several
    sets, none is in a cache when its turn comes. A sample repeats the call until the baseline has
    run for `min_sample` seconds, twice at least where there are several sets; all candidates run
    equally many calls.
    A candidate named in `within` is called inside that context, whose own time does not count.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not one of the candidates {sorted(candidates)}")
    timed = _sample_cuda if torch.device(device).type == "cuda" else _sample_cpu
    contestants = {**candidates, GAUGE: candidates[baseline]}
    names = list(contestants)
    rotation = itertools.cycle(inputs)

    def sample(name: str, calls: int) -> float:
        with (within or {}).get(name, nullcontext)():
            return timed(contestants[name], rotation, calls)

    for name in names:  # compiles, fills the caches and the allocator
        sample(name, 2)
    once = min(sample(baseline, 2) for _ in range(3))
    calls = max(min(len(inputs), 2), math.ceil(min_sample / max(once, 1e-9)))

    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn // 2 % len(names)
        order = names[start:] + names[:start]
        for name in order if turn % 2 == 0 else reversed(order):
            seconds[name].append(sample(name, calls))

    reference = seconds[baseline]
    timings = {
        name: Timing(
            best=min(values),
            median=statistics.median(values),
            ratio=min(reference) / min(values),
            median_ratio=statistics.median(r / v for r, v in zip(reference, values, strict=True)),
        )
        for name, values in seconds.items()
    }
    return Comparison(timings, seconds, calls, torch.get_num_threads(), device_name(device))


LONG = 50e-6
"""Seconds from which a call is timed by itself."""


def _sample_cpu(call: Callable[..., object], inputs: Iterator[Sequence[Any]], calls: int) -> float:
    """Seconds a call: the best of `calls` long ones, the mean of short ones.

    Whoever else uses the machine slows some calls down; the best of many is what a call takes.
    """
    clock = time.perf_counter
    start, best = clock(), math.inf
    for _ in range(calls):
        arguments = next(inputs)
        before = clock()
        call(*arguments)
        best = min(best, clock() - before)
    return best if best > LONG else (clock() - start) / calls


def _sample_cuda(call: Callable[..., object], inputs: Iterator[Sequence[Any]], calls: int) -> float:
    """Seconds a call on the GPU, launches included where they are the longer."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call(*next(inputs))
    end.record()
    torch.cuda.synchronize()
    seconds: float = start.elapsed_time(end) / 1e3
    return seconds / calls


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor's architecture with the vector instructions torch uses."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text: the first column to the left, the others to the right, numbers with 3 digits."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(
    path: Path, device: torch.device | str, results: Sequence[Mapping[str, Any]]
) -> None:
    """Write the results, with the versions and the device they were measured on."""
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment, "results": list(results)}, indent=1)
    path.write_text(text + "\n")
