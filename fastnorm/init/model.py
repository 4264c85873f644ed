"""initialize: every parameter of a model, by the layer it is in and by what follows the layer."""

from torch import Generator, nn
from torch.nn.parameter import is_lazy

from fastnorm.init.report import InitReport
from fastnorm.init.residual import RESIDUALS, apply_residual
from fastnorm.init.walk import SCHEMES, Walk
from fastnorm.structure import read


def initialize(
    model: nn.Module,
    scheme: str = "auto",
    *,
    residual: str = "none",
    generator: Generator | None = None,
) -> InitReport:
    r"""Initialize every layer of `model` in place, and say what was done to each and why.

    .. math:: \mathrm{Var}\,w = \frac{2}{(1 + a^2)\,\mathrm{fan_{in}}}\ \text{(He)},\quad
              \frac{2}{\mathrm{fan_{in}} + \mathrm{fan_{out}}}\ \text{(Xavier)},\quad
              \frac{1}{\mathrm{fan_{in}}}\ \text{(LeCun)}

    Biases become 0, norms (1, 0) with fresh running statistics, embeddings standard normal. A
    weight in several places is drawn once, as a Linear's where one of them is a Linear. Recurrent
    and attention weights are drawn gate by gate and projection by projection. Frozen parameters,
    and those of modules that no rule covers, are left alone; the report names them.

    Args:
        model: read by torch.fx, and where that cannot trace it in the order of its modules. A
            module of another library is an activation if it computes one.
        scheme: "auto" is He where a ReLU-like activation follows (with the slope of a leaky one),
            LeCun before SELU, Xavier elsewhere; or one of "he" and "lecun" (normal), "xavier"
            (uniform), "orthogonal" (with gain √(2/(1 + a²)) before a ReLU-like activation).
        residual: "zero": the weight that ends each residual branch, its last norm's or, where the
            branch ends in a layer, that layer's, is 0, so that each block starts as its skip.
            "depth": that weight is scaled by 1/√(2·blocks).
        generator: on the parameters' device; the same one gives the same weights.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an unknown scheme or residual rule; lazy parameters without a shape; a residual
            rule for a model that cannot be traced. Nothing was changed then.
        RuntimeError: the generator is of another device than a parameter.

    Sources: Glorot & Bengio 2010; He et al. 2015; LeCun et al. 1998; Saxe et al. 2014; Klambauer et
    al. 2017; zero: Goyal et al. 2017, Zhang et al. 2019; depth: Radford et al. 2019.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
    >>> print(fastnorm.init.initialize(model))
    layer  scheme     fan     std  reason
    -------------------------------------------
    0      he normal   64  0.1768  relu follows
    """
    check(model, generator)
    for name, value, allowed in (("scheme", scheme, SCHEMES), ("residual", residual, RESIDUALS)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}")
    structure = read(model)
    if residual != "none" and structure.untraced and not structure.branches:
        raise ValueError(
            f"residual={residual!r} needs the model's branches, but torch.fx cannot trace it: "
            f"{structure.untraced}"
        )
    rows = Walk(model, scheme, structure, generator).run()
    if residual != "none" and structure.branches:
        rows = apply_residual(model, residual, structure, rows)
    return InitReport(rows)


def check(model: nn.Module, generator: Generator | None) -> None:
    """Raise what cannot be initialized, before anything changes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name} is lazy and has no shape yet: run the model on a batch first")
    for name, parameter in model.named_parameters():
        device = parameter.device
        if generator is not None and device.type not in (generator.device.type, "meta"):
            raise RuntimeError(
                f"generator is on {generator.device}, but {name} is on {device}: "
                "they must be on the same type of device"
            )
