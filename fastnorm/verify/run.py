"""Run a list of cases, and sum up what was found."""

import math
import warnings
from collections.abc import Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch

import fastnorm
import fastnorm.functional as FF
from fastnorm.verify.case import Case
from fastnorm.verify.judge import Finding, examine


@dataclass(frozen=True)
class Examined:
    """A case and its results."""

    case: Case
    findings: list[Finding]

    @property
    def worst(self) -> Finding:
        """The result that comes nearest to what the contract allows, or goes farthest beyond."""
        return max(self.findings, key=lambda finding: finding.share)

    @property
    def wrong(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.wrong]


@dataclass(frozen=True)
class Summary:
    """All cases of one operation in one dtype."""

    operation: str
    dtype: str
    cases: int
    wrong: int
    """Cases with a result that breaks the contract."""
    typical_ratio: float | None
    """Geometric mean of our error over torch.nn's, where both have one."""
    worst: Finding
    worst_case: Case


def examined(
    cases: Iterable[Case], device: torch.device, *, backend: str = "auto", jobs: int = 1
) -> Generator[Examined, None, None]:
    """Each case, in order; `jobs` processes share them, since compiling takes most of the time.

    A GPU's and the eager path's calls are made a second time, for the bits.
    """
    if jobs == 1:
        with fastnorm.use_backend(backend):
            yield from (_examined(case, device) for case in cases)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (backend,)) as pool:
        yield from pool.map(partial(_examined, device=device), cases, chunksize=4)


def _start(backend: str) -> None:
    """In a worker: the backend that was asked for, and one thread."""
    torch.set_num_threads(1)
    fastnorm.use_backend(backend).__enter__()


def _examined(case: Case, device: torch.device) -> Examined:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities as inputs
        return Examined(case, examine(case, device, twice=not interprets(device)))


def summaries(found: Iterable[Examined]) -> list[Summary]:
    """By operation and dtype, in the order of the cases."""
    grouped: dict[tuple[str, str], list[Examined]] = {}
    for one in found:
        key = (one.case.operation, one.case.words()["dtype"])
        grouped.setdefault(key, []).append(one)
    return [_summary(operation, dtype, group) for (operation, dtype), group in grouped.items()]


def _summary(operation: str, dtype: str, group: list[Examined]) -> Summary:
    ratios = [f.ratio for one in group for f in one.findings if f.torchs and f.ours]
    logarithms = [math.log(ratio) for ratio in ratios if ratio is not None and ratio < math.inf]
    typical = math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
    worst = max(group, key=lambda one: one.worst.share)
    wrong = sum(bool(one.wrong) for one in group)
    return Summary(operation, dtype, len(group), wrong, typical, worst.worst, worst.case)


def interprets(device: torch.device) -> bool:
    """Whether kernels run on a CPU, in Triton's interpreter."""
    return device.type == "cpu" and fastnorm.backend_for(torch.ones(1, 1)) == "triton"


def left_out(cases: list[Case], device: torch.device) -> tuple[list[Case], str]:
    """(the cases that this machine can run, why the others are left out)."""
    if not interprets(device) or _multiplies_bfloat16():
        return cases, ""
    kept = [case for case in cases if case.dtype is not torch.bfloat16]
    reason = (
        f"{len(cases) - len(kept)} cases left out: Triton's interpreter computes on the bit "
        "patterns of bfloat16, not on the numbers"
    )
    return kept, reason


def _multiplies_bfloat16() -> bool:
    """Whether a product of ones is one; asked of the interpreter alone."""
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    zero, one = torch.zeros(16), torch.ones(16)
    y = FF.linear_batch_norm(x, x / 16, None, zero, one, eps=0.0, algorithm="gram")
    return bool((y - 1).abs().max() < 0.1)
