"""One operation at one shape: what byte counts, generated code and benchmarks walk over."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True)
class Case(ABC):
    """What all families have; a family adds its options, tensors, call and minimum."""

    family: ClassVar[str]
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    activation: str = "identity"
    residual: bool = False
    affine: bool = True

    def __str__(self) -> str:
        parts = [self.family, self.name, *self.words(), self.activation]
        return ", ".join(parts + ["residual"] * self.residual + ["plain"] * (not self.affine))

    def words(self) -> list[str]:
        """Layout, dtype and the family's options, as a reader sees them."""
        return [self.layout, str(self.dtype)[6:]]

    @abstractmethod
    def small_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the float32 parameters by argument name."""

    def buffers(self, device: str) -> dict[str, Tensor]:
        """Tensors of the call that are not differentiated."""
        return {}

    @abstractmethod
    def call(self, tensors: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The forward, on what `inputs` made."""

    @abstractmethod
    def minimum_passes(self, forward_whole: bool, backward_whole: bool) -> tuple[int, int]:
        """(forward, backward) passes; `whole`: one launch does everything to an index set."""

    def inputs(self, device: str, seed: int = 0) -> dict[str, Tensor]:
        """The tensors of a call by name; those that are differentiated require gradients."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, dtype: torch.dtype) -> Tensor:
            if generator is None:
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        large = ["input"] + ["residual"] * self.residual
        tensors = {
            name: draw(*self.shape, dtype=self.dtype).to(memory_format=FORMATS[self.layout])
            for name in large
        }
        for name, shape in self.small_tensors().items():
            tensors[name] = draw(*shape, dtype=torch.float32)
        tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        return tensors | self.buffers(device)

    def forward_and_backward(
        self, tensors: dict[str, Tensor], between: Callable[[], object] = lambda: None
    ) -> None:
        """Run both, every gradient asked for, with `between` called between them."""
        outputs = self.call(tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # most look at no values of it
        seeds = [tensors["dy"]] if "dy" in tensors else [torch.empty_like(y) for y in outputs]
        between()
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        torch.autograd.grad(outputs, leaves, seeds)

    @property
    def element_bytes(self) -> int:
        """Bytes of one tensor of the input's size: a pass over it."""
        return math.prod(self.shape) * self.dtype.itemsize


Sweeps = dict[str, tuple[Sequence[Case], int]]
"""Name -> (cases of a change of sizes, how many specialisations they may need together)."""
