"""What follows what in a model: the activation after a layer, norms, branches of residual sums.

Read from a trace by torch.fx where the model can be traced, else from the order in which modules
were defined, where only neighbours in an `nn.Sequential` are certain.
"""

from fastnorm.structure.activations import Activation
from fastnorm.structure.read import Branch, Structure, double_norms, read, redundant_biases

__all__ = ["Activation", "Branch", "Structure", "double_norms", "read", "redundant_biases"]
