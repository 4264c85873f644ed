"""What this machine can do at most: bytes copied a second, by size, and products a second."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MIB = 1 << 20
SIZES = tuple(4**k << 16 for k in range(7))  # 64 KiB to 256 MiB, of the source alone
ORDER = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices of the product."""


@dataclass(frozen=True)
class Ceilings:
    """`copy`: bytes read plus written to bytes a second; `products`: dtype to flop/s."""

    copy: dict[int, float]
    products: dict[str, float]
    cache: int = 0

    @property
    def memory(self) -> float:
        """Bytes a second of the fastest copy that is twice as large as the cache, or the largest.

        On a CPU still larger ones can be slower, by the pages that the system gives them.
        """
        beyond = [rate for size, rate in self.copy.items() if size >= 2 * self.cache]
        return max(beyond, default=self.copy[max(self.copy)])

    def seconds(self, bytes: int, flops: int, dtype: torch.dtype) -> float:
        """The least that a pass can take."""
        return max(bytes / self.memory, flops / self.products[str(dtype)[6:]])


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * MIB))
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            return int(file.read().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 * MIB


def measure(device: torch.device, quick: bool) -> Ceilings:
    """A few seconds on a CPU."""
    largest = 4 * cache_bytes(device) if device.type == "cuda" else 64 * MIB if quick else 256 * MIB
    sizes = sorted({size for size in SIZES if size < largest} | {largest})
    copy = {}
    for size in sizes:
        source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
        copy[2 * size] = 2 * size / best_seconds(lambda s=source, t=target: t.copy_(s), device)  # type: ignore[misc]
    order = ORDER[device.type]
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, order, order, device=device).to(dtype)
        seconds = best_seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        products[str(dtype)[6:]] = 2 * order**3 / seconds
    return Ceilings(copy, products, cache_bytes(device))


def best_seconds(call: Callable[[], object], device: torch.device, budget: float = 0.3) -> float:
    """Of a call, the best of as many as `budget` seconds hold, 5 at least."""
    cuda = device.type == "cuda"
    call()
    best, spent, done = math.inf, 0.0, 0
    while done < 5 or spent < budget:
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            seconds = start.elapsed_time(end) / 1e3
        else:
            before = time.perf_counter()
            call()
            seconds = time.perf_counter() - before
        best, spent, done = min(best, seconds), spent + seconds, done + 1
    return best
