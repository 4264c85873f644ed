"""Linear + BatchNorm + ReLU against torch eager, torch.compile, and Linear + ReLU without a norm.

    python bench/bench_linear_batch_norm.py --out bench/results/linear_batch_norm.json
    python bench/bench_linear_batch_norm.py --accuracy     # the table of docs/linear_batch_norm.md
    python bench/bench_linear_batch_norm.py --model        # what the cost model says of an H200
    pytest bench/bench_linear_batch_norm.py --benchmark-json=FILE

Ratios are torch eager's time over the candidate's, interleaved (see harness.py), and every case is
checked against torch before it is timed. On a CPU the batches are scaled down.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families.linear_batch_norm import SHAPES
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.bench.harness import GAUGE, compare, device_name, table, write_json
from fastnorm.kernels import cost
from fastnorm.kernels.devices import Device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU_ROWS = 16384
PASSES = ("eval", "train", "train+backward")
DTYPES = (torch.float32, torch.bfloat16)
LARGER = {"mlp, wide": ((8192, 1024), 1024), "narrowing": ((65536, 4096), 1024)}
ALGORITHMS = ("auto", "gram", "epilogue", "unfused")


def rows_and_features(name: str) -> tuple[int, int, int]:
    (M, K), N = (SHAPES | LARGER)[name]
    return (M if DEVICE.type == "cuda" else min(M, CPU_ROWS) // max(K // 64, 1)), K, N


def candidates(
    name: str, dtype: torch.dtype, kind: str, *, compiled: bool
) -> dict[str, Callable[..., Any]]:
    """The calls by name, ours checked against torch's."""
    M, K, N = rows_and_features(name)
    backward = kind == "train+backward"
    x = torch.randn(M, K, device=DEVICE, dtype=dtype).requires_grad_(backward)
    weight = (torch.randn(N, K, device=DEVICE) / K**0.5).to(dtype).requires_grad_(backward)
    gamma, beta = (torch.linspace(*ends, N, device=DEVICE) for ends in ((0.5, 1.5), (-0.5, 0.5)))
    leaves = [x, weight, gamma.requires_grad_(backward), beta.requires_grad_(backward)]
    mean, var = torch.zeros(N, device=DEVICE), torch.ones(N, device=DEVICE)
    dy = torch.randn(M, N, device=DEVICE, dtype=dtype)
    training = kind != "eval"

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(x, weight)
        return F.batch_norm(z, mean, var, gamma, beta, training).relu()

    def ours(algorithm: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: FF.linear_batch_norm(
            x, weight, None, mean, var, gamma, beta, training, algorithm=algorithm
        )

    def call(function: Callable[[Tensor, Tensor], Tensor], wanted: list[Tensor]) -> Any:
        def forward() -> Tensor:
            with torch.no_grad():
                return function(x, weight)

        def forward_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(x, weight), wanted, dy)

        return forward_backward if backward else forward

    calls = {"torch": call(torchs, leaves)}
    calls |= {f"ours, {name}": call(ours(name), leaves) for name in ALGORITHMS}
    calls["linear + relu"] = call(lambda x, weight: F.linear(x, weight).relu(), leaves[:2])
    if compiled:
        torch._dynamo.reset()
        calls["torch.compile"] = call(torch.compile(torchs), leaves)
    want = calls["torch"]()
    for name in ALGORITHMS:
        for got, right in zip(_listed(calls[f"ours, {name}"]()), _listed(want), strict=True):
            error = (got - right).float().norm() / right.float().norm()
            assert error < 0.1, (name, error)
    return calls


def _listed(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that a call holds at a time; 0 where nobody counts."""
    if DEVICE.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def cases(part: str = "") -> Iterator[tuple[str, torch.dtype, str]]:
    for name in SHAPES | LARGER:
        for dtype in DTYPES:
            for kind in PASSES:
                if part in name:
                    yield name, dtype, kind


@pytest.mark.parametrize(("name", "dtype", "kind"), list(cases()), ids=str)
def test_linear_batch_norm(benchmark, name, dtype, kind):
    """pytest-benchmark's own time of `auto`, and beside it the interleaved ratios."""
    calls = candidates(name, dtype, kind, compiled=DEVICE.type == "cuda")
    result = compare(calls, "torch", device=DEVICE)
    benchmark.extra_info.update(result.extra_info("ours, auto"))
    for other in calls:
        benchmark.extra_info[other] = {
            "ratio": result[other].ratio, "peak_bytes": peak_bytes(calls[other])
        }  # fmt: skip

    def once():
        calls["ours, auto"]()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, iterations=result.calls)


def _errors(dtype: torch.dtype, inputs: Callable[[Tensor], Tensor], algorithm: str) -> list[float]:
    """Relative errors of y and its gradients against float64; algorithm "torch": its operators."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    M, K, N = 4096, 128, 512
    x, weight, dy = inputs(draw(M, K)).to(dtype), (draw(N, K) / K**0.5).to(dtype), draw(M, N)
    gamma, beta, dy = (draw(N).abs() + 0.5).float(), (draw(N) * 0.2).float(), dy.to(dtype)

    def run(tensors: list[Tensor], algorithm: str) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        x, weight, gamma, beta = leaves
        if algorithm == "torch":
            y = F.batch_norm(F.linear(x, weight), None, None, gamma, beta, training=True).relu()
        else:
            y = FF.linear_batch_norm(
                x, weight, None, None, None, gamma, beta, training=True, algorithm=algorithm
            )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = [t.double() for t in (x, weight, gamma, beta)]
    z = F.batch_norm(F.linear(*exact[:2]), None, None, *exact[2:], training=True)
    dy[z.abs() < 1e-6] = 0.0  # whose sign no float32 can tell
    got, want = run([x, weight, gamma, beta], algorithm), run(exact, "torch")
    pairs = zip(got, want, strict=True)
    return [((g.double() - w).norm() / w.norm()).item() for g, w in pairs]


def accuracy() -> str:
    """DESIGN's table, on the eager backend."""
    inputs: dict[str, Callable[[Tensor], Tensor]] = {
        "gaussian": lambda t: t, "after a relu": lambda t: t.relu(),
        "mean = 10 std": lambda t: t + 10, "mean = 1000 std": lambda t: t + 1000,
    }  # fmt: skip
    lines = ["| inputs | | y | dx | dW | dγ | dβ |", "|---|---|---|---|---|---|---|"]
    with fastnorm.use_backend("eager"):
        for name, make in inputs.items():
            for dtype in DTYPES:
                for algorithm in ("torch", "gram"):
                    found = " | ".join(f"{e:.1e}" for e in _errors(dtype, make, algorithm))
                    lines.append(f"| {name} | {algorithm} {str(dtype)[6:]} | {found} |")
    return "\n".join(lines)


def model() -> str:
    """Microseconds of a training step that the cost model gives an H200."""
    lines = ["| M, K → N | unfused | epilogue | gram | dX | auto |", "|---|---|---|---|---|---|"]
    for (M, K), N in (SHAPES | LARGER).values():
        p = cost.problem(M, K, N, torch.bfloat16, Device(132), True, True)
        times = [f"{1e6 * f(p):.0f}" for f in (cost.unfused, cost.epilogue, cost.gram)]
        taken = cost.choose(M, K, N, torch.bfloat16, "relu", Device(132), True, True)
        form = "library" if cost.joins(p) else "fused"
        lines.append(f"| {M}, {K} → {N} | {' | '.join(times)} | {form} | {taken} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="part of a shape's name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--accuracy", action="store_true", help="print errors, not times")
    parser.add_argument("--model", action="store_true", help="print the model's times of an H200")
    options = parser.parse_args()
    if options.accuracy or options.model:
        print(accuracy() if options.accuracy else model())
        return
    print(f"{device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results, rows, header = [], [], ("shape", "dtype", "pass", "torch ms")
    for name, dtype, kind in cases(options.only):
        calls = candidates(name, dtype, kind, compiled=not options.no_compile)
        result = compare(calls, "torch", device=DEVICE, rounds=options.rounds)
        header = ("shape", "dtype", "pass", "torch ms", *list(calls)[1:], "gauge")
        ratios = [result[other].ratio for other in (*list(calls)[1:], GAUGE)]
        shape = rows_and_features(name)
        rows.append([f"{name} {shape}", str(dtype)[6:], kind, result["torch"].best * 1e3, *ratios])
        print(table(header, rows[-1:]), flush=True)
        results.append({
            "name": name, "shape": shape, "dtype": str(dtype)[6:], "pass": kind,
            **{other: result.extra_info(other, peak_bytes=peak_bytes(calls[other]))
               for other in calls},
        })  # fmt: skip
    print(f"\n{table(header, rows)}")
    if options.out:
        write_json(options.out, DEVICE, results)


if __name__ == "__main__":
    main()
