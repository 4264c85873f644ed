"""fastnorm.BatchNorm against torch.nn and torch.compile(torch.nn) on the shapes of real models.

    python bench/bench_batch_norm.py --out bench/results/batch_norm.json      # table and JSON
    pytest bench/bench_batch_norm.py --benchmark-json=FILE                    # pytest-benchmark

Ratios are torch.nn's time over the candidate's, interleaved (see harness.py), and every case is
checked against torch.nn before it is timed. On a CPU the batches are scaled down.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import GAUGE, compare, device_name, table, write_json
from torch import Tensor

import fastnorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CL, CL3 = torch.channels_last, torch.channels_last_3d
HEADER = (
    "layer", "dtype", "pass", "torch ms", "ours ms", "ratio", "median", "compile", "gauge", "GB/s"
)  # fmt: skip
PASSES = ("eval", "train", "train+backward")
# Fewest bytes over the size of the input (DESIGN.md §2): the channels are split, x is read twice.
TRAFFIC = {"eval": 2, "train": 3, "train+backward": 8}


@dataclass(frozen=True)
class Model:
    """One normalization layer of a model: its input's shape on a GPU, and its batch on a CPU."""

    name: str
    shape: tuple[int, ...]
    cpu_batch: int
    memory_format: torch.memory_format = torch.contiguous_format

    def input_shape(self, device: torch.device) -> tuple[int, ...]:
        return self.shape if device.type == "cuda" else (self.cpu_batch, *self.shape[1:])


MODELS = [
    Model("small call", (8, 64), 8),
    Model("MLP", (8192, 1024), 8192),
    Model("ResNet-50 stem", (32, 64, 112, 112), 8),
    Model("ResNet-50 stem, batch 32", (32, 64, 112, 112), 32),
    Model("ResNet-50 stage 1", (32, 256, 56, 56), 4),
    Model("ResNet-50 stage 2", (32, 512, 28, 28), 8),
    Model("ResNet-50 stage 3", (32, 1024, 14, 14), 16),
    Model("ResNet-50 stage 4", (32, 2048, 7, 7), 16),
    Model("ResNet-50 stem, cl", (32, 64, 112, 112), 8, CL),
    Model("ResNet-50 stem, cl, batch 32", (32, 64, 112, 112), 32, CL),
    Model("ResNet-50 stage 1, cl", (32, 256, 56, 56), 4, CL),
    Model("ResNet-50 stage 4, cl", (32, 2048, 7, 7), 16, CL),
    Model("U-Net 3d", (2, 32, 32, 64, 64), 2),
    Model("U-Net 3d, cl", (2, 32, 32, 64, 64), 2, CL3),
]
DTYPES = (torch.float32, torch.bfloat16)


def _layer(library: Any, channels: int, rank: int, training: bool) -> torch.nn.Module:
    kind = {2: library.BatchNorm1d, 4: library.BatchNorm2d, 5: library.BatchNorm3d}[rank]
    layer: torch.nn.Module = kind(channels, device=DEVICE).train(training)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, channels))
    return layer


def _call(
    layer: Callable[[Tensor], Tensor], parameters: list[Tensor], backward: bool
) -> Callable[[Tensor, Tensor], Any]:
    def forward(x: Tensor, dy: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x)

    def forward_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    return forward_backward if backward else forward


def candidates(
    model: Model, dtype: torch.dtype, kind: str, *, compiled: bool
) -> tuple[dict[str, Callable[..., Any]], list[tuple[Tensor, Tensor]]]:
    """The calls by library, fastnorm's checked against torch.nn's, and what to call them with."""
    shape = model.input_shape(DEVICE)
    backward = kind == "train+backward"

    def draw() -> Tensor:
        values = torch.randn(shape, device=DEVICE, dtype=dtype)
        return values.contiguous(memory_format=model.memory_format)

    # On a GPU, enough buffers that its cache does not hold them from one call to the next.
    bytes_each = 2 * math.prod(shape) * dtype.itemsize
    copies = min(8, -(-(1 << 28) // bytes_each)) if DEVICE.type == "cuda" else 1
    inputs = [(draw().requires_grad_(backward), draw()) for _ in range(copies)]

    calls = {}
    for name, library in (("torch.nn", torch.nn), ("fastnorm", fastnorm)):
        layer = _layer(library, shape[1], len(shape), kind != "eval")
        calls[name] = _call(layer, list(layer.parameters()), backward)
    want, got = (call(*inputs[0]) for call in calls.values())
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)
    if compiled:
        torch._dynamo.reset()
        layer = _layer(torch.nn, shape[1], len(shape), kind != "eval")
        calls["torch.compile"] = _call(torch.compile(layer), list(layer.parameters()), backward)
    return calls, inputs


def cases(models: list[Model] = MODELS) -> Iterator[tuple[Model, torch.dtype, str]]:
    for model in models:
        for dtype in DTYPES:
            for kind in PASSES:
                yield model, dtype, kind


def gigabytes_per_second(model: Model, dtype: torch.dtype, kind: str, seconds: float) -> float:
    size = math.prod(model.input_shape(DEVICE)) * dtype.itemsize
    return TRAFFIC[kind] * size / seconds / 1e9


@pytest.mark.parametrize(
    ("model", "dtype", "kind"),
    list(cases()),
    ids=lambda value: value.name if isinstance(value, Model) else str(value).split(".")[-1],
)
def test_batch_norm(benchmark, model, dtype, kind):
    """pytest-benchmark's own time of fastnorm, and beside it the interleaved ratios."""
    calls, inputs = candidates(model, dtype, kind, compiled=DEVICE.type == "cuda")
    result = compare(calls, "torch.nn", inputs=inputs, device=DEVICE)
    rate = gigabytes_per_second(model, dtype, kind, result["fastnorm"].best)
    benchmark.extra_info.update(result.extra_info("fastnorm", gigabytes_per_second=rate))
    if "torch.compile" in calls:
        benchmark.extra_info["compile_ratio"] = result["torch.compile"].ratio

    def once():
        calls["fastnorm"](*inputs[0])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, iterations=result.calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()

    print(f"{device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows, results = [], []
    for model, dtype, kind in cases([m for m in MODELS if options.only in m.name]):
        calls, inputs = candidates(model, dtype, kind, compiled=not options.no_compile)
        result = compare(calls, "torch.nn", inputs=inputs, device=DEVICE, rounds=options.rounds)
        base, ours, compiled = (
            result.timings.get(name) for name in ("torch.nn", "fastnorm", "torch.compile")
        )
        shape = list(model.input_shape(DEVICE))
        rows.append([
            f"{model.name} {shape}", str(dtype)[6:], kind, base.best * 1e3, ours.best * 1e3,
            ours.ratio, ours.median_ratio, compiled.ratio if compiled else "-",
            result[GAUGE].ratio, gigabytes_per_second(model, dtype, kind, ours.best),
        ])  # fmt: skip
        print(table(HEADER, rows[-1:]).splitlines()[1], flush=True)
        results.append({
            "model": model.name, "shape": shape, "dtype": str(dtype)[6:], "pass": kind,
            "memory_format": str(model.memory_format)[6:],
            **{name: result.extra_info(name) for name in result.timings},
        })  # fmt: skip
    print(f"\n{table(HEADER, rows)}")
    if options.out:
        write_json(options.out, DEVICE, results)


if __name__ == "__main__":
    main()
