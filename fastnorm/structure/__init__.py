"""What follows what in a model: the activation after a layer, norms, branches of residual sums.

Read from a trace by torch.fx where the model can be traced, else from the order in which modules
were defined, where only neighbours in an `nn.Sequential` are certain.
"""

from fastnorm.structure.activations import Activation
from fastnorm.structure.pairs import NormPair, double_norms, redundant_biases
from fastnorm.structure.read import Branch, Structure, read

__all__ = [
    "Activation",
    "Branch",
    "NormPair",
    "Structure",
    "double_norms",
    "read",
    "redundant_biases",
]
