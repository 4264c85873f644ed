"""What the tests of known defects look with: launches, memory, errors."""

import contextlib
import math
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastnorm

HAS_GPU = torch.cuda.is_available()
EMULATED = os.environ.get("FASTNORM_EMULATE") == "1"
# Launches are seen in the interpreter alone; the emulator of bench/emulate is as silent as a GPU.
INTERPRETED = not HAS_GPU and not EMULATED


def draw(*size: int, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)


def kernels_run(device: torch.device) -> bool:
    return fastnorm.backend_for(torch.ones(2, 3, device=device)) == "triton"


@contextlib.contextmanager
def launches() -> Iterator[list[Any]]:
    """The launches of a block; none where no interpreter runs."""
    if not INTERPRETED:
        yield []
        return
    from interpreter import trace

    with trace() as seen:
        yield seen


@contextlib.contextmanager
def kernels_seen() -> Iterator[set[str]]:
    """The names of the kernels that a block launches; none where no interpreter runs."""
    names: set[str] = set()
    if not INTERPRETED:
        yield names
        return
    from accesses import Launch, Observer
    from interpreter import observed

    class Names(Observer):
        def begin(self, launch: Launch) -> None:
            names.add(launch.kernel)

    with observed(Names()):
        yield names


def reserved(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A vector of which no memory is taken before it is touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def committed() -> int:
    """The most memory this process ever held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def largest_error(got: Tensor, want: Tensor) -> float:
    """Infinite where one is not finite."""
    difference = (got.double() - want).abs().max().item()
    return difference if math.isfinite(difference) else math.inf
