"""Which algorithm of Linear + BatchNorm is fastest: a model in flops, bytes and launches.

A step of an algorithm takes the longer of what its flops take at the device's rate for their dtype
and what its bytes take at the rate of memory or, for tiles that several programs load, of the
cache; and every operator costs its launch. Pure functions of sizes, dtype and device: the same call
always takes the same algorithm. docs/linear_batch_norm.md has the table it gives.
"""

from typing import NamedTuple

import torch

from fastnorm.kernels.devices import Device
from fastnorm.kernels.launch import cdiv, remembered

# Activations whose derivative is a function of their output: what gram can do.
FROM_OUTPUT = frozenset({"identity", "relu", "relu6", "leaky_relu", "elu", "tanh", "sigmoid"})

SMALL = 1 << 21
"""Elements of the output below which, on a CPU, operators cost more than memory: not even asked."""
MARGIN = {True: 0.95, False: 0.85}
"""By `Device.fused`: the share of the unfused time that another must stay below to be taken.

A CPU's rates vary more from machine to machine than a GPU's.
"""
JOINED_MARGIN = 0.9
"""The share of P's and dX's time that storing G must stay below: it takes M (N + K) elements."""

# One thread of a CPU: products of 2 to 4 operators' rates measured by bench_linear_batch_norm.py.
# Only their ratios count, so that the number of threads does not matter.
CPU = Device(
    multiprocessors=1, half=45e9, tf32=45e9, single=45e9, double=20e9,
    memory=20e9, cache=60e9, launch=4e-6, fused=False,
)  # fmt: skip


class Problem(NamedTuple):
    """X (M, K) Wᵀ (K, N) on a device."""

    M: int
    K: int
    N: int
    itemsize: int
    flops: float  # a second, of a library's product
    kernel_flops: float  # a second, of our own
    sum_flops: float  # a second, of P, which is float64 where a float32 has its digits
    training: bool
    backward: bool
    device: Device
    joins: bool  # G may be stored for a library's product: rows, of a dtype with float32's range

    def step(self, flops: float, elements: float, rate: float = 0.0, cached: float = 0.0) -> float:
        """Seconds of one operator: its flops, and the elements it reads or writes."""
        device = self.device
        moved = elements * self.itemsize / device.memory
        reloaded = cached * self.itemsize / device.cache
        return max(flops / (rate or self.flops), moved, reloaded) + device.launch


def choose(
    M: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    activation: str,
    device: Device,
    training: bool,
    backward: bool,
    *,
    columns: bool = True,
    precision: str = "ieee",
) -> str:
    """ "gram", "epilogue" or "unfused".

    `backward`: a gradient will be asked for. `columns`: channels are innermost in memory.
    `precision`: how float32 may be multiplied. float64 does not take gram: its variance would have
    fewer digits than torch's where W cancels a signal.
    """
    if 0 in (M, K, N):
        return "unfused"
    return _choose(
        M, K, N, dtype, activation in FROM_OUTPUT, device, training, backward, columns, precision
    )


@remembered
def _choose(
    M: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    from_output: bool,
    device: Device,
    training: bool,
    backward: bool,
    columns: bool,
    precision: str,
) -> str:
    p = problem(M, K, N, dtype, device, training, backward, precision, columns)
    times = {"unfused": MARGIN[device.fused] * unfused(p)}
    if from_output and dtype is not torch.float64:
        times["gram"] = gram(p)
    if device.fused and columns:
        times["epilogue"] = epilogue(p)
    return min(times, key=lambda name: times[name])


def problem(
    M: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    device: Device,
    training: bool,
    backward: bool,
    precision: str = "ieee",
    columns: bool = True,
) -> Problem:
    rates = {2: device.half, 4: device.tf32 if precision == "tf32" else device.single}
    flops = rates.get(dtype.itemsize, device.double)
    # A GPU's float32 without tensor cores is what libraries do best; Triton reaches half of that.
    plain = device.fused and dtype.itemsize == 4 and precision != "tf32"
    kernel_flops = flops / 2 if plain else flops
    sum_flops = device.double if plain else kernel_flops
    joins = device.fused and columns and dtype in (torch.bfloat16, torch.float32)
    return Problem(
        M, K, N, dtype.itemsize, flops, kernel_flops, sum_flops, training, backward, device, joins
    )  # fmt: skip


def _norm_backward(p: Problem) -> float:
    """BatchNorm's backward on Z, and the two products after it."""
    Z, X, W = p.M * p.N, p.M * p.K, p.N * p.K
    passes = (2, 3) if p.training else (3,)
    if not p.device.fused:
        passes = (3, *passes)  # the activation's
    norm = sum(p.step(0, n * Z) for n in passes)
    return norm + 2 * p.step(2 * p.M * p.N * p.K, Z + X + W)


def unfused(p: Problem) -> float:
    """Seconds of torch's product and `batch_norm`, and of their backward if asked for."""
    Z, X, W = p.M * p.N, p.M * p.K, p.N * p.K
    passes = (1, 2) if p.training else (2,)
    if not p.device.fused:
        passes = (*passes, 2)  # the activation's
    time = p.step(2 * p.M * p.N * p.K, X + W + Z) + sum(p.step(0, n * Z) for n in passes)
    return time + (_norm_backward(p) if p.backward else 0.0)


def epilogue(p: Problem) -> float:
    """The same, with the statistics left by the product."""
    Z, X, W = p.M * p.N, p.M * p.K, p.N * p.K
    flops = 2 * p.M * p.N * p.K
    time = p.step(flops, X + W + Z, p.kernel_flops, _tiles(p)) + p.step(0, 2 * Z)
    merge = p.device.launch if p.training else 0.0
    return time + merge + (_norm_backward(p) if p.backward else 0.0)


def gram(p: Problem) -> float:
    """Seconds of the Gram matrix, a product that writes Y, two of the backward, and what is small.

    What is small is float64, and on a CPU many operators: that sets the smallest M that pays.
    """
    M, K, N, device = p.M, p.K, p.N, p.device
    Y, X, W = M * N, M * K, N * K
    flops, small = 2 * M * N * K, 2 * N * K * K / device.double
    blocks = 0 if device.fused else cdiv(4 * Y, 1 << 20)  # a CPU's operators, a block at a time
    wide = 256 if p.itemsize == 2 and N % 256 == 0 and device.wgmma else 128
    time = p.step(flops, X + W + Y, p.kernel_flops, _tiles(p, wide)) + 4 * blocks * device.launch
    if p.training:
        exact = p.itemsize > 2 or not device.fused
        rate = device.double if exact else p.kernel_flops
        # half of the symmetric product, but for the tiles on the diagonal; a CPU's is whole
        share = 0.5 + 32 / K if device.fused and K > 64 else 1.0
        time += p.step(2 * M * K * K * share, X, rate, X * cdiv(K, 64))
        time += 2 * small + (6 if device.fused else 35) * device.launch
    time += (1 if device.fused else 10) * device.launch
    if not p.backward:
        return time
    if device.fused:
        time += gated(p, joins(p))
    else:
        time += 2 * p.step(flops, Y + X) + p.step(0, 0, cached=4 * Y)
        time += p.step(2 * M * K * K, 2 * X) + 12 * blocks * device.launch
    return time + small + (5 if device.fused else 40) * device.launch


def gated(p: Problem, join: bool = False) -> float:
    """Seconds of gram's P and dX, which both mask dY by Y.

    `join`: P stores G in passing, beside a copy of X, and dX is a library's product of the two.
    """
    M, K, N = p.M, p.K, p.N
    Y, X, W = M * N, M * K, N * K
    again = M * K if p.training else 0  # X, for its part of dX
    flops = 2 * M * K * (N + (K if p.training else 0))
    sums = 2 * Y * cdiv(K, 256) + X * cdiv(N, 128)  # dY, Y and X, as often as tiles load them
    if join:
        time = p.step(2 * M * N * K, 3 * Y + X, p.sum_flops, sums + Y)
        time += p.step(flops, Y + again + X + W)
        return time + (p.step(0, 2 * X) + p.device.launch if p.training else 0.0)
    inputs = (2 * Y + again) * cdiv(K, 128) + W * cdiv(M, 128)
    time = p.step(2 * M * N * K, 2 * Y + X, p.sum_flops, sums)
    return time + p.step(flops, 2 * Y + again + X, p.kernel_flops, inputs)


def joins(p: Problem) -> bool:
    """Whether gram's dX is a library's product of what P stores.

    So it is for wide K, where the fused kernel's tiles load dY and Y again and again, and where a
    library's products are faster than ours.
    """
    return p.joins and gated(p, join=True) < JOINED_MARGIN * gated(p)


def _tiles(p: Problem, columns: int = 128) -> float:
    """Elements that the tiles of X Wᵀ load, 128 × `columns` of the result each."""
    return p.M * p.K * cdiv(p.N, columns) + p.N * p.K * cdiv(p.M, 128)
