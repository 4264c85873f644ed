"""The PyTorch backend: CPU tensors, and whatever a kernel cannot do. Same signatures as `ops`."""

from fastnorm.eager.batch_norm import batch_norm

__all__ = ["batch_norm"]
