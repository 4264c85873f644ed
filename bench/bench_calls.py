"""Host time of a call on tensors so small that nothing else counts.

    python bench/bench_calls.py [--rounds N] [--out FILE]

Every module against torch.nn's on a CPU; then what the host does for a launch, with kernels that
return at once: what this library does, what Triton adds to find and start its kernels (idle.py),
and what the operators of torch.library would add, which a graph needs and a call does without; and
liger-kernel's layer where that is installed, with what Triton adds to it. Forward alone is without
gradients.
"""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from idle import idle
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

import fastnorm
from fastnorm.bench.harness import GAUGE, compare, device_name, table, write_json
from fastnorm.bench.layers import Layer
from fastnorm.bench.libraries import PEERS


class AddNorm(nn.Module):
    """What a block of torch.nn's does at the place of an AddLayerNorm or AddRMSNorm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = input + residual
        return self.norm(total), total


# name: (ours, torch.nn's, shape, inputs)
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...], int]]
MODULES = {
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(8), lambda: nn.BatchNorm1d(8), (4, 8), 1),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(8), lambda: nn.BatchNorm2d(8), (2, 8, 4, 4), 1),
    "BatchNorm3d": (lambda: fastnorm.BatchNorm3d(4), lambda: nn.BatchNorm3d(4), (2, 4, 2, 2, 2), 1),
    "InstanceNorm2d": (
        lambda: fastnorm.InstanceNorm2d(8, affine=True),
        lambda: nn.InstanceNorm2d(8, affine=True), (2, 8, 4, 4), 1,
    ),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 8), lambda: nn.GroupNorm(2, 8), (2, 8, 4, 4), 1),
    "LayerNorm": (lambda: fastnorm.LayerNorm(16), lambda: nn.LayerNorm(16), (4, 16), 1),
    "RMSNorm": (lambda: fastnorm.RMSNorm(16), lambda: nn.RMSNorm(16), (4, 16), 1),
    "AddLayerNorm": (
        lambda: fastnorm.AddLayerNorm(16), lambda: AddNorm(nn.LayerNorm(16)), (4, 16), 2,
    ),
    "AddRMSNorm": (lambda: fastnorm.AddRMSNorm(16), lambda: AddNorm(nn.RMSNorm(16)), (4, 16), 2),
    "LinearBatchNorm": (
        lambda: fastnorm.LinearBatchNorm(16, 16),
        lambda: nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()),
        (8, 16), 1,
    ),
    "Conv2dBatchNorm": (
        lambda: fastnorm.Conv2dBatchNorm(4, 4, 3),
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        (2, 4, 5, 5), 1,
    ),
}  # fmt: skip


def _calls(module: nn.Module, inputs: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Forward in training without gradients; forward and backward."""
    leaves = [*inputs, *module.parameters()]

    def outputs() -> tuple[Tensor, ...]:
        found = module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def forward() -> None:
        with torch.no_grad():
            module(*inputs)

    dys = [torch.ones_like(y) for y in outputs()]
    return {
        "forward": forward,
        "forward and backward": lambda: torch.autograd.grad(outputs(), leaves, dys),
    }


def _of_liger(name: str, shape: tuple[int, ...]) -> nn.Module | None:
    """Its layer of such an input; None where there is none."""
    if PEERS["liger"].absence(torch.device("cuda")):
        return None
    arguments = (2, 8) if name == "GroupNorm" else shape[-1:]
    return PEERS["liger"].make(Layer(name, name, arguments, shape))


def _inputs(shape: tuple[int, ...], count: int) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def on_a_cpu(rounds: int) -> tuple[list[list[object]], list[dict[str, Any]]]:
    """Microseconds of ours, and torch.nn's time over it."""
    rows, results = [], []
    for name, (ours, theirs, shape, count) in MODULES.items():
        row: list[object] = [name]
        inputs = _inputs(shape, count)
        both = _calls(ours(), inputs), _calls(theirs(), inputs)
        for stage in both[0]:
            found = compare(
                {"ours": both[0][stage], "torch": both[1][stage]}, "torch", rounds=rounds
            )
            row += [found["ours"].best * 1e6, found["ours"].ratio, found[GAUGE].ratio]
            results.append({"module": name, "pass": stage, **found.extra_info("ours")})
        rows.append(row)
    return rows, results


def _nothing(*args: object, **kwargs: object) -> None:
    pass


def _yes(x: Tensor) -> bool:
    return True


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    """Within the block CPU tensors take the launchers, and Triton is not even asked."""
    with mock.patch.object(JITFunction, "run", _nothing), idle():
        yield


@contextlib.contextmanager
def by_operators() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for family in FAMILIES:
            module = importlib.import_module(f"fastnorm.ops.{family}")
            stack.enter_context(mock.patch.object(module, "recorded", _yes))
        stack.enter_context(launching_nothing())
        yield


FAMILIES = ("batch_norm", "group_norm", "layer_norm", "linear_batch_norm")
TIMES = 200  # calls of a sample: entering and leaving a patch takes longer than one
WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "ours": launching_nothing,
    "triton": idle,
    "operators": by_operators,
    "liger": launching_nothing,
    "liger triton": idle,
    "torch": contextlib.nullcontext,
}


def _repeated(call: Callable[[], Any], way: str) -> Callable[[], None]:
    def many() -> None:
        with WAYS[way]():
            for _ in range(TIMES):
                call()

    return many


def of_a_launch(rounds: int) -> tuple[list[list[object]], list[dict[str, Any]]]:
    """Microseconds of ours and Liger's, what Triton or operators add, and torch.nn's on a CPU."""
    rows, results = [], []
    for name, (ours, theirs, shape, count) in MODULES.items():
        row: list[object] = [name]
        inputs = _inputs(shape, count)
        reference, liger = _calls(theirs(), inputs), _of_liger(name, shape)
        with launching_nothing():
            direct = _calls(ours(), inputs)
            peer = {} if liger is None else _calls(liger, inputs)
        for stage, call in direct.items():
            inner = dict.fromkeys(WAYS, call) | {"torch": reference[stage]}
            inner |= dict.fromkeys(("liger", "liger triton"), peer.get(stage))
            ways = {way: _repeated(made, way) for way, made in inner.items() if made is not None}
            found = compare(ways, "torch", rounds=rounds)
            best = {way: found[way].best * 1e6 / TIMES for way in ways}
            row += [best["ours"], *(best[w] - best["ours"] for w in ("triton", "operators"))]
            row += [best[way] for way in ("liger", "liger triton") if way in best] or ["", ""]
            row.append(best["torch"])
            results.append({"launch": name, "pass": stage, "calls": TIMES,
                            **{way: found.extra_info(way) for way in ways}})  # fmt: skip
        rows.append(row)
    return rows, results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{device_name('cpu')}, torch {torch.__version__}")
    rows, results = on_a_cpu(options.rounds)
    header = ["CPU", "fwd us", "torch/ours", "gauge", "fwd+bwd us", "torch/ours", "gauge"]
    print(table(header, rows))
    rows, more = of_a_launch(options.rounds)
    more_of_each = ["+ triton", "+ operators", "liger", "with triton", "torch CPU"]
    header = ["launch", "fwd us", *more_of_each, "fwd+bwd us", *more_of_each]
    print(table(header, rows))
    if options.out:
        write_json(options.out, "cpu", results + more)


if __name__ == "__main__":
    main()
