"""Tensors among what a layer takes and gives: which can be summed up, and how sums come home."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastnorm.signals.moments import Number

_in_transform = torch._C._functorch.get_dynamic_layer_stack_depth
_PLAIN = Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` has values of its own, in strides: not one of torch.func, FSDP, or meta.

    Nor of 8 bits, with which torch does not compute.
    """
    return (
        tensor.layout is torch.strided
        and tensor.itemsize > 1
        and not (tensor.is_meta or tensor.is_nested)
        and type(tensor).__torch_dispatch__ is _PLAIN
        and _in_transform() == 0
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def inside(value: object) -> Iterator[Tensor]:
    """The tensors in arguments or an output: in tuples, lists and mappings of any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from inside(one)
    elif isinstance(value, tuple | list):
        for one in value:
            yield from inside(one)


class OnCpu:
    """Numbers as floats and vectors in float64 on the CPU, those of one device in one transfer."""

    def __init__(self, found: Iterable[Number]) -> None:
        groups: dict[torch.device, list[Tensor]] = {}
        for value in found:
            if isinstance(value, Tensor):
                groups.setdefault(value.device, []).append(value)
        self._moved: dict[int, Tensor] = {}
        self._kept = groups  # an id serves as long as its tensor lives
        for device, tensors in groups.items():
            wide = torch.float32 if device.type == "mps" else torch.float64
            self._moved.update(zip(map(id, tensors), _moved(tensors, wide), strict=True))

    def number(self, value: Number) -> float:
        return float(self._moved[id(value)]) if isinstance(value, Tensor) else value

    def vector(self, value: Tensor) -> Tensor:
        return self._moved[id(value)]


def _moved(tensors: Sequence[Tensor], wide: torch.dtype) -> list[Tensor]:
    """Those of one shape and dtype are stacked first: most have no dimensions, and are hundreds."""
    groups: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.dtype, tensor.shape), []).append(index)
    stacks = [torch.stack([tensors[index] for index in group]) for group in groups.values()]
    flat = torch.cat([stack.flatten().to(wide) for stack in stacks]).cpu().double()
    result = list(tensors)
    parts = flat.split_with_sizes([stack.numel() for stack in stacks])
    for group, stack, part in zip(groups.values(), stacks, parts, strict=True):
        for index, value in zip(group, part.view(stack.shape).unbind(), strict=True):
            result[index] = value
    return result
