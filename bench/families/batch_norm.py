"""BatchNorm's cases: ResNet-50, an MLP, a 3d U-Net; small ones for the interpreter; options."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from case import Case, Sweeps
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS


@dataclass(frozen=True)
class BatchNormCase(Case):
    """`functional.batch_norm`, with running statistics."""

    family: ClassVar[str] = "batch_norm"
    training: bool = True

    def words(self) -> list[str]:
        return [*super().words(), "train" if self.training else "eval"]

    def small_tensors(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight", "bias") if self.affine else (), (self.shape[1],))

    def buffers(self, device: str) -> dict[str, Tensor]:
        initial = {"running_mean": 0.0, "running_var": 1.0}
        return {n: torch.full((self.shape[1],), v, device=device) for n, v in initial.items()}

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

    def minimum_passes(self, forward_whole: bool, backward_whole: bool) -> tuple[int, int]:
        x_again, dy_again = not forward_whole, not backward_whole
        gated = 2 if self.residual and self.activation != "identity" else 0  # y in, dz out
        x_unread = not (self.training or self.affine or self.activation != "identity")
        return 2 + self.residual + x_again, 3 + 2 * dy_again + gated - x_unread


RESNET50 = {  # the outputs of the stages, batch 256
    "resnet50 stem": (256, 64, 112, 112),
    "resnet50 stage 1": (256, 256, 56, 56),
    "resnet50 stage 2": (256, 512, 28, 28),
    "resnet50 stage 3": (256, 1024, 14, 14),
    "resnet50 stage 4": (256, 2048, 7, 7),
}


def cases() -> Iterator[Case]:
    for name, shape in RESNET50.items():
        for layout in ("contiguous", "channels_last"):
            case = BatchNormCase(name, shape, layout=layout, activation="relu")
            yield case
            yield replace(case, residual=True)
    yield BatchNormCase("resnet50 stage 4, batch 512", (512, 2048, 7, 7), activation="relu")
    yield BatchNormCase("planes of 13x13", (256, 256, 13, 13), activation="relu")
    yield BatchNormCase("planes of 17x17", (256, 768, 17, 17), activation="relu")
    yield BatchNormCase("planes of 35x35", (256, 288, 35, 35), activation="relu")
    frozen = BatchNormCase("resnet50 stage 1", RESNET50["resnet50 stage 1"], training=False)
    yield frozen
    yield replace(frozen, affine=False)
    yield BatchNormCase("resnet50 stage 2", RESNET50["resnet50 stage 2"], affine=False)
    for dtype in (torch.bfloat16, torch.float32):
        yield BatchNormCase("mlp", (8192, 1024), dtype, activation="relu")
        yield BatchNormCase("mlp, small batch", (256, 1024), dtype, activation="gelu")
        for layout in ("contiguous", "channels_last_3d"):
            shape = (2, 32, 128, 128, 128)
            yield BatchNormCase("u-net 3d", shape, dtype, layout, activation="leaky_relu")
    yield BatchNormCase("tiny", (8, 64), torch.float32)
    one_image = BatchNormCase("one image", (1, 64, 32, 32), torch.float32, training=False)
    yield replace(one_image, residual=True, activation="silu")


def small_cases() -> Iterator[Case]:
    """All layouts, one program a channel and many, small enough for the interpreter."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape, layout in (
            ("whole NCHW", (6, 5, 24, 24), "contiguous"),
            ("whole channels_last", (3, 40, 10, 10), "channels_last"),
            ("whole (N, C)", (250, 40), "contiguous"),
            ("split NCHW", (9, 3, 60, 60), "contiguous"),
            ("split NCHW, odd", (71, 3, 21, 21), "contiguous"),
            ("rows within vectors", (30, 8, 33, 33), "contiguous"),
            ("whole planes", (20, 16, 7, 7), "contiguous"),
            ("split planes", (4000, 6, 2, 2), "contiguous"),
            ("split channels_last", (9, 40, 20, 20), "channels_last"),
            ("split (N, C)", (3001, 33), "contiguous"),
            ("split 3d", (2, 3, 20, 30, 31), "channels_last_3d"),
        ):
            case = BatchNormCase(name, shape, dtype, layout)
            yield case
            yield replace(case, activation="relu", residual=True)
            yield replace(case, activation="silu", training=False)
    split = BatchNormCase("split NCHW", (9, 3, 60, 60))
    yield replace(split, activation="silu", residual=True)
    yield replace(split, residual=True)
    yield replace(split, activation="relu", residual=True, training=False)
    yield replace(split, affine=False)
    yield BatchNormCase("whole NCHW", (6, 5, 24, 24), affine=False)


def option_cases() -> Iterator[Case]:
    """Every activation, dtype and absent tensor once, at shapes that take each kernel."""
    for layout, shape in (
        ("contiguous", (64, 4, 64, 64)),
        ("contiguous", (256, 8, 7, 7)),
        ("contiguous", (256, 8, 33, 33)),
        ("channels_last", (4, 24, 9, 9)),
    ):
        case = BatchNormCase("options", shape, layout=layout)
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


def sweeps(compiled: Callable[[Sequence[Case]], int]) -> Sweeps:
    """What may differ: one program a channel or several (two sets of kernels), the power of two
    that divides the contiguous axis, up to 8 (four classes), and the powers of two that cover a
    channel smaller than a tile.
    """
    image = BatchNormCase("sweep", (32, 64, 56, 56), torch.bfloat16, activation="relu")
    last = replace(image, layout="channels_last")
    rows = replace(image, shape=(32, 64))
    one = compiled([image])
    batches = [16, 17, 24, 31, 32, 48, 64, 100, 128, 255, 256]
    sides = [48, 50, 52, 56, 58, 60, 62, 64, 72, 80, 96, 112, 128, 224]
    odd = [49, 51, 53, 55, 57, 61, 63, 65, 97]
    plane = replace(image, shape=(32, 64, 7, 7))
    return {
        "batch, NCHW": ([replace(image, shape=(n, *image.shape[1:])) for n in batches], one),
        "batch, channels_last": ([replace(last, shape=(n, *last.shape[1:])) for n in batches], one),
        "batch, planes": (
            [replace(plane, shape=(n, 64, 7, 7)) for n in (16, 17, 31, 32, 48, 64, 80)],
            compiled([plane]),
        ),
        "batch, (N, C), split": (
            [replace(rows, shape=(n, 64)) for n in (3000, 4096, 5001, 8192, 65536)],
            one,
        ),
        # even sides: H·W is a multiple of 4 or of 8, which the two finalizing kernels do not see
        "sides, NCHW": ([replace(image, shape=(32, 64, s, s)) for s in sides], 2 * one - 2),
        "odd sides, NCHW": ([replace(image, shape=(32, 64, s, s)) for s in odd], one),
        "sides, channels_last": (
            [replace(last, shape=(32, 64, s, s)) for s in [*sides, *odd]],
            one,
        ),
    }
