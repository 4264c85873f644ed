"""The gram algorithm over processes whose exchange is played in one: each part twice.

At first it only tells what the others are to hear. The collectives themselves are
test_sync_batch_norm.py's.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_linear_batch_norm import LEAVES, Problem, problem
from test_linear_batch_norm_joined import device, form  # noqa: F401
from torch import Tensor

from fastnorm.kernels import linear_batch_norm
from fastnorm.kernels.launch import ChannelView


@dataclass
class Parts(Problem):
    """A batch of whose rows each process has some."""

    rows: tuple[int, ...] = ()

    def ours(self) -> dict[str, Tensor]:
        x, dy = (t.split(self.rows) for t in (self.x, self.dy))
        views = [ChannelView(1, t.shape[1], t.shape[0], columns=True) for t in x]
        told: list[Tensor] = []
        for part, view in zip(x, views, strict=True):
            self._forward(part, view, (None, None), lambda own: told.append(own) or own[None])
        everyone = torch.stack(told)
        buffers = [self.buffers() for _ in x]
        found = [
            self._forward(part, view, moved, lambda own: everyone)
            for part, view, moved in zip(x, views, buffers, strict=True)
        ]
        told = []
        for arguments in zip(dy, x, found, views, strict=True):
            self._backward(*arguments, lambda own: told.append(own.clone()) or own)
        total = torch.stack(told).sum(0)
        gradients = [
            self._backward(*arguments, lambda own: own.copy_(total))
            for arguments in zip(dy, x, found, views, strict=True)
        ]
        for (_, folded), moved in zip(found, buffers, strict=True):
            assert folded.rows.item() == len(self.x)
            assert all(map(torch.equal, moved, buffers[0])), "processes differ"
        dx, dw, db, *norm = zip(*gradients, strict=True)
        assert db == (None,) * len(x)
        results = {"y": torch.cat([y for y, _ in found]), "dx": torch.cat(dx)}
        for name, parts in zip(("weight", "norm_weight", "norm_bias"), (dw, *norm), strict=True):
            if getattr(self, name) is not None:
                results[f"d{name}"] = torch.stack(parts).sum(0)
        return results | dict(zip(("running_mean", "running_var"), buffers[0], strict=True))

    def _forward(self, x: Tensor, view: ChannelView, buffers: Any, gathered: Any) -> Any:
        _, *parameters = (getattr(self, name) for name in LEAVES)
        return linear_batch_norm.gram_forward(
            x, *parameters, *buffers, True, self.momentum, self.eps, self.activation, view, gathered
        )

    def _backward(self, dy: Tensor, x: Tensor, found: Any, view: ChannelView, summed: Any) -> Any:
        y, folded = found
        return linear_batch_norm.gram_backward(
            dy, x, y, self.weight, self.norm_weight, self.norm_bias, None, folded,
            self.activation, view, (True, True, False, True, True), summed,
        )  # fmt: skip


CASES = {
    "bfloat16": ((50, 90), False, {"dtype": torch.bfloat16}),
    "bfloat16, joined": ((50, 90), True, {"dtype": torch.bfloat16}),
    "float64": ((5, 9), False, {"dtype": torch.float64, "activation": "identity"}),
    "far from 0": ((5, 9), False, {"mean": 300.0}),
    "no parameters": ((5, 9), False, {"bias": None, "norm_weight": None, "norm_bias": None}),
    "three": ((1, 6, 7), False, {"activation": "tanh"}),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_are_as_accurate_as_torchs_whole(device, name):  # noqa: F811
    rows, joined, options = CASES[name]
    absent = {key: value for key, value in options.items() if key in LEAVES}
    others = {key: value for key, value in options.items() if key not in LEAVES}
    case = problem(sum(rows), 20, 24, device, **others)
    case = Parts(**vars(case) | absent, rows=rows)
    with form(joined=joined):  # a mean's rest is told too: what torch rounds off far from 0
        case.check(factor=0.1 if name == "far from 0" else 2.0)
