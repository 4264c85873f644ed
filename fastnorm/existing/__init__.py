"""Put fastnorm into a model that exists: convert, fuse, fold, and a summary of what they find."""

from fastnorm.existing.convert import convert
from fastnorm.existing.fold import fold
from fastnorm.existing.fuse import fuse
from fastnorm.existing.summary import summary

__all__ = ["convert", "fold", "fuse", "summary"]
