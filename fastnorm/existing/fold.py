"""Fold: in evaluation BatchNorm is a scale and a shift, which the layer before it can do itself."""

import copy
import inspect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.existing import classes, patterns
from fastnorm.existing.convert import open_modules, require_open
from fastnorm.existing.fuse import plain_arguments
from fastnorm.modules.attributes import is_hooked
from fastnorm.modules.linear_batch_norm import LinearBatchNorm
from fastnorm.structure import layers
from fastnorm.structure.forward import capture, glance
from fastnorm.structure.watch import UntraceableError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
FLAGS = 4
"""Optional arguments of a forward up to which it is read with all combinations of them."""
Pair = tuple[nn.Module, nn.Module]
"""A layer and the batch norm after it."""


class _Way(NamedTuple):
    """One way through a forward: the modules that it calls or looks into, the pairs among them."""

    used: set[nn.Module]
    pairs: list[Pair]


def fold(model: nn.Module) -> nn.Module:
    r"""A copy of `model` for evaluation, each BatchNorm folded into the layer before it.

    .. math:: W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \qquad
              b' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} (b - \mu) + \beta

    with μ and σ² the running statistics. Layers are Linear, Conv1d/2d/3d and ConvTranspose1d/2d/3d
    whose output goes to one BatchNorm and nowhere else, in `nn.Sequential` or any module that
    torch.fx can trace, whatever its optional arguments are. The norm's place keeps its activation,
    if it is fastnorm's with one. The state dict is another, and the copy cannot be trained as the
    model could, nor its parts be called by themselves: fold last.

    Args:
        model: any module in evaluation mode. It stays as it is.

    Raises:
        ValueError: the model, or a BatchNorm in it, is in training mode.
        TypeError: `model` is not a module, or is compiled or scripted.

    The copy raises ValueError where a Linear before a folded BatchNorm1d gets other than (N, C):
    torch's BatchNorm1d would normalize another axis than the layer's last.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    >>> x = torch.randn(2, 3, 9, 9)
    >>> torch.testing.assert_close(fastnorm.fold(model)(x), model(x))
    """
    require_open(model, "fold")
    training = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training and (module is model or isinstance(module, layers.BATCH_NORMS))
    ]
    if training:
        raise ValueError(
            f"fold needs a model in evaluation mode, but {training[0]} is in training mode: "
            "call model.eval() first"
        )
    folded = copy.deepcopy(model)
    ways = [way for _, one in open_modules(folded) for way in _ways(one)]
    times = Counter(one for _, one in folded.named_modules(remove_duplicate=False))
    names = {one: name for name, one in folded.named_modules()}
    for pair in dict.fromkeys(pair for way in ways for pair in way.pairs):
        alone = all(times[one] == 1 for one in pair)  # a layer of two places serves two norms
        if alone and all(pair in way.pairs for way in ways if not way.used.isdisjoint(pair)):
            layer, norm = pair
            owner = folded.get_submodule(names[norm].rpartition(".")[0])
            _fold(layer, norm)
            # a LinearBatchNorm's statistics are over all leading axes
            axes = None if isinstance(owner, LinearBatchNorm) else _axes(layer)
            _replace(folded, names[norm], _Folded(norm, axes))
    for one, name in names.items():
        parts = layers.fused_parts(one)
        if parts is not None and isinstance(getattr(one, parts[1]), _Folded):
            both = nn.Sequential(OrderedDict((part, getattr(one, part)) for part in parts)).eval()
            if one is folded:
                return both
            _replace(folded, name, both)
    return folded


class _Folded(nn.Module):
    """In the place of a folded norm: its activation, and its rule of how many axes there are."""

    def __init__(self, norm: nn.Module, axes: int | None) -> None:
        super().__init__()
        self.activation = getattr(norm, "activation", "identity")
        self.axes = axes
        self.eval()

    def forward(self, input: Tensor) -> Tensor:
        if self.axes is not None and input.ndim != self.axes:
            raise ValueError(
                f"a BatchNorm was folded for {self.axes} axes, but got {list(input.shape)}"
            )
        return ACTIVATIONS[self.activation](input)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _ways(owner: nn.Module) -> list[_Way]:
    """What an owner's forward may do; [] where that cannot be read."""
    kind = classes.original_class(owner)
    if "forward" in owner.__dict__:
        return []
    parts = layers.fused_parts(owner)
    if parts is not None:
        layer, norm = (getattr(owner, name) for name in parts)
        foldable = (
            kind.forward in (one.forward for one in layers.FUSED)
            and type(layer) in FOLDABLE
            and isinstance(norm, layers.BATCH_NORMS)
            and norm.running_mean is not None
            and not any(map(is_hooked, (owner, layer, norm)))
        )
        return [_Way({layer, norm}, [(layer, norm)] if foldable else [])]
    ours = not kind.__module__.startswith("torch.") or kind.forward is nn.Sequential.forward
    if not ours or not any(patterns.norm_kind(one) == "batch" for one in owner.modules()):
        return []
    tried = [_ways_of(owner, kind.forward, args) for args in plain_arguments(kind.forward)]
    with_pairs = (ways for ways in tried if any(way.pairs for way in ways))
    return next(with_pairs, [way for ways in tried for way in ways])


def _ways_of(owner: nn.Module, forward: Callable[..., Any], args: tuple[object, ...]) -> list[_Way]:
    ways: list[_Way] = []
    unread: list[set[nn.Module]] = []
    for options in _options(forward):
        call = owner, forward, args, options
        try:
            ways.append(_way(owner, capture(*call).graph))
        except UntraceableError:
            unread.append(_seen(call, owner))
    if unread:  # who knows what those do with what the others use
        ways.append(_Way(set().union(*unread, *(way.used for way in ways)), []))
    return ways


def _seen(call: tuple[Any, ...], owner: nn.Module) -> set[nn.Module]:
    """What a call that is known but in part surely uses."""
    try:
        return _way(owner, glance(*call)).used
    except UntraceableError:
        return set()


def _options(forward: Callable[..., Any]) -> Iterator[dict[str, object]]:
    """Optional arguments, given or not: a flag its other value, whatever else a tensor's place."""
    optional = {
        name: one.default is False if isinstance(one.default, bool) else torch.empty(0)
        for name, one in inspect.signature(forward).parameters.items()
        if one.default is not one.empty and one.kind is not one.POSITIONAL_ONLY
    }
    most = len(optional) if len(optional) <= FLAGS else 1
    for count in range(most + 1):
        for chosen in itertools.combinations(optional.items(), count):
            yield dict(chosen)


def _way(owner: nn.Module, graph: fx.Graph) -> _Way:
    modules = dict(owner.named_modules(remove_duplicate=False))
    called = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    asked = {
        str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
    } - {""}

    def folds(node: fx.Node, layer: object) -> bool:
        if not isinstance(layer, fx.Node) or layer.op != "call_module" or len(layer.users) != 1:
            return False
        names = (str(layer.target), str(node.target))
        one, norm = modules[names[0]], modules[names[1]]
        return (
            type(one) in FOLDABLE
            and getattr(norm, "running_mean", None) is not None
            and _outputs(one) == norm.num_features  # a Linear's need not be a norm's channels
            and all(called[name] == 1 and name not in asked for name in names)
            and not any(is_hooked(module) for module in (one, norm))
        )

    pairs = [
        (modules[str(node.all_input_nodes[0].target)], modules[str(node.target)])
        for node in graph.nodes
        if node.op == "call_module"
        and patterns.norm_kind(modules.get(str(node.target))) == "batch"
        and len(node.args) == 1
        and not node.kwargs  # a residual
        and folds(node, node.args[0])
    ]
    return _Way({modules[name] for name in called.keys() | asked}, pairs)


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Give `layer` the weight and bias with which it computes what `norm` made of its output."""
    assert isinstance(layer, FOLDABLE)
    assert isinstance(norm, layers.BATCH_NORMS)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, mean = _weight(layer), norm.running_mean
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -mean if layer.bias is None else layer.bias.double() - mean
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, *): the groups of in are those of out
        groups = layer.groups
        parts = weight.double().reshape(groups, -1, *weight.shape[1:])
        scales = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
        folded = (parts * scales).flatten(0, 1)
    else:
        folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(folded.to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)


def _axes(layer: nn.Module) -> int:
    """Of an input that BatchNorm after `layer` normalizes in the axis that the layer computes."""
    return 2 if isinstance(layer, nn.Linear) else _weight(layer).ndim


def _outputs(layer: Any) -> int:
    outputs: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return outputs


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _replace(owner: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(owner.get_submodule(parent), last, module)
