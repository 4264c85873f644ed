"""The published variances, on one tensor; torch.nn.init does the drawing."""

import math

import torch
from torch import Generator, Tensor, nn

from fastnorm.init.fans import Fans, fans_of_shape

MODES = ("fan_in", "fan_out", "fan_avg")


def xavier_uniform_(
    tensor: Tensor,
    gain: float = 1.0,
    *,
    mode: str = "fan_avg",
    fans: Fans | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""Draw from a uniform distribution of Glorot's variance, in place; returns `tensor`.

    .. math:: \mathrm{Var}\,w = \mathrm{gain}^2 \frac{2}{\mathrm{fan_{in}} + \mathrm{fan_{out}}}

    Args:
        tensor: a weight (out, in, \*kernel), of any floating dtype and device.
        mode: "fan_avg" as above; "fan_in" or "fan_out": gain²/fan.
        fans: those of a layer whose weight's shape does not tell them (`fastnorm.init.fans`).
        generator: on the tensor's device; None is torch's own.

    Raises:
        ValueError: fewer than 2 axes and no `fans`; an unknown mode; a gain below 0 or not finite.

    Source: Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural
    networks", the normalized initialization.

    >>> import torch, fastnorm
    >>> w = fastnorm.init.xavier_uniform_(torch.empty(30, 20))
    >>> bool(w.abs().max() <= (6 / 50) ** 0.5)
    True
    """
    return _uniform(tensor, _std(tensor, _gain(gain) ** 2, mode, fans), generator)


def xavier_normal_(
    tensor: Tensor,
    gain: float = 1.0,
    *,
    mode: str = "fan_avg",
    fans: Fans | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""Draw from a normal distribution of Glorot's variance, in place; returns `tensor`.

    .. math:: \mathrm{Var}\,w = \mathrm{gain}^2 \frac{2}{\mathrm{fan_{in}} + \mathrm{fan_{out}}}

    Arguments, errors and source: `xavier_uniform_`.

    >>> import torch, fastnorm
    >>> fastnorm.init.xavier_normal_(torch.empty(30, 20)).shape
    torch.Size([30, 20])
    """
    return _normal(tensor, _std(tensor, _gain(gain) ** 2, mode, fans), generator)


def he_uniform_(
    tensor: Tensor,
    slope: float = 0.0,
    *,
    mode: str = "fan_in",
    fans: Fans | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""Draw from a uniform distribution of He's variance, in place; returns `tensor`.

    .. math:: \mathrm{Var}\,w = \frac{2}{(1 + a^2)\,\mathrm{fan_{in}}}

    Args:
        tensor, fans, generator: as in `xavier_uniform_`.
        slope: a, of the leaky ReLU that follows; 0 for ReLU.
        mode: "fan_in" keeps the forward signal, "fan_out" the backward one.

    Raises:
        ValueError: fewer than 2 axes and no `fans`; an unknown mode; a slope that is not finite.

    Source: He, Zhang, Ren & Sun 2015, "Delving Deep into Rectifiers".

    >>> import torch, fastnorm
    >>> w = fastnorm.init.he_uniform_(torch.empty(30, 20))
    >>> bool(w.abs().max() <= (6 / 20) ** 0.5)
    True
    """
    return _uniform(tensor, _std(tensor, _power(slope), mode, fans), generator)


def he_normal_(
    tensor: Tensor,
    slope: float = 0.0,
    *,
    mode: str = "fan_in",
    fans: Fans | None = None,
    generator: Generator | None = None,
) -> Tensor:
    r"""Draw from a normal distribution of He's variance, in place; returns `tensor`.

    .. math:: \mathrm{Var}\,w = \frac{2}{(1 + a^2)\,\mathrm{fan_{in}}}

    Arguments, errors and source: `he_uniform_`.

    >>> import torch, fastnorm
    >>> fastnorm.init.he_normal_(torch.empty(30, 20), slope=0.1).shape
    torch.Size([30, 20])
    """
    return _normal(tensor, _std(tensor, _power(slope), mode, fans), generator)


def lecun_uniform_(
    tensor: Tensor, *, fans: Fans | None = None, generator: Generator | None = None
) -> Tensor:
    r"""Draw from a uniform distribution of LeCun's variance, in place; returns `tensor`.

    .. math:: \mathrm{Var}\,w = \frac{1}{\mathrm{fan_{in}}}

    Arguments and errors: `xavier_uniform_`. Source: LeCun, Bottou, Orr & Müller 1998, "Efficient
    BackProp", eq. 16.

    >>> import torch, fastnorm
    >>> w = fastnorm.init.lecun_uniform_(torch.empty(30, 20))
    >>> bool(w.abs().max() <= (3 / 20) ** 0.5)
    True
    """
    return _uniform(tensor, _std(tensor, 1.0, "fan_in", fans), generator)


def lecun_normal_(
    tensor: Tensor, *, fans: Fans | None = None, generator: Generator | None = None
) -> Tensor:
    r"""Draw from a normal distribution of LeCun's variance, in place; returns `tensor`.

    .. math:: \mathrm{Var}\,w = \frac{1}{\mathrm{fan_{in}}}

    Arguments and errors: `xavier_uniform_`. Source: `lecun_uniform_`; with SELU, Klambauer et al.
    2017.

    >>> import torch, fastnorm
    >>> fastnorm.init.lecun_normal_(torch.empty(30, 20)).shape
    torch.Size([30, 20])
    """
    return _normal(tensor, _std(tensor, 1.0, "fan_in", fans), generator)


@torch.no_grad()
def orthogonal_(
    tensor: Tensor, gain: float = 1.0, *, groups: int = 1, generator: Generator | None = None
) -> Tensor:
    r"""Make the weight, as a matrix (out, in·∏kernel), gain times an orthogonal one, in place.

    .. math:: W W^\top = \mathrm{gain}^2 I \quad\text{or, with more rows,}\quad
              W^\top W = \mathrm{gain}^2 I

    Args:
        tensor: a weight (out, in, \*kernel); 16-bit ones are computed in float32.
        groups: of a convolution; each group's rows are a matrix of their own.
        generator: on the tensor's device; None is torch's own.

    Raises:
        ValueError: fewer than 2 axes; a gain below 0 or not finite.

    Source: Saxe, McClelland & Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning
    in deep linear neural networks".

    >>> import torch, fastnorm
    >>> w = fastnorm.init.orthogonal_(torch.empty(3, 5))
    >>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-5)
    True
    """
    fans_of_shape(tensor)  # checks the axes
    gain = _gain(gain)
    if tensor.numel() == 0 or tensor.is_meta:
        return tensor
    exact = tensor.dtype if tensor.dtype is torch.float64 else torch.float32
    for block in tensor.chunk(groups):
        drawn = torch.empty(block.shape, dtype=exact, device=tensor.device)
        block.copy_(nn.init.orthogonal_(drawn, gain, generator))
    return tensor


def _gain(gain: float) -> float:
    if not (math.isfinite(gain) and gain >= 0):
        raise ValueError(f"gain must be a finite number, 0 or more, but got {gain}")
    return gain


def _power(slope: float) -> float:
    """He's numerator 2/(1 + a²): what a leaky ReLU leaves of a centred signal's power, inverted."""
    if not math.isfinite(slope):
        raise ValueError(f"slope must be a finite number, but got {slope}")
    return 2 / (1 + slope**2)


def _std(tensor: Tensor, power: float, mode: str, fans: Fans | None) -> float:
    """√(power / fan), of the fan that `mode` names."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, but got {mode!r}")
    fans = fans_of_shape(tensor) if fans is None else fans
    fan = {"fan_in": fans[0], "fan_out": fans[1], "fan_avg": (fans[0] + fans[1]) / 2}[mode]
    return math.sqrt(power / fan) if fan else 0.0  # an empty weight


def _uniform(tensor: Tensor, std: float, generator: Generator | None) -> Tensor:
    limit = math.sqrt(3.0) * std
    return nn.init.uniform_(tensor, -limit, limit, generator)


def _normal(tensor: Tensor, std: float, generator: Generator | None) -> Tensor:
    return nn.init.normal_(tensor, 0.0, std, generator)
