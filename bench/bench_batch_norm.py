"""fastnorm.BatchNorm against torch.nn and torch.compile(torch.nn) on the shapes of real models.

    python bench/bench_batch_norm.py --out bench/results/batch_norm.json      # table and JSON
    pytest bench/bench_batch_norm.py --benchmark-json=FILE                    # pytest-benchmark

How they are compared: layers.py. On a CPU the batches are scaled down.
"""

from typing import Any

import pytest
import torch
from layers import DEVICE, DTYPES, Layer, Make, main, under_pytest

CL, CL3 = torch.channels_last, torch.channels_last_3d
# Fewest bytes over the size of the input (DESIGN.md §2): the channels are split, x is read twice.
PASSES = {"eval": 2.0, "train": 3.0, "train+backward": 8.0}


def _norm(shape: tuple[int, ...]) -> Make:
    name = {2: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]

    def make(library: Any) -> torch.nn.Module | None:
        kind = getattr(library, name, None)
        return None if kind is None else kind(shape[1])

    return make


def _layer(
    name: str,
    shape: tuple[int, ...],
    cpu_batch: int,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Layer:
    """One layer of a model: its input's shape on a GPU, and its batch on a CPU."""
    shape = shape if DEVICE.type == "cuda" else (cpu_batch, *shape[1:])
    return Layer(name, _norm(shape), shape, PASSES, memory_format)


LAYERS = [
    _layer("small call", (8, 64), 8),
    _layer("MLP", (8192, 1024), 8192),
    _layer("ResNet-50 stem", (32, 64, 112, 112), 8),
    _layer("ResNet-50 stem, batch 32", (32, 64, 112, 112), 32),
    _layer("ResNet-50 stage 1", (32, 256, 56, 56), 4),
    _layer("ResNet-50 stage 2", (32, 512, 28, 28), 8),
    _layer("ResNet-50 stage 3", (32, 1024, 14, 14), 16),
    _layer("ResNet-50 stage 4", (32, 2048, 7, 7), 16),
    _layer("ResNet-50 stem, cl", (32, 64, 112, 112), 8, CL),
    _layer("ResNet-50 stem, cl, batch 32", (32, 64, 112, 112), 32, CL),
    _layer("ResNet-50 stage 1, cl", (32, 256, 56, 56), 4, CL),
    _layer("ResNet-50 stage 4, cl", (32, 2048, 7, 7), 16, CL),
    _layer("U-Net 3d", (2, 32, 32, 64, 64), 2),
    _layer("U-Net 3d, cl", (2, 32, 32, 64, 64), 2, CL3),
]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_batch_norm(benchmark: Any, layer: Layer, dtype: torch.dtype, kind: str) -> None:
    under_pytest(benchmark, layer, dtype, kind)


if __name__ == "__main__":
    main(__doc__.split("\n")[0], LAYERS)
