"""GroupNorm's and InstanceNorm's cases: U-Nets, style transfer, 3d medical images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from case import Case, Sweeps
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS


@dataclass(frozen=True)
class GroupNormCase(Case):
    """`functional.group_norm`."""

    family: ClassVar[str] = "group_norm"
    num_groups: int = 32

    def words(self) -> list[str]:
        return [*super().words(), f"{self.num_groups} groups"]

    def small_tensors(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight", "bias") if self.affine else (), (self.shape[1],))

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        return FF.group_norm(
            tensors["input"],
            self.num_groups,
            tensors.get("weight"),
            tensors.get("bias"),
            residual=tensors.get("residual"),
            activation=self.activation,
        )

    def minimum_passes(self, forward_whole: bool, backward_whole: bool) -> tuple[int, int]:
        gated = 2 if self.residual and self.activation != "identity" else 0  # y in, dz out
        # x is read for the moments, then again
        return 2 + self.residual + (not forward_whole), 3 + 2 * (not backward_whole) + gated


@dataclass(frozen=True)
class InstanceNormCase(GroupNormCase):
    """`functional.instance_norm`, with running statistics where `tracked`."""

    family: ClassVar[str] = "instance_norm"
    num_groups: int = 0  # as many as channels
    tracked: bool = False

    def words(self) -> list[str]:
        return [*Case.words(self), *["tracked"] * self.tracked]

    def buffers(self, device: str) -> dict[str, Tensor]:
        initial = {"running_mean": 0.0, "running_var": 1.0} if self.tracked else {}
        return {n: torch.full((self.shape[1],), v, device=device) for n, v in initial.items()}

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        return FF.instance_norm(
            tensors["input"],
            tensors.get("running_mean"),
            tensors.get("running_var"),
            tensors.get("weight"),
            tensors.get("bias"),
            residual=tensors.get("residual"),
            activation=self.activation,
        )


def cases() -> Iterator[Case]:
    for layout in ("contiguous", "channels_last"):
        for channels, side in ((320, 64), (640, 32), (1280, 16)):
            for batch in (2, 16):
                shape = (batch, channels, side, side)
                yield GroupNormCase("stable diffusion", shape, layout=layout, activation="silu")
        large = (112, 64, 512, 512)
        yield GroupNormCase("large groups", large, layout=layout, num_groups=8)
        block = GroupNormCase("residual block", (16, 256, 56, 56), layout=layout)
        yield replace(block, residual=True, activation="relu")
        yield replace(block, residual=True, activation="silu")
        yield replace(block, shape=(64, 512, 7, 7), residual=True, activation="relu")
        odd = replace(block, shape=(16, 256, 57, 57), num_groups=8)
        yield replace(odd, residual=True, activation="relu")
        for dtype in (torch.bfloat16, torch.float32):
            yield InstanceNormCase("style transfer", (4, 64, 256, 256), dtype, layout)
        yield replace(block, name="one group", num_groups=1, activation="gelu")
    for layout in ("contiguous", "channels_last_3d"):
        shape = (2, 32, 128, 128, 128)
        medical = InstanceNormCase("3d medical", shape, torch.float32, layout)
        yield replace(medical, activation="leaky_relu")
        yield replace(medical, tracked=True, affine=False)
    yield GroupNormCase("(N, C)", (65536, 1024), num_groups=8)
    yield GroupNormCase("small images", (4096, 512, 7, 7))
    yield GroupNormCase("(N, C), one group", (8192, 8192), num_groups=1)
    yield GroupNormCase("tiny", (8, 64, 4, 4), torch.float32, num_groups=8)


def small_cases() -> Iterator[Case]:
    """Both layouts, one program a group and many, small enough for the interpreter."""
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape, num_groups, layout in (
            ("whole NCHW", (3, 20, 14, 14), 4, "contiguous"),
            ("whole NCHW, odd", (5, 30, 7, 7), 3, "contiguous"),
            ("whole NCHW, wide", (2, 6, 40, 40), 2, "contiguous"),
            ("whole NCHW, looped", (4, 6, 60, 60), 2, "contiguous"),
            ("whole channels_last", (3, 40, 8, 8), 4, "channels_last"),
            ("whole (N, C)", (250, 40), 8, "contiguous"),
            ("split NCHW", (2, 20, 60, 60), 2, "contiguous"),
            ("rows within vectors", (2, 72, 35, 35), 1, "contiguous"),
            ("split channels_last", (2, 40, 40, 40), 4, "channels_last"),
            ("split 3d", (2, 6, 20, 30, 31), 2, "channels_last_3d"),
        ):
            case = GroupNormCase(name, shape, dtype, layout, num_groups=num_groups)
            yield case
            yield replace(case, activation="silu")
            yield replace(case, activation="relu", residual=True)
        for name, shape, layout in (
            ("whole NCHW", (4, 3, 30, 30), "contiguous"),
            ("whole channels_last", (3, 40, 10, 10), "channels_last"),
            ("split NCHW", (2, 3, 130, 131), "contiguous"),
            ("split channels_last", (2, 40, 30, 30), "channels_last"),
        ):
            yield InstanceNormCase(name, shape, dtype, layout, tracked=True)
    split = GroupNormCase("split NCHW", (2, 20, 60, 60), num_groups=2)
    yield replace(split, activation="silu", residual=True)
    yield replace(split, residual=True)
    yield replace(split, affine=False)
    whole = GroupNormCase("whole NCHW", (3, 20, 14, 14), num_groups=4)
    yield replace(whole, affine=False)
    yield replace(whole, activation="silu", residual=True)


def option_cases() -> Iterator[Case]:
    """Every activation, dtype and absent tensor once, at shapes that take each kernel."""
    for layout in ("contiguous", "channels_last"):
        for shape in ((4, 24, 64, 64), (4, 24, 9, 9), (200, 24, 32, 32)):
            case = GroupNormCase("options", shape, layout=layout, num_groups=2)
            for activation in ACTIVATIONS:
                yield replace(case, activation=activation, residual=layout == "contiguous")
            for dtype in (torch.float16, torch.float32, torch.float64):
                yield replace(case, dtype=dtype, activation="gelu_tanh", residual=True)
            for residual in (True, False):
                plain = replace(case, affine=False, residual=residual)
                yield plain
                yield replace(plain, activation="relu")
                yield replace(plain, activation="silu")
            for num_groups in (1, 3, 8, 24):
                yield replace(case, num_groups=num_groups)


def sweeps(compiled: Callable[[Sequence[Case]], int]) -> Sweeps:
    """What may differ: one program a group or several (two sets of kernels), the power of two that
    divides the contiguous axis, up to 8 (four classes), the powers of two that cover the channels
    of a group or the positions of a sample, where a tile holds several, and whether long groups are
    few or many (two forwards).
    """
    block = GroupNormCase("sweep", (8, 320, 32, 32), activation="silu")
    small = replace(block, shape=(8, 320, 8, 8))
    whole, split = compiled([block]), compiled([replace(block, shape=(2, 320, 64, 64))])
    batches = [1, 2, 3, 8, 16, 17, 31, 64, 100, 128]
    sides = [64, 68, 72, 76, 80, 84, 88, 96, 100, 112, 120, 128, 256, 512]
    odd = [65, 67, 69, 75, 99, 127, 129, 255]
    return {
        f"groups, {name}": (cases, most)
        for name, (cases, most) in {
            "batch, NCHW": ([replace(block, shape=(n, 320, 32, 32)) for n in batches], whole + 1),
            "batch, NCHW, small": (
                [replace(small, shape=(n, 320, 8, 8)) for n in batches],
                whole,
            ),
            "batch, channels_last": (
                [replace(block, shape=(n, 320, 32, 32), layout="channels_last") for n in batches],
                split,
            ),
            "sides, NCHW": ([replace(block, shape=(2, 320, s, s)) for s in sides], split),
            "odd sides, NCHW": ([replace(block, shape=(2, 320, s, s)) for s in odd], split),
            "sides, channels_last": (
                [
                    replace(block, shape=(2, 320, s, s), layout="channels_last")
                    for s in [*sides, *odd]
                ],
                split,
            ),
            # 32 groups of 40 to 64 channels take as many lanes
            "channels, NCHW, small": (
                [replace(small, shape=(8, 32 * k, 8, 8)) for k in (40, 48, 50, 60)],
                whole,
            ),
        }.items()
    }
