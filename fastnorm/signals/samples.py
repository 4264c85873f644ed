"""Samples of tensors: copied as they pass, summed up later, all in one go.

What follows a sample are some twenty small operators. Among the large ones of a model each of them
takes five times as long as right after its likes, since the caches are the model's; so a call pays
for one copy, and the operators run when the buffer is full and at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

SPACE = 2**18
"""Elements of the buffer: 2 MB in float64."""
MANY = 256
"""Samples that wait at most."""


def units_axis(tensor: Tensor, last: bool) -> int:
    """The axis of units (channels, features): the last, or 1 as in convolutions."""
    return tensor.dim() - 1 if last or tensor.dim() < 2 else 1


@functools.lru_cache(maxsize=4096)
def _window(
    shape: torch.Size, strides: tuple[int, ...], axis: int, count: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int, int]:
    """(shape, strides, those of a dense copy, offset, values of a unit) of about `count` elements.

    The axis comes last.
    """
    sizes, steps, offset = list(shape), list(strides), 0
    excess = math.prod(shape) / count
    # positions before samples, the innermost axis last: its elements share cache lines
    axes = [a for a in (*range(len(shape) - 2, -1, -1), len(shape) - 1) if a != axis]
    for a in axes:
        if excess <= 1:
            break
        most = sizes[a] if a == axes[-1] else max(1, sizes[a] // 4)
        step = min(math.ceil(excess), most)
        start = step // 2  # borders are rarely like the rest
        size = len(range(start, sizes[a], step))
        offset += start * steps[a]
        excess *= size / sizes[a]
        sizes[a], steps[a] = size, steps[a] * step
    order = [a for a in range(len(shape)) if a != axis] + [axis]
    sizes, steps = [sizes[a] for a in order], [steps[a] for a in order]
    dense = tuple(math.prod(sizes[a + 1 :]) for a in range(len(sizes)))
    return tuple(sizes), tuple(steps), dense, offset, math.prod(sizes[:-1])


class Samples:
    """A buffer for the samples of many calls, and what is to be done with them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.turn = 0
        """Samples that were taken in an earlier turn have been overwritten."""
        self._buffers: dict[torch.device, Tensor] = {}
        self._used: dict[torch.device, int] = {}
        self._scratch: dict[torch.device, Tensor] = {}
        self._waiting = 0
        self._work: dict[Callable[[list[Any], Samples], None], list[Any]] = {}

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """About `count` elements, evenly spread over all axes but `axis`: (values, units).

        They are there until `turn` changes; `tensor` needs no gradient. In float64, because squares
        of what a float32 holds overflow in float32; MPS has none.
        """
        if tensor.dim() == 0:
            tensor = tensor.reshape(1)
        shape, strides, dense, offset, values = _window(
            tensor.shape, tensor.stride(), axis, self.count
        )
        picked = tensor.as_strided(shape, strides, tensor.storage_offset() + offset)
        size, device = values * shape[-1], tensor.device
        start = self._used.get(device, 0)
        if start + size > SPACE or self._waiting >= MANY:
            self.finish()
            start = 0
        if size > SPACE:
            return picked.to(_wide(device), copy=True).reshape(values, shape[-1])
        self._used[device] = start + size
        buffer = _buffer(self._buffers, device)
        buffer.as_strided(shape, dense, start).copy_(picked)
        return buffer.as_strided((values, shape[-1]), (shape[-1], 1), start)

    def stacks(self, samples: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
        """Those of one shape at a time, as (their places among `samples`, a copy to write to)."""
        alike: dict[tuple[torch.device, torch.Size], list[int]] = {}
        for place, sample in enumerate(samples):
            alike.setdefault((sample.device, sample.shape), []).append(place)
        for (device, shape), places in alike.items():
            most = max(1, SPACE // max(1, shape.numel()))
            for first in range(0, len(places), most):
                some = places[first : first + most]
                room = self._room((len(some), *shape), device)
                yield some, torch.stack([samples[place] for place in some], out=room)

    def _room(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Memory from the system costs more than to fill it."""
        if math.prod(shape) > SPACE:
            return torch.empty(shape, dtype=_wide(device), device=device)
        return _buffer(self._scratch, device)[: math.prod(shape)].view(shape)

    def later(self, work: Callable[[list[Any], Samples], None], item: Any) -> None:
        """Call `work` with all its items, before the samples among them are overwritten."""
        self._work.setdefault(work, []).append(item)
        self._waiting += 1

    def finish(self) -> None:
        """Do it now."""
        waiting, self._work, self._waiting = self._work, {}, 0
        self._used = dict.fromkeys(self._used, 0)
        self.turn += 1
        for work, items in waiting.items():
            work(items, self)


def _buffer(buffers: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    if device not in buffers:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            buffers[device] = torch.empty(SPACE, dtype=_wide(device), device=device)
    return buffers[device]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
