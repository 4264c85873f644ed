"""Sums over a tensor that stay on its device: a few small operators a call, no synchronization."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = Tensor | float
"""A tensor of no dimensions, on a device; on a CPU a float."""
MANY = 256
"""Results of single calls that are kept before they are merged."""
EXACT = 1e-15
"""Norms above this are sums of squares that float32 holds in full: of elements above 1e-19."""
DOTS = (torch.float32, torch.float64)
"""A dot product of these is a sum of squares, at least in float32."""


def keeps_floats(tensor: Tensor) -> bool:
    """Whether floats are kept of `tensor`, not tensors: on a CPU, where small tensors among the
    large ones that a model frees and allocates would scatter its memory (6 % of a ResNet-18's
    step)."""
    return tensor.is_cpu


def number(value: Tensor) -> Number:
    """What is kept of a result of no dimensions."""
    return value.item() if keeps_floats(value) else value


def numbers(values: Tensor) -> Sequence[Number]:
    """What is kept of results in a vector."""
    kept: Sequence[Number] = values.tolist() if keeps_floats(values) else values.unbind()
    return kept


class First:
    """When a quantity was not finite first: a float tells at once, a tensor waits on its device."""

    __slots__ = ("before", "event", "waiting")

    def __init__(self) -> None:
        self.event = math.inf
        self.waiting: list[tuple[int, Tensor]] | None = None
        self.before: Tensor | None = None

    def add(self, value: Number, event: int) -> None:
        """`value`, 0-dimensional, was seen at the time `event`."""
        if not isinstance(value, Tensor):
            if not math.isfinite(value):
                self.event = min(self.event, event)
            return
        if self.waiting is None:
            self.waiting = []
        self.waiting.append((event, value))
        if len(self.waiting) >= MANY:
            self._merge(self.waiting)

    def _merge(self, waiting: Sequence[tuple[int, Tensor]]) -> None:
        """All events so far as one: inf where all were finite."""
        device = waiting[0][1].device
        stacked = torch.stack([value.to(device) for _, value in waiting])
        events = torch.tensor([event for event, _ in waiting], dtype=torch.float32, device=device)
        first = torch.where(stacked.isfinite(), math.inf, events).min()
        if self.before is not None:
            first = torch.minimum(first, self.before.to(device))
        self.waiting, self.before = None, first

    @property
    def parts(self) -> list[Number]:
        waiting: list[Number] = [value for _, value in self.waiting or ()]
        return waiting if self.before is None else [*waiting, self.before]

    def read(self, value: Callable[[Number], float]) -> float:
        """The first event that was not finite; inf: there was none."""
        first = self.event
        for event, one in self.waiting or ():
            if not math.isfinite(value(one)):
                first = min(first, event)
        return first if self.before is None else min(first, value(self.before))


class Moments:
    """Count, mean, Σ(x − mean)², zeros and saturated values, merged over calls (Chan)."""

    __slots__ = ("calls", "count", "failed", "parts")

    def __init__(self) -> None:
        self.calls = 0
        self.count = 0
        self.parts: list[Number] = []  # mean, Σ(x − mean)², not zero, saturated
        self.failed = First()

    def add(self, count: int, mean: Number, m2: Number, nonzero: Number, saturated: Number) -> None:
        """One call's."""
        self.calls += 1
        if count == 0:
            return
        if self.count:
            before, both = self.parts, self.count + count
            delta = mean - before[0]
            mean = before[0] + delta * (count / both)
            m2 = before[1] + m2 + delta * delta * (self.count * count / both)
            nonzero, saturated = nonzero + before[2], saturated + before[3]
        self.parts = [mean, m2, nonzero, saturated]
        self.count += count

    def read(self, value: Callable[[Number], float]) -> dict[str, float]:
        if not self.parts:
            return dict.fromkeys(("mean", "std", "zeros", "saturated"), math.nan)
        mean, m2, nonzero, saturated = map(value, self.parts)
        variance = m2 / self.count
        return {
            "mean": mean,
            "std": math.sqrt(variance) if variance >= 0 else math.nan,
            "zeros": 1 - nonzero / self.count,
            "saturated": saturated / self.count,
        }


class Norms:
    """The root mean square, over calls, of a norm."""

    __slots__ = ("calls", "failed", "squares")

    def __init__(self) -> None:
        self.calls = 0
        self.squares: Number = 0.0
        self.failed = First()

    def add(self, tensor: Tensor, event: int) -> None:
        kept = norm(tensor)
        self.failed.add(kept, event)
        self.calls += 1
        self.squares = self.squares + kept * kept

    def read(self, value: Callable[[Number], float]) -> float:
        if not self.calls:
            return math.nan
        squares = value(self.squares)
        return math.sqrt(squares / self.calls) if squares >= 0 else math.nan


def moments_of(samples: Tensor, bounds: Sequence[float]) -> Iterator[tuple[Number, ...]]:
    """Of each row mean, Σ(x − mean)², not zero, saturated; `samples` is written to."""
    # as floats: torch writes and counts bools at a third of that speed
    nonzero = torch.ne(samples, 0, out=torch.empty_like(samples)).sum(1)
    saturated = _saturated(samples, *bounds) if bounds else torch.zeros_like(nonzero)
    mean = samples.sum(1).div_(samples.shape[1])
    m2 = samples.sub_(mean.unsqueeze(1)).square_().sum(1)
    return zip(*map(numbers, (mean, m2, nonzero, saturated)), strict=True)


def norm(tensor: Tensor) -> Number:
    """√Σ|x|², summed in float32 at least; not finite where an element is not.

    On a CPU also where squares leave float32's range; elsewhere above 1e19 it is infinite.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    floats = keeps_floats(tensor)
    whole = flat(tensor) if floats and tensor.dtype in DOTS else None
    if whole is not None:  # half the time
        result = math.sqrt(torch.dot(whole, whole).item())
    else:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        found: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
        if not floats:
            return found if tensor.device.type == "mps" else found.double()
        result = float(found)
    if EXACT < result < math.inf or math.isnan(result):
        return result
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def flat(tensor: Tensor) -> Tensor | None:
    """All elements in the order of memory, where they are dense in it."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last):
        return tensor.movedim(1, -1).view(-1)
    return None


def _saturated(samples: Tensor, low: float, high: float) -> Tensor:
    """How many values of each row lie within 1 % of the span from a bound."""
    margin = 0.01 * (high - low)
    return ((samples <= low + margin) | (samples >= high - margin)).sum(1)
