"""Inputs on which group norms go wrong: our error is at most torch.nn's own in that dtype."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import FLOATS, OFTEN, memory_formats
from test_batch_norm_adversarial import NAMES, adversarial, error
from torch import Tensor

import fastnorm
import fastnorm.functional as FF

# groups of three channels and of one; the last two are of several tiles, and shared by programs
SHAPES = [((5, 6, 8), 2), ((5, 6, 8), 6), ((4, 6, 9, 11), 2), ((4, 6, 9, 11), 6)]
SHAPES += [((4, 6, 45, 46), 2), ((2, 6, 75, 76), 2)]


def outcome(call, x: Tensor, dy: Tensor, dtype: torch.dtype, small: torch.dtype) -> list[Tensor]:
    x = x.to(dtype).requires_grad_()
    w = torch.tensor([1.0, 0.5, -2.0, 1.5, 0.25, -1.0], device=x.device, dtype=small)
    b = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 0.0], device=x.device, dtype=small)
    leaves = (x, w.requires_grad_(), b.requires_grad_())
    y = call(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def calls(num_groups: int):
    return (
        lambda x, w, b: FF.group_norm(x, num_groups, w, b),
        lambda x, w, b: F.group_norm(x, num_groups, w, b),
        lambda x, w, b: reference.group_norm(x, num_groups, w, b, 1e-5, None, "identity"),
    )


def judge(got: list[Tensor], theirs: list[Tensor], want: list[Tensor], x: Tensor, dy: Tensor, G):
    """At most twice torch's error, or a few roundings where that is nearly none."""
    N, C = x.shape[:2]
    small = torch.float64 if x.dtype is torch.float64 else torch.float32
    # Float64 is measured against float64, whose own mean is off by eps · |x|; κ is what that does.
    spread = x.double().reshape(N * G, -1).std(1).clamp(min=1e-3)
    kappa = (x.abs().max() / spread).max().item() if x.dtype is torch.float64 else 1.0
    terms = x.numel() // min(C, N * G)
    for label, g, t, r in zip(("y", "dx", "dw", "db"), got, theirs, want, strict=True):
        mine, others = error(g, r), error(t, r)
        floor = 4 * torch.finfo(g.dtype).eps
        floor += 4 * torch.finfo(small).eps * (kappa * N if kappa > 1 else terms**0.5)
        if label == "dx":  # what is left where the true gradient cancels to nearly nothing
            floor *= max(1.0, (dy.abs().max() * r.abs().max().reciprocal().clamp(max=1e6)).item())
        assert mine <= max(2 * others, floor), (label, mine, others, floor)


def often(shape: tuple[int, ...], num_groups: int, dtype: torch.dtype) -> object:
    """Of several tiles, one dtype is enough where a minute counts."""
    slow = dtype not in (OFTEN[:1] if math.prod(shape) > 10_000 else OFTEN)
    words = f"{shape}-{num_groups}-{str(dtype)[6:]}"
    return pytest.param(shape, num_groups, dtype, marks=[pytest.mark.slow] * slow, id=words)


@pytest.mark.parametrize(
    ("shape", "num_groups", "dtype"), [often(*case, dtype) for dtype in FLOATS for case in SHAPES]
)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_torchs(backend, name, shape, dtype, num_groups):
    if name == "large" and dtype is torch.float64:
        pytest.skip("the float64 reference overflows where its input nearly does")
    x = adversarial(name, shape, dtype).to(backend)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(backend, dtype)
    small = torch.float64 if dtype is torch.float64 else torch.float32
    ours, torchs, float64 = calls(num_groups)
    want = outcome(float64, x.double(), dy.double(), torch.float64, torch.float64)
    kernels = fastnorm.backend_for(x) == "triton"
    for memory_format in memory_formats(len(shape)):
        laid_out = x.to(memory_format=memory_format)
        # torch's own channels_last takes E[x²] − E[x]²; our kernels are held to its better layout
        theirs = outcome(torchs, x if kernels else laid_out, dy, dtype, small)
        got = outcome(ours, laid_out, dy, dtype, small)
        judge(got, theirs, want, x, dy, num_groups)


@pytest.mark.parametrize("shape", [(4, 4, 3000), (4, 4, 30000)], ids=["whole", "split"])
def test_a_group_that_is_huge_further_on(backend, shape):
    """A group's first tile says nothing of the others' squares."""
    if fastnorm.backend_for(torch.empty(0, device=backend)) != "triton":
        pytest.skip("torch's own overflow")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x[:, 1::2] *= 1e30
    y = FF.group_norm(x.to(backend), 2)
    torch.testing.assert_close(y.cpu().double(), F.group_norm(x.double(), 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_infinities_and_nan_go_where_torchs_go(backend, value, shape, num_groups):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(backend)
    x[1, 1, 2] = value
    ours, torchs, _ = calls(num_groups)
    for memory_format in memory_formats(len(shape)):
        found = [
            outcome(
                call, x.to(memory_format=memory_format), torch.ones_like(x), *[torch.float32] * 2
            )
            for call in (ours, torchs)
        ]
        for got, want in zip(*found, strict=True):
            assert torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize("value", [1e4, math.inf, math.nan])
def test_running_statistics_of_bad_values_are_torchs(backend, value, use_input_stats):
    x = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(4)).to(backend)
    x[1, 1, 2] = value
    found = []
    for library in (FF, F):
        mean, var = torch.zeros(2, device=backend), torch.ones(2, device=backend)
        y = library.instance_norm(x, mean, var, use_input_stats=use_input_stats)
        found.append((y.isnan(), mean, var))
    assert torch.equal(found[0][0], found[1][0])
    for got, want in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_zero_weight(backend, weight):
    """γ = 0 kills dx, not dγ."""
    for shape in ((4, 6, 5), (2, 6, 75, 76)):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(shape, generator=generator).to(backend).requires_grad_()
        w = torch.full((6,), weight, device=backend).requires_grad_()
        dy = torch.randn(shape, generator=generator).to(backend)
        dx, dw = torch.autograd.grad(FF.group_norm(x, 2, w), (x, w), dy)
        assert dx.abs().max() <= abs(weight) * 10
        leaf = x.detach().double(), w.detach().double().requires_grad_()
        want = reference.group_norm(leaf[0], 2, leaf[1], None, 1e-5, None, "identity")
        (want_dw,) = torch.autograd.grad(want, leaf[1], dy.double())
        torch.testing.assert_close(dw.double(), want_dw, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 1.0])
def test_eps(backend, eps):
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(7)).to(backend, torch.float64)
    want = reference.group_norm(x, 2, None, None, eps, None, "identity")
    torch.testing.assert_close(FF.group_norm(x, 2, eps=eps), want, rtol=1e-13, atol=1e-13)
    want = reference.group_norm(x, 6, None, None, eps, None, "identity")
    torch.testing.assert_close(FF.instance_norm(x, eps=eps), want, rtol=1e-13, atol=1e-13)
