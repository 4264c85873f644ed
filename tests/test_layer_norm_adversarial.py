"""Rows on which norms go wrong: our error is at most torch.nn's own in that dtype."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import FLOATS
from probes import kernels_run
from test_batch_norm_adversarial import error
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.kernels import devices, row_plans

KINDS = ("layer_norm", "rms_norm")
SHAPE = (6, 160)


@pytest.fixture(params=["registers", "looped", "split"])
def way(request, monkeypatch) -> str:
    """Rows in registers, in a loop of tiles, and in programs that share one."""
    if request.param != "registers":
        for name, value in (("WIDEST_ROW", 64), ("WIDEST_ROW_BACKWARD", 64), ("LOOP_TILE", 64)):
            monkeypatch.setattr(row_plans, name, value)
        monkeypatch.setattr(row_plans, "COLUMN_TILE", (4, 64))
    if request.param == "split":
        monkeypatch.setattr(devices, "INTERPRETER", devices.Device(multiprocessors=16))
    return request.param


def adversarial(name: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    big = torch.finfo(dtype).max
    if name == "large mean, small spread":
        x = 1e4 + 1e-2 * x
    elif name == "mean of 1000 std":
        x = 1000 + x
    elif name == "one constant row":
        x[1] = 3.0
    elif name == "zeros":
        x = torch.zeros_like(x)
    elif name == "denormals":
        x = x * torch.finfo(dtype).smallest_normal / 16
    elif name == "large":
        x = x.clamp(-3, 3) * (big / 64)
    elif name == "1e30" and dtype is not torch.float16:
        x = x * 1e30
    elif name == "an outlier first":
        x[:, 0] = 1e4
    elif name == "an outlier last":
        x[:, -1] = -1e4
    elif name == "tiny":
        x = x * 1e-6
    return x.to(dtype)


NAMES = [
    "large mean, small spread", "mean of 1000 std", "one constant row", "zeros", "denormals",
    "large", "1e30", "an outlier first", "an outlier last", "tiny",
]  # fmt: skip


def ours(kind: str, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    parameters = (w, b) if kind == "layer_norm" else (w,)
    return getattr(FF, kind)(x, x.shape[-1:], *parameters, eps)


def torchs(kind: str, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    parameters = (w, b) if kind == "layer_norm" else (w,)
    return getattr(F, kind)(x, x.shape[-1:], *parameters, eps)


def float64(kind: str, x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    center = kind == "layer_norm"
    return reference.layer_norm(x, 1, w, b if center else None, eps, "identity", center)


def outcome(call, kind: str, x: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    x = x.to(dtype).requires_grad_()
    values = torch.linspace(-2, 2, x.shape[-1], device=x.device, dtype=dtype)
    w, b = values.clone().requires_grad_(), values.flip(0).requires_grad_()
    y = call(kind, x, w, b, 1e-5)
    leaves = (x, w, b) if kind == "layer_norm" else (x, w)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_torchs(backend, way, name, kind, dtype):
    if name == "large" and dtype is torch.float64:
        pytest.skip("the float64 reference overflows where its input nearly does")
    x = adversarial(name, dtype).to(backend)
    dy = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)).to(backend, dtype)
    got = outcome(ours, kind, x, dy, dtype)
    theirs = outcome(torchs, kind, x, dy, dtype)
    want = outcome(float64, kind, x.double(), dy.double(), torch.float64)
    one, zero = torch.ones((), device=backend), torch.zeros((), device=backend)
    xhat = float64(kind, x.double(), one, zero, 1e-5)
    # Float64 is measured against float64, whose own mean is off by eps · |x|; κ is what that does.
    spread = x.double().std(1).clamp(min=1e-3)
    kappa = (x.abs().amax(1) / spread).max().item() if dtype is torch.float64 else 1.0
    compute = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    for label, g, t, r in zip(("y", "dx", "dw", "db"), got, theirs, want, strict=False):
        mine, others = error(g, r), error(t, r)
        floor = 4 * torch.finfo(g.dtype).eps + 4 * compute * kappa
        if label == "dx":  # what is left where the true gradient cancels to nearly nothing
            floor *= max(1.0, (dy.abs().max() * r.abs().max().reciprocal().clamp(max=1e6)).item())
        if label == "dw":  # likewise, of a sum over rows
            added = (dy.double() * xhat).abs().sum(0).max()
            floor *= max(1.0, (added / r.abs().max().clamp(min=1e-300)).item())
        assert mine <= max(2 * others, floor), (label, mine, others, floor)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nan_go_where_torchs_go(backend, way, kind, value):
    x = adversarial("", torch.float32).to(backend)
    x[1, 70] = value
    dy = torch.ones_like(x)
    got, want = (outcome(call, kind, x, dy, torch.float32) for call in (ours, torchs))
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert got[1][0].isfinite().all(), "other rows are left alone"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_zero_weight(backend, kind, weight):
    """γ = 0 kills dx, not dγ."""
    x = adversarial("", torch.float32).to(backend).requires_grad_()
    w = torch.full((SHAPE[1],), weight, device=backend).requires_grad_()
    dy = torch.randn(SHAPE, generator=torch.Generator().manual_seed(6)).to(backend)
    y = ours(kind, x, w, torch.zeros_like(w), 1e-5)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    assert dx.abs().max() <= abs(weight) * 10
    xhat = float64(kind, x.detach().double(), torch.ones(()).to(x), torch.zeros(()).to(x), 1e-5)
    torch.testing.assert_close(dw.double(), (dy * xhat).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 1.0])
def test_eps(backend, way, kind, eps):
    x = adversarial("", torch.float64).to(backend)
    w, b = torch.ones(2, SHAPE[1], dtype=torch.float64, device=backend)
    want = float64(kind, x, w, b, eps)
    torch.testing.assert_close(ours(kind, x, w, b, eps), want, rtol=1e-13, atol=1e-13)


def test_a_row_that_is_huge_further_on(backend, monkeypatch):
    """The first tile of a program's share says nothing of the others' squares."""
    if not kernels_run(backend):
        pytest.skip("torch's own overflow")
    for name, value in (("WIDEST_ROW", 64), ("LOOP_TILE", 64)):
        monkeypatch.setattr(row_plans, name, value)
    monkeypatch.setattr(devices, "INTERPRETER", devices.Device(multiprocessors=5))
    x = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
    x[:, 1000:] *= 1e30
    y = FF.layer_norm(x.to(backend), (4000,))
    want = F.layer_norm(x.double(), (4000,))
    torch.testing.assert_close(y.cpu().double(), want, atol=1e-5, rtol=1e-5)


def test_a_huge_mean_keeps_its_rest(backend, way):
    """Squares overflow even of what is left of a mean in one float, which is much of a std."""
    if not kernels_run(backend):
        pytest.skip("torch's own overflow")
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (1e30 + 1e24 * x).to(backend, torch.float32)
    want = F.layer_norm(x.double(), SHAPE[1:])
    torch.testing.assert_close(FF.layer_norm(x, SHAPE[1:]).double(), want, atol=1e-5, rtol=1e-5)


def test_a_zero_keeps_its_sign(backend, way):
    """Where there is no bias, none is added."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(backend)
    x[:, ::2] = -0.0
    assert torch.equal(FF.rms_norm(x, SHAPE[1:]).signbit(), F.rms_norm(x, SHAPE[1:]).signbit())
