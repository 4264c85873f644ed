"""LayerSignal: what was seen at one layer, as plain numbers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSignal:
    """What a layer did while it was recorded; NaN or None where that was not seen, or has no sense.

    Moments and shares are those of a sample of the output's elements, evenly spread, of every call;
    `dead` and norms are of all elements.

    >>> import torch, fastnorm
    >>> model = torch.nn.Linear(3, 2)
    >>> with fastnorm.signals.record(model) as signals:
    ...     _ = model(torch.ones(4, 3))
    >>> signals.layers[0].kind, signals.layers[0].calls
    ('Linear', 1)
    """

    name: str
    kind: str
    """The module's class, or the function's name."""
    calls: int
    mean: float
    std: float
    zeros: float
    """Share of the output that is exactly 0."""
    saturated: float
    """Share of a bounded activation's output within 1 % of its span from a bound."""
    dead: float
    """Share of a ReLU's units that were 0 for every value."""
    values: int
    """Values of each unit, over all calls."""
    gradient_norm: float
    """Norm of the loss's gradient with respect to the output; over calls, the root mean square."""
    weight_norm: float = math.nan
    weight_gradient_norm: float = math.nan
    """Of the last backward pass."""
    update_ratio: float = math.nan
    """Norm of the weight's last update over the weight's; seen with an optimizer."""
    identical: float = 0.0
    """Share of units whose weights, and their gradients, are those of another unit."""
    failed: float = math.inf
    """When the output was not finite first: a count of events; inf: never."""
    gradient_failed: float = math.inf
    """The same for the gradient."""
    samples: int | None = None
    """BatchNorm in training: the smallest batch seen, and below, a channel's values in it."""
    channel_values: int = 0
    mean_gap: float = math.nan
    """BatchNorm: |batch mean - running mean| / running deviation, root mean square of channels."""
    var_gap: float = math.nan
    """BatchNorm: |log2(batch variance / running variance)|, mean of channels."""
    gap_samples: int = 0
    """Samples in the batch behind these two."""
    batches_tracked: float = math.nan
    training: bool = False
    momentum: float | None = None
    bounded: bool = False
    weighted: bool = False
    """Whether it is a Linear, a convolution or the like: the steps by which depth is counted."""
