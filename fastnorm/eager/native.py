"""torch's native CPU batch norm, taken apart: its reduction, its scale and shift, its memory.

On a CPU `native_batch_norm` in evaluation is a vectorized `scale (x − mean) + shift` that can write
to a given tensor, and `native_batch_norm_backward` without an input gradient is a vectorized
reduction in one pass over two tensors, on both of torch's layouts. All take dense tensors only.
"""

import ctypes
import functools
import math
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

aten = torch.ops.aten
# of torch.func's innermost transform; Dynamo guards it
_interpreter = torch._C._functorch.peek_interpreter_stack
_Interpreter = torch._C._functorch.CInterpreter

HUGE = 1 << 25
"""Bytes from which glibc maps each tensor anew: its largest mmap threshold."""
NEAR = 2
"""Standard deviations up to which a mean, once rounded, leaves the variance its precision."""
LONG_SUM = 512
"""Positions above which a plane is reduced in pieces, to keep the rounding of float32 small."""
LONG_COLUMN = 1 << 14
"""The same of a column, of which every lane of a vector has one to itself."""

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""What is computed in, where it is not the input's dtype."""

# Activations whose derivative is a step function of the output, so that differentiating twice needs
# no more than it: name -> (act in place, act backward of (dy, y, *arguments), arguments).
STEPS: dict[str, tuple[Callable[[Tensor], Tensor], Any, tuple[Any, ...]]] = {
    "relu": (torch.relu_, aten.threshold_backward, (0,)),
    "relu6": (lambda y: aten.hardtanh_(y, 0.0, 6.0), aten.hardtanh_backward, (0.0, 6.0)),
    "leaky_relu": (lambda y: aten.leaky_relu_(y, 0.01), aten.leaky_relu_backward, (0.01, True)),
}


def memory_format(input: Tensor) -> torch.memory_format:
    """The format that `input` has if it is dense."""
    if input.dim() < 4 or input.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if input.dim() == 4 else torch.channels_last_3d


def is_dense(input: Tensor) -> bool:
    """Whether torch's CPU kernels walk its memory in order."""
    if input.is_contiguous():
        return True
    return input.is_contiguous(memory_format=memory_format(input)) and not is_mistaken(input)


def is_mistaken(input: Tensor) -> bool:
    """Whether torch does not see that channels are innermost in a tensor that is dense.

    An axis of one element may have any stride, and torch goes by strides. Of such a tensor its
    group norm says that it is not contiguous, and its batch norm's gradient in evaluation is wrong.
    """
    if input.is_contiguous() or traced():
        return False
    format = memory_format(input)
    return input.is_contiguous(memory_format=format) and suggest_memory_format(input) is not format


def in_order(t: Tensor) -> Tensor:
    """The same numbers, in memory where torch looks for them."""
    return t.contiguous() if is_mistaken(t) else t


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Tensor:
    """`torch.batch_norm`, whose backward gets its dy `in_order`."""
    z = torch.batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
    )
    if (
        z.requires_grad
        and not torch.compiler.is_compiling()
        and z.is_cpu
        and z.dim() > 3
        and 1 in z.shape
        and not observed(z)
    ):
        # nothing may flow there, in a second derivative
        z.register_hook(lambda dz: dz if dz is None else in_order(dz))  # type: ignore[no-untyped-call]
    return z


def kept_format(input: Tensor) -> torch.memory_format:
    """That which torch gives to what it computes from `input`, dense or not."""
    if not traced():
        return suggest_memory_format(input)
    # TorchScript records sizes, and does not tell them
    return memory_format(input) if is_dense(input) else torch.contiguous_format


def per_channel(values: Tensor, input: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), to broadcast over an input (N, C, ...)."""
    return values.view(-1, *[1] * (input.dim() - 2))


def reduce(g: Tensor, input: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ g (input − mean) rstd` and `Σ g` of each channel."""
    _, product, total = aten.native_batch_norm_backward.default(
        g, input, rstd, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return product, total


def scale_shift(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    output: Tensor,
) -> None:
    """Write `scale (input − mean) / √(var + eps) + shift` to output, which may be the input."""
    unused = mean.new_empty(0)
    torch.native_batch_norm(
        input, scale, shift, mean, var, False, 0.0, eps, out=(output, unused, unused)
    )


def moments(input: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Moments of each channel of a dense tensor: (x, mean of x, mean, biased variance).

    x is the input, or the input less its mean, written to `spare`, where that mean is too large to
    be subtracted later. None where something is not finite: float32 overflowed, or the input has an
    inf or a NaN. torch's own sums, in double, tell which.
    """
    x, out = _by_channel(input), _by_channel(spare)
    mean = x.mean(2).mean(0)
    # Σ x (x − mean) is Σ (x − mean)² but for the rounding of the mean, and saves a pass.
    var, _ = _reduce_pieces(x, mean)
    low, high = torch.aminmax(torch.addcmul(NEAR**2 * var, mean, mean, value=-1))
    if low.item() >= 0 and high.item() < math.inf:
        return input, mean, mean, var

    centered = torch.sub(x, mean[:, None], out=out)
    square, offset = _reduce_pieces(centered, torch.zeros_like(mean))
    var = square.addcmul_(offset, offset, value=-1).clamp_min_(0)
    return (spare, offset, mean.add_(offset), var) if math.isfinite(var.sum().item()) else None


def _by_channel(t: Tensor) -> Tensor:
    """A dense (N, C, ...) as a view (N, C, S), or (1, C, N S) where channels are innermost."""
    if t.dim() > 2 and t.is_contiguous():
        return t.flatten(2)
    return t.movedim(1, -1).flatten(0, -2).t()[None]


def _reduce_pieces(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Means of `x (x − mean)` and of `x` of what `_by_channel` gives, from sums of few terms."""
    n = x.shape[0] * x.shape[2]
    sums = _planes(x, mean) if x.is_contiguous() else _rows(x[0].t(), mean)
    product, total = (t / n for t in sums)
    return product, total


def _planes(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of `x (x − mean)` and of `x` of (N, C, S), from sums of at most LONG_SUM terms.

    Pieces of planes are channels to the kernel. Those of all samples are, so that it walks memory
    in order: (32, 64, 112, 112) takes 3.8 ms, against 14.7 for pieces of the same channel in turn.
    """
    N, C, S = x.shape
    pieces = _pieces(S, LONG_SUM)
    samples = N if pieces > 1 else 1
    means = mean[:, None].expand(samples, C, pieces).reshape(-1)
    blocks = x.view(N // samples, means.shape[0], -1)
    product, total = reduce(blocks, blocks, means, torch.ones_like(means))
    product, total = (t.view(samples, -1).sum(0).view(C, -1).sum(1) for t in (product, total))
    return product, total


def _rows(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The same of (M, C), from sums of at most LONG_COLUMN terms.

    Rows side by side are one row of more channels to the kernel.
    """
    M, C = x.shape
    side = -(-M // LONG_COLUMN)
    even = M // side * side
    means = mean.repeat(side)
    ones = torch.ones_like(means)
    blocks, rest = x[:even].view(-1, side * C), x[even:]
    product, total = (t.view(side, C).sum(0) for t in reduce(blocks, blocks, means, ones))
    if len(rest):
        more = reduce(rest, rest, mean, ones[:C])
        product, total = product + more[0], total + more[1]
    return product, total


@functools.cache
def _pieces(size: int, longest: int) -> int:
    """Into how many equal pieces no longer than `longest`, and not tiny; one if none are equal."""
    choices = range(-(-size // longest), size // 32 + 1)
    return next((pieces for pieces in choices if size % pieces == 0), 1)


def finish(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Add and activate in place."""
    if residual is not None:
        z = z.add_(residual)
    return STEPS[activation][0](z) if activation in STEPS else z


def is_huge(input: Tensor) -> bool:
    """Whether tensors like this had better be on huge pages, and are not unless someone asks."""
    return input.nbytes >= HUGE and _libc() is not None


RMS_IS_LISTED = torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA")
"""Whether autocast on CUDA lists RMS norm, which torch 2.11's does not yet."""


def output_dtype(input: Tensor, *others: Tensor | None, listed: bool = True) -> torch.dtype:
    """That of layer, RMS and group norm, with a residual: autocast on CUDA lists them for float32.

    Nothing is cast for it: what computes in float32 anyway need only store it.
    """
    dtype = input.dtype
    if listed and input.is_cuda and dtype in WIDER and torch.is_autocast_enabled("cuda"):
        dtype = WIDER[dtype]
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def transformed() -> bool:
    """Whether this runs inside a transform of torch.func or forward-mode AD."""
    transform = _interpreter()
    if transform is not None and isinstance(transform, _Interpreter):  # to Dynamo none is not None
        return True
    return forward_ad._current_level >= 0


def is_differentiated(dy: Tensor) -> bool:
    """Whether a backward must take differentiable operators: for create_graph, or a transform."""
    return (
        torch.is_grad_enabled()
        or transformed()
        # of is_grads_batched; a graph of autograd's that is compiled has none
        or (not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy))
    )


def gradients_again(
    forward: Callable[..., Tensor],
    leaves: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dz: Tensor,
) -> list[Tensor | None]:
    """Those of `forward(*leaves)`, which computes z once more by differentiable operators.

    One for each leaf: None where not wanted, or where z does not depend on it. A leaf may have been
    computed from another one, or be it twice: what flows there is for autograd to find, so each
    comes to `forward` as a view, and z is differentiated as far as the views.
    """
    gradients: list[Tensor | None] = [None] * len(leaves)
    if any(wanted[i] for i, t in enumerate(leaves) if t is not None):
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            views = [None if t is None else t.view_as(t) for t in leaves]
            z = forward(*views)
        sources = [(i, t) for i, t in enumerate(views) if t is not None and wanted[i]]
        found = torch.autograd.grad(
            z, [t for _, t in sources], dz.to(z.dtype), create_graph=create_graph, allow_unused=True
        )
        for (i, _), gradient in zip(sources, found, strict=True):
            gradients[i] = gradient
    return gradients


def needs_no_gradient(*tensors: Tensor | None) -> bool:
    """Whether no backward will follow."""
    return not torch.is_grad_enabled() or all(t is None or not t.requires_grad for t in tensors)


def traced() -> bool:
    """Whether `torch.jit.trace` records what is called."""
    return torch._C._get_tracing_state() is not None


def observed(input: Tensor) -> bool:
    """Whether a subclass, a transform, forward-mode AD or a trace watches the operators."""
    return (
        type(input) is not Tensor
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or traced()
    )


def empty_like(input: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """An uninitialized tensor, on huge pages if it is huge.

    Memory that is mapped anew comes page by page, each at the cost of a fault: pages of 4 KB take
    more time than the arithmetic that fills them. Evaluating (32, 64, 112, 112) in float32 takes
    51 ms on those and 11 ms on huge ones.
    """
    return on_huge_pages(torch.empty_like(input, memory_format=memory_format))


def on_huge_pages(output: Tensor) -> Tensor:
    """The same tensor, just allocated, its pages huge if it is."""
    if output.nbytes >= HUGE and (libc := _libc()) is not None and _is_fresh(output, libc):
        start, end = output.data_ptr(), output.data_ptr() + output.nbytes
        start += -start % mmap.PAGESIZE
        libc.madvise(start, (end - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return output


def _is_fresh(output: Tensor, libc: Any) -> bool:
    """Whether nobody has touched this memory yet: the page in its middle is not there."""
    page = (output.data_ptr() + output.nbytes // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    resident = ctypes.c_ubyte(1)
    libc.mincore(page, mmap.PAGESIZE, ctypes.byref(resident))
    return not resident.value & 1


@functools.cache
def _libc() -> Any:
    """For Linux's madvise(2), a hint that changes no contents, where huge pages wait for it.

    None where Linux gives huge pages to everyone or to no one, or torch asks for them itself.
    """
    try:
        mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:  # another system
        return None
    if "[madvise]" not in mode or os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "0":
        return None
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc
