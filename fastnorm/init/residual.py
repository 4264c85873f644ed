"""Residual rules: what the weight that ends each residual branch starts from."""

import math
from dataclasses import replace

import torch
from torch import nn

from fastnorm.init.report import Initialized
from fastnorm.structure import Structure, layers

RESIDUALS = ("none", "zero", "depth")


@torch.no_grad()
def apply_residual(
    model: nn.Module, rule: str, structure: Structure, rows: list[Initialized]
) -> list[Initialized]:
    """Zero or scale the last weight of every branch; the rows, with that added.

    The last weight, not the last norm's: in a branch of norm, ReLU, convolution a norm weight of
    0 would leave a ReLU of 0, which passes no gradient, ever.
    """
    modules = dict(model.named_modules())
    by_layer = {row.layer: row for row in rows}
    factor = 0.0 if rule == "zero" else 1 / math.sqrt(2 * structure.blocks)
    scale = "0" if rule == "zero" else f"times 1/√(2·{structure.blocks})"
    for end in dict.fromkeys(branch.end for branch in structure.branches):
        row = by_layer.get(end, Initialized(end, "kept", math.nan, math.nan, ""))
        weight = modules[end]._parameters.get("weight")
        if weight is None or not weight.requires_grad:
            missing = "it ends a residual branch, but has no weight that may change"
            by_layer[end] = replace(row, reason=_joined(row.reason, missing))
            continue
        weight.mul_(factor)
        words = f"weight {scale}: it ends a residual branch"
        before = "" if isinstance(modules[end], layers.NORMS) else row.reason
        by_layer[end] = replace(row, std=row.std * factor, reason=_joined(before, words))
    return list(by_layer.values())


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
