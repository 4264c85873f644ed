"""torch.compile and torch.export of every module: one graph, eager's numbers, nothing twice."""

import copy
import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import assert_close
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

import fastnorm
import fastnorm.functional as FF
from fastnorm import use_backend
from fastnorm.kernels.devices import Device, assume

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
BATCHES = (11, 7, 13, 10)  # not the size of another axis: Dynamo would take them for equal


def last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


# A module, the shape of an input after its batch, how many inputs it takes, their layout.
CASES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...], int, Any]] = {
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(3, activation="relu"), (3,), 1, None),
    "BatchNorm1d, cumulative": (lambda: fastnorm.BatchNorm1d(3, momentum=None), (3, 5), 1, None),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(4, activation="silu"), (4, 5, 5), 2, None),
    "BatchNorm2d, last": (lambda: fastnorm.BatchNorm2d(4, activation="relu"), (4, 5, 5), 2, last),
    "BatchNorm3d": (
        lambda: fastnorm.BatchNorm3d(4, track_running_stats=False), (4, 2, 3, 3), 1, None,
    ),
    "SyncBatchNorm": (lambda: fastnorm.SyncBatchNorm(4), (4, 5), 1, None),
    "InstanceNorm1d": (
        lambda: fastnorm.InstanceNorm1d(3, affine=True, activation="relu"), (3, 6), 1, None,
    ),
    "InstanceNorm2d": (
        lambda: fastnorm.InstanceNorm2d(3, track_running_stats=True), (3, 6, 6), 2, last,
    ),
    "InstanceNorm3d": (lambda: fastnorm.InstanceNorm3d(3), (3, 2, 6, 6), 1, None),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 6, activation="silu"), (6, 5, 5), 2, None),
    "GroupNorm, last": (lambda: fastnorm.GroupNorm(2, 6), (6, 5, 5), 1, last),
    "LayerNorm": (lambda: fastnorm.LayerNorm(8, activation="gelu"), (5, 8), 1, None),
    "RMSNorm": (lambda: fastnorm.RMSNorm(8), (5, 8), 1, None),
    "AddLayerNorm": (lambda: fastnorm.AddLayerNorm(8), (8,), 2, None),
    "AddRMSNorm": (lambda: fastnorm.AddRMSNorm((2, 8)), (2, 8), 2, None),
    "LinearBatchNorm": (lambda: fastnorm.LinearBatchNorm(4, 6), (4,), 1, None),
    "Conv1dBatchNorm": (lambda: fastnorm.Conv1dBatchNorm(2, 4, 3), (2, 9), 1, None),
    "Conv2dBatchNorm": (
        lambda: fastnorm.Conv2dBatchNorm(3, 6, 1, activation="silu"), (3, 5, 5), 1, last,
    ),
    "Conv3dBatchNorm": (lambda: fastnorm.Conv3dBatchNorm(2, 4, (1, 3, 3)), (2, 3, 5, 5), 1, None),
}  # fmt: skip

pytestmark = [  # torch's own, about what it does itself
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
each_case = pytest.mark.parametrize(
    ("case", "training"),
    [
        pytest.param(
            name, training, id=f"{name}, {'training' if training else 'evaluation'}",
            marks=() if training and name in ("BatchNorm1d", "LayerNorm") else pytest.mark.slow,
        )
        for name in CASES
        for training in (True, False)
    ],
)  # fmt: skip


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def module_of(case: str, device: torch.device, training: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    module = CASES[case][0]().to(device).train(training)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.5)
    return module


def inputs_of(case: str, device: torch.device, batch: int) -> list[Tensor]:
    _, shape, count, layout = CASES[case]
    tensors = [torch.randn(batch, *shape, device=device) for _ in range(count)]
    return [(t if layout is None else layout(t)).requires_grad_() for t in tensors]


def everything(
    call: Callable[..., Any], module: torch.nn.Module, inputs: list[Tensor]
) -> list[Tensor]:
    """Outputs, gradients and buffers; dy is random, and the same each time."""
    found = call(*inputs)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    dys = [
        torch.empty_like(y).copy_(torch.randn(y.shape, device=y.device, generator=generator))
        for y in outputs
    ]
    leaves = [*inputs, *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, leaves, dys), *module.buffers()]


def assert_alike(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        if one.is_floating_point():
            assert_close(one, other.detach(), terms=300)
        else:
            assert torch.equal(one, other)


def test_every_module_has_a_case():
    classes = {
        name
        for name in fastnorm.__all__
        if inspect.isclass(kind := getattr(fastnorm, name)) and issubclass(kind, torch.nn.Module)
    }
    assert classes == {case.partition(",")[0] for case in CASES}


@each_case
def test_one_graph_for_all_batches(backend, case, training):
    """Without a graph break; one compilation for the first batch, one for all others."""
    for dynamic, last_new in ((None, 1), (True, 0)):
        torch._dynamo.reset()
        module = module_of(case, backend, training)
        plain, counter = copy.deepcopy(module), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=dynamic)
        compilations = []
        for batch in BATCHES:
            inputs = inputs_of(case, backend, batch)
            got = everything(compiled, module, inputs)
            assert_alike(got, everything(plain, plain, inputs))
            compilations.append(counter.frame_count)
        assert len(set(compilations[last_new:])) == 1
        assert not counters["graph_break"]


def listing(found: list[str]) -> Callable[..., Any]:
    """A compiler that runs graphs as they are, and lists the operators in them."""

    def compiler(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                wrapped = "auto_functionalized" in str(node.target)  # what moves buffers is
                found.append(str(node.args[0] if wrapped else node.target))
        return make_boxed_func(graph.forward)

    return compiler


@pytest.mark.parametrize("case", ["BatchNorm2d", "LayerNorm"])
def test_kernels_are_operators_in_the_graphs(backend, case):
    """Triton's are opaque; what is eager is made of torch's, which Inductor can fuse."""
    forward: list[str] = []
    backward: list[str] = []
    compiler = aot_autograd(fw_compiler=listing(forward), bw_compiler=listing(backward))
    module = module_of(case, backend)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    everything(compiled, module, inputs_of(case, backend, 4))
    assert forward
    assert backward
    ours = [name for name in (*forward, *backward) if "fastnorm" in name]
    if fastnorm.backend_for(torch.ones(1, device=backend)) == "eager":
        assert not ours  # nor a formula of ours where torch has an operator
        assert any(
            {"BatchNorm2d": "batch_norm", "LayerNorm": "layer_norm"}[case] in name
            for name in forward
        )
        return
    family = {"BatchNorm2d": "batch_norm", "LayerNorm": "layer_norm"}[case]
    update = "_with_update" if family == "batch_norm" else ""
    assert ours == [
        f"fastnorm.{family}_forward{update}.default", f"fastnorm.{family}_backward.default"
    ]  # fmt: skip
    assert not [n for n in (*forward, *backward) if any(w in n for w in ("mul", "sqrt", "sigmoid"))]


@pytest.mark.skipif(HAS_GPU, reason="there it is run")
@each_case
def test_as_traced_for_a_gpu_that_is_not_there(case, training):
    """`auto` is Triton there: one graph of kernels and views, whose tensors are all on the GPU.

    Nothing is asked of a device, nothing is promoted. Without gradients: those ask for a driver.
    """
    found: list[tuple[str, Tensor]] = []

    def compiler(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            values = node.meta.get("val", ())
            for value in values if isinstance(values, (tuple, list)) else (values,):
                if isinstance(value, Tensor):
                    wrapped = "auto_functionalized" in str(node.target)
                    found.append((str(node.args[0] if wrapped else node.target), value))
        return make_boxed_func(graph.forward)

    make, shape, count, layout = CASES[case]
    module = make().train(training).requires_grad_(False)
    with FakeTensorMode(), assume(Device(132)), use_backend("auto"), torch.no_grad():
        for layer in module.modules():
            for tensors in (layer._parameters, layer._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        fake = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                        is_buffer = tensors is layer._buffers
                        tensors[name] = fake if is_buffer else torch.nn.Parameter(fake, False)
        dtype = torch.float32 if "BatchNorm" in case and hasattr(module, "norm") else torch.bfloat16
        inputs = [torch.empty(50, *shape, device="cuda", dtype=dtype) for _ in range(count)]
        inputs = inputs if layout is None else [layout(x) for x in inputs]
        compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))
        try:
            outputs = compiled(*inputs)
        except RuntimeError as error:
            if not found or "not linked with support for cuda" not in str(error):
                raise
            outputs = ()  # traced; a torch without CUDA then moves no buffer, not even a fake one
        for y in outputs if isinstance(outputs, tuple) else (outputs,):
            assert y.is_cuda
            assert y.dtype is dtype
    assert any(name.startswith("fastnorm.") for name, _ in found)
    assert all(value.is_cuda for _, value in found)
    wide = {name for name, value in found if value.dtype is torch.float64}
    assert not wide or "cumulative" in case  # its share is the count's reciprocal


# ---- the choice of a backend ---------------------------------------------------------------------
def chosen(x: Tensor) -> Tensor:
    return x + (1 if fastnorm.backend_for(x) == "eager" else -1)


def test_another_backend_compiles_again():
    """What was traced holds for what was asked for then, in each thread by itself."""
    counter = CompileCounter()
    compiled = torch.compile(chosen, fullgraph=True, backend=counter)
    x = torch.zeros(2, device=DEVICE)

    def count(name: str) -> tuple[float, int]:
        with use_backend(name):
            return compiled(x)[0].item(), counter.frame_count

    assert [count("eager"), count("triton")] == [(1, 1), (-1, 2)]
    assert [count("eager"), count("triton")] == [(1, 2), (-1, 2)]
    with use_backend("triton"), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(lambda: compiled(x)[0].item()).result()
        assert elsewhere == chosen(torch.zeros(1, device=DEVICE)).item() + 2 * (not HAS_GPU)
        assert compiled(x)[0].item() == -1


def test_a_backend_that_the_compiled_function_asks_for():
    def nested(x: Tensor) -> tuple[Tensor, ...]:
        before = chosen(x)
        with use_backend("triton"):
            inner = chosen(x)
            with use_backend("eager"):
                innermost = chosen(x)
            again = chosen(x)
        return before, inner, innermost, again, chosen(x)

    compiled = torch.compile(nested, fullgraph=True, backend="eager")
    x = torch.zeros(2, device=DEVICE)
    for name in ("eager", "triton"):
        with use_backend(name):
            for _ in range(2):
                got = [y[0].item() for y in compiled(x)]
                assert got == [y[0].item() for y in nested(x)]
            assert got[1:4] == [-1, 1, -1]
            assert fastnorm.backend_for(x) == name
    assert fastnorm.environment.traced == []


def test_a_module_with_a_backend_of_its_own():
    """Kernels where the function says so, although eager is asked for around it."""
    seen: list[str] = []
    norm = fastnorm.LayerNorm(8, device=DEVICE)

    def function(x: Tensor) -> Tensor:
        with use_backend("triton"):
            return norm(x)

    compiled = torch.compile(
        function, fullgraph=True, backend=aot_autograd(fw_compiler=listing(seen))
    )
    x = torch.randn(3, 8, device=DEVICE)
    with use_backend("eager"), torch.no_grad():
        assert_close(compiled(x), norm(x), terms=8)
    assert [name for name in seen if "fastnorm" in name] == ["fastnorm.layer_norm_forward.default"]


# ---- torch.fx ------------------------------------------------------------------------------------
class Block(torch.nn.Module):
    """A layer of ours, which takes `count` inputs, and functions of ours."""

    def __init__(self, layer: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.layer, self.count = layer, count
        self.scale = torch.nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        y = self.layer(*[x] * self.count)
        normed = FF.layer_norm(vectors, (3,), self.scale, activation="relu")
        return y, FF.batch_norm(normed, None, None, self.scale, training=True, residual=vectors)


@pytest.mark.parametrize("case", CASES)
def test_symbolic_trace(backend, case):
    """A layer is one node, as torch.nn's are: feature extractors and quantizers look for it."""
    block = Block(module_of(case, backend, training=False), CASES[case][2]).to(backend)
    x, vectors = inputs_of(case, backend, 5)[0], torch.randn(4, 3, device=backend)
    traced = torch.fx.symbolic_trace(block)
    names = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert names == ["layer", FF.layer_norm, FF.batch_norm]
    (layer,) = (node for node in traced.graph.nodes if node.target == "layer")
    assert len(layer.args) == block.count
    torch.testing.assert_close(traced(x, vectors), block(x, vectors), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("whole", "shape"),
    [(fastnorm.LinearBatchNorm(4, 3), (6, 4)), (fastnorm.Conv2dBatchNorm(4, 3, 1), (2, 4, 5, 5))],
    ids=["linear", "conv"],
)
def test_symbolic_trace_of_a_layer_with_its_norm_alone(backend, whole, shape):
    """It is the root, and its parts are nodes, as those of a Sequential are."""
    x = torch.randn(shape, device=backend)
    whole = whole.to(backend).eval()
    traced = torch.fx.symbolic_trace(whole)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls[-1] == "norm"
    assert len(calls) == 2
    torch.testing.assert_close(traced(x), whole(x))


def test_symbolic_trace_of_a_layer_itself(backend):
    """Then there is nothing whose node it could be: what it calls is recorded."""
    norm = fastnorm.AddRMSNorm(8, activation="silu").to(backend)
    traced = torch.fx.symbolic_trace(norm)
    names = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert names == [FF.add_rms_norm]
    x, residual = torch.randn(2, 3, 8, device=backend)
    torch.testing.assert_close(traced(x, residual), norm(x, residual), rtol=0, atol=0)


# ---- what else a compiled module meets -----------------------------------------------------------
class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_hooks_and_parametrizations(backend):
    """Both reach a compiled call, though modules read their parameters without `getattr`."""
    norm = fastnorm.LayerNorm(8).to(backend)
    x = torch.randn(3, 8, device=backend)
    wanted = 2 * norm(x) + 1
    parametrize.register_parametrization(norm, "weight", Doubled())
    norm.register_forward_hook(lambda module, args, output: output + 1)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), wanted.detach(), terms=8)


@pytest.mark.slow
def test_what_changes_between_calls(backend):
    """momentum, eps and training are those of the call."""
    norm = fastnorm.BatchNorm1d(3).to(backend)
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, device=backend, requires_grad=True)
    for momentum, eps, training in (
        (0.1, 1e-5, True), (0.5, 1e-5, True), (0.5, 1.0, True), (0.5, 1.0, False), (None, 1.0, True)
    ):  # fmt: skip
        for module in (norm, plain):
            module.momentum, module.eps = momentum, eps
            module.train(training)
        assert_alike(everything(compiled, norm, [x]), everything(plain, plain, [x]))


@each_case
def test_compiled_autograd(backend, case, training):
    """The backward alone is compiled, of a forward that was not: torch traces it itself."""
    module = module_of(case, backend, training)
    plain, inputs = copy.deepcopy(module), inputs_of(case, backend, 5)
    wanted = everything(plain, plain, inputs)
    found = module(*inputs)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    dys = [torch.randn(y.shape, device=y.device, generator=generator) for y in outputs]
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        torch.autograd.backward(outputs, dys)
    leaves = [*inputs, *module.parameters()]
    got = [*outputs, *(leaf.grad for leaf in leaves), *module.buffers()]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["no_grad", "inference_mode"])
def test_without_gradients(backend, kind):
    norm = fastnorm.BatchNorm2d(4).to(backend)
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 3, 3, device=backend)
    with getattr(torch, kind)():
        for training in (True, False):
            norm.train(training)
            plain.train(training)
            assert_alike([compiled(x), *norm.buffers()], [plain(x), *plain.buffers()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(backend, dtype):
    """eps and momentum are float32 in the kernels, float64 for such an input: nothing is promoted,
    and nothing is rounded that is not without compilation."""
    norm = fastnorm.BatchNorm1d(3, eps=1e-3, momentum=0.3).to(backend, dtype)
    plain = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, 3, device=backend, dtype=dtype, requires_grad=True)
    got, wanted = everything(compiled, norm, [x]), everything(plain, plain, [x])
    assert_alike(got, wanted)
    if fastnorm.backend_for(x) == "triton":
        assert all(map(torch.equal, got, wanted))


@pytest.mark.slow
def test_by_inductor(backend, monkeypatch, tmp_path):
    """A network of them through torch's own compiler, with batches of several sizes."""
    # what it keeps between processes does not ask whether an operator has other arguments now
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        fastnorm.Conv2dBatchNorm(3, 8, 3, padding=1),
        fastnorm.Conv2dBatchNorm(8, 8, 1, activation="silu"),
        fastnorm.GroupNorm(2, 8),
        fastnorm.InstanceNorm2d(8, track_running_stats=True),
        torch.nn.Flatten(),
        fastnorm.LinearBatchNorm(8 * 25, 12),
        fastnorm.LayerNorm(12, activation="gelu"),
        fastnorm.RMSNorm(12),
    ).to(backend)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (4, 7, 9):
        x = torch.randn(batch, 3, 5, 5, device=backend, requires_grad=True)
        got = everything(compiled, model, [x])
        for one, other in zip(got, everything(plain, plain, [x]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# ---- torch.export --------------------------------------------------------------------------------
@each_case
def test_export(backend, case, training):
    """Outputs and buffers of the program, also once decomposed, for a batch of another size."""
    eager = fastnorm.backend_for(torch.ones(1, device=backend)) == "eager"
    module = module_of(case, backend, training)
    inputs = [x.detach() for x in inputs_of(case, backend, 4)]
    others = [x.detach() for x in inputs_of(case, backend, 6)]
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    for strict in (False, True):
        program = torch.export.export(module, tuple(inputs), strict=strict, dynamic_shapes=batch)
        operators = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert any("fastnorm" in name for name in operators) == (not eager)
        exported = program.module()
        for arguments in (inputs, others):
            plain = copy.deepcopy(module)  # a program has no buffers that it does not use
            plain.load_state_dict(exported.state_dict(), strict=False)
            torch.testing.assert_close(exported(*arguments), plain(*arguments))
            buffers = dict(plain.named_buffers())
            for name, buffer in exported.named_buffers():
                torch.testing.assert_close(buffer, buffers[name])
        decomposed = program.run_decompositions({}).module()
        torch.testing.assert_close(decomposed(*others), copy.deepcopy(module)(*others))


@pytest.mark.parametrize("fused", [False, True])
def test_export_names_the_layers(fused):
    """By the modules' names a quantizer finds what is a convolution and what its batch norm."""
    if fused:
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
        model = fastnorm.fuse(torch.nn.Sequential(*layers))
    else:
        model = torch.nn.Sequential(fastnorm.Conv2dBatchNorm(3, 4, 3))
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 5, 5),))
    owners = [
        next(reversed(node.meta["nn_module_stack"].values()))[0]
        for node in program.graph.nodes
        if node.op == "call_function"
    ]
    parts = ["0", "1", "2"] if fused else ["0.conv", "0.norm", "0.norm"]
    assert owners == parts
