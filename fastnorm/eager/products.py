"""Products of float32 rows on a CPU, by the library that is faster there.

torch multiplies matrices with MKL, and convolves with oneDNN. Of AMD's AVX-512, from Zen 5 on half
of what a core can do, MKL makes no use; oneDNN does. There rows are given to it as the positions of
a convolution: by bench/bench_linear_batch_norm.py, on two cores of an EPYC of that kind, a linear
layer of 4096 rows, 256 to 1024, with batch norm and ReLU takes half the time, both ways.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import processor
from fastnorm.eager import native

mkl: Any = torch.backends.mkl
onednn: Any = torch.backends.mkldnn

ROWS, MULTIPLICATIONS = 128, 1 << 24
"""The fewest from which a convolution is the faster one."""
ZEN_5 = 26
"""Its processor family, as AMD counts."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias of rows (M, K), as `torch.nn.functional.linear`."""
    return convolution(x, weight, bias) if convolves(x, weight) else F.linear(x, weight, bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of what `convolves`."""
    positions = x.view(1, len(x), 1, -1).permute(0, 3, 1, 2)  # channels_last, as rows are
    z = F.conv2d(positions, weight[:, :, None, None], bias)
    return z.permute(0, 2, 3, 1).view(len(x), -1)


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution is faster, and as exact."""
    return (
        not torch.compiler.is_compiling()  # first: sizes must not be guarded
        and len(x) >= ROWS
        and x.numel() * len(weight) >= MULTIPLICATIONS
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and _mkl_leaves_half()
        and not native.observed(x)
        and type(weight) in (Tensor, torch.nn.Parameter)
        and _is_exact()
    )


def _is_exact() -> bool:
    """Whether oneDNN may be asked, and neither products nor convolutions may round to less."""
    asked = onednn.matmul.fp32_precision, onednn.conv.fp32_precision
    return bool(onednn.enabled) and set(asked) <= {"none", "ieee"}


@functools.cache
def _mkl_leaves_half() -> bool:
    """Whether torch has both libraries, and MKL leaves half of this processor unused."""
    both = bool(mkl.is_available() and onednn.is_available())
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return both and wide and is_zen_5(processor.facts())


def is_zen_5(facts: Mapping[str, str]) -> bool:
    """Whether a processor is AMD's Zen 5, or a later one."""
    return facts.get("vendor_id") == "AuthenticAMD" and int(facts["cpu family"]) >= ZEN_5
