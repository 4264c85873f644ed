"""Put fastnorm into a model that exists: convert, fuse, fold, and a summary of what they find."""

from fastnorm.existing.convert import convert
from fastnorm.existing.fuse import fuse

__all__ = ["convert", "fuse"]
