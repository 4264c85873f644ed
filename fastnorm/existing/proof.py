"""Does a foreign norm compute what ours would? Asked of both, on random inputs.

Both get the same random parameters, in copies, so that the model's own are not touched. Asked is
the output, its dtype and its layout, and every gradient: in the module's dtype, where roundings in
another order are allowed, in float32, where formulas that are merely alike differ (an unbiased
variance is off by 1/2n), and with inputs of another dtype than the weight's.
"""

import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

HALVES = (torch.float16, torch.bfloat16)


class SwapLike(Protocol):
    """What is proven: `apply` changes a module, `attributes` say how."""

    @property
    def ours(self) -> type[nn.Module]: ...
    @property
    def attributes(self) -> dict[str, Any]: ...
    def apply(self, module: nn.Module) -> None: ...


Outcome = list[Tensor] | None
"""Output and gradients of a call; None where it raises."""


class Proofs:
    """What has been shown: a model has many norms of few kinds."""

    def __init__(self) -> None:
        self._known: dict[object, bool] = {}

    def equal(self, module: nn.Module, swap: SwapLike) -> bool:
        key = (*_key(module), swap.ours, tuple(sorted(swap.attributes.items())))
        if key not in self._known:
            try:
                with torch.inference_mode(False):
                    self._known[key] = _equal(module, swap)
            except Exception:  # nothing was shown: of tensors that are fake, say
                self._known[key] = False
        return self._known[key]

    def refusal(self, module: nn.Module) -> str:
        """Why the module could not be asked; empty where it could."""
        inputs = [
            name
            for name, one in inspect.signature(module.forward).parameters.items()
            if one.default is one.empty
            and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        ]
        if len(inputs) != 1:
            return f"its forward takes {len(inputs)} inputs ({', '.join(inputs)})"
        return ""


def _key(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules that compute the same but for the values of their parameters."""
    plain = {
        name: repr(value)
        for name, value in module.__dict__.items()
        if name not in ("_parameters", "_buffers", "_modules", "training") and "hooks" not in name
    }
    tensors = {
        name: (tuple(tensor.shape), tensor.dtype, tensor.device)
        for name, tensor in module._parameters.items()
        if tensor is not None
    }
    return type(module), tuple(sorted(plain.items())), tuple(sorted(tensors.items(), key=str))


def _equal(module: nn.Module, swap: SwapLike) -> bool:
    """Whether all that can be compared agrees, and enough could be."""
    own = next((t.dtype for t in module._parameters.values() if t is not None), torch.float32)
    asked = [(own, own), *itertools.product((torch.float32, torch.bfloat16), repeat=2)]
    for parameters, inputs in dict.fromkeys(asked):
        compared = 0
        for training in (True, False):
            theirs, ours = _twins(module, swap, parameters, training)
            for x in _inputs(module, swap, inputs):
                before = dict(theirs.__dict__)
                want = _outcome(theirs, x)
                if theirs.__dict__ != before:  # it counts its calls, or keeps what it has seen
                    return False
                if want is None:
                    continue
                got = _outcome(ours, x)
                if got is None or not _agree(got, want, parameters, inputs):
                    return False
                compared += 1
        if compared < 2 and parameters is inputs:
            return False
    return True


def _twins(
    module: nn.Module, swap: SwapLike, dtype: torch.dtype, training: bool
) -> tuple[nn.Module, nn.Module]:
    """(a copy of `module`, the same as ours), with equal random parameters and no hooks."""
    theirs, ours = _copy(module, dtype, training), _copy(module, dtype, training)
    swap.apply(ours)
    return theirs, ours


def _copy(module: nn.Module, dtype: torch.dtype, training: bool) -> nn.Module:
    copy: nn.Module = module.__new__(type(module))
    copy.__dict__ = {
        name: OrderedDict() if "hooks" in name and isinstance(value, dict) else value
        for name, value in module.__dict__.items()
    }
    generator = torch.Generator().manual_seed(0)
    parameters: dict[str, nn.Parameter | None] = {}
    for name, tensor in module._parameters.items():
        if tensor is None:
            parameters[name] = None
            continue
        values = torch.randn(tensor.shape, generator=generator, device="cpu")
        parameters[name] = nn.Parameter(values.to(_device(module), dtype))
    copy.__dict__.update(_parameters=parameters, training=training)
    return copy


def _device(module: nn.Module) -> torch.device:
    found = next((t.device for t in module._parameters.values() if t is not None), None)
    return torch.device("cpu") if found is None or found.type == "meta" else found


def _inputs(module: nn.Module, swap: SwapLike, dtype: torch.dtype) -> Iterator[Tensor]:
    """Trailing axes, and channels on axis 1; also small enough for eps to matter; with an offset.

    Not of 16 bits, where squares overflow: also large ones, and NaN, which are not to be clipped.
    Without a weight any size may do for the foreign norm: then only what ours is made for is asked.
    """
    shape = swap.attributes.get("normalized_shape", ())
    channels = getattr(module, "num_channels", math.prod(shape))
    weight = module._parameters.get("weight")
    generator = torch.Generator().manual_seed(1)
    leading: list[tuple[int, ...]] = [(3,), (2, 5), (2, 3, 4)]
    trailing = [(*lead, *shape) for lead in leading]
    first = [(2, channels, 3, 5), (1, channels, 4, 2)]
    shapes = (trailing if shape else []) + first
    if weight is None and shape:
        shapes = first if "contiguous" in swap.attributes else trailing
    for scale in (1.0, 1e-3) if dtype in HALVES else (1.0, 1e-3, 1e4, math.nan):
        for size in shapes:
            x = torch.randn(size, generator=generator, device="cpu") + 0.5
            if math.isnan(scale):
                x.view(-1)[0] = scale
            else:
                x *= scale
            yield x.to(_device(module), dtype)


def _outcome(module: nn.Module, x: Tensor) -> Outcome:
    leaves = [x.detach().requires_grad_()]
    leaves += [tensor for tensor in module._parameters.values() if tensor is not None]
    try:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            y = module.forward(leaves[0])
        # a norm's output is like its input: what came of broadcasting was not meant
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.requires_grad:
            return None
        generator = torch.Generator().manual_seed(2)
        dy = torch.randn(y.shape, generator=generator, device="cpu").to(y.device, y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    except Exception:  # a forward may raise anything for a shape that it was not made for
        return None


def _agree(
    got: list[Tensor], want: list[Tensor], parameters: torch.dtype, inputs: torch.dtype
) -> bool:
    y, expected = got[0], want[0]
    if (y.dtype, y.shape) != (expected.dtype, expected.shape):
        return False
    if y.is_contiguous() != expected.is_contiguous():
        return False
    # foreign norms compute in float32 also where parameters are float64, and round in between
    dtypes = {torch.float32, *(dtype for dtype in (parameters, inputs) if dtype in HALVES)}
    step = max(torch.finfo(dtype).eps for dtype in dtypes)
    for ours, theirs in zip(got, want, strict=True):
        if not torch.equal(ours.isnan(), theirs.isnan()):
            return False
        ours, theirs = ours[~ours.isnan()], theirs[~theirs.isnan()]
        if not len(theirs):
            continue
        difference = (ours.double() - theirs.double()).abs().max()
        scale = theirs.double().abs().max()
        # a wrong formula differs in the first digits, or (n against n - 1) by 1/2n
        if not difference <= 16 * step * scale:
            return False
    return True
