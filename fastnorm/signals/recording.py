"""record: hooks on every layer of a model, there while a block runs."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from fastnorm.signals import shown
from fastnorm.signals.findings import Finding, find
from fastnorm.signals.layers import LayerSignal
from fastnorm.signals.moments import First, Number, number
from fastnorm.signals.watch import Watch, activation_of
from fastnorm.signals.weights import Weight
from fastnorm.structure import activations, layers

SAMPLE = 2**13


def record(
    model: nn.Module, *, optimizer: Optimizer | None = None, sample: int = SAMPLE
) -> "Signals":
    r"""Record what goes through `model`, forward and backward, while the block runs.

    .. math:: \mathrm{mean}\,y_l,\ \mathrm{std}\,y_l,\ \|\partial L/\partial y_l\|,\
              \|W_l\|,\ \|\partial L/\partial W_l\|,\ \|\Delta W_l\| / \|W_l\|

    for each layer, norm and activation l, those called as functions of torch included. Everything
    is summed on the model's device as it passes; one transfer at the end of the block brings the
    numbers. Hooks are removed there, also after an exception. The model's results do not change.

    Args:
        model: any module; several forward and backward passes in the block are merged.
        optimizer: also relates the last step of each weight to the weight.
        sample: of each tensor at most about so many elements, evenly spread, make the moments.
            Dead units, and NaN or infinities, are looked for in all elements.

    Returns:
        A context manager; its value has `layers`, `findings()`, `table()`, `plot(path)` and
        `html(path)`, to be asked for after the block.

    Raises:
        TypeError: `model` is not a module, or `optimizer` not an optimizer.
        ValueError: `sample` below 1.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> with fastnorm.signals.record(model) as signals:
    ...     model(torch.randn(16, 8)).square().mean().backward()
    >>> [layer.name for layer in signals.layers]
    ['0', '1', '2']
    """
    return Signals(model, optimizer, sample)


class Signals:
    """What `record` saw; made by `record`.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    >>> with fastnorm.signals.record(model) as signals:
    ...     _ = model(torch.randn(32, 2))
    >>> [finding.problem for finding in signals.findings()]
    ['redundant bias']
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None, sample: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, but got {kind}")
        if sample < 1:
            raise ValueError(f"sample must be 1 or more, but got {sample}")
        self.model, self.optimizer, self.sample = model, optimizer, sample
        self.layers: list[LayerSignal] = []
        """In the order in which they were first called; filled at the end of the block."""
        self.input_failed = math.inf
        self._watches: dict[str, Watch] = {}
        self._handles: list[RemovableHandle] = []
        self._functions: _Functions | None = None
        self._sampled: tuple[Tensor | None, Tensor | None] = None, None
        self._event = 0
        self._inputs = First()
        self._inside = 0  # calls of layers that are running: their own functions are not seen
        self._last = ""  # the layer called last, and whether its units are on the last axis
        self._units_last = False

    def findings(self) -> list[Finding]:
        """What is wrong, each with its evidence and a remedy; empty where nothing was found."""
        return find(self.model, self.layers, self.input_failed)

    def table(self) -> str:
        """Plain text, a line for each layer."""
        return shown.table(self.layers)

    def plot(self, path: str | Path) -> None:
        """Write a PNG of deviations and gradient norms by depth; needs matplotlib."""
        Path(path).write_bytes(shown.plot(self.layers))

    def html(self, path: str | Path) -> None:
        """Write one self-contained page: findings, plot and table; needs matplotlib."""
        page = shown.page(type(self.model).__name__, self.layers, self.findings())
        Path(path).write_text(page, "utf-8")

    def __enter__(self) -> "Signals":
        if self._handles:
            raise RuntimeError("this recording runs already; call record() again for another")
        self._watches, self.layers, self._last = {}, [], ""
        self._inputs, self.input_failed = First(), math.inf
        self._handles.append(
            self.model.register_forward_pre_hook(self._see_input, with_kwargs=True)
        )
        for name, module in self.model.named_modules():
            if _is_watched(module):
                self._attach(Watch(name, module, activation_of(module)), module)
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(self.optimizer.register_step_post_hook(self._after_step))
        self._functions = _Functions(self)
        self._functions.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._functions is not None:
            self._functions.__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles, self._functions, self._inside = [], None, 0
        self.layers = self._collect()
        self._watches, self._sampled = {}, (None, None)

    def _attach(self, watch: Watch, module: nn.Module) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            self._inside += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            self._see(watch, module, args, output)

        # always_call: the count of running layers must be right after an exception
        handles = [module.register_forward_hook(leave, always_call=True)]
        handles.append(module.register_forward_pre_hook(enter))
        if watch.weight is not None and watch.weight.parameter.requires_grad:
            parameter: Any = watch.weight.parameter
            handles.append(
                parameter.register_post_accumulate_grad_hook(self._weight_hook(watch.weight))
            )
        self._handles += handles

    def _see(self, watch: Watch, module: nn.Module | None, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) and output else output
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            return
        with torch._C.DisableTorchFunction():  # our own sums are no part of the model
            self._measure(watch, module, args, tensor)
            if tensor.requires_grad and torch.is_grad_enabled():
                tensor.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self._see_gradient(watch, gradient)
                )

    def _measure(self, watch: Watch, module: nn.Module | None, args: Any, tensor: Tensor) -> None:
        self._watches.setdefault(watch.name, watch)
        self._event += 1
        if module is not None:
            self._last = watch.name
            if isinstance(module, (*layers.LAYERS, *layers.NORMS, *layers.FUSED)):
                self._units_last = units_last(module)
        picked = watch.forward(tensor, self._event, self._units_last, self.sample)
        if watch.batch_norm is not None:
            input = tensor if watch.batch_norm.fused else args[0]
            known = self._sampled[1] if self._sampled[0] is input else None
            watch.batch_norm.see(input, known, self.sample)
        # a convolution's output is the input of the norm after it
        self._sampled = tensor, None if self._units_last and tensor.dim() > 2 else picked

    def _see_gradient(self, watch: Watch, gradient: Tensor) -> None:
        if self._handles:  # a backward pass after the block is not recorded
            self._event += 1
            with torch._C.DisableTorchFunction():
                watch.backward(gradient, self._event)

    def _see_input(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._event += 1
        found = [
            value
            for value in (*args, *kwargs.values())
            if isinstance(value, Tensor) and value.is_floating_point()
        ]
        for value in found:
            wide = torch.promote_types(value.dtype, torch.float32)
            self._inputs.add(number(value.detach().sum(dtype=wide)), self._event)

    def _see_function(self, name: str, slope: Any, output: Any) -> None:
        if self._inside:
            return
        activation = activations.of_function(name, slope)
        key = f"{self._last or 'input'} → {activation}"
        watch = self._watches.get(key) or Watch(key, None, activation)
        self._see(watch, None, (), output)

    def _weight_hook(self, weight: Weight) -> Callable[[Tensor], None]:
        def seen(parameter: Tensor) -> None:
            with torch._C.DisableTorchFunction():
                weight.after_backward(parameter)

        return seen

    def _before_step(self, *_: Any) -> None:
        for watch in self._watches.values():
            if watch.weight is not None:
                watch.weight.before_step(self.sample)

    def _after_step(self, *_: Any) -> None:
        for watch in self._watches.values():
            if watch.weight is not None:
                watch.weight.after_step(self.sample)

    @torch.no_grad()
    def _collect(self) -> list[LayerSignal]:
        """Every layer's numbers, by one transfer from each device."""
        found = [(watch, watch.parts()) for watch in self._watches.values()]
        tensors = [tensor for _, groups in found for group in groups for tensor in group]
        inputs = self._inputs.parts
        values = iter(_to_cpu([*inputs, *tensors]))
        self.input_failed = self._inputs.number([float(next(values)) for _ in inputs])
        return [
            watch.signal([[next(values) for _ in group] for group in groups])
            for watch, groups in found
        ]


class _Functions(TorchFunctionMode):
    """Shows the activations that a forward calls as functions or methods of torch."""

    def __init__(self, signals: Signals) -> None:
        super().__init__()
        self.signals = signals

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name.rstrip("_") in activations.NAMES:
            slope = kwargs.get("negative_slope", args[1] if len(args) > 1 else None)
            self.signals._see_function(name, slope, output)
        return output


def units_last(module: nn.Module) -> bool:
    """Whether a layer's units are on the last axis; in convolutions and channel norms on axis 1."""
    channels = (nn.modules.batchnorm._NormBase, nn.GroupNorm, *layers.CONVOLUTIONS)
    parts = layers.fused_parts(module)
    return parts == ("linear", "norm") or (parts is None and not isinstance(module, channels))


def _is_watched(module: nn.Module) -> bool:
    if isinstance(module, (*layers.LAYERS, *layers.NORMS, *layers.FUSED)):
        return True
    passing = (*layers.VIEWS, *layers.DROPOUTS, *layers.POOLS)
    return activations.of_module(module) is not None and not isinstance(module, passing)


def _to_cpu(found: list[Number]) -> list[Number]:
    """The same on the CPU, tensors in float64, those of one device in one transfer.

    Those of 0 dimensions are stacked by dtype first: most of them are, and there are hundreds.
    """
    result = list(found)
    tensors = {index: t for index, t in enumerate(found) if isinstance(t, Tensor)}
    groups: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for index, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype, tensor.shape), []).append(index)
    for device in {device for device, _, _ in groups}:
        mine = [indices for key, indices in groups.items() if key[0] == device]
        wide = torch.float32 if device.type == "mps" else torch.float64
        stacks = [torch.stack([tensors[index] for index in indices]) for indices in mine]
        flat = torch.cat([stack.flatten().to(wide) for stack in stacks]).cpu().double()
        parts = torch.split(flat, [stack.numel() for stack in stacks])
        for indices, part, stack in zip(mine, parts, stacks, strict=True):
            for index, value in zip(indices, part.reshape(stack.shape).unbind(), strict=True):
                result[index] = value
    return result
