"""The cases of `fastnorm bench` under pytest-benchmark: every layer, dtype and pass.

    pytest bench/bench_layers.py --benchmark-json=FILE        # -k BatchNorm2d: some of them

pytest-benchmark's own time is fastnorm's; the interleaved ratios stand beside it as extra_info.
"""

from typing import Any

import pytest
import torch

from fastnorm.bench import suite
from fastnorm.bench.ceilings import Ceilings, measure
from fastnorm.bench.libraries import PEERS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# torch.compile takes seconds a case on a CPU: `fastnorm bench` has it there
CHOSEN = [name for name, peer in PEERS.items() if not peer.absence(DEVICE)]
CHOSEN = [name for name in CHOSEN if name != "compile" or DEVICE.type == "cuda"]


@pytest.fixture(scope="session")
def ceilings() -> Ceilings:
    return measure(DEVICE, quick=False)


@pytest.mark.parametrize("case", suite.cases(DEVICE, quick=False), ids=str)
def test_layer(benchmark: Any, case: suite.Case, ceilings: Ceilings) -> None:
    measured = suite.measure(case, CHOSEN, DEVICE, ceilings)
    benchmark.extra_info.update(suite.as_json(measured))
    calls, inputs, _ = suite.prepare(case, [], DEVICE)

    def once() -> None:
        calls[suite.OURS](*inputs[0])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=5, iterations=measured.calls)
