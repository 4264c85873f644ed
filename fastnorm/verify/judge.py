"""The contract: our error is at most torch.nn's own in that dtype, or a few roundings.

    allowed = max( 2 · torch.nn's error,
                   ε_out · max|want|  +  8 ε · max size  +  k ε_in · typical size )

`want` is float64's result of the very same, already rounded, inputs. ε_out is that of the result's
dtype: a rounding at the store, and one before. ε is that of the arithmetic, float32's or float64's;
`size` is the sum of the magnitudes that were added up to give the result (Σ|dy x̂| for dγ), to which
rounding errors are relative, whatever is left of them after cancelling. k tensors lie, rounded to
the input's dtype, between torch.nn's layers where an activation, a sum or a product is fused here;
the errors of n elements grow like √n in a sum of them: typical size = max size / √n. 2 and 8 are
for the order of roundings, which is not torch's. Errors are the largest over a tensor. Where `want`
is NaN or infinite, or does not fit the dtype, ours is right where torch's is. Where roundings alone
reach beyond the dtype's largest number, it is luck what overflows: an infinity is one of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnorm.verify.case import BUFFERS, LEAVES, ROUNDINGS, Case, Stages, Tensors, compute_dtype

FACTOR = 2.0
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
"""Where a derivative jumps: a rounding of z there is an error of the size of dy."""


@dataclass(frozen=True)
class Finding:
    """One result of a case. Errors are relative to the largest element of the reference."""

    result: str
    ours: float
    torchs: float | None
    """None where torch has no such operator for this dtype here."""
    allowed: float
    wrong: str = ""
    """What is wrong, in words; empty where the contract is kept."""

    @property
    def ratio(self) -> float | None:
        """Our error over torch.nn's; 1 where neither has any."""
        if self.torchs is None:
            return None
        if self.torchs == 0:
            return 1.0 if self.ours == 0 else math.inf
        return self.ours / self.torchs

    @property
    def share(self) -> float:
        """Our error over what the contract allows."""
        if self.wrong:
            return max(1.0, self.ours / self.allowed) if self.allowed else math.inf
        return self.ours / self.allowed if self.allowed else 0.0


def examine(case: Case, device: torch.device, *, twice: bool = False) -> list[Finding]:
    """Run the case by all three, and ours again where `twice` asks whether the bits are the same.

    Whatever ours raises is a finding.
    """
    tensors = case.tensors(device)
    exact = {name: t.double() for name, t in tensors.items()}
    stages = case.stages(exact)
    tensors["dy"] = tensors["dy"].masked_fill(_ambiguous(case, stages), 0)
    exact["dy"] = tensors["dy"].double()
    want = case.settled(_outcome(case.reference, exact))
    try:
        theirs = _outcome(_in_place(case.torchs), tensors)
    except (RuntimeError, NotImplementedError):
        theirs = {}  # it has no such operator for this dtype here
    try:
        got = _outcome(_in_place(case.ours), tensors)
        again = _outcome(_in_place(case.ours), tensors) if twice else got
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        return [Finding("call", math.inf, None, 0.0, f"{type(error).__name__}: {words}")]
    sizes = case.sizes(exact, stages)
    findings = []
    for name, expected in want.items():
        terms = max(1.0, tensors["dy"].numel() / max(expected.numel(), 1))
        between = case.stored_between * torch.finfo(case.dtype).eps / terms**0.5
        step = ROUNDINGS * torch.finfo(compute_dtype(case.dtype)).eps + between
        finding = _judge(name, got[name], theirs.get(name), expected, sizes[name], step)
        findings.append(finding if finding.wrong else _repeated(finding, got[name], again[name]))
    return findings


def _ambiguous(case: Case, stages: Stages) -> Tensor:
    """Elements whose derivative depends on how z was rounded: they get no upstream gradient."""
    reach = 2 * torch.finfo(case.dtype).eps * stages.z_size
    near = torch.zeros_like(stages.z, dtype=torch.bool)
    for kink in KINKS.get(case.activation, ()):
        near |= (stages.z - kink).abs() <= reach
    return near


Call = Callable[[Tensors], tuple[Tensors, Tensors]]


def _in_place(call: Callable[[Tensors], Tensors]) -> Call:
    """A call that moves its buffers in place, as one that returns them."""

    def called(tensors: Tensors) -> tuple[Tensors, Tensors]:
        own = tensors | {n: tensors[n].clone() for n in BUFFERS if n in tensors}
        outputs = call(own)
        return outputs, {n: own[n] for n in BUFFERS if n in own}

    return called


def _outcome(call: Call, tensors: Tensors) -> Tensors:
    """Outputs, every gradient and the buffers, by name."""
    leaves = {n: tensors[n].detach().requires_grad_() for n in LEAVES if n in tensors}
    outputs, buffers = call(tensors | leaves)
    seeds = [tensors["dy" if name == "y" else "dsum"].to(y.dtype) for name, y in outputs.items()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), seeds)
    found = outputs | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)} | buffers
    return {name: t.detach() for name, t in found.items()}


def _judge(
    name: str,
    got: Tensor,
    theirs: Tensor | None,
    want: Tensor,
    size: Tensor,
    step: float,
) -> Finding:
    dtype = got.dtype if theirs is None else theirs.dtype
    if got.dtype != dtype or got.shape != want.shape:
        says = f"{got.dtype} {list(got.shape)}, expected {dtype} {list(want.shape)}"
        return Finding(name, math.inf, None, 0.0, says)
    store = torch.finfo(dtype).eps
    finite = want.to(dtype).isfinite()
    magnitude = _largest(size[size.isfinite()])
    scale = max(_largest(want[finite]), step * magnitude, torch.finfo(dtype).smallest_normal)
    floor = store * _largest(want[finite]) + step * magnitude
    floor += torch.finfo(dtype).smallest_normal  # results that small may be flushed to zero
    bad = _wrong_places(got, want, finite)
    others: float | None = None
    if theirs is not None:
        both = finite & theirs.isfinite()
        others = _largest((theirs.double() - want)[both]) / scale
        bad &= ~_wrong_places(theirs, want, finite)
    if floor > torch.finfo(dtype).max:
        bad &= ~(got.isinf() & finite)
    both = finite & got.isfinite()
    ours = _largest((got.double() - want)[both]) / scale
    allowed = max(FACTOR * (others or 0.0), floor / scale)
    if bad.any():
        wrong = f"{int(bad.sum())} elements NaN, infinite or finite where torch's are not"
    else:
        wrong = "" if ours <= allowed else "worse than the contract allows"
    return Finding(name, ours, others, allowed, wrong)


def _wrong_places(got: Tensor, want: Tensor, finite: Tensor) -> Tensor:
    """Where one is finite, NaN or infinite and the other is not."""
    return (got.isfinite() != finite) | (got.isnan() != want.isnan())


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _repeated(finding: Finding, first: Tensor, second: Tensor) -> Finding:
    same = torch.equal(first.nan_to_num(nan=1.0), second.nan_to_num(nan=1.0))
    if same:
        return finding
    wrong = "other bits on a second call"
    return Finding(finding.result, finding.ours, finding.torchs, finding.allowed, wrong)
