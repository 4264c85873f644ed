"""The Triton backend: one autograd function per family, same signatures as `eager`."""

from fastnorm.ops.batch_norm import batch_norm
from fastnorm.ops.group_norm import group_norm, instance_norm
from fastnorm.ops.layer_norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastnorm.ops.linear_batch_norm import linear_batch_norm
from fastnorm.ops.sync_batch_norm import sync_batch_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear_batch_norm",
    "rms_norm",
    "sync_batch_norm",
]
