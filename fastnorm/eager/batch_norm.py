"""BatchNorm in torch operators: torch's own where it is fast, a shorter way where it is not.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (C,), of the batch or from the buffers

Where torch loses time on a CPU, and what is done about it:

* Training of contiguous planes, long columns, and tensors from 32 MB on: batch_norm_cpu.py.
* A column, the one channel of (N, 1), is one plane: more than 10 times as fast for 284,057 values.
* Strided input is copied first: 3 times as fast for (64, 128, 100) stored as (N, L, C), in float32.
* Residual and activation go in place over the output, which nobody else holds yet.

Everything else, and all of it under torch.compile, torch.func, forward-mode AD and tracing, is
`torch.batch_norm` and plain operators.
"""

import torch
from torch import Tensor

from fastnorm.eager import batch_norm_cpu, formulas, native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.batch_norm_cpu import BatchNormFunction, Statistics, is_slow, normalize
from fastnorm.eager.native import STEPS

# Activations that give the same, and the same gradient, before and after z is rounded to 16 bits.
ROUNDED = ("identity", "relu")


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
    """`act(batch_norm(input) + residual)` of arguments that `functional.batch_norm` has checked."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None and running_mean is not None:
            momentum = _cumulative(num_batches_tracked, running_mean)
    if momentum is None:
        momentum = 0.0  # there is no buffer to move
    dtype = native.WIDER.get(input.dtype, input.dtype)
    if (
        isinstance(momentum, Tensor)
        or (dtype is not input.dtype and rounds_between(input, residual, activation))
        # A 16-bit input without a float32 parameter would get statistics in 16 bits.
        or (input if weight is None else weight).dtype is not dtype
        # torch's own operator reads parameters and buffers with strides as if they had none.
        or (weight is not None and not weight.is_contiguous())
        or (bias is not None and not _serves(bias, dtype))
        or (running_mean is not None and not _serves(running_mean, dtype))
        or (running_var is not None and not _serves(running_var, dtype))
    ):
        return _converted(
            input, running_mean, running_var, weight, bias,
            training, momentum, eps, residual, activation,
        )  # fmt: skip
    cpu = input.is_cpu
    dense = own = False
    plain = (
        not cpu
        # a graph is not asked for its sizes: it would be compiled again for others
        or torch.compiler.is_compiling()
        or input.is_mkldnn  # which has no strides
        or input.numel() < batch_norm_cpu.SMALL
    )
    if not plain and batch_norm_cpu.is_column(input):
        z = batch_norm(
            input.reshape(1, 1, -1), running_mean, running_var, weight, bias, training, momentum,
            eps, None if residual is None else residual.reshape(1, 1, -1), activation, None,
        )  # fmt: skip
        return z.view(input.shape)
    if not plain:
        dense = native.is_dense(input)
        own = is_slow(input, training, eps)
        nothing_to_gain = dense and not own and residual is None and activation == "identity"
        plain = nothing_to_gain or native.observed(input)
    if plain or (residual is not None and residual.dtype is not input.dtype):
        if cpu and not torch.compiler.is_compiling():
            input = native.in_order(input)
        statistics = (running_mean, running_var, training, momentum, eps)
        z = _plain(input, weight, bias, statistics, cpu or torch.backends.cudnn.enabled)
        if residual is not None:
            z = z + residual
        return z if activation == "identity" else ACTIVATIONS[activation](z)

    statistics = (running_mean, running_var, training, momentum, eps)
    if not dense:  # a copy costs less than torch's loops over strides
        input = input.contiguous(memory_format=native.kept_format(input))
        own = is_slow(input, training, eps)
    inner = activation if activation in STEPS else "identity"
    if not own:
        z = native.finish(native.batch_norm(input, weight, bias, *statistics), residual, inner)
    elif torch.is_grad_enabled():
        z = BatchNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, inner, statistics
        )
    else:
        z = native.finish(normalize(input, weight, bias, statistics)[0], residual, inner)
    return z if inner == activation else ACTIVATIONS[activation](z)


def _plain(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    cudnn_enabled: bool,
) -> Tensor:
    running_mean, _, training, _, eps = statistics
    if not native.transformed():
        return native.batch_norm(input, weight, bias, *statistics, cudnn_enabled)
    if not training:  # torch's rule for vmap knows but one dtype
        wide = input.to(native.WIDER.get(input.dtype, input.dtype))
        z = torch.batch_norm(wide, weight, bias, *statistics, cudnn_enabled)
        return z.to(input.dtype)
    if running_mean is not None:  # moved by torch's operator, which has rules for it
        torch.batch_norm(input.detach(), None, None, *statistics, cudnn_enabled)
    return formulas.batch_norm(input, weight, bias, eps)


def _cumulative(num_batches_tracked: Tensor, running_mean: Tensor) -> float | Tensor:
    """The share of the newest batch in the average of all; a number where that costs no wait."""
    recorded = torch.compiler.is_compiling() or native.observed(num_batches_tracked)
    if num_batches_tracked.is_cpu and not recorded:
        return 1.0 / int(num_batches_tracked.item())
    dtype = torch.promote_types(running_mean.dtype, torch.float32)
    return num_batches_tracked.to(dtype).reciprocal()


def _serves(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype is dtype and tensor.is_contiguous()


def _converted(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`batch_norm` of tensors cast as need be, with a momentum that may be a tensor."""
    if input.ndim < 2:  # (0,): no channel
        return input.clone() if residual is None else input + residual
    dtype = native.WIDER.get(input.dtype, input.dtype)
    y_dtype = torch.promote_types(input.dtype, (input if residual is None else residual).dtype)
    if rounds_between(input, residual, activation):
        input = input.to(dtype)
    elif not training and residual is None and _is_exact(
        input, running_mean, running_var, weight, bias
    ):  # fmt: skip
        statistics = (running_mean, running_var, False, 0.0, eps)
        return ACTIVATIONS[activation](native.batch_norm(input, weight, bias, *statistics))
    if weight is None:
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    weight = weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    if running_mean is None or running_var is None:
        mean = var = None
    elif not training:
        mean, var = (t.to(dtype).contiguous() for t in (running_mean, running_var))
    elif not isinstance(momentum, Tensor) and _can_move(input, running_mean, running_var):
        mean, var = (
            t if _serves(t, dtype) else t.to(dtype).contiguous()
            for t in (running_mean, running_var)
        )
        y = batch_norm(
            input, mean, var, weight, bias, True, momentum, eps, residual, activation, None
        )
        if mean is not running_mean:
            running_mean.copy_(mean)
        if var is not running_var:
            running_var.copy_(var)
        return y.to(y_dtype)
    else:  # a momentum of one leaves the batch's own statistics in these
        # (as vmapped as the input is; torch loses what it should write to a vmapped view)
        mean, var = (input.new_zeros(running_mean.numel(), dtype=dtype) for _ in range(2))
    y = batch_norm(input, mean, var, weight, bias, training, 1.0, eps, residual, activation, None)
    if training and input.numel() > 0:
        for running, batch in ((running_mean, mean), (running_var, var)):
            if running is not None and batch is not None:
                move(running, batch, momentum)
    return y.to(y_dtype)


def move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    """Move a buffer towards a statistic of the batch, in the wider of their dtypes.

    torch.func refuses to write to a buffer that is no argument of its function, but not to an alias
    of it, by which torch.nn's InstanceNorm moves its own.
    """
    dtype = torch.promote_types(running.dtype, batch.dtype)
    share = momentum.to(dtype) if isinstance(momentum, Tensor) else momentum
    moved = torch.lerp(running.to(dtype), batch.to(dtype).view(running.shape), share)
    (native.aten.alias(running) if native.transformed() else running).copy_(moved)


def _is_exact(input: Tensor, *small: Tensor | None) -> bool:
    """Whether torch's evaluation of 16 bits, parameters and all, is as precise, and casts are dear.

    It computes in float32; only sums of gradients over other layouts are 16-bit ones.
    """
    return (
        input.is_cpu
        and not torch.compiler.is_compiling()
        and input.numel() < batch_norm_cpu.SMALL
        and all(t is None or (t.dtype is input.dtype and t.is_contiguous()) for t in small)
        and (input.is_contiguous() or native.needs_no_gradient(input, *small))
        and not native.transformed()
    )


def _can_move(input: Tensor, *buffers: Tensor) -> bool:
    """Whether torch's operator can move the buffers, or copies of them that lose nothing."""
    dtype = native.WIDER.get(input.dtype, input.dtype)
    return all(_serves(t, dtype) for t in buffers) or (
        all(t.dtype in native.WIDER for t in buffers)
        and not torch.compiler.is_compiling()
        and not native.observed(input)
    )


def rounds_between(input: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether to cast a 16-bit input first, lest z is rounded before the end as it is in torch.nn.

    Not a large one: that would take three times as long.
    """
    cheap = torch.compiler.is_compiling() or input.numel() < batch_norm_cpu.SMALL
    return cheap and (residual is not None or activation not in ROUNDED)
