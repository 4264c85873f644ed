"""A norm layer in a model: its input, what it must move and compute, and how it is called.

The fewest bytes of a pass, in passes over the input (n values an index set, b bytes each):

                                     forward        backward
    read once, where n fits            2              3          x, y; x, dy, dx
    read twice, where it does not      3              5
    evaluation, of running statistics  2              not timed
    + residual before the activation   1              0, or 2 for the mask that y tells
    + residual before the norm         2              1          r, sum; dsum

What fits is what our kernels hold (their plans). A linear layer and its batch norm: X and Y
once in the forward, X, Y, dY and dX once in the backward, and the products of a linear layer alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastnorm.kernels.group_plans import WHOLE_POSITIONS
from fastnorm.kernels.launch import WHOLE_BYTES
from fastnorm.kernels.row_plans import WIDEST_ROW, WIDEST_ROW_BACKWARD
from fastnorm.kernels.run_plans import RUN_BYTES, RUN_BYTES_BACKWARD

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
PASSES = ("eval", "forward", "step")
"""Forward in evaluation; forward in training; forward and backward in training."""
ROWS = ("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm")
FUSED = ("LinearBatchNorm", "Conv2dBatchNorm")
_FLOPS = {"eval": 4, "forward": 8, "step": 20}
"""An element's sums, differences and products in the formulas of kernels/*.py, each counted one."""


@dataclass(frozen=True)
class Layer:
    """A layer of `kind`, a class of fastnorm, made of `arguments`, and the shape of its input."""

    name: str
    kind: str
    arguments: tuple[int, ...]
    shape: tuple[int, ...]
    layout: str = "contiguous"
    activation: str = "identity"
    residual: bool = False
    quick: bool = False
    """Whether `--quick` takes it."""

    def __str__(self) -> str:
        return f"{self.name}: {self.operation} {list(self.shape)} {self.layout}"

    @property
    def operation(self) -> str:
        """The class, and what is fused to it."""
        added = " + residual" if self.residual and not self.kind.startswith("Add") else ""
        active = "" if self.activation == "identity" else f" + {self.activation}"
        return self.kind + added + active

    @property
    def passes(self) -> tuple[str, ...]:
        """Evaluation differs from training where there are running statistics."""
        return PASSES if "BatchNorm" in self.kind else PASSES[1:]

    @property
    def features(self) -> int:
        """Channels or columns of the output."""
        if self.kind in FUSED:
            return self.arguments[1]
        return self.shape[-1] if self.kind in ROWS else self.shape[1]

    @property
    def output(self) -> tuple[int, ...]:
        if self.kind == "LinearBatchNorm":
            return (*self.shape[:-1], self.features)
        return (self.shape[0], self.features, *self.shape[2:])

    def inputs(self, dtype: torch.dtype, device: torch.device, backward: bool) -> list[Tensor]:
        """x, the residual if there is one, and the gradients of the outputs."""
        outputs = 2 if self.kind.startswith("Add") else 1
        shapes = [self.shape] * (1 + self.residual) + [self.output] * outputs
        drawn = [
            torch.randn(shape, device=device, dtype=dtype).to(memory_format=FORMATS[self.layout])
            for shape in shapes
        ]
        for x in drawn[: 1 + self.residual]:
            x.requires_grad_(backward)
        return drawn

    def fewest_bytes(self, dtype: torch.dtype, kind: str) -> int:
        """That a pass must move, parameters and statistics aside."""
        x, y = math.prod(self.shape), math.prod(self.output)
        if self.kind in FUSED:
            return (3 * (x + y) if kind == "step" else x + y) * dtype.itemsize
        added = self.kind.startswith("Add")
        fits, fits_backward = self._fits(dtype)
        forward = 2 + self.residual + added + (kind != "eval" and not fits)
        gated = 2 if self.residual and self.activation != "identity" else 0
        backward = 3 + gated + added + 2 * (not fits_backward)
        return x * dtype.itemsize * (forward + backward if kind == "step" else forward)

    def _fits(self, dtype: torch.dtype) -> tuple[bool, bool]:
        """Whether a kernel reads each value once, in the forward and in the backward."""
        if self.kind in ROWS:
            wide = max(dtype.itemsize // 4, 1)
            row = self.shape[-1] * wide
            return row <= WIDEST_ROW, row <= WIDEST_ROW_BACKWARD
        sets = self.shape[1]
        if self.kind == "GroupNorm":
            sets = self.shape[0] * self.arguments[0]
        elif self.kind.startswith("Instance"):
            sets = self.shape[0] * self.shape[1]
        size = math.prod(self.shape) // sets * dtype.itemsize
        if "Batch" in self.kind:
            return size <= WHOLE_BYTES, size <= WHOLE_BYTES
        if self.layout == "contiguous":
            return size <= RUN_BYTES, size <= RUN_BYTES_BACKWARD
        short = math.prod(self.shape[2:]) < WHOLE_POSITIONS and size <= WHOLE_BYTES
        return short, short

    def flops(self, kind: str) -> int:
        """Of the formulas: a product's 2MKN (6MKN in a step), else a few an element."""
        x, y = math.prod(self.shape), math.prod(self.output)
        products = 0
        if self.kind in FUSED:
            products = 2 * x * self.features * (3 if kind == "step" else 1)
        return products + _FLOPS[kind] * y
