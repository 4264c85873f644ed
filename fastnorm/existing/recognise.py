"""Which norm a module is, and which class of ours computes it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastnorm.existing import classes, proof
from fastnorm.existing.foreign import (
    ChannelLayerNorm,
    ForeignGroupNorm,
    ForeignLayerNorm,
    ForeignRMSNorm,
)
from fastnorm.modules.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from fastnorm.modules.group_norm import GroupNorm, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from fastnorm.modules.layer_norm import LayerNorm, RMSNorm
from fastnorm.modules.sync_batch_norm import SyncBatchNorm
from fastnorm.structure import layers

TORCH: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.InstanceNorm1d: InstanceNorm1d,
    nn.InstanceNorm2d: InstanceNorm2d,
    nn.InstanceNorm3d: InstanceNorm3d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}
STATEFUL = (nn.modules.batchnorm._NormBase,)
# what torch's forward of a norm calls: a subclass that overrides one computes something else
INSIDE = {nn.InstanceNorm1d: "_apply_instance_norm", nn.InstanceNorm2d: "_apply_instance_norm",
          nn.InstanceNorm3d: "_apply_instance_norm"}  # fmt: skip

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps", "rms_norm_eps")
USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)
SHAPE_NAMES = ("normalized_shape", "dim", "hidden_size", "num_channels")
ZERO_CENTRED = re.compile(r"Gemma\w*RMSNorm|Qwen3(Next|_5\w*)RMSNorm|ZeroCenteredRMSNorm")
WEIGHTED = re.compile(r"T5LayerNorm|T5DenseLayerNorm")
PROMOTED = re.compile(r"(Llama|Mistral|Mixtral|Qwen2\w*|Qwen3\w*|Phi3|DeepseekV\d)RMSNorm")
CHANNELS_FIRST = re.compile(r"LayerNorm2d|LayerNormChannelsFirst")


@dataclass(frozen=True)
class Swap:
    """A class of ours, and the attributes that a module of another class needs to be one."""

    ours: type[nn.Module]
    attributes: dict[str, Any] = field(default_factory=dict)

    def apply(self, module: nn.Module) -> None:
        """Change `module` itself.

        Raises:
            TypeError: its class does not mix with ours, as one with slots. Nothing has changed.
        """
        module.__class__ = classes.merged(self.ours, type(module))
        module.__dict__.update(self.attributes)


@dataclass(frozen=True)
class Verdict:
    """What convert does to a norm: a swap, or none and the reason."""

    swap: Swap | None
    reason: str = ""


def is_norm(module: nn.Module) -> bool:
    """Whether somebody would call it a normalization layer: by its class, name or parameters."""
    if isinstance(module, (*layers.NORMS, *layers.FUSED, LazyModuleMixin)):
        return not isinstance(module, LazyModuleMixin) or "Norm" in type(module).__name__
    if any(True for _ in module.children()):
        return False
    parameters = {name for name, one in module._parameters.items() if one is not None}
    shaped = {"weight"} <= parameters <= {"weight", "bias"} and len(_eps(module)) == 1
    return shaped or "norm" in type(module).__name__.lower()


def verdict(module: nn.Module, verify: bool, proofs: proof.Proofs) -> Verdict:
    """What to do with a norm; `proofs` keeps what has been shown of equal modules."""
    if any(isinstance(module, ours) for ours in (*TORCH.values(), *layers.FUSED)):
        return Verdict(None, "fastnorm's already")
    if isinstance(module, LazyModuleMixin):
        return Verdict(None, "it is lazy: convert after its first batch")
    if "forward" in module.__dict__:
        return Verdict(None, "its forward was replaced on the instance")
    base = next((kind for kind in type(module).__mro__ if kind in TORCH), None)
    if base is not None:
        changed = classes.overridden(module, base, "forward", "__call__", *_inside(base))
        if not changed:
            ours = Swap(TORCH[base], {"activation": "identity"})
            conflict = _conflict(module, ours)
            return Verdict(None if conflict else ours, conflict)
        if issubclass(base, STATEFUL) or changed != "forward":
            return Verdict(None, f"{type(module).__name__} overrides {changed}")
    elif type(module).__module__.startswith("torch.nn."):
        return Verdict(None, f"fastnorm has no {type(module).__name__}")
    refusal = _unlike_a_norm(module)
    if refusal:
        return Verdict(None, refusal)
    if not verify:
        swap = _by_name(module)
        return Verdict(swap, "" if swap else "an unknown class, and verify=False compares nothing")
    return _by_behaviour(module, proofs)


def _inside(base: type[nn.Module]) -> tuple[str, ...]:
    return (INSIDE[base],) if base in INSIDE else ()


def _unlike_a_norm(module: nn.Module) -> str:
    """Why a module of a foreign class cannot be one of ours, whatever it computes."""
    names = {name for name, tensor in module._parameters.items() if tensor is not None}
    if not names <= {"weight", "bias"}:
        return f"its parameters are {', '.join(sorted(names))}, not weight and bias"
    if any(tensor is not None for tensor in module._buffers.values()):
        return "it has buffers"
    if any(True for _ in module.children()):
        return "it has submodules"
    own = [tensor for tensor in module._parameters.values() if tensor is not None]
    if any(not tensor.is_floating_point() for tensor in own):
        return "its parameters are not floating-point"
    if len({tensor.shape for tensor in own}) > 1 or len({tensor.dtype for tensor in own}) > 1:
        return "its weight and bias differ in shape or dtype"
    if _shape(module) is None:
        return "no attribute says what shape it normalizes"
    return ""


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    if weight is not None:
        return tuple(weight.shape)
    for name in SHAPE_NAMES:
        value = module.__dict__.get(name)
        if isinstance(value, int) and value > 0:
            return (value,)
        if isinstance(value, tuple | list) and value and all(isinstance(v, int) for v in value):
            return tuple(value)
    return None


def _eps(module: nn.Module) -> tuple[float, ...]:
    """The eps that the module names, or else those worth trying."""
    found = [module.__dict__.get(name) for name in EPS_NAMES]
    named = [float(value) for value in found if isinstance(value, int | float)]
    return (named[0],) if named else USUAL_EPS


def _swaps(module: nn.Module) -> Iterator[Swap]:
    """Every norm of ours with the module's parameters, most likely first."""
    if isinstance(module, nn.GroupNorm):
        yield Swap(ForeignGroupNorm, {"activation": "identity"})
        return
    shape = _shape(module)
    assert shape is not None  # else it is unlike a norm
    has_bias = module._parameters.get("bias") is not None
    for eps in _eps(module):
        common = {
            "normalized_shape": shape, "eps": eps, "activation": "identity",
            "elementwise_affine": module._parameters.get("weight") is not None,
        }  # fmt: skip
        rules = [common | {"result": result} for result in ("input", "promoted", "weight")]
        if not has_bias:
            for offset in (0.0, 1.0):
                yield from (Swap(ForeignRMSNorm, rule | {"offset": offset}) for rule in rules)
        yield from (Swap(ForeignLayerNorm, rule) for rule in rules)
        if len(shape) == 1:
            for contiguous in (False, True):
                yield from (
                    Swap(ChannelLayerNorm, rule | {"contiguous": contiguous}) for rule in rules
                )


def _by_behaviour(module: nn.Module, proofs: proof.Proofs) -> Verdict:
    """The first class of ours that computes the same on random inputs."""
    conflict = ""
    for swap in _swaps(module):
        conflict = conflict or _conflict(module, swap)
        if not conflict and proofs.equal(module, swap):
            return Verdict(swap)
    name = type(module).__name__
    return Verdict(None, conflict or proofs.refusal(module) or f"{name} computes another function")


def _conflict(module: nn.Module, swap: Swap) -> str:
    """Why the attributes of ours would take the place of others; a child is an attribute too."""
    for name, value in swap.attributes.items():
        now = getattr(module, name, value)
        if now != value:
            return f"its attribute {name} is {now!r}, and ours would be {value!r}"
    return ""


def _by_name(module: nn.Module) -> Swap | None:
    """What a class is by its name alone."""
    name = classes.original_class(module).__name__
    first = module.__dict__.get("data_format") == "channels_first"
    wanted: dict[str, Any] = {"result": "input"}
    kind: type[nn.Module] | None = None
    if CHANNELS_FIRST.fullmatch(name) or (first and isinstance(module, nn.LayerNorm)):
        kind, wanted["contiguous"] = ChannelLayerNorm, False
    elif WEIGHTED.fullmatch(name):
        kind, wanted["result"], wanted["offset"] = ForeignRMSNorm, "weight", 0.0
    elif ZERO_CENTRED.fullmatch(name):
        kind, wanted["offset"] = ForeignRMSNorm, 1.0
    elif PROMOTED.fullmatch(name):
        kind, wanted["result"], wanted["offset"] = ForeignRMSNorm, "promoted", 0.0
    if len(_eps(module)) > 1 or kind is None:
        return None
    for swap in _swaps(module):
        matches = all(swap.attributes.get(key) == value for key, value in wanted.items())
        if swap.ours is kind and matches and not _conflict(module, swap):
            return swap
    return None
