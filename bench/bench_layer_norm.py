"""fastnorm.LayerNorm and RMSNorm against torch.nn, torch.compile and Liger, over hidden sizes.

    python bench/bench_layer_norm.py --out bench/results/layer_norm.json      # table and JSON
    pytest bench/bench_layer_norm.py --benchmark-json=FILE                    # pytest-benchmark

How they are compared: layers.py. 2²⁶ elements on a GPU, 2²² on a CPU.
"""

from typing import Any

import pytest
import torch
from layers import DEVICE, DTYPES, Layer, Make, main, under_pytest

ELEMENTS = 1 << (26 if DEVICE.type == "cuda" else 22)
WIDTHS = (128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PASSES = {"eval": 2.0, "train+backward": 5.0}
LIGER = {"LayerNorm": "LigerLayerNorm", "RMSNorm": "LigerRMSNorm"}


def _norm(name: str, width: int) -> Make:
    def make(library: Any) -> torch.nn.Module | None:
        kind = getattr(library, name, None) or getattr(library, LIGER[name], None)
        return None if kind is None else kind(width, eps=1e-6)

    return make


LAYERS = [
    Layer(name, _norm(name, width), shape, PASSES)
    for name in LIGER
    for width, shape in [(64, (8, 64)), *((n, (ELEMENTS // n, n)) for n in WIDTHS)]
]


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layer_norm(benchmark: Any, layer: Layer, dtype: torch.dtype, kind: str) -> None:
    under_pytest(benchmark, layer, dtype, kind)


if __name__ == "__main__":
    main(__doc__.split("\n")[0], LAYERS)
