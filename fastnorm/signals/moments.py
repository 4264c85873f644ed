"""Sums over a tensor that stay on its device: a few small operators a call, no synchronization."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = Tensor | float
"""A tensor of no dimensions, on a device; on a CPU a float."""
MANY = 256
"""Results of single calls that are kept before they are merged."""
EXACT = 1e-15
"""Norms above this are sums of squares that float32 holds in full: of elements above 1e-19."""


def keeps_floats(tensor: Tensor) -> bool:
    """Whether floats are kept of `tensor`, not tensors: on a CPU, where small tensors among the
    large ones that a model frees and allocates would scatter its memory (6 % of a ResNet-18's
    step)."""
    return tensor.is_cpu


def number(value: Tensor) -> Number:
    """What is kept of a result of no dimensions."""
    return value.item() if keeps_floats(value) else value


class First:
    """When a quantity was not finite first; the quantities wait on the device until asked for."""

    def __init__(self) -> None:
        self.values: list[Number] = []
        self.events: list[int] = []
        self.before: Number | None = None

    def add(self, value: Number, event: int) -> None:
        """`value`, 0-dimensional, was seen at the time `event`."""
        self.values.append(value)
        self.events.append(event)
        if len(self.values) >= MANY:
            self._merge()

    def _merge(self) -> None:
        """All events so far as one: inf where all were finite."""
        on_device = next((v.device for v in self.values if isinstance(v, Tensor)), None)
        if on_device is None:
            self.before = self.number([float(value) for value in (*self.values, *self._earlier)])
        else:
            stacked = torch.stack([torch.as_tensor(v, device=on_device) for v in self.values])
            events = torch.tensor(self.events, dtype=torch.float32).to(on_device)
            first = torch.where(stacked.isfinite(), math.inf, events).min()
            for before in self._earlier:
                first = torch.minimum(first, torch.as_tensor(before, device=on_device))
            self.before = first
        self.values, self.events = [], []

    @property
    def _earlier(self) -> list[Number]:
        return [] if self.before is None else [self.before]

    @property
    def parts(self) -> list[Number]:
        return [*self.values, *self._earlier]

    def number(self, values: list[float]) -> float:
        """The first event that was not finite, from the values of `parts`; inf: there was none."""
        merged = values[len(self.events) :]
        found = [e for e, v in zip(self.events, values, strict=False) if not math.isfinite(v)]
        return float(min([*merged, *found], default=math.inf))


class Moments:
    """Count, mean, Σ(x − mean)², zeros and saturated values, merged over calls (Chan)."""

    def __init__(self) -> None:
        self.calls = 0
        self.count = 0
        self.parts: list[Number] = []  # mean, Σ(x − mean)², not zero, saturated
        self.failed = First()

    def add(self, sample: Tensor, bounds: tuple[float, ...], scratch: Tensor) -> None:
        """One call's sample; `scratch` is room for another."""
        count = sample.numel()
        self.calls += 1
        if count == 0:
            return
        average = sample.mean()
        spread = torch.linalg.vector_norm(torch.sub(sample, average, out=scratch))
        found = [number(t) for t in (average, spread, torch.count_nonzero(sample))]
        found.append(number(_saturated(sample, bounds)) if bounds else found[2])
        mean, deviation, nonzero, saturated = found
        m2 = deviation * deviation
        if self.count:
            before, both = self.parts, self.count + count
            delta = mean - before[0]
            mean = before[0] + delta * (count / both)
            m2 = before[1] + m2 + delta * delta * (self.count * count / both)
            nonzero, saturated = nonzero + before[2], saturated + before[3]
        self.parts = [mean, m2, nonzero, saturated]
        self.count += count

    def numbers(self, values: list[float]) -> dict[str, float]:
        """The results, from the values of `parts`."""
        if not values:
            return dict.fromkeys(("mean", "std", "zeros", "saturated"), math.nan)
        mean, m2, nonzero, saturated = values
        variance = m2 / self.count
        return {
            "mean": mean,
            "std": math.sqrt(variance) if variance >= 0 else math.nan,
            "zeros": 1 - nonzero / self.count,
            "saturated": saturated / self.count,
        }


class Norms:
    """The root mean square, over calls, of a norm."""

    def __init__(self) -> None:
        self.calls = 0
        self.squares: Number = 0.0
        self.failed = First()

    def add(self, tensor: Tensor, event: int) -> None:
        kept = norm(tensor)
        self.failed.add(kept, event)
        self.calls += 1
        self.squares = self.squares + kept * kept

    @property
    def parts(self) -> list[Number]:
        return [self.squares] if self.calls else []

    def number(self, values: list[float]) -> float:
        """The result, from the value of `parts`."""
        if not values:
            return math.nan
        return math.sqrt(values[0] / self.calls) if values[0] >= 0 else math.nan


def norm(tensor: Tensor) -> Number:
    """√Σ|x|², summed in float32 at least; not finite where an element is not.

    On a CPU also where squares leave float32's range; elsewhere above 1e19 it is infinite.
    """
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    wide = torch.promote_types(tensor.dtype, torch.float32)
    if not keeps_floats(tensor):
        found: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
        return found if tensor.device.type == "mps" else found.double()
    whole = flat(tensor) if tensor.dtype is wide else None
    if whole is None:
        result = float(torch.linalg.vector_norm(tensor, dtype=wide))
    else:  # half the time
        result = math.sqrt(torch.dot(whole, whole).item())
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


def _saturated(sample: Tensor, bounds: tuple[float, ...]) -> Tensor:
    """How many values lie within 1 % of the span from a bound."""
    low, high = bounds
    margin = 0.01 * (high - low)
    return ((sample <= low + margin) | (sample >= high - margin)).sum()
