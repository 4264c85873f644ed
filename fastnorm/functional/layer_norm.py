"""Layer normalization, RMS normalization, and both of a sum."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnorm import checks
from fastnorm.backend import at_once, implementation
from fastnorm.eager import direct

EPSILON_32, EPSILON_64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
) -> Tensor:
    r"""Normalize over the trailing axes, scale, shift, then activate.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,\gamma
              + \beta\Bigr)

    μ and σ² (biased) are those of each sample's `normalized_shape`.

    Args:
        input: (*, *normalized_shape), any floating dtype, which is the output's; under autocast
            on CUDA that is float32, as torch's. Rows of any stride are read without a copy where
            the last axis is contiguous.
        weight, bias: γ and β, `normalized_shape`, of any floating dtype.
        activation: as in `batch_norm`.

    Raises:
        RuntimeError: an empty `normalized_shape`, or an input, weight or bias that does not fit it.
        NotImplementedError: an input that is not floating-point.
        TypeError: a `normalized_shape` that is not of integers, or an eps that is no number.
        ValueError: an unknown activation.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization".

    >>> import torch, fastnorm.functional as FF
    >>> FF.layer_norm(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), (2,), eps=1e-12)
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    done = at_once(direct.layer_norm, input, normalized_shape, weight, bias, eps, activation)
    if done is not None:
        return done
    checks.row_statistics("layer_norm", input, normalized_shape, weight, bias)
    if activation != "identity":
        checks.activation(activation)
    y: Tensor = implementation(input).layer_norm(
        input, normalized_shape, weight, bias, checks.epsilon(eps), activation
    )
    return y


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str = "identity",
) -> Tensor:
    r"""Divide by the root mean square over the trailing axes, scale, then activate.

    .. math:: y = \mathrm{act}\Bigl(\frac{x}{\sqrt{\overline{x^2} + \epsilon}}\,\gamma\Bigr)

    Args:
        input: (*, *normalized_shape), any floating dtype, which is the output's; float32 under
            autocast on CUDA. Or complex: x² is then the square of the number, as torch's.
        weight: γ, `normalized_shape`, of any floating dtype, complex where the input is.
        eps: None is the machine epsilon of float32; of float64 for such an input.
        activation: as in `batch_norm`.

    Raises:
        ValueError: an unknown activation, or an input of fewer axes than `normalized_shape`.
        RuntimeError, NotImplementedError, TypeError: as `layer_norm`.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".

    >>> import torch, fastnorm.functional as FF
    >>> FF.rms_norm(torch.tensor([[3.0, 3.0], [-2.0, 2.0]]), (2,))
    tensor([[ 1.,  1.],
            [-1.,  1.]])
    """
    done = at_once(direct.rms_norm, input, normalized_shape, weight, eps, activation)
    if done is not None:
        return done
    checks.row_statistics("rms_norm", input, normalized_shape, weight, None)
    if activation != "identity":
        checks.activation(activation)
    eps = _machine_epsilon(input.dtype) if eps is None else checks.epsilon(eps)
    y: Tensor = implementation(input).rms_norm(input, normalized_shape, weight, eps, activation)
    return y


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    r"""Add, and layer-normalize the sum: the step between two blocks of a pre-norm transformer.

    .. math:: s = x + r, \qquad y = \mathrm{act}(\mathrm{LN}_{\gamma,\beta}(s))

    Args:
        input, residual: x and r, both (*, *normalized_shape); the dtype of s and y is the promotion
            of theirs.
        the rest: as in `layer_norm`.

    Returns:
        (y, s).

    Raises:
        RuntimeError: a residual of another shape; else as `layer_norm`.

    Source: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture".

    >>> import torch, fastnorm.functional as FF
    >>> FF.add_layer_norm(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), (2,), eps=1e-12)
    (tensor([-1.,  1.]), tensor([1., 3.]))
    """
    checks.row_statistics("layer_norm", input, normalized_shape, weight, bias)
    checks.residual(residual, input.shape, input)
    if activation != "identity":
        checks.activation(activation)
    both: tuple[Tensor, Tensor] = implementation(input).add_layer_norm(
        input, residual, normalized_shape, weight, bias, checks.epsilon(eps), activation
    )
    return both


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    r"""Add, and divide the sum by its root mean square: the step of Llama and its kin.

    .. math:: s = x + r, \qquad y = \mathrm{act}(\mathrm{RMSNorm}_\gamma(s))

    Args:
        input, residual: as in `add_layer_norm`.
        the rest: as in `rms_norm`.

    Returns:
        (y, s).

    Raises:
        RuntimeError: a residual of another shape; else as `rms_norm`.

    >>> import torch, fastnorm.functional as FF
    >>> FF.add_rms_norm(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]), (2,))
    (tensor([ 1., -1.]), tensor([ 2., -2.]))
    """
    checks.row_statistics("rms_norm", input, normalized_shape, weight, None)
    checks.residual(residual, input.shape, input)
    if activation != "identity":
        checks.activation(activation)
    dtype = torch.promote_types(input.dtype, residual.dtype)
    eps = _machine_epsilon(dtype) if eps is None else checks.epsilon(eps)
    both: tuple[Tensor, Tensor] = implementation(input).add_rms_norm(
        input, residual, normalized_shape, weight, eps, activation
    )
    return both


def _machine_epsilon(dtype: torch.dtype) -> float:
    """torch's default: that of the type it computes in."""
    return EPSILON_64 if dtype in (torch.float64, torch.complex128) else EPSILON_32
