"""What plans and cost.py ask of a device: its size, and what its processors and memory reach.

Rates are an H200's, scaled: those of products times multiprocessors, times clock, times what one of
them does a clock; memory's in proportion to its peak. Only ratios of rates decide, so a share of
the peak that all devices reach alike need not be known. Figures a clock are of dense products with
float32 sums, from the vendors' architecture papers; where a consumer's part does half of what a
datacenter's does, the consumer's.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class Rates(NamedTuple):
    """Products a second that libraries reach, by operands; bytes a second of memory and of L2."""

    half: float = 550e12
    tf32: float = 275e12
    single: float = 42e12
    double: float = 42e12
    memory: float = 4.0e12
    cache: float = 6.5e12


H200 = Rates()
_MULTIPROCESSORS, _CLOCK, _BANDWIDTH = 132, 1.98e9, 4.9e12  # of an H200: the last two at their peak

# Floating-point operations a clock of a multiprocessor: half, tf32, single, double.
PER_CLOCK = {
    "sm_70": (1024, 128, 128, 64),
    "sm_75": (1024, 128, 128, 4),
    "sm_80": (2048, 1024, 128, 128),
    "sm_86": (512, 256, 256, 4),
    "sm_89": (512, 256, 256, 4),
    "sm_90": (4096, 2048, 256, 256),
    "sm_100": (8192, 4096, 256, 128),
    "sm_103": (8192, 4096, 256, 4),
    "sm_120": (512, 256, 256, 4),
    "gfx90a": (1024, 256, 256, 256),
    "gfx942": (2048, 1024, 256, 256),
}


def rates(architecture: str, multiprocessors: int, clock: float, bandwidth: float) -> Rates:
    """The rates of a device; its clock (a second) and peak bandwidth (bytes a second) may be 0.

    What is not known, the clock, the bandwidth or all of an architecture, is taken to be an H200's.
    """
    size = multiprocessors / _MULTIPROCESSORS * ((clock or _CLOCK) / _CLOCK)
    own, reference = PER_CLOCK.get(architecture, PER_CLOCK["sm_90"]), PER_CLOCK["sm_90"]
    half, tf32, single, double = (
        known * size * (each / base)
        for known, each, base in zip(H200[:4], own, reference, strict=True)
    )
    memory = H200.memory * ((bandwidth or _BANDWIDTH) / _BANDWIDTH)
    return Rates(half, tf32, single, double, memory, H200.cache * size)


@dataclass(frozen=True)
class Device:
    """What the policy asks of a device."""

    multiprocessors: int
    shared: int = 227 << 10  # bytes that one program may have
    wgmma: bool = True  # Hopper's products of shared memory, whose tiles may be larger
    # What cost.py asks: Rates, and the seconds of a launch.
    half: float = H200.half
    tf32: float = H200.tf32
    single: float = H200.single
    double: float = H200.double
    memory: float = H200.memory
    cache: float = H200.cache
    launch: float = 2.5e-6
    fused: bool = True  # it runs our kernels
    limits: bool = True  # its compiler takes a limit of registers

    def __hash__(self) -> int:  # whatever is planned is remembered by its device
        return hash(self.multiprocessors)


INTERPRETER = Device(multiprocessors=4)  # small: the interpreter runs one program after another
_assumed: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Plan launches as for `device`, wherever the tensors are."""
    token = _assumed.set(device)
    try:
        yield
    finally:
        _assumed.reset(token)


def device_of(device: torch.device) -> Device:
    return _assumed.get() or _queried(device)


@functools.cache
def _queried(device: torch.device) -> Device:
    if device.type != "cuda":
        return INTERPRETER
    return described(torch.cuda.get_device_properties(device), torch.version.hip is not None)


def described(found: Any, hip: bool) -> Device:
    """What torch's properties of a GPU say of it."""
    count = found.multi_processor_count
    shared = getattr(found, "shared_memory_per_block_optin", 0) or 64 << 10
    clock = 1e3 * getattr(found, "clock_rate", 0)  # given in kHz
    if hip:
        architecture, bandwidth = found.gcnArchName.partition(":")[0], 0.0
    else:  # two transfers a clock; in bits
        architecture = f"sm_{found.major}{found.minor}"
        bandwidth = 250.0 * getattr(found, "memory_clock_rate", 0)
        bandwidth *= getattr(found, "memory_bus_width", 0)
    reached = rates(architecture, count, clock, bandwidth)
    return Device(
        count, shared, architecture == "sm_90", limits=not hip, **reached._asdict()
    )  # fmt: skip
