"""Convert: the norms of a model become fastnorm's, in place."""

from torch import nn

from fastnorm.existing import classes, recognise
from fastnorm.existing.proof import Proofs
from fastnorm.existing.recognise import Swap


def convert(model: nn.Module, *, fuse: bool = True, verify: bool = True) -> nn.Module:
    r"""Make the norms of `model` fastnorm's, in place, and return it.

    .. math:: \mathrm{convert}(f)(x) = f(x)

    Each module stays the object that it was, with its parameters, buffers, hooks, name and mode;
    only its class changes. Optimizers, tied weights and checkpoints stay valid, and state-dict keys
    are the same before and after. `fastnorm.summary` says what has changed, and why not.

    Args:
        model: any module. torch.nn's norms are converted, and subclasses that keep their forward.
            Classes of other libraries that compute LayerNorm or RMSNorm, over the last axes or over
            the channels of (N, C, *), are recognised; RMSNorm also with 1 + weight.
        fuse: whether to call `fastnorm.fuse` afterwards.
        verify: convert a foreign class only where it and ours agree on random inputs, output and
            gradients. Otherwise only classes known by name are converted, unseen.

    Raises:
        TypeError: `model` is not a module, or is compiled or scripted: convert before that.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> weight = model[1].weight
    >>> type(fastnorm.convert(model)[1])
    <class 'fastnorm.modules.layer_norm.LayerNorm'>
    >>> model[1].weight is weight
    True
    """
    require_open(model, "convert")
    proofs = Proofs()
    found = [
        (module, recognise.verdict(module, verify, proofs).swap)
        for _, module in open_modules(model)
        if recognise.is_norm(module)
    ]
    for module, swap in found:
        if swap is not None:
            _apply(module, swap)
    if fuse:
        from fastnorm.existing.fuse import fuse as fused  # which needs this file

        fused(model)
    return model


def _apply(module: nn.Module, swap: Swap) -> None:
    try:
        swap.apply(module)
    except TypeError:  # a class with slots or a metaclass of its own: it stays, summary says why
        return


def require_open(model: nn.Module, name: str) -> None:
    """Raise where a whole model cannot be changed."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} needs a torch.nn.Module, but got {type(model).__name__}")
    reason = classes.closed(model)
    if reason:
        raise TypeError(f"{name} cannot change this model: {reason}. Call {name} first, then that")


def open_modules(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """(name, module) of all that may be changed: not what is compiled or scripted within."""
    found, seen = [], set()
    todo = [(prefix, model)]
    while todo:
        name, module = todo.pop()
        if module in seen or (module is not model and classes.closed(module)):
            continue
        seen.add(module)
        found.append((name, module))
        dot = f"{name}." if name else ""
        todo += reversed([(dot + part, child) for part, child in module.named_children()])
    return found
