"""The PyTorch backend: CPU tensors, and whatever a kernel cannot do. Same signatures as `ops`."""

from fastnorm.eager.batch_norm import batch_norm
from fastnorm.eager.linear_batch_norm import linear_batch_norm

__all__ = ["batch_norm", "linear_batch_norm"]
