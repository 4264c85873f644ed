"""Linear + BatchNorm through Z: torch's product, its bias, and derivatives of the second order."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.eager import native, products
from fastnorm.eager.batch_norm import batch_norm
from fastnorm.eager.sync_formulas import gradients_about

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def product(input: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
    """torch's product over axis 1; in training no gradient reaches the bias but exact zeros."""
    constant = training and bias is not None and bias.requires_grad and torch.is_grad_enabled()
    constant = constant and not torch.compiler.is_compiling() and not native.observed(input)
    b = bias.detach() if constant and bias is not None else bias
    if input.ndim == 2:
        z = products.linear(input, weight, b)
    else:
        kernel = weight.view(*weight.shape, *[1] * (input.ndim - 2))
        z = CONVOLUTIONS[input.ndim](input, kernel, b)
    return _ZeroGradient.apply(z, bias) if constant else z  # type: ignore[no-untyped-call]


class _ZeroGradient(torch.autograd.Function):
    """z, in the graph of a bias that batch norm removes."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_like = bias.shape, bias.dtype, bias.device
        ctx.set_materialize_grads(False)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dz,) = grads
        if dz is None:  # nothing depends on the output
            return None, None
        shape, dtype, device = ctx.bias_like
        return dz, torch.zeros(shape, dtype=dtype, device=device)


def bias_gradient(
    found: Tensor | None, wanted: bool, like: tuple[torch.Size, torch.dtype, torch.device] | None
) -> Tensor | None:
    """What was found, in the bias's dtype; where batch norm removes the bias, exact zeros."""
    if not wanted or like is None:
        return None
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device) if found is None else found.to(dtype)


def differentiable_gradients(
    leaves: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    fixed: tuple[Tensor, Tensor] | None,
    bias_like: Any,
    eps: float,
    activation: str,
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """Those of x, weight, bias, norm_weight and norm_bias by differentiable operators.

    Product and norm are computed once more, and that is differentiated. `fixed` are the mean and
    variance of evaluation, which have eps in them; in training the bias is None.
    """
    mean, var = (None, None) if fixed is None else fixed
    gradients = native.gradients_again(
        lambda x, weight, bias, norm_weight, norm_bias: batch_norm(
            product(x, weight, bias, training=False), mean, var, norm_weight, norm_bias,
            fixed is None, 0.0, eps if fixed is None else 0.0, None, activation, None,
        ),
        leaves, wanted, dy,
    )  # fmt: skip
    gradients[2] = bias_gradient(gradients[2], wanted[2], bias_like)
    return tuple(gradients)


def differentiable_shared(
    leaves: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    centre: Tensor,
    bias_like: Any,
    eps: float,
    activation: str,
    group: Any,
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """The same in training with other processes, through Z: as all algorithms do, so that their
    sums meet. `leaves` without the bias; `centre` is of Z less the bias.
    """
    x, weight, norm_weight, norm_bias = leaves
    assert x is not None
    assert weight is not None
    wants_dx, wants_dw, wants_db, *affine = wanted
    joins = wants_dx or wants_dw or wants_db
    rows = x.movedim(1, -1)
    dz, _, dgamma, dbeta = gradients_about(
        centre, dy, (rows @ weight.T).movedim(-1, 1), None, None, norm_weight, norm_bias,
        eps, activation, group, (joins, False, *affine),
    )  # fmt: skip
    dx = dw = None
    if dz is not None:
        dz = dz.movedim(1, -1)
        dx = (dz @ weight).movedim(-1, 1) if wants_dx else None
        dw = dz.flatten(0, -2).T @ rows.flatten(0, -2) if wants_dw else None
    return dx, dw, bias_gradient(None, wants_db, bias_like), dgamma, dbeta
