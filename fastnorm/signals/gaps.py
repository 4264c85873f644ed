"""BatchNormGap: what a BatchNorm's batches have too little of, and how far its averages are off."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastnorm.signals.moments import Number, number
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
    """The gaps of all norms on a device at once: of each only the last batch counts."""
    groups: dict[torch.device, list[tuple[BatchNormGap, Tensor]]] = {}
    for gap in gaps:
        picked, gap._picked = gap._picked, None
        if picked is not None and gap.norm.running_mean is not None:
            groups.setdefault(picked.device, []).append((gap, picked))
    for group in groups.values():
        _settle_group(group, samples)


def _settle_group(group: Sequence[tuple[BatchNormGap, Tensor]], samples: Samples) -> None:
    wide: dict[str, Any] = {"dtype": group[0][1].dtype, "device": group[0][1].device}
    sizes = [picked.shape[1] for _, picked in group]
    means, variances = torch.empty(2, sum(sizes), **wide)
    pieces = zip(
        group, means.split_with_sizes(sizes), variances.split_with_sizes(sizes), strict=True
    )
    for (gap, picked), mean, variance in pieces:
        torch.mean(picked, 0, out=mean)
        centred = torch.sub(picked, mean, out=samples.scratch(picked))
        torch.mean(centred.square_(), 0, out=variance).add_(gap.norm.eps)
    running = torch.cat([gap.norm.running_var.to(**wide) + gap.norm.eps for gap, _ in group])
    means.sub_(torch.cat([gap.norm.running_mean for gap, _ in group]).to(**wide))
    apart = torch.stack([means.square_().div_(running), variances.div_(running).log2_().abs_()])
    for (gap, _), found in zip(group, apart.split_with_sizes(sizes, 1), strict=True):
        mean, logarithm = found.mean(1).unbind()
        tracked = gap.norm.num_batches_tracked
        count = math.nan if tracked is None else number(tracked.clone())
        gap.parts = [number(mean.sqrt()), number(logarithm), count]
