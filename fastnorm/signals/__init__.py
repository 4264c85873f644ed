"""What activations and gradients do in a model, and what is wrong with them."""

from fastnorm.signals.findings import Finding
from fastnorm.signals.layers import LayerSignal
from fastnorm.signals.recording import Signals, record

__all__ = ["record", "Signals", "LayerSignal", "Finding"]
