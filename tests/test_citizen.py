"""What people do to any nn.Module: autocast, checkpoints, hooks, meta, processes, threads."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint
from twins import close, randomize

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import native
from fastnorm.kernels.devices import Device, assume


@dataclass(frozen=True)
class Twin:
    """A module of ours, torch's of the same state dict, and the shape of their input."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    shape: tuple[int, ...]
    memory_format: torch.memory_format = torch.contiguous_format

    def both(self, device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
        torch.manual_seed(0)
        ours, theirs = self.ours().to(device, dtype), self.theirs().to(device, dtype)
        randomize(theirs)
        ours.load_state_dict(theirs.state_dict())
        return [ours, theirs]

    def batch(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.shape, generator=generator) * 2 + 1
        return x.to(device, dtype).to(memory_format=self.memory_format)


class Gram(fastnorm.LinearBatchNorm):
    """The algorithm that is chosen for large inputs, on small ones."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var, training, momentum, count = self.norm.statistics()
        return FF.linear_batch_norm(
            input, self.linear.weight, self.linear.bias, mean, var, self.norm.weight,
            self.norm.bias, training, momentum, self.norm.eps, activation="tanh",
            algorithm="gram", num_batches_tracked=count,
        )  # fmt: skip


def _sequential(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


TWINS = {
    "BatchNorm1d": Twin(lambda: fastnorm.BatchNorm1d(3), lambda: nn.BatchNorm1d(3), (6, 3)),
    "BatchNorm2d": Twin(
        lambda: fastnorm.BatchNorm2d(3, momentum=None),
        lambda: nn.BatchNorm2d(3, momentum=None),
        (4, 3, 5, 2),
        torch.channels_last,
    ),
    "BatchNorm3d": Twin(
        lambda: fastnorm.BatchNorm3d(2), lambda: nn.BatchNorm3d(2), (2, 2, 3, 2, 2)
    ),
    "InstanceNorm2d": Twin(
        lambda: fastnorm.InstanceNorm2d(3, affine=True, track_running_stats=True),
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (2, 3, 4, 5),
    ),
    "GroupNorm": Twin(
        lambda: fastnorm.GroupNorm(2, 4),
        lambda: nn.GroupNorm(2, 4),
        (3, 4, 5, 2),
        torch.channels_last,
    ),
    "LayerNorm": Twin(lambda: fastnorm.LayerNorm(8), lambda: nn.LayerNorm(8), (6, 8)),
    "RMSNorm": Twin(lambda: fastnorm.RMSNorm([2, 4]), lambda: nn.RMSNorm([2, 4]), (5, 2, 4)),
    "LinearBatchNorm": Twin(
        lambda: fastnorm.LinearBatchNorm(4, 3, activation="tanh"),
        lambda: _sequential(linear=nn.Linear(4, 3, False), norm=nn.BatchNorm1d(3), act=nn.Tanh()),
        (6, 4),
    ),
    "Conv2dBatchNorm": Twin(
        lambda: fastnorm.Conv2dBatchNorm(2, 3, 1, activation="identity"),
        lambda: _sequential(conv=nn.Conv2d(2, 3, 1, bias=False), norm=nn.BatchNorm2d(3)),
        (3, 2, 4, 4),
    ),
    "Conv1dBatchNorm": Twin(
        lambda: fastnorm.Conv1dBatchNorm(2, 3, 3, padding=1, activation="identity"),
        lambda: _sequential(conv=nn.Conv1d(2, 3, 3, 1, 1, bias=False), norm=nn.BatchNorm1d(3)),
        (4, 2, 5),
    ),
}
TWINS["LinearBatchNorm, gram"] = Twin(
    lambda: Gram(4, 3, activation="tanh"), TWINS["LinearBatchNorm"].theirs, (6, 4)
)
each_twin = pytest.mark.parametrize("name", TWINS)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
HALVES = (torch.float16, torch.bfloat16)


def gradients(module: nn.Module, y: Tensor, x: Tensor) -> list[Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return list(torch.autograd.grad(y, [x, *module.parameters()], dy))


# ---- autocast ------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of its own
@pytest.mark.parametrize("under", HALVES, ids=lambda d: str(d)[6:])
@each_twin
def test_autocast(backend, name, under):
    """Dtypes of output, gradients and buffers are torch's, and so are the values."""
    twin, products = TWINS[name], name.startswith(("Linear", "Conv"))
    for training in (True, False):
        for dtype in (torch.float32, under, torch.float64):
            if dtype is torch.float64 and products:
                continue  # torch's layers refuse it: their weights are float32
            step = max(8 * torch.finfo(under if products else dtype).eps, 1e-5)
            found = []
            for module in twin.both(backend):
                module.train(training)
                x = twin.batch(backend, dtype).requires_grad_()
                if not products:
                    module.to(torch.promote_types(dtype, torch.float32))
                with torch.autocast(backend.type, dtype=under):
                    y = module(x)
                found.append([y, *gradients(module, y, x), *module.buffers()])
            for i, (got, want) in enumerate(zip(*found, strict=True)):
                what = f"{name} of {dtype}, {training=}: {i}"
                assert got.dtype == want.dtype, what
                torch.testing.assert_close(
                    got, want, rtol=step, atol=step, msg=lambda text, what=what: f"{what}: {text}"
                )


@contextlib.contextmanager
def autocast_of_a_gpu(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda")`, which is not to be had without one."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is tried")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of its own
@pytest.mark.parametrize("backend_name", ["auto", "eager"])
@each_twin
def test_autocast_of_a_gpu_that_is_not_there(name, backend_name):
    """Which norms give float32 there differs from a CPU, and from one torch to another."""
    twin = TWINS[name]
    modules = [make().eval() for make in (twin.ours, twin.theirs)]
    states = [module.state_dict().items() for module in modules]
    with FakeTensorMode(), assume(Device(132)), fastnorm.use_backend(backend_name):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(twin.shape, device="cuda", dtype=dtype)
            x = x.to(memory_format=twin.memory_format)
            found = []
            for module, state in zip(modules, states, strict=True):
                fakes = {n: torch.empty(t.shape, device="cuda", dtype=t.dtype) for n, t in state}
                with autocast_of_a_gpu(torch.bfloat16):
                    y = torch.func.functional_call(module, fakes, x)
                found.append((y.dtype, y.device, y.shape))
            assert found[0] == found[1]


CASTS = {
    "layer_norm": lambda x, r: FF.layer_norm(x, x.shape[2:], activation="gelu"),
    "rms_norm": lambda x, r: FF.rms_norm(x, x.shape[2:]),
    "group_norm": lambda x, r: FF.group_norm(x, 2, residual=r, activation="relu"),
    "group_norm, rows": lambda x, r: FF.group_norm(x[..., 0], 1),
    "add_layer_norm": lambda x, r: FF.add_layer_norm(x, r, x.shape[2:])[0],
    "add_rms_norm": lambda x, r: FF.add_rms_norm(x, r, x.shape[2:], activation="silu")[0],
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands in for a GPU")
@pytest.mark.parametrize("name", CASTS)
def test_autocast_of_a_gpu_is_in_the_kernels(monkeypatch, name):
    """Its float32 outputs are stored by the kernels: nothing is cast, before or after."""
    from interpreter import trace

    torch.manual_seed(0)
    # eighths, so that 16 bits hold their sum
    x, residual, dy = (torch.randint(-16, 17, (3, 4, 8)).bfloat16() / 8 for _ in range(3))

    def run(dtype: torch.dtype) -> tuple[list[Tensor], list[str], bool]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual)]
        with fastnorm.use_backend("triton"), trace() as launches, profile() as profiled:
            y = CASTS[name](*leaves)
        assert y.dtype is torch.float32
        gradient = dy[..., : y.shape[-1] if y.ndim == 3 else 1].reshape(y.shape).float()
        found = torch.autograd.grad(y, leaves, gradient, allow_unused=True)
        kept = [t for t in (y, *found) if t is not None]
        assert all(g.dtype is dtype for g in kept[1:])
        cast = any(event.key == "aten::_to_copy" for event in profiled.key_averages())
        return kept, [launch.kernel for launch in launches], cast

    want, launches, _ = run(torch.float32)
    wider = {torch.bfloat16: torch.float32}
    monkeypatch.setattr(native, "output_dtype", lambda t, *_, **__: wider.get(t.dtype, t.dtype))
    got, same, cast = run(torch.bfloat16)
    assert same == launches
    assert not cast
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
    for mine, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(mine, other.bfloat16(), rtol=0.01, atol=0.01)


@each_twin
def test_grad_scaler(backend, name):
    """Scaled steps in float16 move a model as torch's, and a step with an inf moves nothing."""
    twin, found = TWINS[name], []
    for module in twin.both(backend):
        scaler = torch.amp.GradScaler(backend.type, init_scale=256.0, growth_interval=1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        losses = []
        for step in range(3):
            with torch.autocast(backend.type, dtype=torch.float16):
                # (torch's own channels_last GroupNorm ends the process where no dx is wanted)
                y = module(twin.batch(backend).requires_grad_())
                # weighed: of what is normalized the sum of squares hardly depends on the input
                loss = (
                    y.float().square() * torch.linspace(0, 1, y.numel()).to(y).view_as(y)
                ).mean()
            losses.append(loss.detach())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step == 1:
                next(module.parameters()).grad.fill_(torch.inf)
            before = [p.detach().clone() for p in module.parameters()]
            scaler.step(optimizer)
            scaler.update()
            moved = [
                not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)
            ]
            assert all(moved) == (step != 1)
        found.append([*losses, *module.parameters(), *module.buffers(), scaler.get_scale()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=0.01, atol=0.01)


# ---- what holds tensors between forward and backward ---------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@each_twin
def test_checkpoint(backend, name, reentrant):
    """The recomputation gives the same gradients, and moves buffers again, as torch's does.

    Unless it ends early, once all is there that the backward needs: torch's InstanceNorm has not
    yet moved its buffers then, and our kernels have.
    """
    twin, found = TWINS[name], []
    for module in (*twin.both(backend, torch.float64), twin.both(backend, torch.float64)[0]):
        x = twin.batch(backend, torch.float64).requires_grad_()
        y = checkpoint(module, x, use_reentrant=reentrant) if len(found) < 2 else module(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
        found.append(([y, x.grad, *(p.grad for p in module.parameters())], [*module.buffers()]))
    ours, theirs, plain = found
    for got, want, once in zip(ours[0], theirs[0], plain[0], strict=True):
        close(got, want)
        assert torch.equal(got, once)
    if name != "InstanceNorm2d" or reentrant:
        for got, want in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@each_twin
def test_second_gradients_through_a_checkpoint(backend, name):
    twin = TWINS[name]
    module = twin.both(backend, torch.float64)[0]
    found = []
    for checkpointed in (True, False):
        x = twin.batch(backend, torch.float64).requires_grad_()
        y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    close(*found)


@each_mode
@each_twin
def test_saved_tensors_hooks(backend, name, training):
    """Everything large that a backward needs goes through the hooks, and comes back from them."""
    twin = TWINS[name]
    module = twin.both(backend)[0].train(training)
    x = twin.batch(backend).requires_grad_()
    twice = copy.deepcopy(module)
    y = twice(x)
    want = gradients(twice, y, x)
    packed: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Any:
        packed.append(tuple(t.shape))
        return t.detach().cpu().clone(), t.device, t.stride()

    def unpack(saved: Any) -> Tensor:
        t, device, stride = saved
        packed.append(())
        return torch.empty_strided(t.shape, stride, dtype=t.dtype, device=device).copy_(t)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = module(x)
    assert any(torch.Size(shape).numel() >= x.numel() for shape in packed)
    kept = len(packed)
    assert all(map(torch.equal, gradients(module, y, x), want))
    assert len(packed) <= 2 * kept, "none is unpacked twice"
    with torch.autograd.graph.save_on_cpu():
        y = twice(x)
    assert all(g.isfinite().all() for g in gradients(twice, y, x))


# ---- modules without memory ----------------------------------------------------------------------
@pytest.mark.unchecked  # whose torch.empty is none of those that torch.device knows
@each_twin
def test_deferred_initialization(name):
    """Made on the meta device, given memory and a state dict: the module that was meant."""
    twin = TWINS[name]
    want = twin.both(torch.device("cpu"))[0]
    with torch.device("meta"):
        ours, theirs = twin.ours(), twin.theirs()
    if theirs.state_dict().keys() >= {"running_mean"} and theirs.momentum is None:
        theirs.momentum = 0.1  # lest torch asks the meta device for the count
    assert all(t.is_meta for t in ours.state_dict().values())
    for training in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            x = twin.batch(torch.device("cpu")).to("meta", dtype).requires_grad_()
            y, other = (m.to(dtype).train(training)(x) for m in (ours, theirs))
            assert y.is_meta
            assert (y.shape, y.dtype, y.stride()) == (other.shape, other.dtype, other.stride())
            assert [g.shape for g in gradients(ours, y, x)] == [
                t.shape for t in (x, *ours.parameters())
            ]
    ours = ours.float().to_empty(device="cpu").train()
    ours.load_state_dict(want.state_dict())
    x = twin.batch(torch.device("cpu"))
    assert torch.equal(ours(x), want(x))
    for got, buffer in zip(ours.buffers(), want.buffers(), strict=True):
        assert torch.equal(got, buffer)


CONSTRUCTED = dict.fromkeys(
    ["BatchNorm1d", "InstanceNorm2d", "LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"], (4,)
) | {"GroupNorm": (2, 4), "LinearBatchNorm": (3, 4), "Conv2dBatchNorm": (3, 4, 1)}


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", CONSTRUCTED)
def test_skip_init(kind):
    """torch.nn.utils reads in a constructor's signature that there is a device."""
    constructor, arguments = getattr(fastnorm, kind), CONSTRUCTED[kind]
    module = torch.nn.utils.skip_init(constructor, *arguments, dtype=torch.float64)
    module.load_state_dict(constructor(*arguments).state_dict())
    assert {t.dtype for t in module.parameters()} <= {torch.float64}


@each_mode
@each_twin
def test_inference_mode(backend, name, training):
    twin, found = TWINS[name], []
    for module in twin.both(backend, torch.float64):
        with torch.inference_mode():
            y = module.train(training)(twin.batch(backend, torch.float64))
            assert y.is_inference()
        x = twin.batch(backend, torch.float64).requires_grad_()
        found.append([y, *gradients(module, module(x), x), *module.buffers()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@each_mode
@each_twin
def test_without_gradients(backend, name, training):
    """The bits of a call that autograd records, which one without it is not."""
    twin, found = TWINS[name], []
    for mode, frozen in [
        (torch.enable_grad, False),
        (torch.enable_grad, True),
        (torch.no_grad, False),
    ]:
        module = twin.both(backend)[0].train(training).requires_grad_(not frozen)
        with mode():
            y = module(twin.batch(backend))
        assert y.requires_grad == (mode is torch.enable_grad and not frozen)
        found.append([y.detach(), *module.buffers()])
    for tensors in zip(*found, strict=True):
        for other in tensors[1:]:
            torch.testing.assert_close(other, tensors[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_a_sum_without_gradients(backend, name):
    """Both results, as where autograd records them."""
    module = getattr(fastnorm, name)(8).to(backend)
    x, residual = (torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    recorded = module(x.to(backend), residual.to(backend))
    with torch.no_grad():
        alone = module(x.to(backend), residual.to(backend))
    assert not any(t.requires_grad for t in alone)
    for got, want in zip(alone, recorded, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=0)


# ---- processes and threads -----------------------------------------------------------------------
def _train_a_step(model: nn.Module, x: Tensor, answers: Any) -> None:
    """In another process, which has only what came through the queue."""
    with fastnorm.use_backend("eager"):
        y = model(x)
    y.square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.1)
    answers.put([p.grad.tolist() for p in model.parameters()])


def test_shared_memory_between_processes():
    """Hogwild: what a process does to parameters and buffers is there in the other."""
    twin = TWINS["LinearBatchNorm"]
    context = torch.multiprocessing.get_context("spawn")
    module = twin.both(torch.device("cpu"))[0].share_memory()
    alone = copy.deepcopy(module)
    assert all(t.is_shared() for t in module.state_dict().values())
    answers, here = context.SimpleQueue(), context.SimpleQueue()
    x = twin.batch(torch.device("cpu"))
    process = context.Process(target=_train_a_step, args=(module, x, answers))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    _train_a_step(alone, x, here)
    torch.testing.assert_close(answers.get(), here.get(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-5)
    assert module.norm.num_batches_tracked.item() == 6


@each_twin
def test_threads(name):
    """Forwards and backwards of one module at once, in evaluation, give what one gives."""
    device, twin = torch.device("cpu"), TWINS[name]
    module = twin.both(device)[0].eval()

    def step(i: int) -> list[Tensor]:
        with fastnorm.use_backend("eager"):
            x = (twin.batch(device) * (i + 1)).requires_grad_()
            y = module(x)
        return [y.detach(), *gradients(module, y, x)]

    want = [step(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(step, [0, 1, 2, 3] * 8)):
            assert all(map(torch.equal, got, want[i % 4]))


def test_threads_that_train_their_own_replica():
    """As nn.DataParallel's replicas do."""
    device, twin = torch.device("cpu"), TWINS["LinearBatchNorm"]

    def steps(seed: int) -> dict[str, Tensor]:
        module = twin.both(device)[0]
        for i in range(10):
            module(twin.batch(device) + seed + i).square().sum().backward()
        return module.state_dict() | {n: p.grad for n, p in module.named_parameters()}

    want = [steps(i) for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for got, other in zip(pool.map(steps, range(3)), want, strict=True):
            assert all(torch.equal(got[name], t) for name, t in other.items())


# ---- determinism ---------------------------------------------------------------------------------
@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # and torch.empty is filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


@each_mode
@each_twin
def test_deterministic_algorithms(backend, deterministic, name, training):
    twin = TWINS[name]
    results = []
    for _ in range(2):
        module = twin.both(backend)[0].train(training)
        x = twin.batch(backend).requires_grad_()
        y = module(x)
        results.append([y, *gradients(module, y, x), *module.buffers()])
    assert all(map(torch.equal, *results))
    assert all(t.isfinite().all() for t in results[0])


# ---- tensors whose memory is not their values ----------------------------------------------------
def _negated(t: Tensor) -> Tensor:
    """The same values, as the imaginary part of a conjugate: torch negates what it reads."""
    view = torch.view_as_complex(torch.stack([t, -t], -1)).conj().imag
    assert view.is_neg()
    return view


@each_mode
@each_twin
def test_views_that_are_negated(backend, name, training):
    """Kernels see memory, not what torch makes of it: input, dy and parameters may be negated."""
    twin, found = TWINS[name], []
    for like in (Tensor.clone, _negated, lambda t: torch._neg_view(-t)):
        module = twin.both(backend)[0].train(training)
        for layer in module.modules():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    layer._parameters[key] = nn.Parameter(like(parameter.detach()))
        x = like(twin.batch(backend)).requires_grad_()
        y = module(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
        leaves = [x, *module.parameters()]
        found.append([y, *torch.autograd.grad(y, leaves, like(dy)), *module.buffers()])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
