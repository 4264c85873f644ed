"""What a device's processors and memory reach, for cost.py: an H200's rates, scaled.

A rate is that of an H200, times multiprocessors, times clock, times what one of them does a clock;
memory's is in proportion to its peak. Only ratios of rates decide, so a share of the peak that all
devices reach alike need not be known. Figures a clock are of dense products with float32 sums, from
the vendors' architecture papers; where a consumer's part does half of what a datacenter's does, the
consumer's.
"""

from typing import NamedTuple


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
