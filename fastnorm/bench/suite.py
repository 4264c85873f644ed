"""Measure one pass of one layer: every library's call, interleaved, checked and put in numbers."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.bench import libraries, shapes
from fastnorm.bench.ceilings import Ceilings, cache_bytes
from fastnorm.bench.harness import GAUGE, Comparison, compare
from fastnorm.bench.layers import Layer

BASELINE, OURS = "torch.nn", "fastnorm"
MOST_COPIES = 16
NOISY = 0.03
"""A measurement whose baseline is that far from itself may be taken again."""
_AGREEMENT = {2: 0.1, 4: 0.01}
"""Largest relative error, by bytes an element, at which two libraries compute the same thing."""

Call = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A pass of a layer in a dtype."""

    layer: Layer
    dtype: torch.dtype
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}, {str(self.dtype)[6:]}, {self.kind}"


@dataclass(frozen=True)
class Cost:
    """What one library needs for one call."""

    best_s: float
    median_s: float
    speedup: float
    """Of fastnorm over it: its best time over ours."""
    median_speedup: float
    """Median over rounds of its time over ours of the same round."""
    of_ceiling: float
    """The least time that this machine's memory and products allow, over its best time."""
    peak_bytes: int | None = None
    launches: int | None = None
    """Kernels on the GPU."""
    host_s: float | None = None
    """What the host needs to issue a call to the GPU."""


@dataclass(frozen=True)
class Measured:
    """One line of the report."""

    case: Case
    backend: str
    bytes: int
    flops: int
    calls: int
    noise: float
    """The larger deviation from 1 of torch.nn's ratio to itself: of best times, of medians."""
    costs: dict[str, Cost]
    refused: dict[str, str] = field(default_factory=dict)
    """Peers that did not run this case, or computed something else: why."""


def cases(device: torch.device, quick: bool, only: str = "") -> list[Case]:
    """The cases of a run; `only`: those of layers with this in their description.

    The quick ones are of the dtype that the device is mostly used with.
    """
    dtypes = [torch.float32, torch.bfloat16]
    kinds = ["eval", "forward", "step"]
    layers = [layer for layer in shapes.layers(device.type) if only in str(layer)]
    if quick:
        dtypes = [torch.bfloat16 if device.type == "cuda" else torch.float32]
        kinds.remove("eval")
        layers = [layer for layer in layers if layer.quick]
    return [
        Case(layer, dtype, kind)
        for layer in layers
        for dtype in dtypes
        for kind in kinds
        if kind in layer.passes
    ]


def prepare(
    case: Case, peers: Iterable[str], device: torch.device
) -> tuple[dict[str, Call], list[list[Tensor]], dict[str, str]]:
    """(calls by library, sets of inputs, why a peer takes no part); peers are checked."""
    backward = case.kind == "step"
    layer, dtype = case.layer, case.dtype
    size = layer.fewest_bytes(dtype, "forward")
    copies = min(MOST_COPIES, max(1, math.ceil(2 * cache_bytes(device) / size)))
    inputs = [layer.inputs(dtype, device, backward) for _ in range(copies)]
    calls = {
        BASELINE: _call(case, libraries.torch_nn(layer), device),
        OURS: _call(case, libraries.ours(layer), device),
    }
    # torch.nn's own gradients of a channels_last_3d instance norm are wrong: ask it about planes.
    planes = [t.detach().contiguous().requires_grad_(t.requires_grad) for t in inputs[0]]
    want = calls[BASELINE](*planes)
    if (error := _difference(calls[OURS](*inputs[0]), want)) > _AGREEMENT[dtype.itemsize]:
        raise AssertionError(f"{case}: fastnorm differs from torch.nn by {error:.1e}")
    refused = {}
    for name in peers:
        peer = libraries.PEERS[name]
        try:
            module = peer.make(layer)
            if module is None:
                continue
            call = _call(case, module, device)
            with peer.within():
                error = _difference(call(*inputs[0]), want)
            if error > _AGREEMENT[dtype.itemsize]:
                refused[name] = f"differs from torch.nn by {error:.1e}"
            else:
                calls[name] = call
        except Exception as problem:  # what a peer cannot do must not end the comparison
            first = str(problem).partition("\n")[0]
            refused[name] = f"{type(problem).__name__}: {first}"
    return calls, inputs, refused


def measure(
    case: Case,
    peers: Iterable[str],
    device: torch.device,
    ceilings: Ceilings,
    *,
    rounds: int = 15,
    again: bool = True,
    peak_memory: Callable[[Call, torch.device], int | None] | None = None,
) -> Measured:
    """Every library's time, interleaved, then its memory, launches and host time.

    `again`: a noisy measurement is taken twice, and the one with less noise counts.
    """
    torch.compiler.reset()
    calls, inputs, refused = prepare(case, peers, device)
    within = {name: libraries.PEERS[name].within for name in calls if name in libraries.PEERS}

    def timed() -> tuple[Comparison, float]:
        found = compare(calls, BASELINE, inputs=inputs, device=device, rounds=rounds, within=within)
        gauge = found[GAUGE]
        return found, max(abs(1 - gauge.ratio), abs(1 - gauge.median_ratio))

    result, noise = timed()
    if again and noise > NOISY:
        result, noise = min((result, noise), timed(), key=lambda pair: pair[1])
    bytes = case.layer.fewest_bytes(case.dtype, case.kind)
    flops = case.layer.flops(case.kind)
    least = ceilings.seconds(bytes, flops, case.dtype)
    costs = {}
    for name, call in calls.items():
        with within.get(name, nullcontext)():
            costs[name] = Cost(
                result[name].best,
                result[name].median,
                result[name].best / result[OURS].best,
                _paired(result, name),
                least / result[name].best,
                peak_memory(partial(call, *inputs[0]), device) if peak_memory else None,
                launches(call, inputs[0], device),
                host_seconds(call, inputs[0], device),
            )
    backend = fastnorm.backend_for(inputs[0][0])
    return Measured(case, backend, bytes, flops, result.calls, noise, costs, refused)


def as_json(found: Measured) -> dict[str, Any]:
    """One line of the report, as JSON has it."""
    layer = found.case.layer
    return {
        "name": layer.name,
        "operation": layer.operation,
        "kind": layer.kind,
        "shape": list(layer.shape),
        "layout": layer.layout,
        "dtype": str(found.case.dtype)[6:],
        "pass": found.case.kind,
        "backend": found.backend,
        "bytes": found.bytes,
        "flops": found.flops,
        "calls": found.calls,
        "noise": found.noise,
        "costs": {name: asdict(cost) for name, cost in found.costs.items()},
        "refused": found.refused,
    }


def _paired(result: Comparison, name: str) -> float:
    """Median over rounds of this candidate's time over ours."""
    pairs = zip(result.samples[name], result.samples[OURS], strict=True)
    return statistics.median(theirs / own for theirs, own in pairs)


def _call(case: Case, module: nn.Module, device: torch.device) -> Call:
    """Takes what `Layer.inputs` made; returns the outputs, or every gradient."""
    libraries.prepared(module, case.layer, case.dtype, device)
    module.train(case.kind != "eval")
    parameters = list(module.parameters())
    leaves = 1 + case.layer.residual

    def forward(*tensors: Tensor) -> Any:
        with torch.no_grad():
            return module(*tensors[:leaves])

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = module(*tensors[:leaves])
        return torch.autograd.grad(outputs, [*tensors[:leaves], *parameters], tensors[leaves:])

    return step if case.kind == "step" else forward


def _difference(got: Any, want: Any) -> float:
    """The largest relative error, in norm, of any output; as many as the baseline has."""
    got, want = ([t] if isinstance(t, Tensor) else list(t) for t in (got, want))
    worst = 0.0
    for one, other in zip(got, want, strict=True):
        norm = other.double().norm().item()
        worst = max(worst, (one.double() - other.double()).norm().item() / max(norm, 1e-30))
    return worst


def launches(call: Call, inputs: Sequence[Tensor], device: torch.device) -> int | None:
    """Kernels that a call starts on the GPU; None on a CPU, which has none, or if nobody counts."""
    activity = torch.profiler.ProfilerActivity.CUDA
    if device.type != "cuda" or activity not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]
        return None
    with torch.profiler.profile(activities=[activity]) as profile:
        call(*inputs)
        torch.cuda.synchronize(device)
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return len(kernels)


def host_seconds(call: Call, inputs: Sequence[Tensor], device: torch.device) -> float | None:
    """What the host takes to issue a call, waiting for nothing; None on a CPU: the call's time."""
    if device.type != "cuda":
        return None
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            call(*inputs)
        best = min(best, (time.perf_counter() - start) / 10)
    torch.cuda.synchronize(device)
    return best
