"""Figures that others have published, to stand beside what is measured."""

from collections.abc import Mapping

RMS_NORM: Mapping[str, Mapping[int, int]] = {
    "quack": {
        256: 1913, 512: 2298, 1024: 2581, 2048: 2761, 4096: 2900, 8192: 2987,
        16384: 2960, 32768: 2987, 65536: 3020, 131072: 2986, 262144: 2811,
    },
    "Liger": {
        256: 1945, 512: 2128, 1024: 2587, 2048: 2815, 4096: 2904, 8192: 2836,
        16384: 2645, 32768: 2860, 65536: 653,
    },
    "torch.compile": {
        256: 1278, 512: 1576, 1024: 1948, 2048: 2185, 4096: 2303, 8192: 1947,
        16384: 1814, 32768: 1776, 65536: 1534, 131072: 1503, 262144: 1498,
    },
}  # fmt: skip
"""GB/s of RMSNorm's forward in bfloat16, by row length: an H100, from quack's published plot."""

PEAK = 3350
"""GB/s of that H100's memory, by its datasheet."""
