"""What people do to any nn.Module: autocast, checkpoints, hooks, meta tensors, processes, threads."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from twins import close, randomize

import fastnorm
import fastnorm.functional as FF


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
                loss = module(twin.batch(backend).requires_grad_()).float().square().mean()
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
