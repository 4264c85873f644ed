"""The gram algorithm's passes over the rows of X, forward; its small arithmetic is in gram.py."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.eager import gram, native, products
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.native import STEPS

BLOCK_BYTES = 1 << 20
"""Of the product: what a core's second-level cache holds with room to spare."""
CONVOLVED_BYTES = 4 << 20
"""The same of a convolution: to begin one takes longer than to begin a product."""


def blocks(
    N: int, *tensors: Tensor | None, size: int = BLOCK_BYTES
) -> Iterator[tuple[Tensor | None, ...]]:
    """Some rows of each tensor at a time, such that (rows, N) float32 are of that size in bytes."""
    size = max(size // (4 * N), 64)
    rows = next(t.shape[0] for t in tensors if t is not None)
    for start in range(0, rows, size):
        yield tuple(None if t is None else t[start : start + size] for t in tensors)


def gram_matrix(x: Tensor) -> tuple[Tensor, Tensor]:
    """x̄ and S in float64, about the first row, so that a large mean costs no digits."""
    M, K = x.shape
    pivot = x[0].double().nan_to_num(0.0, 0.0, 0.0)
    total = torch.zeros(K, dtype=torch.float64, device=x.device)
    s = torch.zeros(K, K, dtype=torch.float64, device=x.device)
    for (block,) in blocks(2 * K, x):
        assert block is not None
        d = block - pivot  # float64
        total += d.sum(0)
        s.addmm_(d.T, d)
    offset = total / M
    return pivot + offset, s.addr_(offset, offset, alpha=-M)


def shifted(x: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return x if shift is None else x - shift


def forward(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    statistics: gram.Statistics,
    activation: str,
) -> Tensor:
    """y from rows less their mean: act((x − x̄) (α∘W)ᵀ + shift)."""
    dtype = gram.compute_dtype(x.dtype)
    folded = gram.scale_of(statistics, norm_weight)[:, None] * weight.double()
    w = folded.to(dtype)
    x_mean = None if statistics.x_mean is None else statistics.x_mean.to(dtype)
    if statistics.x_mean is None or x_mean is None:
        shift = -gram.scale_of(statistics, norm_weight) * statistics.centre
    else:  # what the rounding of x̄ leaves
        shift = folded @ (x_mean - statistics.x_mean)
        if statistics.apart is not None:
            shift += gram.scale_of(statistics, norm_weight) * statistics.apart
    if norm_bias is not None:
        shift = shift + norm_bias.double().reshape(-1)
    shift = shift.to(dtype)
    act = STEPS[activation][0] if activation in STEPS else ACTIVATIONS[activation]
    M, N = x.shape[0], weight.shape[0]
    convolves = products.convolves(x, w)  # which writes to no given memory
    if convolves and x_mean is None and 4 * M * N < native.HUGE:
        return act(products.convolution(x, w, shift))
    y = native.on_huge_pages(torch.empty(M, N, dtype=x.dtype, device=x.device))
    in_place = not convolves and y.dtype is dtype
    for x_block, y_block in blocks(N, x, y, size=CONVOLVED_BYTES if convolves else BLOCK_BYTES):
        assert x_block is not None
        assert y_block is not None
        rows = shifted(x_block, x_mean, dtype)
        if in_place:
            z = torch.addmm(shift, rows, w.T, out=y_block)
        else:
            z = (products.convolution if convolves else F.linear)(rows, w, shift)
        z = act(z)
        if z is not y_block:
            y_block.copy_(z)
    return y
