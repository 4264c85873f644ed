"""LayerNorm's and RMSNorm's cases: hidden sizes of transformers, small ones, every option."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from case import Case, Sweeps
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS


@dataclass(frozen=True)
class LayerNormCase(Case):
    """`functional.layer_norm` over the last axis; with a residual `add_layer_norm`."""

    family: ClassVar[str] = "layer_norm"

    def small_tensors(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight", "bias") if self.affine else (), self.shape[-1:])

    def call(self, tensors: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        parameters = (self.shape[-1:], tensors.get("weight"), tensors.get("bias"))
        x, residual = tensors["input"], tensors.get("residual")
        if residual is None:
            return FF.layer_norm(x, *parameters, activation=self.activation)
        return FF.add_layer_norm(x, residual, *parameters, activation=self.activation)

    def minimum_passes(self, forward_whole: bool, backward_whole: bool) -> tuple[int, int]:
        added = 2 if self.residual else 0  # residual in, sum out; backward: dsum in
        forward = 2 + added + (not forward_whole)
        return forward, 3 + added // 2 + 2 * (not backward_whole)


@dataclass(frozen=True)
class RMSNormCase(LayerNormCase):
    """`functional.rms_norm` over the last axis; with a residual `add_rms_norm`."""

    family: ClassVar[str] = "rms_norm"

    def small_tensors(self) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("weight",) if self.affine else (), self.shape[-1:])

    def call(self, tensors: dict[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        parameters = (self.shape[-1:], tensors.get("weight"))
        x, residual = tensors["input"], tensors.get("residual")
        if residual is None:
            return FF.rms_norm(x, *parameters, activation=self.activation)
        return FF.add_rms_norm(x, residual, *parameters, activation=self.activation)


KINDS = (LayerNormCase, RMSNormCase)
ELEMENTS = 1 << 26
WIDTHS = (128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def cases() -> Iterator[Case]:
    for kind in KINDS:
        for width in WIDTHS:
            yield kind("hidden size", (ELEMENTS // width, width))
        yield kind("hidden size", (ELEMENTS // 4096, 4096), torch.float32)
        for width in (1024, 4096, 16384):
            yield kind("pre-norm", (ELEMENTS // width, width), residual=True)
        yield kind("pre-norm", (ELEMENTS // 8192, 8192), torch.float32, residual=True)
        # without weights, which would be as large as the rows; small and option cases have them
        yield kind("few huge rows", (16, 4194304), affine=False)
        yield kind("one odd row", (1, 1000003), torch.float32, affine=False)
        yield kind("frozen", (16384, 4096), affine=False)
        yield kind("with activation", (16384, 4096), activation="silu")


def small_cases() -> Iterator[Case]:
    """Each way of sharing rows, small enough for the interpreter."""
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float32):
            for name, shape in (
                ("short rows", (500, 96)),
                ("odd rows", (61, 333)),
                ("a row a program", (12, 5000)),
                ("backward by columns", (9, 8500)),
                ("looped", (3, 17000)),
                ("split", (1, 40001)),
            ):
                case = kind(name, shape, dtype)
                yield case
                yield replace(case, residual=True)
        yield kind("short rows", (500, 96), affine=False)
        yield kind("short rows", (500, 96), activation="silu")


def option_cases() -> Iterator[Case]:
    """Every activation, dtype and absent tensor once, at shapes that take each kernel."""
    for kind in KINDS:
        for shape in ((4096, 256), (2048, 12288), (256, 65536), (2, 262144)):
            case = kind("options", shape)
            for activation in ACTIVATIONS:
                yield replace(case, activation=activation)
            for dtype in (torch.float16, torch.float32, torch.float64):
                yield replace(case, dtype=dtype, activation="gelu_tanh", residual=True)
                yield replace(case, dtype=dtype)
            for residual in (True, False):
                yield replace(case, affine=False, residual=residual)
                yield replace(case, affine=False, residual=residual, activation="silu")


def sweeps(compiled: Callable[[Sequence[Case]], int]) -> Sweeps:
    """The number of rows compiles nothing; their length does by the power of two that covers it,
    by the power of two that divides it, up to 8, and by whether it fills its tiles.
    """
    rows = LayerNormCase("sweep", (4096, 1024))
    short = replace(rows, shape=(4096, 1000))
    numbers = [1, 2, 15, 16, 31, 100, 128, 1000, 4096, 65536]
    lengths = [520, 640, 768, 1000, 1016, 1024]
    long = replace(rows, shape=(512, 40960))
    return {
        "rows": ([replace(rows, shape=(m, 1024)) for m in numbers], compiled([rows])),
        "row lengths, multiples of 8": (
            [replace(rows, shape=(4096, n)) for n in lengths],
            compiled([rows, short]),
        ),
        "odd row lengths": (
            [replace(rows, shape=(4096, n)) for n in (513, 777, 1001, 1023)],
            compiled([short]),
        ),
        "long rows": (
            [replace(long, shape=(m, n)) for m in (512, 600, 1001) for n in (40960, 50008, 131072)],
            compiled([long, replace(long, shape=(512, 50008))]),
        ),
    }
