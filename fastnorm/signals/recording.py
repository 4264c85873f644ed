"""record: hooks on every layer of a model, there while a block runs."""

import math
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fastnorm.signals import shown
from fastnorm.signals.around import Functions, checked, module_by_module
from fastnorm.signals.findings import Finding, find
from fastnorm.signals.hooks import Hook
from fastnorm.signals.layers import LayerSignal
from fastnorm.signals.moments import First, number
from fastnorm.signals.samples import Samples
from fastnorm.signals.tensors import inside, is_plain
from fastnorm.signals.watch import Watch, collect, kind, total
from fastnorm.signals.weights import Weight
from fastnorm.structure import activations, layers

SAMPLE = 2**13


def record(
    model: nn.Module, *, optimizer: Optimizer | None = None, sample: int = SAMPLE
) -> "Signals":
    r"""Record what goes through `model`, forward and backward, while the block runs.

    .. math:: \mathrm{mean}\,y_l,\ \mathrm{std}\,y_l,\ \|\partial L/\partial y_l\|,\
              \|W_l\|,\ \|\partial L/\partial W_l\|,\ \|\Delta W_l\| / \|W_l\|

    for each layer, norm and activation l: those called as functions of torch in the model's forward
    included, and modules of your own with parameters and no parts. Everything is summed on the
    model's device as it passes; one transfer at the end of the block brings the numbers. Hooks are
    removed there, also after an exception; in copies of the model they do nothing. The model's
    results do not change, but for rounding where something was compiled, or a transformer in
    evaluation took torch's fused path: in the block modules run one by one. Calls by other threads
    are not recorded.

    Args:
        model: any module; several forward and backward passes in the block are merged.
        optimizer: also relates the last step of each weight to the weight.
        sample: of each tensor at most about so many elements, evenly spread, make the moments.
            Dead units, and NaN or infinities, are looked for in all elements.

    Returns:
        A context manager; its value has `layers`, `findings()`, `table()`, `plot(path)` and
        `html(path)`, to be asked for after the block.

    Raises:
        TypeError: `model` is not a module, or one of torch.jit; `optimizer` is not an optimizer.
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
        model = checked(model, optimizer, sample)
        self.model, self.optimizer, self.sample = model, optimizer, sample
        self.layers: list[LayerSignal] = []
        """In the order in which they were first called; filled at the end of the block."""
        self.input_failed = math.inf
        """When an input was not finite first, as a layer's `failed`."""
        self._watches: dict[str, Watch] = {}
        self._handles: list[RemovableHandle] = []
        self._around = ExitStack()
        self._functions: Functions | None = None
        self._samples = Samples(sample)
        self._output: Tensor | None = None  # the last one, and what is known of it
        self._known: tuple[int, Tensor, int] | None = None
        self._event = 0
        self._inputs = First()
        self._depth = 0  # calls of the model that are running
        self._called = False  # before the first, the model's parts alone may be called
        self._thread = 0  # others run as if nothing was
        self._running: list[Watch] = []  # layers that are running: their own functions are not seen
        self._last: str | None = (
            None  # the layer called last; whether its units are on the last axis
        )
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
        self._watches, self._last, self._called = {}, None, False
        self._thread = threading.get_ident()
        self._inputs = First()
        self.layers, self.input_failed = [], math.inf
        try:
            self._attach_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._functions is not None:
            self._functions.stop()
            self._functions = None
        self._around.close()
        for handle in self._handles:
            handle.remove()
        self._handles, self._running, self._depth = [], [], 0
        self._samples.finish()
        self.layers, self.input_failed = collect(list(self._watches.values()), self._inputs)
        self._watches, self._output, self._known = {}, None, None
        self._samples = Samples(self.sample)

    def _attach_all(self) -> None:
        self._attach_model()
        self._attach_layers()
        if self.optimizer is not None:
            self._handles.append(self.optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(self.optimizer.register_step_post_hook(self._after_step))
        self._around.enter_context(module_by_module(self.model))
        self._functions = Functions(self._see_function)
        self._listen()

    def _attach_layers(self) -> None:
        watches: dict[nn.Module, Watch] = {}  # without copies of modules, which have the hooks too

        def enter(called: nn.Module, args: Any) -> None:
            watch = watches.get(called)
            if watch is not None and not watch.open and self._concerned():
                self._running.append(watch)
                self._listen()

        def leave(called: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            watch = watches.get(called)
            if watch is not None and self._handles and self._concerned():
                if watch in self._running:  # else another hook refused the call
                    del self._running[self._running.index(watch) :]
                    self._listen()
                input = args[0] if args else kwargs.get("input")
                self._see(watch, called, input, output)

        whole = {module: layers.fused_parts(module) or () for module in self.model.modules()}
        parts = {getattr(module, part) for module, names in whole.items() for part in names}
        for name, module in self.model.named_modules():
            if kind(module).watched and module not in parts:  # hooks would have them called apart
                watch = watches[module] = Watch(name, module)
                # always_call: what is running must be known after an exception
                handle = module.register_forward_hook(
                    Hook(leave), with_kwargs=True, always_call=True
                )
                self._handles += [handle, module.register_forward_pre_hook(Hook(enter))]
                self._handles += watch.attach()

    def _see(self, watch: Watch, module: nn.Module | None, input: Any, output: Any) -> None:
        tensor = output
        while isinstance(tensor, tuple) and tensor:  # a packed sequence begins with its data
            tensor = tensor[0]
        with torch._C.DisableTorchFunction():  # our own sums are no part of the model
            if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and is_plain(tensor)):
                return
            if module is not None:
                self._last = watch.name
                if watch.units_last is not None:
                    self._units_last = watch.units_last
            # within a backward pass a checkpoint is computed again: seen already
            if torch._C._current_graph_task_id() < 0:
                self._measure(watch, input, tensor)
            self._output = tensor
            if tensor.requires_grad and torch.is_grad_enabled():
                handle: RemovableHandle = tensor.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self._see_gradient(watch, gradient)
                )
                if tensor.is_leaf:  # else it goes with its graph
                    self._handles.append(handle)

    def _measure(self, watch: Watch, input: Any, tensor: Tensor) -> None:
        if watch.name not in self._watches:
            self._watches[watch.name] = watch
            self._handles += watch.attach()
        self._event += 1
        output, version = tensor.detach(), -1 if tensor.is_inference() else tensor._version
        gap = watch.batch_norm
        if gap is not None and (gap.fused or isinstance(input, Tensor)):
            gap.see(output if gap.fused else input.detach(), self._sample_of(input), self._samples)
        picked = watch.forward(output, self._event, self._units_last, self._samples)
        # a convolution's output is the input of the norm after it
        channels = version >= 0 and not (self._units_last and tensor.dim() > 2)
        self._known = (version, picked, self._samples.turn) if channels else None

    def _sample_of(self, input: Any) -> Tensor | None:
        """The sample of the last output, where `input` is that, and nothing wrote to either."""
        output = self._output
        if self._known is None or output is None or input is not output:
            return None
        version, picked, turn = self._known
        return picked if output._version == version and turn == self._samples.turn else None

    def _see_gradient(self, watch: Watch, gradient: Tensor) -> None:
        if self._handles:  # a backward pass after the block is not recorded
            with torch._C.DisableTorchFunction():
                if is_plain(gradient):
                    self._event += 1
                    watch.backward(gradient, self._event)

    def _attach_model(self) -> None:
        # closures: with methods a copy of the model would hold a copy of the recording
        def enter(called: nn.Module, args: Any, kwargs: Any) -> None:
            if called is self.model and threading.get_ident() == self._thread:
                self._depth += 1
                self._called = True
                self._listen()
                if torch._C._current_graph_task_id() < 0:
                    self._see_input((args, kwargs))

        def leave(called: nn.Module, args: Any, output: Any) -> None:
            if called is self.model and threading.get_ident() == self._thread:
                self._depth = max(0, self._depth - 1)
                self._listen()

        self._handles.append(self.model.register_forward_pre_hook(Hook(enter), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(Hook(leave), always_call=True))

    def _concerned(self) -> bool:
        """Whether this thread is the recording's, or one in which its backward pass runs."""
        mine = threading.get_ident() == self._thread
        return mine or torch._C._current_graph_task_id() >= 0

    def _listen(self) -> None:
        """To functions in the model's calls, and before the first, but not inside of layers."""
        if self._functions is not None and threading.get_ident() == self._thread:
            self._functions.listen(not self._running and (self._depth > 0 or not self._called))

    def _see_input(self, arguments: Any) -> None:
        self._event += 1
        with torch._C.DisableTorchFunction():
            for value in inside(arguments):
                if value.is_floating_point() and is_plain(value):
                    self._inputs.add(number(total(value.detach())), self._event)

    def _see_function(self, name: str, slope: Any, input: Any, output: Any) -> None:
        """Of the model's own forward, or of the last output: other models are not recorded."""
        if self._running or not (self._depth or input is self._output):
            return
        activation = activations.of_function(name, slope)
        last = "input" if self._last is None else self._last or "(model)"
        key = f"{last} → {activation}"
        self._see(self._watches.get(key) or Watch(key, None, activation), None, None, output)

    def _before_step(self, *_: Any) -> None:
        for weight in self._weights():
            weight.before_step(self.sample)

    def _after_step(self, *_: Any) -> None:
        for weight in self._weights():
            weight.after_step(self.sample)

    def _weights(self) -> list[Weight]:
        return [watch.weight for watch in self._watches.values() if watch.weight is not None]
