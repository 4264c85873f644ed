"""Argument checks: torch's exception types, and messages with the values and the rule.

They run before anything is allocated or changed, so a call that raises leaves its buffers as they
were. They also run on every call: each asks as little as it can of a good one.
"""

from fastnorm.checks.arguments import (
    activation,
    algorithm,
    convolution,
    epsilon,
    fixed_momentum,
    linear,
    momentum,
    residual,
)
from fastnorm.checks.statistics import (
    batch_statistics,
    group_count,
    group_statistics,
    instance_statistics,
    row_statistics,
)

__all__ = [
    "activation",
    "algorithm",
    "batch_statistics",
    "convolution",
    "epsilon",
    "fixed_momentum",
    "group_count",
    "group_statistics",
    "instance_statistics",
    "linear",
    "momentum",
    "residual",
    "row_statistics",
]
