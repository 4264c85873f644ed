"""Fused normalization layers for PyTorch: Triton kernels on a GPU, PyTorch operators elsewhere."""

from fastnorm import functional, init, signals
from fastnorm.backend import backend_for, use_backend
from fastnorm.existing import convert, fold, fuse, summary
from fastnorm.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.modules.group_norm import (
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from fastnorm.modules.layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fastnorm.modules.linear_batch_norm import (
    Conv1dBatchNorm,
    Conv2dBatchNorm,
    Conv3dBatchNorm,
    LinearBatchNorm,
)
from fastnorm.modules.sync_batch_norm import SyncBatchNorm

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "SyncBatchNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "AddLayerNorm",
    "AddRMSNorm",
    "LinearBatchNorm",
    "Conv1dBatchNorm",
    "Conv2dBatchNorm",
    "Conv3dBatchNorm",
    "convert",
    "fuse",
    "fold",
    "summary",
    "functional",
    "init",
    "signals",
    "use_backend",
    "backend_for",
]
