"""Inputs on which norms go wrong, by name, as float64; and how they lie in memory."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Values = Callable[[Tensor, torch.dtype], Tensor]
"""(draws from a normal distribution, the dtype they will have) -> the values, changed in place."""


def _constant_set(x: Tensor, dtype: torch.dtype) -> Tensor:
    x[:, 0] = 3.0  # a channel, where the last axis is no set
    x[0] = 3.0
    return x


def _one(value: float) -> Values:
    def values(x: Tensor, dtype: torch.dtype) -> Tensor:
        x[-1].view(-1)[x[-1].numel() // 2] = value
        return x

    return values


def _outlier(x: Tensor, dtype: torch.dtype) -> Tensor:
    x[..., -1] = -1e4
    x[0] = 1e4
    return x


ADVERSARIAL: dict[str, Values] = {
    "mean 1e4, std 1e-2": lambda x, dtype: 1e4 + 1e-2 * x,
    "mean 1e3, std 1": lambda x, dtype: 1e3 + x,
    "a constant set": _constant_set,
    "all equal": lambda x, dtype: torch.full_like(x, 1.1),
    "zeros": lambda x, dtype: torch.zeros_like(x),
    "denormals": lambda x, dtype: x * torch.finfo(dtype).smallest_normal / 16,
    "near the maximum": lambda x, dtype: x.clamp(-3, 3) * (torch.finfo(dtype).max / 64),
    "1e30": lambda x, dtype: x * 1e30,
    "outliers": _outlier,
    "sorted": lambda x, dtype: x.flatten().sort().values.reshape(x.shape),
    "tiny": lambda x, dtype: x * 1e-6,
    "a NaN": _one(float("nan")),
    "an infinity": _one(float("inf")),
}
"""Beside "normal": mean 0.5 and standard deviation 1.5."""


def values(name: str, draws: Tensor, dtype: torch.dtype) -> Tensor:
    return draws * 1.5 + 0.5 if name == "normal" else ADVERSARIAL[name](draws, dtype)


def fits(name: str, dtype: torch.dtype) -> bool:
    """Whether the values can be had in `dtype`, and judged."""
    if name == "near the maximum":
        return dtype is not torch.float64  # the squares of the float64 formulas overflow there
    return name != "1e30" or dtype is not torch.float16


FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
NAN = float("nan")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in `layout`, between NaNs where that has gaps."""
    if layout == "sliced":  # rows with a stride; nothing is aligned
        return F.pad(x, (1, 2), value=NAN)[..., 1:-2]
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2]
    return x.contiguous(memory_format=FORMATS[layout])
