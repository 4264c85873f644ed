"""Interleaved timing: is a candidate faster than a baseline on a machine that is never quiet?

Two runs a minute apart differ by more than most improvements. So every candidate is timed in every round, the
order rotates and alternates in direction from round to round, and the baseline takes part twice: the ratio of
the baseline to itself is the noise of the whole comparison, and no ratio means more than that gauge allows.

    ratio = best time of the baseline / best time of the candidate           (above 1: the candidate is faster)
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GAUGE = "baseline again"
"""Name under which the second copy of the baseline is reported."""


@dataclass(frozen=True)
class Timing:
    """What one candidate took per call: the best and the median sample in seconds, and its ratios."""

    name: str
    best: float
    median: float
    ratio: float
    """Best baseline sample over best sample of this candidate."""
    median_ratio: float
    """Median over rounds of the baseline's sample over this candidate's in the same round."""


@dataclass(frozen=True)
class Comparison:
    """Timings by name, with what is needed to read them: rounds, calls a sample, threads, device."""

    timings: dict[str, Timing]
    baseline: str
    rounds: int
    calls_per_sample: int
    threads: int
    device: str

    @property
    def noise(self) -> float:
        """How far the baseline's ratio to itself is from one; no smaller difference is a finding."""
        return abs(self.timings[GAUGE].ratio - 1.0)

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def extra_info(self, name: str, **more: Any) -> dict[str, Any]:
        """Numbers of one candidate for `benchmark.extra_info`."""
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


def _timer(
    device: torch.device,
) -> Callable[[Callable[..., object], Sequence[Sequence[Any]], int], float]:
    """A function that returns the seconds `calls` calls took on the device."""
    if device.type != "cuda":

        def sample_cpu(
            call: Callable[..., object], inputs: Sequence[Sequence[Any]], calls: int
        ) -> float:
            start = time.perf_counter()
            for index in range(calls):
                call(*inputs[index % len(inputs)])
            return time.perf_counter() - start

        return sample_cpu

    def sample_cuda(
        call: Callable[..., object], inputs: Sequence[Sequence[Any]], calls: int
    ) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for index in range(calls):
            call(*inputs[index % len(inputs)])
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return sample_cuda


def compare(
    candidates: Mapping[str, Callable[..., object]],
    baseline: str,
    *,
    inputs: Sequence[Sequence[Any]] = ((),),
    device: torch.device | str = "cpu",
    rounds: int = 15,
    min_sample: float = 2e-3,
) -> Comparison:
    """Time every candidate `rounds` times, interleaved, and relate each to `baseline`.

    Call number i of a sample gets `*inputs[i % len(inputs)]`: give several sets of buffers to keep a cache from
    holding the operands. A sample repeats the call until the baseline has run for `min_sample` seconds; all
    candidates run equally many calls.
    """
    if baseline not in candidates:
        raise ValueError(f"baseline {baseline!r} is not one of the candidates {sorted(candidates)}")
    device = torch.device(device)
    sample = _timer(device)
    calls_by_name = {**candidates, GAUGE: candidates[baseline]}
    names = list(calls_by_name)

    for call in calls_by_name.values():  # compiles, fills caches and the allocator
        sample(call, inputs, len(inputs))
        sample(call, inputs, len(inputs))
    once = min(sample(candidates[baseline], inputs, 1) for _ in range(3))
    calls = max(len(inputs) if len(inputs) > 1 else 1, math.ceil(min_sample / max(once, 1e-9)))

    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order if turn % 2 == 0 else reversed(order):
            seconds[name].append(sample(calls_by_name[name], inputs, calls) / calls)

    reference = seconds[baseline]
    timings = {
        name: Timing(
            name,
            best=min(values),
            median=statistics.median(values),
            ratio=min(reference) / min(values),
            median_ratio=statistics.median(r / v for r, v in zip(reference, values, strict=True)),
        )
        for name, values in seconds.items()
    }
    return Comparison(
        timings, baseline, rounds, calls, torch.get_num_threads(), device_name(device)
    )


def device_name(device: torch.device | str) -> str:
    """The GPU's name, or the processor architecture with the vector instructions torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions, device and thread count, to be stored beside every result."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A plain text table: first column left-aligned, numbers to the right with three digits."""
    cells = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in (header, *rows)
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in cells
    )


def write_json(
    path: Path, device: torch.device | str, results: Sequence[Mapping[str, Any]]
) -> None:
    """Write the results with the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"environment": environment(device), "results": list(results)}, indent=1) + "\n"
    )
