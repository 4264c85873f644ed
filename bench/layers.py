"""Time one layer of each library on one input: fastnorm, torch.nn, torch.compile, installed peers.

What the benchmarks of all families have in common. Ratios are torch.nn's time over the
candidate's, interleaved (see harness.py), and every case is checked against torch.nn before it is
timed. On a CPU the shapes are scaled down by whoever lists them.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import GAUGE, Comparison, compare, device_name, table, write_json
from torch import Tensor

import fastnorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADER = (
    "layer", "dtype", "pass", "torch ms", "ours ms", "ratio", "median", "others", "gauge", "GB/s"
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)

Make = Callable[[Any], torch.nn.Module | None]
"""The layer of a library (torch.nn, fastnorm or a peer's module); None where it has none."""


@dataclass(frozen=True)
class Layer:
    """A layer in a model: how each library makes it, and its input."""

    name: str
    make: Make
    shape: tuple[int, ...]
    passes: dict[str, float]
    """"eval", "train", "train+backward" -> fewest bytes over the size of the input."""
    memory_format: torch.memory_format = torch.contiguous_format

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


def peers() -> dict[str, Any]:
    """Other libraries with layers of torch.nn's names, where they are installed and can run."""
    found = {}
    if DEVICE.type == "cuda":
        try:
            import liger_kernel.transformers as liger
        except ImportError:
            print("liger-kernel: absent")
        else:
            found["liger"] = liger
    return found


def _call(
    layer: Callable[[Tensor], Tensor], parameters: list[Tensor], backward: bool
) -> Callable[[Tensor, Tensor], Any]:
    def forward(x: Tensor, dy: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x)

    def forward_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *parameters], dy)

    return forward_backward if backward else forward


def _built(layer: Layer, library: Any, kind: str) -> torch.nn.Module | None:
    module = layer.make(library)
    if module is None:
        return None
    module = module.to(DEVICE).train(kind != "eval")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).view_as(parameter))
    return module


def candidates(
    layer: Layer, dtype: torch.dtype, kind: str, *, compiled: bool
) -> tuple[dict[str, Callable[..., Any]], list[tuple[Tensor, Tensor]]]:
    """The calls by library, checked against torch.nn's, and what to call them with."""
    backward = kind == "train+backward"

    def draw() -> Tensor:
        values = torch.randn(layer.shape, device=DEVICE, dtype=dtype)
        return values.contiguous(memory_format=layer.memory_format)

    # On a GPU, enough buffers that its cache does not hold them from one call to the next.
    bytes_each = 2 * math.prod(layer.shape) * dtype.itemsize
    copies = min(8, -(-(1 << 28) // bytes_each)) if DEVICE.type == "cuda" else 1
    inputs = [(draw().requires_grad_(backward), draw()) for _ in range(copies)]

    calls = {}
    for name, library in {"torch.nn": torch.nn, "fastnorm": fastnorm, **peers()}.items():
        module = _built(layer, library, kind)
        if module is not None:
            calls[name] = _call(module, list(module.parameters()), backward)
    # torch.nn's own gradients of a channels_last_3d instance norm are wrong: ask it about planes.
    planes = (t.detach().contiguous() for t in inputs[0])
    want, *_ = (calls["torch.nn"](x.requires_grad_(backward), dy) for x, dy in [planes])
    for name in calls.keys() - {"torch.nn"}:
        torch.testing.assert_close(calls[name](*inputs[0]), want, atol=2e-2, rtol=2e-2)
    if compiled:
        torch._dynamo.reset()
        module = _built(layer, torch.nn, kind)
        assert module is not None
        calls["compile"] = _call(torch.compile(module), list(module.parameters()), backward)
    return calls, inputs


def timed(
    layer: Layer, dtype: torch.dtype, kind: str, *, compiled: bool, rounds: int = 15
) -> tuple[Comparison, dict[str, Callable[..., Any]], list[tuple[Tensor, Tensor]]]:
    calls, inputs = candidates(layer, dtype, kind, compiled=compiled)
    return compare(calls, "torch.nn", inputs=inputs, device=DEVICE, rounds=rounds), calls, inputs


def gigabytes_per_second(layer: Layer, dtype: torch.dtype, kind: str, seconds: float) -> float:
    return layer.passes[kind] * math.prod(layer.shape) * dtype.itemsize / seconds / 1e9


def under_pytest(benchmark: Any, layer: Layer, dtype: torch.dtype, kind: str) -> None:
    """pytest-benchmark's own time of fastnorm, and beside it the interleaved ratios."""
    result, calls, inputs = timed(layer, dtype, kind, compiled=DEVICE.type == "cuda")
    rate = gigabytes_per_second(layer, dtype, kind, result["fastnorm"].best)
    benchmark.extra_info.update(result.extra_info("fastnorm", gigabytes_per_second=rate))
    for name in set(calls) - {"torch.nn", "fastnorm"}:
        benchmark.extra_info[f"{name}_ratio"] = result[name].ratio

    def once() -> None:
        calls["fastnorm"](*inputs[0])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, iterations=result.calls)


def main(description: str, layers: Sequence[Layer]) -> None:
    """A table on the terminal, and JSON."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a layer's name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()

    print(f"{device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rows, results = [], []
    for layer in layers:
        if options.only not in layer.name:
            continue
        for dtype in DTYPES:
            for kind in layer.passes:
                result, *_ = timed(
                    layer, dtype, kind, compiled=not options.no_compile, rounds=options.rounds
                )
                base, ours = result["torch.nn"], result["fastnorm"]
                names = [n for n in result.timings if n not in ("torch.nn", "fastnorm", GAUGE)]
                rows.append([
                    str(layer), str(dtype)[6:], kind, base.best * 1e3, ours.best * 1e3,
                    ours.ratio, ours.median_ratio,
                    " ".join(f"{n} {result[n].ratio:.2f}" for n in names) or "-",
                    result[GAUGE].ratio, gigabytes_per_second(layer, dtype, kind, ours.best),
                ])  # fmt: skip
                print(table(HEADER, rows[-1:]).splitlines()[1], flush=True)
                results.append({
                    "layer": layer.name, "shape": list(layer.shape), "dtype": str(dtype)[6:],
                    "pass": kind, "memory_format": str(layer.memory_format)[6:],
                    **{name: result.extra_info(name) for name in result.timings},
                })  # fmt: skip
    print(f"\n{table(HEADER, rows)}")
    if options.out:
        write_json(options.out, DEVICE, results)
