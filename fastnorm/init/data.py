"""lsuv: the scale of every layer from a batch of data."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fastnorm.init.model import check, initialize
from fastnorm.init.report import Initialized, InitReport
from fastnorm.structure import layers

SCALED = (nn.Linear, nn.Bilinear, *layers.CONVOLUTIONS)


def lsuv(
    model: nn.Module,
    batch: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    generator: Generator | None = None,
) -> InitReport:
    r"""Orthogonal weights, then each layer's divided by the deviation of its output on `batch`.

    .. math:: W_l \leftarrow W_l / \sqrt{\mathrm{Var}(W_l\, x_l)}

    with x_l from the layers before, which have been scaled already. Biases are 0, so that one
    division is exact and one forward pass serves all layers. The pass runs in the model's mode but
    for dropout, which is off; buffers are as fresh as `initialize` leaves them. Weights within
    attention and recurrent layers, and those of several layers, stay orthogonal, and the report
    says so.

    Args:
        batch: the model's input, or a sequence of its arguments, or a mapping of them by name.
        generator: on the parameters' device.

    Returns:
        A report whose `std` is the deviation of the layer's output afterwards, measured.

    Raises:
        ValueError: a layer's output is constant or not finite, or the model on the meta device,
            without values. Parameters are as before then.
        TypeError, ValueError, RuntimeError: as `initialize`.

    Source: Mishkin & Matas 2016, "All you need is a good init".

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> report = fastnorm.init.lsuv(model, torch.randn(32, 8))
    >>> round(report["2"].std, 3)
    1.0
    """
    check(model, generator)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: lsuv needs values to measure")
    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = {}
    if isinstance(batch, Mapping):
        named = dict(batch)
    else:
        arguments = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    with _undone_on_error(model):
        rows = {row.layer: row for row in initialize(model, "orthogonal", generator=generator)}
        scaler, shared = _Scaler(rows), _shared(model)
        with ExitStack() as stack, torch.no_grad():
            if "torch._dynamo" in sys.modules:  # a graph would hold weights of before
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_without_dropout(model))
            stack.enter_context(_buffers_kept(model))
            for name, module in model.named_modules():
                if isinstance(module, SCALED) and name in rows and module not in shared:
                    stack.callback(scaler.watch(name, module).remove)
            model(*arguments, **named)
    modules = dict(model.named_modules())
    for name, row in rows.items():
        if row.scheme == "orthogonal":
            alone = not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
            whole = alone and isinstance(modules.get(name), SCALED)
            why = "the batch never called it" if whole else "a part of a larger layer"
            if modules.get(name) in shared:  # to scale it would undo what others measured
                why = "its weight is another layer's, too"
            rows[name] = replace(row, reason=f"{row.reason}; not scaled: {why}")
    return InitReport(list(rows.values()))


def _shared(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight is in several places."""
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            users.setdefault(weight, []).append(module)
    return {module for found in users.values() if len(found) > 1 for module in found}


class _Scaler:
    """Scales each layer when it is first called, and notes what came out."""

    def __init__(self, rows: dict[str, Initialized]) -> None:
        self.rows = rows

    def watch(self, name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def scale(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            row = self.rows[name]
            if row.scheme != "orthogonal":
                return None  # tied, frozen, or called before
            std = _std(output)
            if not (math.isfinite(std) and std > 0):
                raise ValueError(
                    f"the output of {name or 'the model'} has a standard deviation of {std} on "
                    "this batch: its variance cannot become 1"
                )
            module.weight = _divided(module, std)
            torch.clear_autocast_cache()  # a 16-bit copy of the weight as it was
            scaled: Tensor = module.forward(*args, **kwargs)
            reason, after = (
                f"orthogonal, divided by {std:.4g}, the deviation of its output",
                _std(scaled),
            )
            if abs(after - 1) > 0.1 and "weight" not in module._parameters:
                reason = "orthogonal; its parametrization sets the scale"  # spectral_norm
            self.rows[name] = Initialized(name, "lsuv", row.fan, after, reason)
            return scaled

        # before hooks of others: they see the output that is theirs afterwards, too
        return module.register_forward_hook(scale, with_kwargs=True, prepend=True)


def _divided(module: Any, std: float) -> Any:
    """What to assign as the weight: the parameter itself, or the value of a computed one."""
    if "weight" in module._parameters:
        module.weight.div_(std)
        return module.weight
    return module.weight / std


def _std(output: Any) -> float:
    while isinstance(output, tuple) and output:  # some layers give their bias besides
        output = output[0]
    wide = output.detach().to(torch.promote_types(output.dtype, torch.float32))
    return float(wide.std(correction=0))


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        raise


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """A forward pass in training moves running statistics; these start fresh."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    active = [m for m in model.modules() if isinstance(m, layers.DROPOUTS) and m.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()
