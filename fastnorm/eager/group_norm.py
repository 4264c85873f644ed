"""GroupNorm in torch operators: torch's own where it is fast, a shorter way where it is not.

    y = act(γ (x − μ) rstd + β + r)               μ, rstd: (N, G), of K channels by S positions

Where torch loses time on a CPU, and what is done about it:

* The backward of channels_last, and tensors from 32 MB on: group_norm_cpu.py.
* Residual and activation go in place over the output, which nobody else holds yet.

Everything else, and all of it under torch.compile, torch.func, forward-mode AD and tracing, is
`torch.group_norm` and plain operators.
"""

import torch
from torch import Tensor

from fastnorm.eager import formulas, native
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.eager.batch_norm import rounds_between
from fastnorm.eager.group_norm_cpu import GroupNormFunction, normalize, of_torch
from fastnorm.eager.native import STEPS


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`act(group_norm(input) + residual)` of arguments that `functional.group_norm` has checked."""
    y_dtype = native.output_dtype(input, residual)
    input, weight, bias = prepared(input, weight, bias, residual, activation)
    plain = not input.is_cpu or torch.compiler.is_compiling() or native.observed(input)
    plain = plain or input.numel() == 0
    if plain or (residual is not None and residual.dtype != input.dtype):
        if plain or not input.is_contiguous():
            z = _plain(input, num_groups, weight, bias, eps)
        else:
            z = of_torch(input, num_groups, weight, bias, eps)[0]
        return ACTIVATIONS[activation](z if residual is None else z + residual).to(y_dtype)

    if not (input.is_contiguous() or channels_are_last(input)):
        # a copy costs less than torch's, which it makes in the backward again
        input = input.contiguous(memory_format=native.kept_format(input))
    inner = activation if activation in STEPS else "identity"
    own = native.is_huge(input) or not input.is_contiguous()
    if not own:
        z = of_torch(input, num_groups, weight, bias, eps)[0]
        z = native.finish(z, residual, inner)
    elif torch.is_grad_enabled():
        z = GroupNormFunction.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, residual, inner, num_groups, eps
        )
    else:
        z = native.finish(normalize(input, num_groups, weight, bias, eps)[0], residual, inner)
    return (z if inner == activation else ACTIVATIONS[activation](z)).to(y_dtype)


def prepared(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Input, weight and bias, cast such that torch computes in float32 at least.

    Weight and bias are dense: where its function has not seen to that, torch's operator reads
    others as if they were.
    """
    dtype = native.WIDER.get(input.dtype, input.dtype)
    if dtype is not input.dtype and (
        not input.is_cpu or rounds_between(input, residual, activation)
    ):
        input = input.to(dtype)
    if weight is None and (bias is not None or input.dtype is not dtype):
        # For torch's sake: a bias alone breaks its backward, and a 16-bit input without a float32
        # parameter would get statistics in 16 bits.
        weight = torch.ones(input.shape[1], dtype=dtype, device=input.device)
    weight, bias = (None if t is None else t.to(dtype).contiguous() for t in (weight, bias))
    return input, weight, bias


def channels_are_last(input: Tensor) -> bool:
    return input.dim() > 3 and native.is_dense(input)


def _plain(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if input.numel() == 0:  # torch's gradient of the weight would be NaN
        column = [-1 if axis == 1 else 1 for axis in range(input.dim())]
        z = input if weight is None else input * weight.view(column)
        return (z if bias is None else z + bias.view(column)).to(input.dtype)
    if native.transformed():
        return formulas.group_norm(input, num_groups, weight, bias, eps)
    frozen = input.is_cpu and not input.requires_grad
    if frozen and not (input.is_contiguous() or native.needs_no_gradient(weight, bias)):
        kept = native.kept_format(input)
        z = torch.group_norm(input.contiguous(), num_groups, weight, bias, eps, False)
        return z.contiguous(memory_format=kept)
    enabled = input.is_cpu or torch.backends.cudnn.enabled
    return torch.group_norm(input, num_groups, weight, bias, eps, enabled)
