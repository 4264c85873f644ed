"""The float64 oracle of the tests is the one that ships with `fastnorm verify`."""

from fastnorm.verify.reference import (
    ACTIVATIONS,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    linear_batch_norm,
)

__all__ = [
    "ACTIVATIONS",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear_batch_norm",
]
