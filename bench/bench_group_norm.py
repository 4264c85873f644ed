"""fastnorm.GroupNorm and InstanceNorm against torch.nn, torch.compile and Liger on real shapes.

    python bench/bench_group_norm.py --out bench/results/group_norm.json      # table and JSON
    pytest bench/bench_group_norm.py --benchmark-json=FILE                    # pytest-benchmark

How they are compared: layers.py. On a CPU the batches are scaled down.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import DEVICE, DTYPES, Layer, Make, main, under_pytest
from torch import Tensor

import fastnorm

CL, CL3 = torch.channels_last, torch.channels_last_3d
# Fewest bytes over the size of the input (DESIGN.md §2): a group is split, x is read twice.
PASSES = {"eval": 3.0, "train+backward": 8.0}


class _TorchGroupNorm(torch.nn.GroupNorm):
    """torch.nn's, whose CUDA operator takes parameters of the input's dtype only."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


def _group_norm(num_groups: int, channels: int, activation: str) -> Make:
    def make(library: Any) -> torch.nn.Module | None:
        if library is fastnorm:
            return fastnorm.GroupNorm(num_groups, channels, activation=activation)
        if library is not torch.nn:  # Liger's takes the channels first, and eps without a default
            kind = getattr(library, "LigerGroupNorm", None)
            return (
                None
                if kind is None or activation != "identity"
                else kind(channels, num_groups, eps=1e-5)
            )
        kind = _TorchGroupNorm if DEVICE.type == "cuda" else torch.nn.GroupNorm
        norm = kind(num_groups, channels)
        return norm if activation == "identity" else torch.nn.Sequential(norm, torch.nn.SiLU())

    return make


def _instance_norm(shape: tuple[int, ...]) -> Make:
    def make(library: Any) -> torch.nn.Module | None:
        kind = getattr(library, f"InstanceNorm{len(shape) - 2}d", None)
        return None if kind is None else kind(shape[1], affine=True)

    return make


def _layer(
    name: str,
    shape: tuple[int, ...],
    cpu_batch: int,
    num_groups: int | None,  # None: InstanceNorm
    memory_format: torch.memory_format = torch.contiguous_format,
    activation: str = "identity",
) -> Layer:
    """One layer of a model: its input's shape on a GPU, and its batch on a CPU."""
    shape = shape if DEVICE.type == "cuda" else (cpu_batch, *shape[1:])
    make = _instance_norm(shape)
    if num_groups is not None:
        make = _group_norm(num_groups, shape[1], activation)
    return Layer(name, make, shape, PASSES, memory_format)


LAYERS = [
    _layer("small call", (2, 64, 4, 4), 2, 8),
    _layer("Stable Diffusion", (16, 320, 64, 64), 2, 32, activation="silu"),
    _layer("Stable Diffusion", (16, 640, 32, 32), 2, 32, activation="silu"),
    _layer("Stable Diffusion", (16, 1280, 16, 16), 2, 32, activation="silu"),
    _layer("Stable Diffusion, cl", (16, 320, 64, 64), 2, 32, CL, "silu"),
    _layer("Stable Diffusion, cl", (16, 640, 32, 32), 2, 32, CL, "silu"),
    _layer("Stable Diffusion, cl", (16, 1280, 16, 16), 2, 32, CL, "silu"),
    _layer("large groups", (112, 64, 512, 512), 1, 8),
    _layer("large groups, cl", (112, 64, 512, 512), 1, 8, CL),
    _layer("style transfer", (4, 64, 256, 256), 2, None),
    _layer("style transfer, cl", (4, 64, 256, 256), 2, None, CL),
    _layer("3d medical", (2, 32, 128, 128, 128), 1, None),
    _layer("3d medical, cl", (2, 32, 128, 128, 128), 1, None, CL3),
]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_group_norm(benchmark: Any, layer: Layer, dtype: torch.dtype, kind: str) -> None:
    under_pytest(benchmark, layer, dtype, kind)


if __name__ == "__main__":
    main(__doc__.split("\n")[0], LAYERS)
