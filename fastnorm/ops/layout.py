"""How the kernels see a tensor: dense, as (N, C, S), or as rows with a contiguous last axis."""

import contextlib
import itertools
import math

import torch
from torch import Tensor

from fastnorm.eager import native
from fastnorm.kernels.launch import ChannelView


def _has_channels_innermost(x: Tensor) -> bool:
    """Whether `x.movedim(1, -1)`, which takes 3 µs to make, is contiguous."""
    if x.ndim not in (4, 5):
        return (x if x.ndim == 2 else x.movedim(1, -1)).is_contiguous()
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=last) or x.numel() == 0


def channel_view(x: Tensor) -> tuple[Tensor, ChannelView]:
    """`x`, or the one copy it takes to make it dense, and its view by channels (axis 1).

    What is dense keeps its layout, and so the output has it: channels_last as in torch, and of
    three axes (B, L, C).transpose(1, 2). There torch's CUDA kernel of batch norm does the same, of
    bfloat16 or without parameters; cuDNN, GroupNorm and InstanceNorm copy, as a CPU does.
    """
    x = in_memory(x)
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    if _has_channels_innermost(x):
        return x, ChannelView(1, channels, batch * positions, columns=True)
    if x.is_contiguous():
        return x, ChannelView(batch, channels, positions, columns=False)
    if x.stride(1) == 1 and channels > 1:
        dense = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return dense, ChannelView(1, channels, batch * positions, columns=True)
    return x.contiguous(), ChannelView(batch, channels, positions, columns=False)


def in_memory(t: Tensor) -> Tensor:
    """`t`, or the copy it takes that memory has its values, which kernels read.

    It has not where torch negates what it reads, as in the imaginary part of a conjugate.
    """
    return t.resolve_neg()


def sample_view(x: Tensor) -> tuple[Tensor, ChannelView]:
    """The same, for what is computed sample by sample: its N is the batch in both layouts."""
    dense, _ = channel_view(x)
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    # where it is both, the longer runs: those of the one channel, or those of the channels
    columns = positions == 1 or not dense.is_contiguous()
    return dense, ChannelView(batch, channels, positions, columns)


def view_of(x: Tensor, columns: bool, by_sample: bool = False) -> ChannelView:
    """The view of a dense `x` of which `channel_view` or `sample_view` told the layout."""
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    if columns and not by_sample:
        return ChannelView(1, channels, batch * positions, columns)
    return ChannelView(batch, channels, positions, columns)


def laid_out_as(t: Tensor, x: Tensor) -> Tensor:
    """`t` with the strides of the dense `x`: itself, or a copy."""
    if t.stride() == x.stride():
        return in_memory(t)
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


def as_rows(x: Tensor, size: int) -> Tensor:
    """`x`, or (rows, size) with a contiguous last axis: a view, or the one copy that it takes."""
    x = in_memory(x)
    if x.is_contiguous():  # launchers need no view, which would cost the host as much as a plan
        return x
    rows = x.reshape(-1, size)
    return rows if rows.stride(1) == 1 or size == 1 else rows.contiguous()


def is_in_order(x: Tensor) -> bool:
    """Whether what torch computes from `x` is contiguous: it keeps the order of the strides.

    The rows of others are copied anyway, and a sum of two copies takes longer than one of a sum.
    """
    if x.is_contiguous():
        return True
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]
    return all(outer >= inner for outer, inner in itertools.pairwise(strides))


def as_vector(t: Tensor | None) -> Tensor | None:
    """A parameter as a dense vector: itself, a view, or a copy."""
    return None if t is None else in_memory(t if t.ndim == 1 else t.reshape(-1)).contiguous()


def recorded(x: Tensor) -> bool:
    """Whether someone is to see which operators run, and kernels must be operators, too.

    Dynamo traces a backward itself where torch compiles autograd's graph ("compiled autograd").
    """
    return torch.compiler.is_compiling() or native.observed(x)


def as_recorded(size: int | torch.SymInt) -> int:
    """A size that may vary from call to call, as it is in the one that is recorded; 0: unknown."""
    return size if isinstance(size, int) else size.node.hint or 0


_HERE = contextlib.nullcontext()


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Launches go to the current device: make it the tensor's, where it is another."""
    elsewhere = (
        x.is_cuda
        and torch.cuda.is_initialized()  # which a fake tensor does not need
        and x.get_device() != torch.cuda.current_device()
    )
    return torch.cuda.device(x.device) if elsewhere else _HERE
