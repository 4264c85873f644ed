"""The operators of torch.ops.fastnorm: schemas, fakes, gradients, and who gets to see them."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
import fastnorm.functional as FF
from fastnorm.ops import operators
from fastnorm.ops.layout import on_device_of

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
OPERATIONS = sorted({*operators.__all__} - {"sync_batch_norm"})  # collectives are no operator
HALF, DOUBLE = torch.bfloat16, torch.float64

Arguments = tuple[Any, ...]


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def buffers(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels, device=DEVICE), torch.rand(channels, device=DEVICE)


def arguments_of(operation: str) -> list[Arguments]:
    """Arguments of its operator: both layouts, with and without what may be absent.

    A momentum is two of them, a tensor or a number.
    """

    def r(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, device=DEVICE, dtype=dtype)

    count, tenth = torch.tensor(3, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    linear = [
        (torch.float32, buffers(6), True, "relu", "gram", count),
        (HALF, (None, None), True, "tanh", "gram", None),
        (torch.float32, buffers(6), False, "identity", "gram", None),
        (torch.float32, buffers(6), True, "silu", "epilogue", count),
        (HALF, buffers(6), False, "relu", "epilogue", None),
        (torch.float32, buffers(6), True, "relu", "unfused", count),
    ]
    few, many = 1e-5, 0.0625
    return {
        "batch_norm": [
            (r(4, 3, 5), *buffers(3), r(3), r(3), True, None, 0.1, few, None, "relu", count),
            (last(r(2, 4, 3, 2, dtype=HALF)), None, None, r(4), None, True, None, 0.1, few,
             last(r(2, 4, 3, 2)), "silu", None),
            (r(6, 3, dtype=DOUBLE), *buffers(3), None, r(3), True, tenth, None, many,
             r(6, 3, dtype=HALF), "relu", None),
            (r(4, 3, 5), *buffers(3), r(3), r(3), True, None, None, few, None, "relu", count),
            (r(4, 3, 5), *buffers(3), r(3), r(3), False, None, 0.1, few, None, "gelu", None),
        ],
        "group_norm": [
            (r(2, 6, 5), 3, r(6), r(6), few, r(2, 6, 5, dtype=HALF), "leaky_relu"),
            (last(r(2, 4, 3, 2)), 2, None, None, few, None, "identity"),
        ],
        "instance_norm": [
            (r(2, 3, 6), *buffers(3), r(3), r(3), True, None, 0.1, few, None, "tanh"),
            (r(2, 3, 6), *buffers(3), None, None, True, tenth, 0.0, few, r(2, 3, 6), "relu"),
            (r(2, 3, 6), *buffers(3), r(3), None, False, None, 0.1, few, None, "identity"),
        ],
        "layer_norm": [
            (r(2, 3, 8), (8,), r(8), r(8), few, "gelu"),
            (r(8, 6, dtype=HALF).t(), (8,), None, r(8), few, "identity"),
        ],
        "rms_norm": [(r(2, 3, 8), (3, 8), r(3, 8), few, "identity")],
        "add_layer_norm": [(r(3, 8, dtype=HALF), r(3, 8), (8,), r(8), r(8), few, "silu")],
        "add_rms_norm": [(r(3, 8), r(3, 8), (8,), r(8), few, "identity")],
        "linear_batch_norm": [
            (r(20, 4, dtype=dtype), r(6, 4, dtype=dtype),
             None if algorithm == "unfused" else r(6, dtype=dtype), *moments, r(6), r(6), training,
             None, 0.1, few, activation, algorithm, number)
            for dtype, moments, training, activation, algorithm, number in linear
        ],
    }[operation]  # fmt: skip


def with_gradients(operation: str, arguments: Arguments) -> Arguments:
    """The same; whatever has a gradient requires it."""
    schema = operator_of(operation)._schema.arguments
    fixed = ("running_mean", "running_var", "momentum", "num_batches_tracked")
    return tuple(
        value.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(value, Tensor) and argument.name not in fixed
        else value
        for value, argument in zip(arguments, schema, strict=True)
    )


def operator_of(operation: str) -> Any:
    return getattr(torch.ops.fastnorm, operation).default


def name_of(operator: Any) -> str:
    return str(operator._schema.name.removeprefix("fastnorm::"))


def copied(arguments: Arguments, grad: bool = True) -> Arguments:
    return tuple(
        a.detach().clone().requires_grad_(grad and a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments
    )


def everything(
    function: Callable[..., Any], arguments: Arguments, fill: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Outputs, arguments after the call (buffers move), and gradients where dy is `fill`(y)."""
    found = function(*arguments)
    outputs = list(found) if isinstance(found, tuple) else [found]
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    leaves = [t for t in tensors if t.requires_grad]
    return [*outputs, *tensors, *torch.autograd.grad(outputs, leaves, [fill(y) for y in outputs])]


def random_like(y: Tensor) -> Tensor:
    """Contiguous, and the same each time."""
    generator = torch.Generator(y.device).manual_seed(0)
    return torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)


class Seen(TorchDispatchMode):
    """Lists the calls of our operators, with arguments as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Arguments]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastnorm":
            self.calls.append((func, copied(args, grad=False)))  # below autograd
        return func(*args, **(kwargs or {}))


def kernel_calls(operation: str) -> list[tuple[Any, Arguments]]:
    """What the operators of kernels are called with, forward and backward."""
    with Seen() as seen:
        for arguments in arguments_of(operation):
            everything(operator_of(operation), with_gradients(operation, arguments), random_like)
    return seen.calls


def test_every_operation_is_an_operator_and_every_kernel_is_tested():
    """What is defined and not called here would be found by nobody."""
    public = [name for name in sorted(FF.__all__) if name != "conv_batch_norm"]
    assert public == OPERATIONS  # conv_batch_norm is a convolution and one of these
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    defined = {name for namespace, name in names if namespace == "fastnorm"}
    kernels = {name_of(call[0]) for operation in OPERATIONS for call in kernel_calls(operation)}
    assert kernels == defined - set(OPERATIONS)
    assert set(OPERATIONS) <= defined


FAST = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck(operation):
    """Of every kernel, forward and backward, with the arguments that the operation gives it."""
    for operator, arguments in kernel_calls(operation):
        torch.library.opcheck(operator, arguments, test_utils=FAST)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # torch's own, about its fakes
@pytest.mark.parametrize("operation", OPERATIONS)
def test_opcheck_with_a_graph(operation):
    """Of the operation itself, too, and with all of torch's checks."""
    for arguments in arguments_of(operation):
        torch.library.opcheck(operator_of(operation), arguments)
        torch.library.opcheck(operator_of(operation), with_gradients(operation, arguments))
    for operator, arguments in kernel_calls(operation):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_whoever_looks_sees_the_kernels_and_changes_nothing(operation):
    """Operators under a dispatch mode, launches without one: the same bits."""
    for arguments in arguments_of(operation):
        arguments = with_gradients(operation, arguments)
        with Seen() as seen:
            watched = everything(operator_of(operation), copied(arguments), random_like)
        alone = everything(operator_of(operation), arguments, random_like)
        stages = {name_of(call[0]).rpartition("norm_")[2] for call in seen.calls}
        assert any("forward" in stage for stage in stages)
        assert any("backward" in stage for stage in stages)
        for one, other in zip(watched, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_fake_tensors(operation):
    """Shapes, dtypes and strides, and those of the gradients, without a computation."""
    for arguments in arguments_of(operation):
        arguments = with_gradients(operation, arguments)
        real = everything(operator_of(operation), arguments, random_like)
        with FakeTensorMode() as mode:
            fakes = tuple(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
            faked = everything(
                operator_of(operation),
                fakes,
                lambda y: torch.empty(y.shape, dtype=y.dtype, device=DEVICE),
            )
        for one, other in zip(faked, real, strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            assert one.stride() == other.stride()


def test_fake_tensors_of_a_gpu_that_is_not_there():
    """Who plans for another machine: `auto` is Triton there, and nothing touches a device."""
    with FakeTensorMode(), fastnorm.use_backend("auto"), torch.no_grad():
        norm = fastnorm.BatchNorm2d(4, device="cuda", dtype=torch.bfloat16)
        x = last(torch.empty(2, 4, 3, 3, device="cuda", dtype=torch.bfloat16))
        y = norm(x)
        assert fastnorm.backend_for(x) == "triton"
        assert (y.device.type, y.dtype, y.stride()) == ("cuda", torch.bfloat16, x.stride())


# ---- determinism ---------------------------------------------------------------------------------
@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_where_determinism_is_asked_for(backend, operation, deterministic):
    """No operation refuses it, on either backend, and none needs it to give the same bits."""
    implementation = fastnorm.backend.implementation(torch.ones(1, device=backend))
    for arguments in arguments_of(operation):
        runs = []
        for enabled in (True, True, False):
            torch.use_deterministic_algorithms(enabled)
            copies = copied(with_gradients(operation, arguments))
            arguments_now = joined(operation, copies)
            function = getattr(implementation, operation)
            runs.append(everything(function, arguments_now, random_like))
        for again in runs[1:]:
            for one, other in zip(runs[0], again, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


def joined(operation: str, arguments: Arguments) -> Arguments:
    """Those of the function: one momentum."""
    names = [argument.name for argument in operator_of(operation)._schema.arguments]
    if "momentum" not in names:
        return arguments
    at = names.index("momentum")
    tensor, number = arguments[at : at + 2]
    return (*arguments[:at], number if tensor is None else tensor, *arguments[at + 2 :])


# ---- what takes a GPU ----------------------------------------------------------------------------
def layers() -> list[tuple[torch.nn.Module, Tensor]]:
    """A layer of each family, and an input of it."""
    layers = [
        (fastnorm.BatchNorm2d(8, activation="relu"), torch.randn(4, 8, 7, 7)),
        (fastnorm.BatchNorm1d(64, momentum=None), torch.randn(4096, 64)),
        (fastnorm.GroupNorm(2, 8, activation="silu"), torch.randn(4, 8, 7, 7)),
        (fastnorm.InstanceNorm2d(8, track_running_stats=True), torch.randn(4, 8, 7, 7)),
        (fastnorm.LayerNorm(96), torch.randn(33, 96)),
        (fastnorm.RMSNorm(96), torch.randn(33, 96)),
        (fastnorm.LinearBatchNorm(32, 64), torch.randn(4096, 32)),
    ]
    return [(module.cuda(), x.cuda().requires_grad_()) for module, x in layers]


def step(module: torch.nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.gpu
def test_cuda_graphs():
    """A step is captured, and replayed with other inputs: no synchronization, nothing left out.

    Replays move the buffers too: with a cumulative average by a share that the device computes.
    """
    for module, x in layers():
        plain = copy.deepcopy(module)
        with torch.no_grad():
            dy = torch.randn_like(plain.eval()(x))
        plain.train()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled before the capture
            for _ in range(3):
                step(module, x, dy)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(module, x, dy)
        module.load_state_dict(plain.state_dict())
        for seed in range(3):
            torch.manual_seed(seed)
            with torch.no_grad():
                x.copy_(torch.randn_like(x) * 2 + seed)
                dy.copy_(torch.randn_like(dy))
            graph.replay()
            wanted = step(plain, x, dy)
            torch.cuda.synchronize()
            for one, other in zip(
                [*captured, *module.buffers()], [*wanted, *plain.buffers()], strict=True
            ):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.gpu
def test_no_synchronization():
    """The host waits for nothing, forward or backward."""
    for module, x in layers():
        dy = torch.randn_like(module(x))
        step(module, x, dy)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(module, x, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_streams():
    """Kernels go to the current stream: they see what it has computed, and it what they have."""
    for module, x in layers():
        plain = copy.deepcopy(module)
        dy = torch.randn_like(copy.deepcopy(module)(x))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # what is not on this stream would overtake it
            late = (2 * x.detach() + 1).requires_grad_()
            got = [*step(module, late, dy), *module.buffers()]
            total = [t.double().sum() for t in got]
        torch.cuda.current_stream().wait_stream(stream)
        now = (2 * x.detach() + 1).requires_grad_()
        expected = [*step(plain, now, dy), *plain.buffers()]
        for one, other, sum_of_one in zip(got, expected, total, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            torch.testing.assert_close(sum_of_one, one.double().sum(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("own", "current", "initialized"),
    [(1, 0, True), (1, 1, True), (0, 0, True), (0, 1, True), (1, 0, False), (None, 0, True)],
)
def test_the_current_device_changes_where_it_is_another(monkeypatch, own, current, initialized):
    """A CPU's tensor, or a fake one where no GPU was started, changes none."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: device)
    x: Any = SimpleNamespace(is_cuda=own is not None, device="own", get_device=lambda: own)
    changes = initialized and own not in (None, current)
    assert (on_device_of(x) == "own") == changes


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    """Kernels run where the tensors are, forward and backward, and leave the current device."""
    for module, x in layers():
        dy = torch.randn_like(copy.deepcopy(module)(x))
        plain = copy.deepcopy(module)
        there = copy.deepcopy(module).to("cuda:1")
        far, far_dy = x.detach().to("cuda:1").requires_grad_(), dy.to("cuda:1")
        assert torch.cuda.current_device() == 0
        got = [*step(there, far, far_dy), *there.buffers()]
        assert torch.cuda.current_device() == 0
        for one, other in zip(got, [*step(plain, x, dy), *plain.buffers()], strict=True):
            assert one.device == torch.device("cuda:1")
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0)
