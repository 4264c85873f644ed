"""Neighbours of which one undoes the other: a bias before a norm, a norm before a norm."""

from typing import Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from fastnorm.structure import layers
from fastnorm.structure.read import Structure, read


class NormPair(NamedTuple):
    """A norm whose output another one normalizes, and which of them does nothing by itself."""

    first: str
    second: str
    idle: str
    """The name of the one that but for weights and biases changes no result; "": not known."""


def redundant_biases(model: nn.Module, structure: Structure | None = None) -> list[tuple[str, str]]:
    """(layer, norm) wherever a layer has a bias and the norm after it removes it again.

    BatchNorm and InstanceNorm subtract each channel's mean, and with it the bias; β serves instead.
    """
    facts = structure or read(model)
    modules = dict(model.named_modules())
    return [
        (layer, norm)
        for layer, norm in facts.straight.items()
        if isinstance(modules[norm], layers.PER_CHANNEL_NORMS)
        and isinstance(modules[layer], layers.LAYERS)
        and _has_bias(modules[layer])
        and _alike_in_channels(modules[layer], modules[norm], layer in facts.reshaped)
    ]


def double_norms(model: nn.Module, structure: Structure | None = None) -> list[NormPair]:
    """Every norm whose output is normalized again at once."""
    facts = structure or read(model)
    modules = dict(model.named_modules())
    pairs = []
    for first, second in facts.straight.items():
        if isinstance(modules[first], layers.NORMS):
            which = 0 if first in facts.reshaped else idle(modules[first], modules[second])
            pairs.append(NormPair(first, second, ("", first, second)[which]))
    return pairs


def _has_bias(layer: nn.Module) -> bool:
    """Of a lazy one nobody knows the length."""
    bias = getattr(layer, "bias", None)
    return isinstance(bias, nn.Parameter) and not is_lazy(bias)


def _alike_in_channels(layer: Any, norm: Any, reshaped: bool) -> bool:
    """Whether all values of a channel of the norm got the same element of the layer's bias.

    A Linear's outputs may be made (C, H, W), or channels pixels, so that a channel has several. A
    flattened convolution has more channels, each within one of the convolution's.
    """
    units, channels = len(layer.bias), norm.num_features
    return units == channels or bool(reshaped and units and channels % units == 0)


def idle(first: nn.Module, second: nn.Module) -> int:
    """Which of two norms in a row, the 1st or the 2nd, does nothing but for weights and biases.

    Where each set of the first lies in one of the second, that one's values have mean 0 and mean
    square 1 already. Where each set of the second lies in one of the first, the second removes what
    shift and scale the first gave to it. 0: neither, or not known from the modules alone.
    """
    one, other = _channels_apart(first), _channels_apart(second)
    if one is not None and other is not None:
        inner, outer = _within(one, other), _within(other, one)
    elif isinstance(first, ROWS) and isinstance(second, ROWS):
        mine, its = tuple(first.normalized_shape), tuple(second.normalized_shape)
        inner, outer = its[-len(mine) :] == mine, mine[-len(its) :] == its
    else:
        return 0
    centred = [not isinstance(norm, nn.RMSNorm) for norm in (first, second)]
    if inner and (centred[0] or not centred[1]):
        return 2
    return 1 if outer and (centred[1] or not centred[0]) else 0


ROWS = (nn.LayerNorm, nn.RMSNorm)


def _channels_apart(norm: Any) -> tuple[bool, int, int] | None:
    """(whether samples are in one set, groups of channels, channels); None of a norm over rows."""
    if isinstance(norm, nn.GroupNorm):
        return False, norm.num_groups, norm.num_channels
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        together = isinstance(norm, layers.BATCH_NORMS)
        return together, norm.num_features, norm.num_features
    return None


def _within(one: tuple[bool, int, int], other: tuple[bool, int, int]) -> bool:
    """Whether each set of `one` lies in a set of `other`."""
    samples, groups, _ = one
    return (other[0] or not samples) and groups % max(other[1], 1) == 0
