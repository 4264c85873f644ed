"""What each library makes of a layer: torch.nn, fastnorm, and the peers that are installed.

A peer is compared where it has the layer, runs on the device and agrees with torch.nn; where it
does not, the report says so. Peers are imported only when they are asked for a layer.
"""

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

import fastnorm
from fastnorm.bench.layers import Layer
from fastnorm.eager.activations import ACTIVATIONS

EPS = 1e-5


class _Composed(nn.Module):
    """torch.nn's modules for what fastnorm does in one: a sum, a norm, a sum, an activation."""

    def __init__(self, norm: nn.Module, layer: Layer) -> None:
        super().__init__()
        self.norm = norm
        self.before = layer.kind.startswith("Add")
        self.activation = ACTIVATIONS[layer.activation]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.before:
            assert residual is not None
            x = x + residual
        z: Tensor = self.norm(x)
        if residual is not None and not self.before:
            z = z + residual
        y = self.activation(z)
        return (y, x) if self.before else y


def torch_nn(layer: Layer) -> nn.Module:
    """The layer as a model without fastnorm has it."""
    norm: nn.Module
    if layer.kind == "LinearBatchNorm":
        inputs, outputs = layer.arguments
        norm = nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))
    elif layer.kind == "Conv2dBatchNorm":
        inputs, outputs, size = layer.arguments
        convolution = nn.Conv2d(inputs, outputs, size, bias=False)
        norm = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
    else:
        made = getattr(nn, layer.kind.removeprefix("Add"))
        norm = made(*layer.arguments, **_options(layer))
    plain = layer.activation == "identity" and not layer.residual
    return norm if plain else _Composed(norm, layer)


def ours(layer: Layer) -> nn.Module:
    made = getattr(fastnorm, layer.kind)
    module: nn.Module = made(*layer.arguments, activation=layer.activation, **_options(layer))
    return module


def _options(layer: Layer) -> dict[str, Any]:
    """Arguments whose defaults differ among libraries, or that leave the parameters out."""
    if layer.kind.startswith("InstanceNorm"):
        return {"affine": True}
    return {"eps": EPS} if "RMSNorm" in layer.kind else {}


def _compiled(layer: Layer) -> nn.Module:
    module: nn.Module = torch.compile(torch_nn(layer), dynamic=False)  # type: ignore[assignment]
    return module


def _liger(layer: Layer) -> nn.Module | None:
    if layer.activation != "identity":
        return None
    package = "liger_kernel.transformers"
    if layer.kind == "GroupNorm":  # which takes the channels first
        groups, channels = layer.arguments
        made = importlib.import_module(f"{package}.group_norm").LigerGroupNorm
        module: nn.Module = made(channels, groups, eps=EPS)
        return module
    name = {"AddRMSNorm": "LigerFusedAddRMSNorm"}.get(layer.kind, f"Liger{layer.kind}")
    made = getattr(importlib.import_module(package), name, None)
    # in place, its backward would write dx over the dy that the other candidates still need
    options = {"in_place": False} if "RMSNorm" in layer.kind else {}
    return None if made is None else made(*layer.arguments, eps=EPS, **options)


class _Called(nn.Module):
    """A function of (x, residual, weight, bias) as a module with these parameters."""

    def __init__(self, function: Callable[..., Any], layer: Layer) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(layer.features))
        with_bias = "RMSNorm" not in layer.kind
        self.bias = nn.Parameter(torch.zeros(layer.features)) if with_bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return self.function(x, residual, self.weight, self.bias)


def _quack(layer: Layer) -> nn.Module | None:
    if "RMSNorm" not in layer.kind or layer.activation != "identity":
        return None
    rmsnorm = importlib.import_module("quack.rmsnorm").rmsnorm
    return _Called(
        lambda x, residual, weight, bias: rmsnorm(
            x, weight, residual=residual, eps=EPS, prenorm=residual is not None
        ),
        layer,
    )


def _flash_attention(layer: Layer) -> nn.Module | None:
    if layer.kind not in ("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"):
        return None
    if layer.activation != "identity":
        return None
    function = importlib.import_module("flash_attn.ops.triton.layer_norm").layer_norm_fn
    return _Called(
        lambda x, residual, weight, bias: function(
            x, weight, bias, residual=residual, eps=EPS, prenorm=residual is not None,
            is_rms_norm="RMSNorm" in layer.kind,
        ),
        layer,
    )  # fmt: skip


def _apex(layer: Layer) -> nn.Module | None:
    module: nn.Module
    if layer.kind in ("LayerNorm", "RMSNorm") and layer.activation == "identity":
        apex = importlib.import_module("apex.normalization")
        module = getattr(apex, f"Fused{layer.kind}")(*layer.arguments, eps=EPS)
        return module
    if layer.kind == "GroupNorm" and layer.activation in ("identity", "silu"):
        act = "" if layer.activation == "identity" else layer.activation
        apex = importlib.import_module("apex.contrib.group_norm")
        module = apex.GroupNorm(*layer.arguments, eps=EPS, act=act)
        return module
    return None


def _xformers(layer: Layer) -> nn.Module | None:
    if layer.kind != "RMSNorm" or layer.activation != "identity":
        return None
    made = importlib.import_module("xformers.ops").RMSNorm
    module: nn.Module = made(*layer.arguments, eps=EPS)
    return module


def _gems() -> AbstractContextManager[Any]:
    """Within it torch's operators are FlagGems'."""
    context: AbstractContextManager[Any] = importlib.import_module("flag_gems").use_gems()
    return context


@dataclass(frozen=True)
class Peer:
    """A library that fastnorm is compared with."""

    distribution: str
    module: str
    make: Callable[[Layer], nn.Module | None]
    """The layer; None where the library has none."""
    cpu: bool = False
    """Whether it runs without a GPU."""
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    """A context for its calls."""

    def absence(self, device: torch.device) -> str | None:
        """Why it takes no part; None where it does."""
        if importlib.util.find_spec(self.module) is None:
            return "not installed"
        return None if self.cpu or device.type == "cuda" else "needs a GPU"

    def version(self) -> str | None:
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None


PEERS = {
    "compile": Peer("torch", "torch", _compiled, cpu=True),
    "liger": Peer("liger-kernel", "liger_kernel", _liger),
    "quack": Peer("quack-kernels", "quack", _quack),
    "flag-gems": Peer("flag_gems", "flag_gems", torch_nn, within=_gems),
    "apex": Peer("apex", "apex", _apex),
    "xformers": Peer("xformers", "xformers", _xformers),
    "flash-attn": Peer("flash-attn", "flash_attn", _flash_attention),
}


def prepared(module: nn.Module, layer: Layer, dtype: torch.dtype, device: torch.device) -> None:
    """Place the module, with the same parameters in every library.

    In 16 bits, BatchNorm and InstanceNorm keep float32 parameters, as under autocast; the others
    take the input's dtype, as where a whole model was cast.
    """
    wide = layer.kind.startswith(("BatchNorm", "InstanceNorm"))
    module.to(device)
    for child in module.modules():
        if not wide and not isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                values = torch.linspace(0.5, 1.5, parameter.numel(), device=device)
                parameter.copy_(values)
            else:
                generator = torch.Generator().manual_seed(0)
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn / parameter[0].numel() ** 0.5)
    if layer.layout != "contiguous" and layer.kind == "Conv2dBatchNorm":
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
