"""Group normalization, and instance normalization."""

from torch import Tensor

from fastnorm import checks
from fastnorm.backend import at_once, implementation
from fastnorm.eager import direct


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    r"""Normalize groups of neighbouring channels of each sample, then add, then activate.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mu_{n,g}}{\sqrt{\sigma_{n,g}^2 + \epsilon}}\,\gamma_c
              + \beta_c + r\Bigr)

    with μ and σ² (biased) of sample n over all positions of the C / num_groups channels of group g.

    Args:
        input: (N, C) or (N, C, *), any floating dtype. Its memory format is kept, and its dtype,
            but for float32 under autocast on CUDA, as torch's.
        num_groups: a divisor of C.
        weight, bias: γ and β, (C,), of any floating dtype.
        residual: r, of input's shape; the output's dtype is the promotion of both.
        activation: as in `batch_norm`.

    Raises:
        ValueError: a single value in all groups together; an unknown activation.
        RuntimeError: C is not divisible by num_groups, or that is negative; a parameter or
            residual of the wrong size; fewer than 2 axes.
        ZeroDivisionError: num_groups is 0, as in torch.

    Source: Wu & He 2018, "Group Normalization".

    >>> import torch, fastnorm.functional as FF
    >>> x = torch.tensor([[0.0, 2.0, 10.0, 30.0]])
    >>> FF.group_norm(x, 2, eps=1e-12, activation="relu")
    tensor([[0., 1., 0., 1.]])
    """
    if residual is None:
        done = at_once(direct.group_norm, input, num_groups, weight, bias, eps, activation)
        if done is not None:
            return done
    if type(num_groups) is not int:
        num_groups = checks.group_count(num_groups)
    checks.group_statistics(input, num_groups, weight, bias)
    if residual is not None:
        checks.residual(residual, input.shape, input)
    if activation != "identity":
        checks.activation(activation)
    if type(eps) is not float:
        eps = checks.epsilon(eps)
    y: Tensor = implementation(input).group_norm(
        input, num_groups, weight, bias, eps, residual, activation
    )
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    r"""Normalize each channel of each sample over its positions, then add, then activate.

    .. math:: y = \mathrm{act}\Bigl(\frac{x - \mu_{n,c}}{\sqrt{\sigma_{n,c}^2 + \epsilon}}\,\gamma_c
              + \beta_c + r\Bigr)

    With `use_input_stats` μ and σ² (biased) are those of the sample and channel, and the buffers,
    where given, move by `momentum` towards the averages over samples of μ and of the unbiased
    variance. Without it they are the buffers, one a channel.

    Args:
        input: (N, C, *), any floating dtype. Its memory format is kept.
        running_mean, running_var: (C,) buffers, moved in place; both may be None with
            `use_input_stats`.
        weight, bias: γ and β, (C,), of any floating dtype.
        momentum: share of the batch in the buffers. A 0-dimensional tensor stays on its device.
        residual: r, of input's shape; the output's dtype is the promotion of both.
        activation: as in `batch_norm`.

    Raises:
        ValueError: a single position with `use_input_stats`; one running buffer without the other;
            an unknown activation.
        RuntimeError: a parameter, buffer or residual of the wrong size; no buffers without
            `use_input_stats`.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, "Instance Normalization".

    >>> import torch, fastnorm.functional as FF
    >>> x = torch.tensor([[[0.0, 2.0], [10.0, 30.0]]])
    >>> FF.instance_norm(x, eps=1e-12, activation="relu")
    tensor([[[0., 1.],
             [0., 1.]]])
    """
    if residual is None:
        done = at_once(
            direct.instance_norm, input, running_mean, running_var, weight, bias,
            use_input_stats, eps, activation,
        )  # fmt: skip
        if done is not None:
            return done
    checks.instance_statistics(input, running_mean, running_var, weight, bias, use_input_stats)
    if residual is not None:
        checks.residual(residual, input.shape, input)
    if activation != "identity":
        checks.activation(activation)
    if type(momentum) is not float:
        momentum = checks.fixed_momentum(momentum, input)
    if type(eps) is not float:
        eps = checks.epsilon(eps)
    y: Tensor = implementation(input).instance_norm(
        input, running_mean, running_var, weight, bias,
        use_input_stats, momentum, eps, residual, activation,
    )  # fmt: skip
    return y
