"""BatchNormGap: what a BatchNorm's batches have too little of, and how far its averages are off."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm.signals.moments import Number, number, numbers
from fastnorm.signals.samples import Samples
from fastnorm.structure import layers


class BatchNormGap:
    """How a BatchNorm's running statistics differ from its last batch's, and how few values it had.

    Of a layer fused with its norm only the latter is seen: the norm's input exists nowhere.
    """

    def __init__(self, module: Any) -> None:
        parts = layers.fused_parts(module)
        self.norm: Any = module if parts is None else getattr(module, parts[1])
        self.fused = parts is not None
        self.samples: int | None = None
        self.values = self.batch = 0
        self.parts: list[Number] = []  # mean gap, variance gap, batches tracked
        self._picked: Tensor | None = None  # a sample of the last batch, until it is settled

    @classmethod
    def of(cls, module: nn.Module) -> "BatchNormGap | None":
        """None of a layer that has another norm in its BatchNorm's place."""
        gap = cls(module)
        return gap if isinstance(gap.norm, layers.BATCH_NORMS) else None

    def see(self, input: Tensor, picked: Tensor | None, samples: Samples) -> None:
        """A call of the norm; of a fused layer, its output stands for the norm's input.

        `picked` is a sample of the input, where there is one already.
        """
        axis = input.dim() - 1 if self.fused and isinstance(self.norm, nn.BatchNorm1d) else 1
        axis = min(axis, input.dim() - 1)
        if input.numel() == 0:
            return
        batch, values = input.shape[0], input.numel() // input.shape[axis]
        if self.norm.training:
            self.samples = batch if self.samples is None else min(self.samples, batch)
            self.values = values if not self.values else min(self.values, values)
        if self.fused or self.norm.running_mean is None or values < 2:
            return
        self._picked = samples.take(input, axis) if picked is None else picked
        self.batch = min(batch, len(self._picked))
        samples.later(_settle, self)

    def read(self, value: Callable[[Number], float]) -> dict[str, Any]:
        seen: dict[str, Any] = {
            "samples": self.samples, "channel_values": self.values,
            "training": bool(self.norm.training), "momentum": self.norm.momentum,
        }  # fmt: skip
        if self.parts:
            seen["mean_gap"], seen["var_gap"], seen["batches_tracked"] = map(value, self.parts)
            seen["gap_samples"] = self.batch
        return seen


@torch.no_grad()
def _settle(gaps: Sequence[BatchNormGap], samples: Samples) -> None:
    """The gaps of all norms of one shape at once: of each only the last batch counts."""
    waiting: list[tuple[BatchNormGap, Tensor]] = []
    for gap in gaps:
        picked, gap._picked = gap._picked, None
        if picked is not None and gap.norm.running_mean is not None:
            waiting.append((gap, picked))
    for places, stack in samples.stacks([picked for _, picked in waiting]):
        _settle_stack([waiting[place][0] for place in places], stack)


def _settle_stack(gaps: Sequence[BatchNormGap], batches: Tensor) -> None:
    """Batches are (norms, values, channels), and written to."""
    means = batches.mean(1)
    variances = batches.sub_(means.unsqueeze(1)).square_().mean(1)
    running = torch.stack([gap.norm.running_var for gap in gaps]).to(variances)
    means.sub_(torch.stack([gap.norm.running_mean for gap in gaps]))
    eps = [gap.norm.eps for gap in gaps]
    for rows in (running, variances):
        torch._foreach_add_(rows.unbind(), eps)
    apart = numbers(means.square_().div_(running).mean(1).sqrt_())
    scaled = numbers(variances.div_(running).log2_().abs_().mean(1))
    for gap, mean, variance in zip(gaps, apart, scaled, strict=True):
        tracked = gap.norm.num_batches_tracked
        count = math.nan if tracked is None else number(tracked.clone())
        gap.parts = [mean, variance, count]
