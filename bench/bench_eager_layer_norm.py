"""Ways to compute RMSNorm in torch operators on a CPU: why eager/rms_norm.py does what it does.

    python bench/bench_eager_layer_norm.py [--rounds N] [--out FILE]

Every way is checked against torch's before it is timed; ratios are torch's time over the way's.
Chunks are of so many elements; "one" takes all rows at once. LayerNorm itself is torch's operator.
"""

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.bench.harness import GAUGE, compare, device_name, table, write_json

rms_norm = importlib.import_module("fastnorm.eager.rms_norm")  # the function hides its module
EPS = 1e-6
SHAPES = [(8, 64), (64, 512), (512, 768), (4096, 1024), (1024, 8192)]
CHUNKS = {"2^15": 1 << 15, "2^17": 1 << 17, "2^19": 1 << 19, "one": 1 << 40}
WAYS = ["plain", *CHUNKS]


def _forward(x: Tensor, w: Tensor) -> dict[str, Callable[[], Tensor]]:
    size = x.shape[1:]

    def chunks(elements: int) -> Callable[[], Tensor]:
        def way() -> Tensor:
            rms_norm.CHUNK, rms_norm.SMALL = elements, 0
            return rms_norm._normalize(x, w, size, EPS)[0]

        return way

    return {
        "torch": lambda: F.rms_norm(x, size, w, EPS),
        "plain": lambda: rms_norm._short(x, (1,), w, EPS).to(x.dtype),
        **{name: chunks(elements) for name, elements in CHUNKS.items()},
    }


def _backward(x: Tensor, w: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    graphs = {
        "torch": F.rms_norm(x, x.shape[1:], w, EPS),
        "plain": rms_norm._short(x.float(), (1,), w, EPS).to(x.dtype),
    }
    _, rstd = rms_norm._normalize(x.detach(), w.detach(), x.shape[1:], EPS)

    def autograd(y: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y, (x, w), dy, retain_graph=True)

    def chunks(elements: int) -> Callable[[], Any]:
        def way() -> Any:
            rms_norm.CHUNK = elements
            return rms_norm._gradients(dy, x.detach(), w.detach(), rstd, (True, True))

        return way

    return {name: autograd(y) for name, y in graphs.items()} | {
        name: chunks(elements) for name, elements in CHUNKS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows, results = [], []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            x, dy = torch.randn(2, *shape).to(dtype)
            w = torch.linspace(0.5, 1.5, shape[1], dtype=dtype)
            for kind, ways in (("forward", _forward(x, w)), ("backward", _backward(x, w, dy))):
                with torch.set_grad_enabled(kind == "backward"):
                    want = ways["torch"]()
                    for way in ways.values():
                        torch.testing.assert_close(way(), want, atol=0.5, rtol=5e-2)
                    result = compare(ways, "torch", rounds=options.rounds)
                ratios = [result[name].ratio for name in (*WAYS, GAUGE)]
                best = result["torch"].best * 1e6
                rows.append([f"{list(shape)} {str(dtype)[6:]} {kind}", best, *ratios])
                results.append({
                    "shape": list(shape), "dtype": str(dtype)[6:], "pass": kind,
                    **{name: result.extra_info(name) for name in result.timings},
                })  # fmt: skip
    print(table(["", "torch us", *WAYS, "gauge"], rows))
    if options.out:
        write_json(options.out, "cpu", results)


if __name__ == "__main__":
    main()
