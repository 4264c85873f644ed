"""What fastnorm.signals.record adds to a training step: a ResNet-18, forward, backward and update.

    python bench/bench_signals.py --out bench/results/signals.json
    pytest bench/bench_signals.py --benchmark-json=FILE

The overhead is the time of a recorded step over a plain one, less 1, interleaved (see harness.py).
Recording starts and ends within the step: hooks, the transfer and the report's numbers are in it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fastnorm import signals
from fastnorm.bench.harness import GAUGE, Comparison, compare, device_name, table, write_json

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    "images 8x3x224x224": ((8, 3, 224, 224), torch.contiguous_format),
    "images 8x3x224x224, channels_last": ((8, 3, 224, 224), torch.channels_last),
    "images 64x3x64x64": ((64, 3, 64, 64), torch.contiguous_format),
    "images 16x3x64x64": ((16, 3, 64, 64), torch.contiguous_format),
}
HEADER = ("ResNet-18, training step", "ms", "overhead", "median", "gauge")


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, as in He et al. 2015."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, input: Tensor) -> Tensor:
        output = self.relu(self.norm1(self.conv1(input)))
        output = self.norm2(self.conv2(output))
        return cast(Tensor, self.relu(output + self.shortcut(input)))


def resnet18() -> nn.Module:
    """11.7 million parameters, 1.8 billion multiplications for an image of 224x224."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    for inputs, channels, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(inputs, channels, stride), Block(channels, channels, 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*layers)


def steps(name: str) -> dict[str, Callable[[], Any]]:
    """A plain step, one that is recorded, and one with the optimizer's updates recorded too."""
    shape, memory_format = CASES[name]
    torch.manual_seed(0)
    model = resnet18().to(DEVICE, memory_format=memory_format)
    images = torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format)
    labels = torch.randint(1000, shape[:1], device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    def recorded() -> None:
        with signals.record(model):
            step()

    def with_optimizer() -> None:
        with signals.record(model, optimizer=optimizer):
            step()

    return {"plain": step, "recorded": recorded, "with optimizer": with_optimizer}


def overhead(result: Comparison, name: str) -> tuple[float, float]:
    """From the best times, and the median over rounds: the share that recording adds."""
    timing = result[name]
    return 1 / timing.ratio - 1, 1 / timing.median_ratio - 1


@pytest.mark.parametrize("name", CASES)
def test_record(benchmark: Any, name: str) -> None:
    calls = steps(name)
    result = compare(calls, "plain", device=DEVICE, rounds=5)
    best, median = overhead(result, "recorded")
    benchmark.extra_info.update(result.extra_info("recorded", overhead=best, median=median))
    benchmark.pedantic(calls["recorded"], rounds=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    print(f"{device_name(DEVICE)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = []
    for name in CASES:
        if options.only not in name:
            continue
        result = compare(steps(name), "plain", device=DEVICE, rounds=options.rounds)
        gauge = overhead(result, GAUGE)[0]
        rows = [
            (way, timing.best * 1e3, *(f"{share:+.1%}" for share in overhead(result, way)),
             f"{gauge:+.1%}")
            for way, timing in result.timings.items() if way != GAUGE
        ]  # fmt: skip
        print(f"\n{table((name, *HEADER[1:]), rows)}", flush=True)
        results += [
            {"case": name, "way": way, "overhead": overhead(result, way)[0],
             **result.extra_info(way)}
            for way in ("recorded", "with optimizer")
        ]  # fmt: skip
    if options.out:
        write_json(options.out, DEVICE, results)


if __name__ == "__main__":
    main()
