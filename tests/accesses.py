"""What a kernel launch is given and which memory it touches, and who is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch


class KernelFault(AssertionError):  # noqa: N818 - a verdict, as Hypothesis has Flaky
    """A kernel did what no kernel may do."""


@dataclasses.dataclass(frozen=True)
class TensorArgument:
    """A tensor as a kernel saw it."""

    name: str
    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    storage_ptr: int
    storage_bytes: int

    def locate(self, address: int) -> str:
        """`element 13 [3, 1] of x_ptr`; outside the view, indices go on past its shape."""
        size = self.dtype.itemsize
        offset = rest = (address - self.data_ptr) // size
        index = [0] * len(self.shape)
        for axis in sorted(range(len(index)), key=lambda axis: -self.stride[axis]):
            if self.stride[axis] and self.shape[axis] > 1:
                index[axis], rest = divmod(rest, self.stride[axis])
        inside = rest == 0 and all(0 <= i < n for i, n in zip(index, self.shape, strict=True))
        flat = int(np.ravel_multi_index(index, self.shape)) if inside and index else offset
        place = f"element {flat} {index if rest == 0 else ''}".rstrip()
        outside = "" if inside else f", outside its shape {self.shape} and strides {self.stride}"
        return f"{place} of {self.name}{outside}"


class Chunk(NamedTuple):
    """Unmasked lanes of one access by one program to one argument."""

    program: int
    argument: int
    size: int
    address: np.ndarray


# One entry for each unmasked lane: its first byte, the program (in launch order; Launch.index gives
# the grid index), the position of the argument in Launch.tensors and the bytes of an element.
ACCESS = np.dtype([("address", "u8"), ("program", "i4"), ("argument", "i2"), ("size", "i2")])


def _gathered(chunks: list[Chunk]) -> np.ndarray:
    accesses = np.empty(sum(chunk.address.size for chunk in chunks), ACCESS)
    if chunks:
        counts = [chunk.address.size for chunk in chunks]
        accesses["address"] = np.concatenate([chunk.address.reshape(-1) for chunk in chunks])
        for name in ("program", "argument", "size"):
            accesses[name] = np.repeat([getattr(chunk, name) for chunk in chunks], counts)
    return accesses


def split(accesses: np.ndarray, unit: int) -> np.ndarray:
    """The same bytes as elements of `unit` bytes each."""
    counts = accesses["size"] // unit
    if (counts == 1).all():
        return accesses
    first = np.cumsum(counts, dtype=np.int64) - counts
    narrow = np.repeat(accesses, counts)
    step = np.arange(narrow.size) - np.repeat(first, counts)
    narrow["address"] += (step * unit).astype(np.uint64)
    narrow["size"] = unit
    return narrow


def numbered(address: np.ndarray, unit: int) -> tuple[np.ndarray, int]:
    """Number elements of `unit` bytes from 0; return their numbers and a bound on them."""
    number = ((address - address.min()) >> np.uint64(unit.bit_length() - 1)).view(np.int64)
    count = int(number.max()) + 1
    if count > 16 * number.size + 65536:  # far apart: an array over the gap would not fit
        _, number = np.unique(number, return_inverse=True)
        count = number.size
    return number, count


def distinct_bytes(accesses: np.ndarray) -> int:
    if not accesses.size:
        return 0
    unit = int(accesses["size"].min())
    number, count = numbered(split(accesses, unit)["address"], unit)
    seen = np.zeros(count, bool)
    seen[number] = True
    return int(np.count_nonzero(seen)) * unit


class _Window(NamedTuple):
    shift: int
    start: int
    stop: int


# Kernels that are watched see each argument in a window of its own, so that whatever a wrong offset
# reaches is known by the argument it started from, and lies inside no other.
_WINDOW_BITS = 44
_ALIGNMENT = 1 << 16


class Launch:
    """One kernel launch: what it was given and, when it has run, the memory it touched.

    `tensors`, `scalars` and `constants` (constexprs and None) hold its arguments by name, `options`
    what is no argument (num_warps), `grid` three sizes. `loads`, `stores` and `atomics` hold one
    entry for each unmasked lane.
    """

    def __init__(self, kernel: str, module: str, options: dict[str, Any]) -> None:
        self.kernel = kernel
        self.module = module
        self.options = options
        self.grid: tuple[int, int, int] = (0, 0, 0)
        self.tensors: dict[str, TensorArgument] = {}
        self.scalars: dict[str, bool | int | float] = {}
        self.constants: dict[str, Any] = {}
        self.program = 0
        self.chunks: dict[str, list[Chunk]] = {"load": [], "store": [], "atomic": []}
        self._arguments: list[TensorArgument] = []
        self._windows: list[_Window] = []

    def __repr__(self) -> str:
        return f"Launch({self.kernel}, grid={self.grid})"

    @cached_property
    def loads(self) -> np.ndarray:
        return self.accesses("load")

    @cached_property
    def stores(self) -> np.ndarray:
        return self.accesses("store")

    @cached_property
    def atomics(self) -> np.ndarray:
        return self.accesses("atomic")

    def accesses(self, *kinds: str, arguments: Collection[int] | None = None) -> np.ndarray:
        """Loads, stores or atomics in the order they ran, of some arguments, given by position."""
        chunks = [chunk for kind in kinds for chunk in self.chunks[kind]]
        if arguments is not None:
            chunks = [chunk for chunk in chunks if chunk.argument in arguments]
        return _gathered(chunks)

    @property
    def storages(self) -> list[list[int]]:
        """Positions of the arguments that share a storage, for each storage."""
        groups: dict[int, list[int]] = {}
        for position, argument in enumerate(self._arguments):
            groups.setdefault(argument.storage_ptr, []).append(position)
        return list(groups.values())

    def argument(self, position: int) -> TensorArgument:
        return self._arguments[position]

    def index(self, program: int) -> tuple[int, ...]:
        """The grid index of a program."""
        return tuple(int(i) for i in np.unravel_index(program, self.grid))

    def bytes_loaded(self, distinct: bool = True) -> int:
        """Bytes loaded; with `distinct`, an address counts once however often it is read."""
        return self._bytes("load", self.storages, distinct)

    def bytes_stored(self, distinct: bool = True) -> int:
        """Bytes stored; with `distinct`, an address counts once however often it is written."""
        return self._bytes("store", self.storages, distinct)

    def traffic(self) -> dict[str, tuple[int, int, int, int]]:
        """(distinct loaded, distinct stored, raw loaded, raw stored) bytes of each tensor argument.

        An access counts for the argument whose pointer it was computed from, so that a tensor given
        twice is counted for the argument that was used.
        """
        return {
            argument.name: (
                self._bytes("load", [[position]], True),
                self._bytes("store", [[position]], True),
                self._bytes("load", [[position]], False),
                self._bytes("store", [[position]], False),
            )
            for position, argument in enumerate(self._arguments)
        }

    def _bytes(self, kind: str, groups: list[list[int]], distinct: bool) -> int:
        """Bytes of a kind of access and of atomics, over groups of arguments that share memory."""
        parts = (self.accesses(kind, "atomic", arguments=group) for group in groups)
        count = distinct_bytes if distinct else (lambda part: int(part["size"].sum(dtype=np.int64)))
        return sum(count(part) for part in parts)

    def admit(self, name: str, tensor: torch.Tensor) -> int:
        """Register a tensor argument and return the address that the kernel shall see."""
        while name in self.tensors:
            name += "'"
        storage = tensor.untyped_storage()
        pointer, start = tensor.data_ptr(), storage.data_ptr()
        argument = TensorArgument(
            name, pointer, tuple(tensor.shape), tensor.stride(), tensor.dtype, start, len(storage)
        )
        self.tensors[name] = argument
        self._arguments.append(argument)
        middle = (2 * len(self._arguments) + 1) << (_WINDOW_BITS - 1)
        seen = middle + pointer % _ALIGNMENT
        first = seen + start - pointer
        self._windows.append(_Window(pointer - seen, first, first + len(storage)))
        return seen

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int
    ) -> tuple[np.ndarray, list[Chunk]]:
        """Check and record the unmasked lanes; return the true addresses of all lanes."""
        full = mask.all()
        lanes = pointers if full else pointers[mask]
        if not lanes.size:
            return pointers, []
        low, high = int(lanes.min()), int(lanes.max())
        position = (low >> _WINDOW_BITS) - 1
        if 0 <= position < len(self._windows):
            shift, start, stop = self._windows[position]
            if start <= low and high + size <= stop:
                address = pointers + np.uint64(shift % 2**64)
                lanes = address if full else address[mask]
                chunk = Chunk(self.program, position, size, lanes)
                self.chunks[kind].append(chunk)
                return address, [chunk]
        return self._access_several(kind, pointers, mask, size)

    def _access_several(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int
    ) -> tuple[np.ndarray, list[Chunk]]:
        address = np.array(pointers)
        positions = (pointers >> np.uint64(_WINDOW_BITS)).astype(np.int64) - 1
        chunks = []
        for position in np.unique(positions[mask]).tolist():
            here = mask & (positions == position)
            if not 0 <= position < len(self._windows):
                self._stray(kind, int(pointers[here][0]), None)
            shift, start, stop = self._windows[position]
            wrong = here & ((pointers < start) | (pointers + np.uint64(size) > stop))
            if wrong.any():
                self._stray(kind, int(pointers[wrong][0]) + shift, self._arguments[position])
            address[here] += np.uint64(shift % 2**64)
            chunks.append(Chunk(self.program, position, size, address[here]))
        self.chunks[kind].extend(chunks)
        return address, chunks

    def _stray(self, kind: str, address: int, argument: TensorArgument | None) -> None:
        verb = {"load": "loads", "store": "stores", "atomic": "updates"}[kind]
        if argument is None:
            what, held = "an address", "no argument is near it"
        else:
            what = argument.locate(address)
            held = f"its storage of {argument.storage_bytes} bytes ends before it"
            if address < argument.storage_ptr:
                held = "its storage begins after it"
        raise self.fault(self.program, f"{verb} {what}: out of bounds, {held}")

    def fault(self, program: int, what: str) -> KernelFault:
        return KernelFault(f"{self.kernel}, program {self.index(program)}: {what}")


class Observer:
    """Watches launches; what a subclass does not override it does not see."""

    def begin(self, launch: Launch) -> None:
        """The arguments are known; nothing has run."""

    def loaded(self, launch: Launch, chunks: list[Chunk], data: np.ndarray) -> None:
        """Data was loaded, masked lanes included."""

    def atomic(self, launch: Launch, chunks: list[Chunk]) -> None:
        """An atomic is about to run."""

    def end(self, launch: Launch) -> None:
        """Every program has run."""


class _Watched:
    """What is going on now: the launch that runs, if anybody observes it."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.running: Launch | None = None


watched = _Watched()
