"""Memory that knows whose it is: bounds, alignment, and who wrote what since the last barrier."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from emulate.numbers import POISON, UNSIGNED, Array


class AccessError(Exception):
    """An access that a device refuses, or that has no certain outcome."""


def _aligned(addresses: Array, size: int, text: str) -> None:
    if (addresses % np.uint64(size)).any():
        raise AccessError(f"misaligned: {text}")


class Global:
    """The tensors of a launch, at their own addresses."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        ranges = sorted(_extent(t) for t in tensors if t.numel())
        merged: list[tuple[int, int]] = []
        for begin, end in ranges:
            if merged and begin <= merged[-1][1]:
                begin, end = merged[-1][0], max(end, merged.pop()[1])
            merged.append((begin, end))
        self.ranges = merged
        self.views: dict[tuple[int, int], Array] = {}

    def _view(self, i: int, size: int) -> Array:
        """Range i as numbers of `size` bytes; addresses count from a multiple of 16 below it."""
        if (i, size) not in self.views:
            begin, end = self.ranges[i]
            begin -= begin % 16
            count = (end - begin) // size
            array = (ctypes.c_uint8 * (count * size)).from_address(begin)
            self.views[i, size] = np.frombuffer(array, dtype=UNSIGNED[8 * size])
        return self.views[i, size]

    def _places(self, addresses: Array, size: int, text: str) -> list[tuple[int, Array]]:
        """(range, which of the addresses are in it), of accesses of `size` bytes."""
        _aligned(addresses, size, text)
        found, left = [], len(addresses)
        lowest, highest = int(addresses.min()), int(addresses.max())
        for i, (begin, end) in enumerate(self.ranges):
            if begin <= lowest and highest + size <= end:
                return [(i, np.ones(len(addresses), bool))]
            inside = (addresses >= np.uint64(begin)) & (addresses <= np.uint64(end - size))
            if end - begin >= size and inside.any():
                found.append((i, inside))
                left -= int(inside.sum())
        if left:
            raise AccessError(f"{left} addresses are no tensor's: {text}")
        return found

    def load(self, addresses: Array, bits: int, count: int, text: str) -> list[Array]:
        """`count` neighbours at each address."""
        values = [np.empty(len(addresses), UNSIGNED[bits]) for _ in range(count)]
        for i, inside in self._places(addresses, bits // 8 * count, text):
            view, index = self._view(i, bits // 8), self._index(i, addresses[inside], bits // 8)
            for k in range(count):
                values[k][inside] = view[index + k]
        return values

    def store(self, addresses: Array, values: Sequence[Array], text: str) -> None:
        size = values[0].itemsize
        for i, inside in self._places(addresses, size * len(values), text):
            view, index = self._view(i, size), self._index(i, addresses[inside], size)
            for k, value in enumerate(values):
                view[index + k] = value[inside]

    def _index(self, i: int, addresses: Array, size: int) -> Array:
        begin = self.ranges[i][0]
        return ((addresses - np.uint64(begin - begin % 16)) // np.uint64(size)).astype(np.intp)


def _extent(tensor: Tensor) -> tuple[int, int]:
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in axes)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Shared:
    """Shared memory of programs side by side, and the warps that used each word of it.

    Between two barriers a word that one warp writes is nobody else's: whoever reads it may come
    before or after.
    """

    WORD = 4

    def __init__(self, programs: int, size: int, threads: int) -> None:
        self.size = -(-size // 16) * 16
        self.bytes = np.empty(programs * self.size, np.uint8)
        self.bytes.view(np.uint64)[:] = POISON
        words = programs * self.size // self.WORD
        self.epoch = np.ones(programs, np.int64)
        self.writer = np.zeros(words, np.int64)
        self.written = np.zeros(words, np.int64)
        self.readers = np.zeros(words, np.int64)
        self.read = np.zeros(words, np.int64)
        lanes = np.arange(programs * threads)
        self.program = lanes // threads
        self.warp = lanes % threads // 32

    def barrier(self, programs: Array) -> None:
        self.epoch[programs] += 1

    def _index(self, lanes: Array, addresses: Array, size: int, text: str) -> Array:
        """Of the first byte of each access."""
        _aligned(addresses, size, text)
        if int(addresses.max()) + size > self.size:
            raise AccessError(f"beyond shared memory: {text}")
        return self.program[lanes] * self.size + addresses.astype(np.int64)

    def load(self, lanes: Array, addresses: Array, bits: int, count: int, text: str) -> list[Array]:
        size = bits // 8
        at = self._index(lanes, addresses, size * count, text)
        view = self.bytes.view(UNSIGNED[bits])
        self._reads(lanes, at, size * count, text)
        return [view[at // size + k] for k in range(count)]

    def store(self, lanes: Array, addresses: Array, values: Sequence[Array], text: str) -> None:
        """Two warps may write the same number to a word, but no different ones.

        Lanes of one warp may: a sum that all of them have differs by the order of its summands.
        The last one stays.
        """
        size = values[0].itemsize
        at = self._index(lanes, addresses, size * len(values), text)
        contested = self._writes(lanes, at, size * len(values), text)
        view = self.bytes.view(values[0].dtype)
        for k, value in enumerate(values):
            if (contested & (view[at // size + k] != value)).any():
                raise AccessError(f"another warp has written something else: {text}")
        for k, value in enumerate(values):
            view[at // size + k] = value
            lost = view[at // size + k] != value
            by = self.writer[(at + k * size) // self.WORD]
            if (lost & (by != self.warp[lanes])).any():
                raise AccessError(f"two warps write different numbers: {text}")

    def _words(self, at: Array, size: int) -> Array:
        """Words of each access, (accesses, words). Less than a word is not watched."""
        return at[:, None] // self.WORD + np.arange(size // self.WORD)

    def _reads(self, lanes: Array, at: Array, size: int, text: str) -> None:
        words = self._words(at, size)
        warp, now = self.warp[lanes][:, None], self.epoch[self.program[lanes]][:, None]
        if ((self.written[words] == now) & (self.writer[words] != warp)).any():
            raise AccessError(f"another warp writes what is read: {text}")
        earlier = np.where(self.read[words] == now, self.readers[words], 0)
        self.readers[words] = earlier  # lanes of other warps read the same words
        np.bitwise_or.at(self.readers, words, np.broadcast_to(1 << warp, words.shape))
        self.read[words] = now

    def _writes(self, lanes: Array, at: Array, size: int, text: str) -> Array:
        """Which of the accesses are to what another warp has written."""
        words = self._words(at, size)
        warp, now = self.warp[lanes][:, None], self.epoch[self.program[lanes]][:, None]
        if ((self.read[words] == now) & ((self.readers[words] & ~(1 << warp)) != 0)).any():
            raise AccessError(f"another warp reads what is written: {text}")
        contested: Array = ((self.written[words] == now) & (self.writer[words] != warp)).any(1)
        self.writer[words] = warp
        self.written[words] = now
        return contested


@dataclass
class Copy:
    """An asynchronous copy from global memory to shared."""

    lanes: Array
    to: Array
    read: Array  # which of the lanes read anything; what the others fill is 0
    source: Array  # of those alone
    words: int  # of each lane
    text: str

    def _found(self, memory: Global) -> list[Array]:
        if not self.read.any():
            return [np.empty(0, np.uint32)] * self.words
        return memory.load(self.source, 32, self.words, self.text)

    def begin(self, memory: Global, shared: Shared) -> None:
        """From here on shared memory has what nobody knows."""
        self.expected = self._found(memory)
        unknown = np.full(len(self.lanes), POISON % 2**32, np.uint32)
        shared.store(self.lanes, self.to, [unknown] * self.words, self.text)

    def arrive(self, memory: Global, shared: Shared) -> None:
        found = self._found(memory)
        for before, now in zip(self.expected, found, strict=True):
            if (before != now).any():
                raise AccessError(f"what is copied changes under way: {self.text}")
        values = []
        for word in found:
            value = np.zeros(len(self.lanes), np.uint32)
            value[self.read] = word
            values.append(value)
        shared.store(self.lanes, self.to, values, self.text)
