"""The Triton backend: one autograd function per family, same signatures as `eager`."""

from fastnorm.ops.batch_norm import batch_norm

__all__ = ["batch_norm"]
