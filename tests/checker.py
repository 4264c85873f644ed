"""Kernel checker: every launch in the interpreter is judged, element by element.

    with checked():
        layer_norm(x, ...)

raises `KernelFault`, naming kernel, program, argument and element, for

- a load or store outside the storage of the argument whose pointer it was computed from, before
  memory is touched;
- an element written by two programs of a launch, or written by one and read by another, since
  nothing orders programs (a program may read and rewrite what is its own);
- any atomic, since its order differs from run to run;
- an element of a `torch.empty` tensor, made by a launcher, that is read before a launch has written
  it, or that no launch and no torch operator has written when the context ends (but what only
  launches were given that wait for a flag and found it down).

Only what ran is judged: another size may take another branch. Within a program the interpreter
keeps an order that the threads of a GPU do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from accesses import Chunk, KernelFault, Launch, Observer, numbered, split
from interpreter import observed

from fastnorm.kernels.launch import ON_A_FLAG

__all__ = ["KernelFault", "checked"]

# Where an allocation was never written it still holds these bits; floating ones are NaN.
_SENTINELS = {
    torch.float64: 0x7FF8_DEAD_BEAD_DEAD,
    torch.float32: 0x7FC0_DEAD,
    torch.bfloat16: 0x7FDE,
    torch.float16: 0x7EAD,
    torch.bool: 1,
}
_PATTERN = 0x5AA5_5AA5_5AA5_5AA5
_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGEST_FILL = 2**28  # bytes; filling more would commit memory that a test only borrows


class _Allocation:
    """A tensor from `torch.empty`, and which of its elements launches have written."""

    def __init__(self, tensor: torch.Tensor) -> None:
        size = tensor.element_size()
        self.tensor = tensor.detach()  # keeps the memory, not the graph
        self.storage_ptr = tensor.untyped_storage().data_ptr()
        self.sentinel = _SENTINELS.get(tensor.dtype, _PATTERN >> (64 - 8 * size))
        unsigned = np.dtype(f"uint{8 * size}")
        self.tensor.view(_SIGNED[size]).fill_(
            int(np.array(self.sentinel, unsigned).astype(f"int{8 * size}"))
        )
        whole = torch.empty(0, dtype=_SIGNED[size]).set_(tensor.untyped_storage())
        self.bits = whole.numpy().view(unsigned)
        self.stored = np.zeros(self.bits.size, bool)
        self.receivers: dict[str, str] = {}  # argument name to kernel name

    def elements(self, address: np.ndarray, size: int) -> np.ndarray:
        """Positions in the storage of the elements that accesses of `size` bytes touch."""
        unit = self.bits.itemsize
        first = (address - np.uint64(self.storage_ptr)).reshape(-1).astype(np.int64)
        if size <= unit:
            return first // unit
        return ((first // unit)[:, None] + np.arange(size // unit)).reshape(-1)

    def untouched(self, elements: Any = slice(None)) -> np.ndarray:
        """Neither stored by a launch nor overwritten by a torch operator."""
        return ~self.stored[elements] & (self.bits[elements] == self.sentinel)

    def never_written(self) -> str | None:
        """What is wrong with the tensor when everything has run."""
        untouched = torch.from_numpy(self.untouched())
        missing = untouched.as_strided(self.tensor.shape, self.tensor.stride()).numpy()
        if not missing.any():
            return None
        index = tuple(int(i) for i in np.argwhere(missing)[0])
        flat = int(np.flatnonzero(missing)[0])
        where = " and ".join(f"{name} of {kernel}" for name, kernel in self.receivers.items())
        return (
            f"element {flat} {list(index)} of {where} was never written"
            f" ({np.count_nonzero(missing)} of {missing.size} elements)"
        )


class _Checker(Observer):
    """Judges launches and remembers what launchers allocated."""

    def __init__(self, modules: tuple[str, ...], scratch: Collection[str]) -> None:
        self.modules = modules
        self.scratch = scratch
        self.allocations: dict[int, _Allocation] = {}
        self.arguments: dict[int, _Allocation] = {}  # of the launch that runs
        self.stores_seen = 0

    def remember(self, tensor: torch.Tensor, caller: str) -> None:
        ours = any(caller == name or caller.startswith(f"{name}.") for name in self.modules)
        if not ours or type(tensor) is not torch.Tensor or tensor.device.type != "cpu":
            return
        size = tensor.untyped_storage().nbytes()
        if tensor.numel() and size <= _LARGEST_FILL and not tensor.dtype.is_complex:
            with torch.no_grad():
                allocation = _Allocation(tensor)
            self.allocations[allocation.storage_ptr] = allocation

    def unwritten(self) -> list[str]:
        given = (a for a in self.allocations.values() if a.receivers)
        judged = (a for a in given if not set(self.scratch) & set(a.receivers))
        return [problem for a in judged if (problem := a.never_written())]

    def begin(self, launch: Launch) -> None:
        self.arguments = {}
        self.stores_seen = 0
        for position, argument in enumerate(launch.tensors.values()):
            allocation = self.allocations.get(argument.storage_ptr)
            if allocation is not None:
                self.arguments[position] = allocation

    def loaded(self, launch: Launch, chunks: list[Chunk], data: np.ndarray) -> None:
        for chunk in chunks:
            allocation = self.arguments.get(chunk.argument)
            if allocation is None:
                continue
            bits = data.view(f"uint{8 * data.itemsize}")
            if chunk.size == allocation.bits.itemsize and not (bits == allocation.sentinel).any():
                continue
            self.note_stores(launch)
            unwritten = allocation.untouched(allocation.elements(chunk.address, chunk.size))
            if unwritten.any():
                lane = int(np.flatnonzero(unwritten)[0]) * chunk.address.size // unwritten.size
                element = launch.argument(chunk.argument).locate(int(chunk.address.flat[lane]))
                raise launch.fault(chunk.program, f"loads {element}, read before written")

    def note_stores(self, launch: Launch) -> None:
        """Mark what the launch has stored since the last call."""
        stores = launch.chunks["store"]
        for chunk in stores[self.stores_seen :]:
            allocation = self.arguments.get(chunk.argument)
            if allocation is not None:
                allocation.stored[allocation.elements(chunk.address, chunk.size)] = True
        self.stores_seen = len(stores)

    def atomic(self, launch: Launch, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            element = launch.argument(chunk.argument).locate(int(chunk.address.flat[0]))
            raise launch.fault(chunk.program, f"updates {element} by an atomic")

    def end(self, launch: Launch) -> None:
        self.note_stores(launch)
        waits = any(name in launch.tensors for name in ON_A_FLAG)
        if launch.chunks["store"] or not waits:
            given = list(launch.tensors.values())
            for position, allocation in self.arguments.items():
                allocation.receivers.setdefault(given[position].name, launch.kernel)
        if launch.program > 0:
            for group in launch.storages:
                loads = launch.accesses("load", arguments=group)
                stores = launch.accesses("store", arguments=group)
                find_race(launch, loads, stores)


def find_race(launch: Launch, loads: np.ndarray, stores: np.ndarray) -> None:
    """Raise where two programs meet in one storage and at least one of them writes."""
    if not stores.size:
        return
    unit = int(min(stores["size"].min(), loads["size"].min(initial=255)))
    loads, stores = split(loads, unit), split(stores, unit)
    number, count = numbered(np.concatenate([stores["address"], loads["address"]]), unit)
    written, read = np.split(number, [stores.size])
    owner = np.full(count, -1, np.int32)
    owner[written] = stores["program"]
    for verb, accesses, elements in (("stores", stores, written), ("loads", loads, read)):
        conflict = (owner[elements] != accesses["program"]) & (owner[elements] >= 0)
        if conflict.any():
            lane = int(np.argmax(conflict))
            address, program, argument, _ = accesses[lane].tolist()
            other = launch.index(int(owner[elements[lane]]))
            element = launch.argument(argument).locate(address)
            raise launch.fault(program, f"{verb} {element}, which program {other} stores")


def _filling(original: Callable[..., Any], checker: _Checker) -> Callable[..., Any]:
    def allocate(*args: Any, **kwargs: Any) -> Any:
        tensor = original(*args, **kwargs)
        if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor:
            return tensor  # Dynamo cannot follow the rest, and fakes have no memory
        checker.remember(tensor, sys._getframe(1).f_globals.get("__name__", ""))
        return tensor

    return allocate


_ALLOCATORS = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


@contextmanager
def checked(
    modules: tuple[str, ...] = ("fastnorm.kernels",), scratch: Collection[str] = ()
) -> Iterator[None]:
    """Judge every launch in the interpreter; raise `KernelFault` at the first that is wrong.

    Args:
        modules: Names (and packages) of modules whose `torch.empty` and its kin are filled with
            NaN, in integers with a pattern, and must be written before they are read.
        scratch: Names of kernel arguments that may stay partly unwritten, such as a symmetric
            matrix of which one half is used. Reading the unwritten part is a fault still.

    Does nothing for kernels that were compiled.
    """
    checker = _Checker(modules, scratch)
    with ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            filling = _filling(getattr(owner, name), checker)
            stack.enter_context(mock.patch.object(owner, name, filling))
        stack.enter_context(observed(checker))
        yield
    if problems := checker.unwritten():
        raise KernelFault("; ".join(problems))
