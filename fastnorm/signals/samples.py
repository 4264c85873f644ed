"""Samples of tensors: copied as they pass, summed up later, all in one go.

What follows a sample are some twenty small operators. Among the large ones of a model each of them
takes five times as long as right after its likes, since the caches are the model's; so a call pays
for one copy, and the operators run when the buffer is full and at the end.
"""

import functools
import math
from collections.abc import Callable

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
) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """(shape, strides, offset, values of a unit) of about `count` elements, the axis put last."""
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
    return tuple(sizes), tuple(steps), offset, math.prod(sizes[:-1])


def _picked(tensor: Tensor, axis: int, count: int) -> tuple[Tensor, int]:
    """About `count` elements, evenly spread over all axes but `axis`, which is last; its values."""
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    sizes, strides, offset, values = _window(tensor.shape, tensor.stride(), axis, count)
    return tensor.as_strided(sizes, strides, tensor.storage_offset() + offset), values


def spread(tensor: Tensor, axis: int, count: int) -> Tensor:
    """About `count` elements, evenly spread over all axes but `axis`: (values, units) in float64.

    Float64 because squares of what a float32 holds overflow in float32; MPS has none.
    """
    picked, values = _picked(tensor.detach(), axis, count)
    return picked.to(_wide(tensor.device)).reshape(values, picked.shape[-1])


class Samples:
    """A buffer for the samples of many calls, and what is to be done with them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.turn = 0
        """Samples that were taken in an earlier turn have been overwritten."""
        self._buffers: dict[torch.device, Tensor] = {}
        self._used: dict[torch.device, int] = {}
        self._scratch: dict[torch.device, Tensor] = {}
        self._work: list[Callable[[], None]] = []

    def take(self, tensor: Tensor, axis: int) -> Tensor:
        """A sample as of `spread`, there until `turn` changes; `tensor` needs no gradient."""
        picked, values = _picked(tensor, axis, self.count)
        size, device = picked.numel(), tensor.device
        if self._used.get(device, 0) + size > SPACE or len(self._work) >= MANY:
            self.finish()
        if size > SPACE:
            return picked.to(_wide(device)).reshape(values, picked.shape[-1])
        start = self._used.get(device, 0)
        self._used[device] = start + size
        place = _buffer(self._buffers, device)[start : start + size]
        place.view(picked.shape).copy_(picked)
        return place.view(values, picked.shape[-1])

    def scratch(self, sample: Tensor) -> Tensor:
        """Room for a tensor like this sample; memory from the system costs more than to fill it."""
        if sample.numel() > SPACE:
            return torch.empty_like(sample)
        return _buffer(self._scratch, sample.device)[: sample.numel()].view(sample.shape)

    def later(self, work: Callable[[], None]) -> None:
        """What to do with samples, before they are overwritten."""
        self._work.append(work)

    def finish(self) -> None:
        """Do it now."""
        work, self._work = self._work, []
        self._used = dict.fromkeys(self._used, 0)
        self.turn += 1
        for do in work:
            do()


def _buffer(buffers: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    if device not in buffers:
        with torch.inference_mode(False):  # or it could not be written to outside of it
            buffers[device] = torch.empty(SPACE, dtype=_wide(device), device=device)
    return buffers[device]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
