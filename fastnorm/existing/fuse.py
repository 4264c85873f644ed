"""Fuse: modules that follow each other in a forward run as one operation."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from fastnorm.existing import classes, patterns
from fastnorm.existing.classes import PLANS
from fastnorm.existing.convert import open_modules, require_open
from fastnorm.modules.attributes import is_exported, is_hooked
from fastnorm.structure import layers
from fastnorm.structure.forward import Captured, capture, is_tensors
from fastnorm.structure.watch import ABSENT, SIMPLE, Guard, UntraceableError

BAKED = ("activation", "negative_slope", "alpha", "approximate")
"""Attributes of a norm or activation that a plan has as they were."""
MOST_PLANS = 16
"""Ways to call a forward that are each traced; calls in further ways run as they are written."""


def fuse(model: nn.Module) -> nn.Module:
    r"""Run layers, norms, sums and activations that follow each other as one operation, in place.

    .. math:: \mathrm{act}(\mathrm{BN}(Wx + b)), \quad \mathrm{act}(\mathrm{BN}(x) + r), \quad
              \mathrm{LN}(x + r)

    Found are Linear or Conv, BatchNorm, activation; BatchNorm or GroupNorm, sum, activation; a sum
    before LayerNorm or RMSNorm: in the order that `forward` has them, in `nn.Sequential` or any
    module that torch.fx can trace with its children whole. Submodules, their names and state-dict
    keys stay, and each module still works when called by itself: what changes is the forward of the
    module that calls them. It reads their parameters at each call, and is as written while one of
    them has hooks, or wherever an attribute that it read has changed.

    Args:
        model: any module; norms may be torch.nn's or fastnorm's.

    Raises:
        TypeError: `model` is not a module, or is compiled or scripted.

    >>> import torch, fastnorm
    >>> layers = torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()
    >>> model = torch.nn.Sequential(*layers)
    >>> x = torch.randn(16, 4)
    >>> before = model.eval()(x)
    >>> torch.testing.assert_close(fastnorm.fuse(model)(x), before)
    >>> list(model.state_dict())[:2]
    ['0.weight', '0.bias']
    """
    require_open(model, "fuse")
    for _, module in open_modules(model):
        if not candidate(module):
            continue
        plans = first_plans(module)
        if not any(isinstance(plan, Plan) for plan in plans.values()):
            continue
        try:
            module.__class__ = classes.merged(FusedForward, type(module))
        except (
            TypeError
        ):  # a class with slots or a metaclass of its own: it stays, summary says why
            continue
        module.__dict__[PLANS] = plans
    return model


@dataclass
class Plan:
    """A forward for one way to call it, and what must still hold for it to be the module's."""

    run: Callable[..., Any]
    captured: Captured
    found: patterns.Found
    parts: list[tuple[dict[str, nn.Module | None], str, nn.Module]]
    """Where each module that has been fused hangs, by which name, and what it was."""

    def holds(self) -> bool:
        for where, name, module in self.parts:
            if where.get(name) is not module or is_hooked(module):
                return False
        return self.captured.holds() and not torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]


class FusedForward(nn.Module):
    """What a module's class is merged with when its forward has been rewritten."""

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """The forward of the merged class, with the signature that others may ask for."""
        written = original.forward

        @functools.wraps(written)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _run(self, written, args, kwargs)

        # torch.compile counts recompilations by code object: each class has its own
        forward.__code__ = forward.__code__.replace()  # type: ignore[attr-defined]
        return {"forward": forward}


def _run(module: nn.Module, written: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The fused forward where there is one for such a call, else the one that was written."""
    compiling = torch.compiler.is_compiling()
    plans = module.__dict__.get(PLANS)
    if plans is None:  # a copy, a slice, or from a file
        if compiling:
            return written(module, *args, **kwargs)
        plans = module.__dict__[PLANS] = {}
    key, inputs = _way(module, args, kwargs)
    plan = plans.get(key, "")
    new = plan == "" and key is not None and len(plans) < MOST_PLANS
    if new and not compiling and not getattr(module, "_is_replica", False):
        # a replica of nn.DataParallel has the plans of another module
        plan = plans[key] = plan_for(module, written, args, kwargs)
    if isinstance(plan, Plan) and plan.holds() and not is_exported(*inputs):
        return plan.run(module, *inputs)
    return written(module, *args, **kwargs)


def _way(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
    """(what distinguishes this way to call a forward, the inputs of its graph).

    The way is None where the arguments are no values: somebody else is tracing.
    """
    key: list[Any] = [module.training]
    inputs: list[Any] = []
    for name, value in [*enumerate(args), *kwargs.items()]:
        if isinstance(value, Tensor):
            key.append((name, Tensor))
            inputs.append(value)
        elif isinstance(value, SIMPLE):
            key.append((name, type(value), value))
        elif is_tensors(value):
            key.append((name, type(value), len(value)))
            inputs += value
        elif isinstance(value, fx.Proxy):
            return None, []
        else:
            key.append((name, type(value)))
            inputs.append(value)
    return tuple(key), inputs


def plan_for(module: nn.Module, written: Callable[..., Any], args: Any, kwargs: Any) -> Plan | str:
    """A plan, or why there is none."""
    try:
        captured = capture(module, written, args, kwargs)
    except UntraceableError as error:
        return f"{error}"
    graph = patterns.Graph(module, captured.graph)
    found = graph.find()
    if not found.fusions:
        captured.graph = fx.Graph()  # nodes would keep it all alive
        return Nothing(found)
    modules = graph.modules
    parts = [
        (_parent(modules, name)._modules, name.split(".")[-1], part)
        for run in found.fusions
        for name, part in patterns.modules_of(run, modules)
    ]
    captured.guards += [
        Guard(part.__dict__, name, part.__dict__[name])
        for _, _, part in parts
        for name in BAKED
        if name in part.__dict__
    ]
    captured.guards += [Guard(part.__dict__, "attributes_changed", ABSENT) for _, _, part in parts]
    graph.rewrite()
    return Plan(_function(captured.graph.python_code("self")), captured, found, parts)


_functions: dict[tuple[str, tuple[tuple[str, int], ...]], Callable[..., Any]] = {}


def _function(code: Any) -> Callable[..., Any]:
    """A graph's code as a function: one for equal modules, or torch.compile takes each for new."""
    key = code.src, tuple((name, id(value)) for name, value in code.globals.items())
    if key not in _functions:
        exec(compile(code.src, "<fastnorm fused forward>", "exec"), code.globals)
        _functions[key] = code.globals["forward"]  # which keeps the rest, so that no id comes again
    return _functions[key]


class Nothing(str):
    """No plan, since nothing is to be fused: with the reasons, by norm."""

    found: patterns.Found

    def __new__(cls, found: patterns.Found) -> "Nothing":
        self = super().__new__(cls, "nothing to fuse")
        self.found = found
        return self


def _parent(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    return modules[name.rpartition(".")[0]]


def candidate(module: nn.Module) -> bool:
    """Whether a module's own forward, if it may be read, calls norms: something to fuse."""
    kind = classes.original_class(module)
    if isinstance(module, (FusedForward, *layers.FUSED)) or "forward" in module.__dict__:
        return False
    if kind.__module__.startswith("torch.") and kind.forward is not nn.Sequential.forward:
        return False
    return any(patterns.norm_kind(child) for child in _called(module))


def _called(module: nn.Module) -> list[nn.Module]:
    """The children that a forward calls: also those in a ModuleList or ModuleDict."""
    found: list[nn.Module] = []
    for child in module.children():
        held = isinstance(child, nn.ModuleList | nn.ModuleDict)
        found += _called(child) if held else [child]
    return found


def first_plans(module: nn.Module) -> dict[Any, Plan | str]:
    """Plans of the plainest call, with required arguments alone, in training and evaluation."""
    tried = []
    written = classes.original_class(module).forward
    for args in plain_arguments(written):
        tried.append(_plans_of(module, written, args))
        if any(isinstance(plan, Plan | Nothing) for plan in tried[-1].values()):
            return tried[-1]
    return tried[0]


def _plans_of(
    module: nn.Module, written: Callable[..., Any], args: tuple[object, ...]
) -> dict[Any, Plan | str]:
    plans: dict[Any, Plan | str] = {}
    was = module.training
    for training in (True, False):
        module.training = training
        try:
            key, _ = _way(module, args, {})
            plans[key] = plan_for(module, written, args, {})
        finally:
            module.training = was
    return plans


def plain_arguments(forward: Callable[..., Any]) -> Iterator[tuple[object, ...]]:
    """Something for each positional argument without a default but self: a tensor, or a list."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    count = sum(
        one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        for one in parameters
    )
    yield (torch.empty(0),) * count
    yield ([torch.empty(0)],) * count
