"""The benchmark grid: every operation of the library, at the shapes of real models.

The one place where a family's cases are listed. Byte counts, generated code, specialisation counts
and benchmarks all walk `CASES`; adding a family is adding its cases, and its minimum, here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS

# Names of kernel arguments that are as large as the input; the others are parameters, statistics
# and partial sums.
LARGE = ("dy_ptr", "x_ptr", "y_ptr", "residual_ptr", "dx_ptr", "dz_ptr")

FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


@dataclass(frozen=True)
class Case:
    """One operation at one shape; `call` makes the forward, its backward is autograd's."""

    family: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    training: bool = True
    activation: str = "identity"
    residual: bool = False
    affine: bool = True

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        parts = [self.family, self.name, self.layout, str(self.dtype)[6:], mode, self.activation]
        return ", ".join(parts + ["residual"] * self.residual + ["plain"] * (not self.affine))

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
        for name in ("weight", "bias") if self.affine else ():
            tensors[name] = draw(self.shape[1], dtype=torch.float32)
        tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        for name, value in (("running_mean", 0.0), ("running_var", 1.0)):
            tensors[name] = torch.full((self.shape[1],), value, device=device)
        return tensors

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        return FF.batch_norm(
            tensors["input"],
            tensors["running_mean"],
            tensors["running_var"],
            tensors.get("weight"),
            tensors.get("bias"),
            self.training,
            residual=tensors.get("residual"),
            activation=self.activation,
        )

    def forward_and_backward(
        self, tensors: dict[str, Tensor], between: Callable[[], object] = lambda: None
    ) -> None:
        """Run both, every gradient asked for, with `between` called between them."""
        outputs = self.call(tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = [torch.empty_like(y) for y in outputs]  # no values are looked at
        between()
        leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
        torch.autograd.grad(outputs, leaves, seeds)

    @property
    def element_bytes(self) -> int:
        """Bytes of one tensor of the input's size: a pass over it."""
        return math.prod(self.shape) * self.dtype.itemsize

    def minimum_passes(self, whole: bool) -> tuple[int, int]:
        """(forward, backward) passes of DESIGN §2; `whole`: an index set fits one program."""
        again = 1 if self.training and not whole else 0  # x is read for the moments, then again
        gated = 2 if self.residual and self.activation != "identity" else 0  # y in, dz out
        x_unread = not (self.training or self.affine or self.activation != "identity")
        return 2 + self.residual + again, 3 + 2 * again + gated - x_unread


RESNET50 = {  # the outputs of the stages, batch 256
    "resnet50 stem": (256, 64, 112, 112),
    "resnet50 stage 1": (256, 256, 56, 56),
    "resnet50 stage 2": (256, 512, 28, 28),
    "resnet50 stage 3": (256, 1024, 14, 14),
    "resnet50 stage 4": (256, 2048, 7, 7),
}


def _batch_norm() -> Iterator[Case]:
    for name, shape in RESNET50.items():
        for layout in ("contiguous", "channels_last"):
            case = Case("batch_norm", name, shape, layout=layout, activation="relu")
            yield case
            yield replace(case, residual=True)
    frozen = Case("batch_norm", "resnet50 stage 1", RESNET50["resnet50 stage 1"], training=False)
    yield frozen
    yield replace(frozen, affine=False)
    yield Case("batch_norm", "resnet50 stage 2", RESNET50["resnet50 stage 2"], affine=False)
    for dtype in (torch.bfloat16, torch.float32):
        yield Case("batch_norm", "mlp", (8192, 1024), dtype, activation="relu")
        yield Case("batch_norm", "mlp, small batch", (256, 1024), dtype, activation="gelu")
        for layout in ("contiguous", "channels_last_3d"):
            shape = (2, 32, 128, 128, 128)
            yield Case("batch_norm", "u-net 3d", shape, dtype, layout, activation="leaky_relu")
    yield Case("batch_norm", "tiny", (8, 64), torch.float32)
    one_image = Case("batch_norm", "one image", (1, 64, 32, 32), torch.float32, training=False)
    yield replace(one_image, residual=True, activation="silu")


def _small_batch_norm() -> Iterator[Case]:
    """Both layouts, one program a channel and many, small enough for the interpreter."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape, layout in (
            ("whole NCHW", (6, 5, 24, 24), "contiguous"),
            ("whole channels_last", (3, 40, 10, 10), "channels_last"),
            ("whole (N, C)", (250, 40), "contiguous"),
            ("split NCHW", (9, 3, 60, 60), "contiguous"),
            ("split NCHW, odd", (71, 3, 21, 21), "contiguous"),
            ("split channels_last", (9, 40, 20, 20), "channels_last"),
            ("split (N, C)", (3001, 33), "contiguous"),
            ("split 3d", (2, 3, 20, 30, 31), "channels_last_3d"),
        ):
            case = Case("batch_norm", name, shape, dtype, layout)
            yield case
            yield replace(case, activation="relu", residual=True)
            yield replace(case, activation="silu", training=False)
    split = Case("batch_norm", "split NCHW", (9, 3, 60, 60))
    yield replace(split, activation="silu", residual=True)
    yield replace(split, residual=True)
    yield replace(split, activation="relu", residual=True, training=False)
    yield replace(split, affine=False)
    yield Case("batch_norm", "whole NCHW", (6, 5, 24, 24), affine=False)


def _batch_norm_options() -> Iterator[Case]:
    """Every activation, dtype and absent tensor once, at shapes that take each kernel."""
    for layout, shape in (("contiguous", (64, 4, 64, 64)), ("channels_last", (4, 24, 9, 9))):
        case = Case("batch_norm", "options", shape, layout=layout)
        for activation in ACTIVATIONS:
            yield replace(case, activation=activation, residual=layout == "contiguous")
            yield replace(case, activation=activation, training=False)
        for dtype in (torch.float16, torch.float32, torch.float64):
            yield replace(case, dtype=dtype, activation="gelu_tanh", residual=True)
        for training in (True, False):
            for residual in (True, False):
                plain = replace(case, affine=False, training=training, residual=residual)
                yield plain
                yield replace(plain, activation="relu")
                yield replace(plain, activation="silu")


CASES: tuple[Case, ...] = tuple(_batch_norm())
OPTION_CASES: tuple[Case, ...] = tuple(_batch_norm_options())
SMALL_CASES: tuple[Case, ...] = tuple(_small_batch_norm())
