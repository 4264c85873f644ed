"""The PyTorch backend: CPU tensors, and whatever a kernel cannot do. Same signatures as `ops`."""

from fastnorm.eager.batch_norm import batch_norm
from fastnorm.eager.group_norm import group_norm
from fastnorm.eager.instance_norm import instance_norm
from fastnorm.eager.layer_norm import add_layer_norm, add_rms_norm, layer_norm
from fastnorm.eager.linear_batch_norm import linear_batch_norm
from fastnorm.eager.rms_norm import rms_norm
from fastnorm.eager.sync_batch_norm import sync_batch_norm

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
