"""Tensors among what a layer takes and gives: which can be summed up, and how sums come home."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastnorm.signals.moments import Number

_in_transform = torch._C._functorch.get_dynamic_layer_stack_depth
_PLAIN = Tensor.__torch_dispatch__


def is_plain(tensor: Tensor) -> bool:
    """Whether `tensor` has values of its own, in strides: not one of torch.func, FSDP, or meta."""
    return (
        tensor.layout is torch.strided
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


def to_cpu(found: list[Number]) -> list[Number]:
    """The same on the CPU, tensors in float64, those of one device in one transfer.

    Those of 0 dimensions are stacked by dtype first: most of them are, and there are hundreds.
    """
    result = list(found)
    tensors = {index: t for index, t in enumerate(found) if isinstance(t, Tensor)}
    groups: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for index, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(index)
    for device in {device for device, _, _ in groups}:
        mine = [indices for key, indices in groups.items() if key[0] == device]
        wide = torch.float32 if device.type == "mps" else torch.float64
        stacks = [torch.stack([tensors[index] for index in indices]) for indices in mine]
        flat = torch.cat([stack.flatten().to(wide) for stack in stacks]).cpu().double()
        parts = torch.split(flat, [stack.numel() for stack in stacks])
        for indices, part, stack in zip(mine, parts, stacks, strict=True):
            for index, value in zip(indices, part.reshape(stack.shape).unbind(), strict=True):
                result[index] = value
    return result
