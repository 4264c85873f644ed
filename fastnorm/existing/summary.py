"""Summary: every norm of a model, what it is now, and why."""

from torch import nn

from fastnorm import tables
from fastnorm.existing import classes, recognise
from fastnorm.existing.classes import PLANS
from fastnorm.existing.fuse import FusedForward, Nothing, Plan, candidate, first_plans
from fastnorm.existing.proof import Proofs
from fastnorm.modules.attributes import is_hooked
from fastnorm.structure import layers, redundant_biases

COLUMNS = ("layer", "class", "computed by", "why")


def summary(model: nn.Module) -> str:
    r"""A table of the norms in `model`: what each is now, and why `convert` and `fuse` left it.

    .. math:: y = \frac{x - \mu}{\sigma} \gamma + \beta

    is computed by fastnorm, alone or as one operation with the layers that are named; or by the
    module's own forward, with the reason. It changes nothing, so it also tells beforehand what
    `convert` would do. Below the table: forwards that could not be read, and biases that a norm
    removes again, which cost memory and time and do nothing.

    Raises:
        TypeError: `model` is not a module.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    >>> print(fastnorm.summary(fastnorm.convert(model)))
    layer  class        computed by      why
    ------------------------------------------
    1      BatchNorm1d  fastnorm, fused  0 → 1
    <BLANKLINE>
    0.bias: 1 subtracts each channel's mean, and this bias with it. bias=False saves both
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"summary needs a torch.nn.Module, but got {type(model).__name__}")
    fused, refused, notes = _fusions(model)
    proofs = Proofs()
    inside = _inside_closed(model)
    rows = []
    for name, module in model.named_modules():
        if not recognise.is_norm(module):
            continue
        kind = type(module).__name__
        if name in inside:
            rows.append((name or "(model)", kind, "its own forward", inside[name]))
            continue
        by, why = _computed_by(module, proofs)
        if name in fused:
            by, why = f"{by}, fused", fused[name]
        elif by == "fastnorm" and not why:
            why = refused.get(name, "")
        rows.append((name or "(model)", kind, by, why))
    if not rows:
        return "no normalization layers"
    text = tables.text(COLUMNS, rows, left=COLUMNS)
    notes += [
        f"{layer}.bias: {norm} subtracts each channel's mean, and this bias with it. "
        "bias=False saves both"
        for layer, norm in redundant_biases(model)
    ]
    return "\n".join([text, *([""] if notes else []), *notes])


def _computed_by(module: nn.Module, proofs: Proofs) -> tuple[str, str]:
    verdict = recognise.verdict(module, True, proofs)
    if verdict.swap is not None:
        return "its own forward", "convert() has not been called"
    if getattr(module, "attributes_changed", False):
        return "its own forward", "one of its attributes has been set since convert()"
    if isinstance(module, (*recognise.TORCH.values(), *layers.FUSED)):
        return "fastnorm", ""
    return "its own forward", verdict.reason


def _fusions(model: nn.Module) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """(what each norm is fused with, why others are not, forwards that could not be read)."""
    fused: dict[str, str] = {}
    refused: dict[str, str] = {}
    notes: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, FusedForward):
            plans = module.__dict__.get(PLANS) or first_plans(module)
        elif candidate(module) and not classes.closed(module):
            plans = first_plans(module)
        else:
            continue
        for plan in plans.values():
            if isinstance(plan, Plan | Nothing):
                reasons = {_join(name, norm): why for norm, why in plan.found.refused.items()}
                refused = reasons | refused
            if isinstance(plan, Plan) and isinstance(module, FusedForward):
                fused |= _by_norm(name, plan)
        untold = [str(plan) for plan in plans.values() if not isinstance(plan, Plan | Nothing)]
        if len(untold) == len(plans):
            notes.append(f"{name or '(model)'}: its forward could not be read: {untold[0]}")
    return fused, refused, notes


def _by_norm(owner: str, plan: Plan) -> dict[str, str]:
    """What each norm of a plan is fused with; with what keeps it from being so now."""
    held = [one for _, _, one in plan.parts if is_hooked(one)]
    shown = {}
    for run in plan.found.fusions:
        whole = str(run) if not held else f"{run} (as written while a part has hooks)"
        for part in run.norms:
            shown[_join(owner, part)] = whole
    return shown


def _inside_closed(model: nn.Module) -> dict[str, str]:
    """Names of modules in compiled or scripted parts, with the reason."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        reason = classes.closed(module)
        if reason:
            found |= {_join(name, part): reason for part, _ in module.named_modules()}
    return found


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
