"""BatchNorm in torch operators: torch's own where it is fast, a shorter way where it is not.

    y = act(γ (x − μ) rstd + β + r)                      μ, rstd: (C,), of the batch or the buffers
    g = dy ∘ act′(y)       dβ = Σ g       dγ = Σ g (x − μ) rstd       dr = g
    dx = γ rstd (g − dβ/n − (x − μ) rstd dγ/n)           in training; γ rstd g otherwise

Where torch loses time on a CPU, and what is done about it (bench/bench_eager_batch_norm.py
measures the alternatives; ratios are torch's time over ours, two cores, forward without grad):

* NCHW training in float32: torch sums moments one element at a time. Subtract the mean into the
  output, reduce Σ and Σ² of it with the vectorized first half of torch's backward kernel, and
  normalize the output in place. This is also the accurate order: a large mean is gone before
  anything is squared.
* From 32 MB on, malloc maps every tensor anew and the page faults of the output cost more than the
  arithmetic. The output is allocated here, on huge pages where Linux grants them on request, and
  torch's kernels write into it. The backward kernel cannot: there two elementwise passes over such
  an output replace its second half, in place where the gradient of the activation is ours.
* The residual is added and the activation applied in place, on an output that nobody else holds.

Everything else, and all of it inside torch.compile, torch.func transforms, forward-mode AD and
tracing, is `torch.batch_norm` followed by plain operators.
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

SMALL = 1 << 15
"""Elements below which one call of torch costs less than several faster operators."""
HUGE = 1 << 25
"""Bytes from which glibc never reuses freed memory (its largest dynamic mmap threshold)."""
SHORT_PLANE = 16
"""Positions per channel and sample below which the reduction over planes loses to torch's sums."""

_STATISTICS_DTYPE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}

# Activations that are done in place, and whose derivative is a step function of the output, so that
# differentiating twice needs no more: name -> (act_, act_backward(dy, y, *arguments), arguments).
_FUSED: dict[str, tuple[Callable[[Tensor], Tensor], Any, tuple[Any, ...]]] = {
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
    """`act(batch_norm(input) + residual)`; arguments as `fastnorm.functional.batch_norm` has
    checked them. Buffers are updated in place."""
    if not training:
        momentum = 0.0
    elif num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None and running_mean is not None:
            dtype = torch.promote_types(running_mean.dtype, torch.float32)
            momentum = num_batches_tracked.to(dtype).reciprocal()
    dtype = _STATISTICS_DTYPE[input.dtype]
    if (
        isinstance(momentum, float)
        # With a parameter in float32, torch keeps the statistics of a 16-bit input in float32 too.
        and (dtype is input.dtype if weight is None else weight.dtype is dtype)
        and (bias is None or bias.dtype is dtype)
        and (running_mean is None or running_mean.dtype is dtype)
        and (running_var is None or running_var.dtype is dtype)
    ):
        return _batch_norm(
            input, running_mean, running_var, weight, bias,
            training, momentum, eps, residual, activation,
        )  # fmt: skip

    weight = _cast(weight, dtype)
    if weight is None and dtype is not input.dtype:
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    bias = _cast(bias, dtype)
    if not training or running_mean is None or running_var is None:
        mean, var = _cast(running_mean, dtype), _cast(running_var, dtype)
        return _batch_norm(
            input, mean, var, weight, bias, training, 0.0, eps, residual, activation
        )
    # A momentum of one leaves the batch's own statistics in these.
    mean, var = (torch.zeros_like(running_mean, dtype=dtype) for _ in range(2))
    y = _batch_norm(input, mean, var, weight, bias, training, 1.0, eps, residual, activation)
    if momentum is not None and input.numel() > 0:
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
    """The same where parameters and buffers have the statistics' dtype: choose the way."""
    cpu = input.is_cpu
    if not cpu or torch.compiler.is_compiling() or input.numel() < SMALL or _observed(input):
        z = torch.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps,
            cpu or torch.backends.cudnn.enabled,
        )  # fmt: skip
        if residual is not None:
            z = z + residual
        return ACTIVATIONS[activation](z)

    if not _is_dense(input):  # torch's strided loops cost more than a copy
        input = input.contiguous(memory_format=suggest_memory_format(input))
    if not (input.nbytes >= HUGE or (training and _has_planes(input, eps))):
        z = torch.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps, False
        )
        return _finish(z, residual, activation)

    if residual is not None and residual.dtype != input.dtype:
        inside: tuple[Tensor | None, str] = (None, "identity")
    else:
        inside = (residual, activation if activation in _FUSED else "identity")
        residual = None
        activation = "identity" if activation in _FUSED else activation
    z = BatchNormFunction.apply(
        input, weight, bias, inside[0],
        running_mean, running_var, training, momentum, eps, inside[1],
    )  # fmt: skip
    return _finish(z, residual, activation)


def _observed(input: Tensor) -> bool:
    """Whether something looks at the operators: a transform, forward-mode AD, a trace, a subclass."""
    return (
        type(input) is not Tensor
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _is_dense(input: Tensor) -> bool:
    return input.is_contiguous() or input.is_contiguous(memory_format=_memory_format(input))


def _memory_format(input: Tensor) -> torch.memory_format:
    """The format of a dense input."""
    if input.dim() < 4 or input.is_contiguous():
        return torch.contiguous_format
    return torch.channels_last if input.dim() == 4 else torch.channels_last_3d


def _has_planes(input: Tensor, eps: float) -> bool:
    """Whether each channel of a sample is a long enough run of memory, in full precision.

    A squared float32 underflows where torch's double does not: an eps above that hides it.
    """
    return (
        input.dtype in (torch.float32, torch.float64)
        and eps > 1e-30
        and input.is_contiguous()
        and input.numel() >= SHORT_PLANE * input.shape[0] * input.shape[1]
    )


def _finish(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Add and activate an output that nobody else holds."""
    if residual is not None:
        z = z.add_(residual) if residual.dtype == z.dtype else z + residual
    return _FUSED[activation][0](z) if activation in _FUSED else ACTIVATIONS[activation](z)


def _empty_like(input: Tensor) -> Tensor:
    """An uninitialized tensor, on huge pages if it is large."""
    output = torch.empty_like(input)
    if output.nbytes >= HUGE and (advise := _madvise()) is not None:
        start = -(-output.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = output.data_ptr() + output.nbytes - start
        advise(start, length // mmap.PAGESIZE * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return output


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Linux's madvise(2), a hint that changes no contents. None where it has no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


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
    """Output, mean and rstd of a dense input; moves the buffers."""
    output = _empty_like(input)
    mean, rstd, unused = (torch.empty(0, dtype=_STATISTICS_DTYPE[input.dtype]) for _ in range(3))
    if training and _has_planes(input, eps):
        n = input.numel() // input.shape[1]
        mean, offset, var = _center(input, output)
        # An overflow in float32, or an inf or NaN in the input: torch's double sums say what it is.
        if math.isfinite(var.sum().item()):
            mean += offset
            if running_mean is not None and running_var is not None:
                running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
                running_var.mul_(1 - momentum).add_(var, alpha=momentum * n / (n - 1))
            _native(
                output, weight, bias, offset, var, False, 0.0, eps,
                out=output, save_mean=unused, save_invstd=unused,
            )  # fmt: skip
            return output, mean, (var + eps).rsqrt_()
        mean = torch.empty_like(unused)
    _native(
        input, weight, bias, running_mean, running_var, training, momentum, eps,
        out=output, save_mean=mean, save_invstd=rstd,
    )  # fmt: skip
    if not training:
        assert running_mean is not None and running_var is not None  # noqa: S101  for mypy
        mean, rstd = running_mean.clone(), (running_var + eps).rsqrt_()
    return output, mean, rstd


def _center(input: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write `input − mean` to output; return that mean, its own mean, and the biased variance."""
    planes = input.shape[:2] + (-1,)
    x, centered = input.view(planes), output.view(planes)
    n = input.numel() // input.shape[1]
    mean = x.mean((0, 2))
    torch.sub(x, mean[:, None], out=centered)
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    _, square, total = _native_backward(
        centered, centered, one, None, None, zero, one, True, 0.0, [False, True, True]
    )
    offset = total / n
    return mean, offset, torch.addcmul(square / n, offset, offset, value=-1).clamp_min_(0)


class BatchNormFunction(torch.autograd.Function):
    """`_normalize` with residual and activation, and its gradient."""

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
        activated = output if activation != "identity" else None
        ctx.save_for_backward(input, weight, activated, mean, rstd)
        ctx.training, ctx.eps, ctx.activation = training, eps, activation
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, activated, mean, rstd = ctx.saved_tensors
        unneeded = (None,) * 6  # buffers, training, momentum, eps, activation
        for_input, for_weight, for_bias, for_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, grads[0]), *unneeded

        dy = grads[0]
        g = dy.contiguous(memory_format=_memory_format(input))
        if activated is not None:
            _, act_backward, arguments = _FUSED[ctx.activation]
            out = g if g is not dy else _empty_like(input)
            g = act_backward(g, activated, *arguments, grad_input=out)
        if ctx.training and (input.nbytes < HUGE or input.dtype not in (torch.float32, torch.float64)):
            mask = [for_input, for_weight, for_bias]
            dx, dw, db = _native_backward(
                g, input, weight, None, None, mean, rstd, True, ctx.eps, mask
            )
        else:
            scale = rstd if weight is None else rstd * weight
            dx = dw = db = None
            if ctx.training or for_weight or for_bias:
                _, dw, db = _native_backward(
                    g, input, scale, None, None, mean, rstd, True, ctx.eps, [False, True, True]
                )
            if for_input:
                dx = _empty_like(input) if g is dy or for_residual else g
                slope = -scale * rstd * dw
                _input_gradient(g, input, mean, rstd, scale, dw, db, ctx.training, dx)
        return (
            dx,
            dw if for_weight else None,
            db if for_bias else None,
            g if for_residual else None,
            *unneeded,
        )
