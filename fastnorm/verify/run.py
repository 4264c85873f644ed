"""Run a list of cases, and sum up what was found."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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


def examined(cases: Iterable[Case], device: torch.device) -> Iterator[Examined]:
    """Each case once; a GPU's and the eager path's also a second time, for the bits."""
    twice = not interprets(device)
    for case in cases:
        with warnings.catch_warnings():
            # NumPy's, of infinities inside the interpreter
            warnings.simplefilter("ignore", RuntimeWarning)
            yield Examined(case, examine(case, device, twice=twice))


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
