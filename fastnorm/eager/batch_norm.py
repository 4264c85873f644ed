"""BatchNorm in torch operators: torch's own where it is fast, a shorter way where it is not.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (C,), of the batch or from the buffers
    g = dy ∘ act′(y)     dβ = Σ g     dγ = Σ g (x − μ) rstd     dr = g
    dx = γ rstd (g − dβ/n − (x − μ) rstd dγ/n)    in training, n values a channel; else γ rstd g

Where torch loses time on a CPU, and what is done about it:

* NCHW, float32, training: torch adds the moments up one element after the other. Here the mean is
  subtracted into the output, the vectorized reduction of torch's backward kernel gives Σ and Σ² of
  that, and the output is normalized in place. This is the accurate order too: a large mean is gone
  before anything is squared.
* From 32 MB on, malloc maps every tensor anew, and the page faults of an output cost more than its
  arithmetic. Outputs are allocated here, on huge pages where Linux grants them on request, and
  torch's kernels write into them. The backward kernel cannot; two elementwise passes over such a
  tensor replace its second half.
* Residual and activation go in place over the output, which nobody else holds yet.

Everything else, and all of it under torch.compile, torch.func, forward-mode AD and tracing, is
`torch.batch_norm` and plain operators. bench/bench_eager_batch_norm.py measures the alternatives.
"""

import ctypes
import functools
import math
import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd import forward_ad

from fastnorm.eager.activations import ACTIVATIONS

aten = torch.ops.aten
_native = aten.native_batch_norm.out
_native_backward = aten.native_batch_norm_backward.default

SMALL = 1 << 17
"""Elements a thread below which several fast operators cost more than one slow one."""
SHORT_PLANE = 32
"""Positions of a channel in a sample below which a reduction over planes is no longer fast."""
HUGE = 1 << 25
"""Bytes from which glibc returns freed memory to the system: its largest mmap threshold."""

_STATISTICS = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

# Activations whose derivative is a step function of the output, so that differentiating twice needs
# no more than it: name -> (act in place, act backward of (dy, y, *arguments), arguments).
_STEPS: dict[str, tuple[Callable[[Tensor], Tensor], Any, tuple[Any, ...]]] = {
    "relu": (torch.relu_, aten.threshold_backward, (0,)),
    "relu6": (lambda y: aten.hardtanh_(y, 0.0, 6.0), aten.hardtanh_backward, (0.0, 6.0)),
    "leaky_relu": (lambda y: aten.leaky_relu_(y, 0.01), aten.leaky_relu_backward, (0.01, True)),
}


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """`act(batch_norm(input) + residual)`, of arguments that `functional.batch_norm` has checked."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None and running_mean is not None:
            dtype = torch.promote_types(running_mean.dtype, torch.float32)
            momentum = num_batches_tracked.to(dtype).reciprocal()
    if momentum is None:
        momentum = 0.0  # no buffers to move
    dtype = _STATISTICS[input.dtype]
    if (
        not isinstance(momentum, Tensor)
        # Given a float32 parameter, torch keeps the statistics of a 16-bit input in float32 too.
        and (dtype is input.dtype if weight is None else weight.dtype is dtype)
        and (bias is None or bias.dtype is dtype)
        and (running_mean is None or running_mean.dtype is dtype)
        and (running_var is None or running_var.dtype is dtype)
    ):
        return _batch_norm(
            input, running_mean, running_var, weight, bias,
            training, momentum, eps, residual, activation,
        )  # fmt: skip

    if weight is None:
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    weight, bias = weight.to(dtype), _cast(bias, dtype)
    mean, var = _cast(running_mean, dtype), _cast(running_var, dtype)
    if not training or running_mean is None or running_var is None or input.numel() == 0:
        return _batch_norm(input, mean, var, weight, bias, training, 0, eps, residual, activation)
    # A momentum of one leaves the batch's own statistics behind.
    mean, var = (torch.zeros_like(running_mean, dtype=dtype) for _ in range(2))
    y = _batch_norm(input, mean, var, weight, bias, training, 1, eps, residual, activation)
    _move(running_mean, mean, momentum)
    _move(running_var, var, momentum)
    return y


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """`running += momentum (batch − running)`, rounded once, to the buffer's dtype."""
    dtype = torch.promote_types(running.dtype, batch.dtype)
    share = momentum.to(dtype) if isinstance(momentum, Tensor) else momentum
    running.copy_(torch.lerp(running.to(dtype), batch.to(dtype), share))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The same for parameters and buffers of the statistics' dtype: choose the way."""
    cpu = input.is_cpu
    statistics = (running_mean, running_var, training, momentum, eps)
    if (
        not cpu
        or torch.compiler.is_compiling()
        or input.numel() < SMALL
        or (residual is not None and residual.dtype is not input.dtype)
        or _observed(input)
    ):
        cudnn = cpu or torch.backends.cudnn.enabled
        z = torch.batch_norm(input, weight, bias, *statistics, cudnn)
        return ACTIVATIONS[activation](z if residual is None else z + residual)

    if not input.is_contiguous(memory_format=_memory_format(input)):
        # Strided: one copy costs less than torch's loops over strides.
        input = input.contiguous(memory_format=suggest_memory_format(input))
    inner = activation if activation in _STEPS else "identity"
    if input.nbytes < HUGE and not (training and _has_planes(input, eps)):
        z = _finish(torch.batch_norm(input, weight, bias, *statistics, False), residual, inner)
    elif torch.is_grad_enabled():
        z = BatchNormFunction.apply(input, weight, bias, residual, *statistics, inner)
    else:
        z = _finish(_normalize(input, weight, bias, *statistics)[0], residual, inner)
    return z if inner == activation else ACTIVATIONS[activation](z)


def _observed(input: Tensor) -> bool:
    """Whether a subclass, a transform, forward-mode AD or a trace watches the operators."""
    return (
        type(input) is not Tensor
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _memory_format(input: Tensor) -> torch.memory_format:
    """The format that a dense input of torch's layouts has."""
    if input.dim() < 4 or input.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if input.dim() == 4 else torch.channels_last_3d


def _has_planes(input: Tensor, eps: float) -> bool:
    """Whether the channels of a sample are long runs of memory, and there is enough to gain.

    Not in 16 bits, where the centred values would be rounded before they are reduced. The square
    of a tiny float32 is lost where torch's double keeps it; an ordinary eps makes that irrelevant.
    """
    return (
        input.dtype is _STATISTICS[input.dtype]
        and input.is_contiguous()
        and input.numel() >= SHORT_PLANE * input.shape[0] * input.shape[1]
        and input.numel() >= SMALL * torch.get_num_threads()
        and eps > 1e-30
    )


def _finish(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Add and activate in place."""
    if residual is not None:
        z = z.add_(residual)
    return _STEPS[activation][0](z) if activation in _STEPS else z


def _empty_like(input: Tensor) -> Tensor:
    """An uninitialized tensor, on huge pages if it is large."""
    output = torch.empty_like(input)
    if output.nbytes >= HUGE and (madvise := _madvise()) is not None:
        start, end = output.data_ptr(), output.data_ptr() + output.nbytes
        start += -start % mmap.PAGESIZE
        madvise(start, (end - start) // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return output


@functools.cache
def _madvise() -> Any:
    """Linux's madvise(2); as used here, a hint that cannot change what memory holds."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd of a dense input; moves the buffers in training."""
    output = _empty_like(input)
    moments = _center(input, output) if training and _has_planes(input, eps) else None
    if moments is not None:
        mean, offset, var = moments
        n = input.numel() // input.shape[1]
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (n / (n - 1)), momentum)
        _scale_shift(output, offset, var, weight, bias, eps, output)
        return output, mean, (var + eps).rsqrt_()
    if not training and running_mean is not None and running_var is not None:
        _scale_shift(input, running_mean, running_var, weight, bias, eps, output)
        return output, running_mean.clone(), (running_var + eps).rsqrt_()
    mean, rstd = (torch.empty(0, dtype=_STATISTICS[input.dtype]) for _ in range(2))
    _native(
        input, weight, bias, running_mean, running_var, training, momentum, eps,
        out=output, save_mean=mean, save_invstd=rstd,
    )  # fmt: skip
    return output, mean, rstd


def _center(input: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Write input − m to output, m its mean as rounded: return the mean, mean − m, the variance.

    None if they are not finite: float32 overflowed, or the input has an inf or NaN. The double
    precision sums of torch's forward tell which.
    """
    N, C = input.shape[:2]
    x, centered = input.view(N, C, -1), output.view(N, C, -1)
    n = N * x.shape[2]
    mean = x.mean((0, 2))
    torch.sub(x, mean[:, None], out=centered)
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    _, square, offset = _native_backward(
        centered, centered, None, None, None, zero, one, True, 0.0, [False, True, True]
    )
    offset /= n
    var = torch.addcmul(square / n, offset, offset, value=-1).clamp_min_(0)
    return (mean.add_(offset), offset, var) if math.isfinite(var.sum().item()) else None


def _scale_shift(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output: Tensor,
) -> None:
    """Write `weight (input − mean) / √(var + eps) + bias` to output, which may be the input."""
    unused = torch.empty(0, dtype=mean.dtype)
    _native(
        input, weight, bias, mean, var, False, 0.0, eps,
        out=output, save_mean=unused, save_invstd=unused,
    )  # fmt: skip


def _reduce(g: Tensor, input: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """`Σ g (input − mean) rstd` and `Σ g`: the first half of torch's backward kernel, one pass."""
    _, dw, db = _native_backward(
        g, input, rstd, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return dw, db


class BatchNormFunction(torch.autograd.Function):
    """`_normalize` and `_finish`, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        activation: str,
    ) -> Tensor:
        output, mean, rstd = _normalize(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        _finish(output, residual, activation)
        activated = None if activation == "identity" else output
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        return output
