"""What a recording starts with, and what holds while it runs: functions are seen, and every module
is called."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from fastnorm.structure import activations


def checked(model: object, optimizer: object, sample: int) -> nn.Module:
    """The arguments of `record` as it takes them: the model that torch.compile has wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but got {kind}")
    if sample < 1:
        raise ValueError(f"sample must be 1 or more, but got {sample}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is scripted or traced by torch.jit, which calls no hooks of the modules "
            "inside: record it as it was before"
        )
    if "_orig_mod" in model._modules:  # what torch.compile has wrapped
        model = model.get_submodule("_orig_mod")
    return model


_innermost: Callable[[], object] = torch.overrides._get_current_function_mode


class Functions(TorchFunctionMode):
    """Shows the activations that a forward calls as functions or methods of torch.

    While it listens, each function and attribute of a tensor is slower by 2 µs, a function that
    torch writes in Python by 6.
    """

    def __init__(self, seen: Callable[[str, Any, Any, Any], None]) -> None:
        super().__init__()
        self.seen = seen  # takes (name, slope, input, output)
        self.on = False

    def listen(self, on: bool) -> None:
        """In this thread; it goes on where a mode was entered after it, since modes are a stack."""
        if on and not self.on:
            self.on = True
            self.__enter__()  # type: ignore[no-untyped-call]
        elif not on and self.on and _innermost() is self:
            self.stop()

    def stop(self) -> None:
        if self.on:
            self.on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in activations.NAMES:
            slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else None)
            self.seen(name, slope, args[0] if args else None, output)
        return output


@contextmanager
def module_by_module(model: nn.Module) -> Iterator[None]:
    """Has every module called, so that its hooks are: nothing compiled, nothing fused by torch."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        fused = (nn.MultiheadAttention, nn.TransformerEncoder)
        if any(issubclass(kind, fused) for kind in set(map(type, model.modules()))):
            mha = torch.backends.mha
            stack.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
            mha.set_fastpath_enabled(False)
        yield
