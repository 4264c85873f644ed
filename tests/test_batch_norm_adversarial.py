"""Inputs on which norms go wrong: our error is at most torch.nn's own in that dtype."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import each_dtype
from torch import Tensor

import fastnorm
import fastnorm.functional as FF

SHAPES = [(64, 3), (6, 3, 8, 9), (9, 3, 60, 60), (40, 3, 2, 2), (4000, 3, 2, 2)]


def adversarial(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    big = torch.finfo(dtype).max
    if name == "large mean, small spread":
        x = 1e4 + 1e-2 * x
    elif name == "mean of 1000 std":
        x = 1000 + x
    elif name == "one constant channel":
        x[:, 1] = 3.0
    elif name == "all equal":
        x = torch.full_like(x, 1.1)
    elif name == "zeros":
        x = torch.zeros_like(x)
    elif name == "denormals":
        x = x * torch.finfo(dtype).smallest_normal / 16
    elif name == "large":
        x = x.clamp(-3, 3) * (big / 64)
    elif name == "1e30" and dtype not in (torch.float16,):
        x = x * 1e30
    elif name == "an outlier first":
        x[0] = 1e4
    elif name == "an outlier last":
        x[-1] = -1e4
    elif name == "sorted":
        x = x.flatten().sort().values.reshape(shape)
    elif name == "tiny":
        x = x * 1e-6
    return x.to(dtype)


NAMES = [
    "large mean, small spread", "mean of 1000 std", "one constant channel", "all equal", "zeros",
    "denormals", "large", "1e30", "an outlier first", "an outlier last", "sorted", "tiny",
]  # fmt: skip


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest element; infinite where finiteness differs."""
    if not torch.equal(got.isfinite(), want.isfinite()):
        return math.inf
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    got, want = got.double()[finite], want[finite]
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-300)).item()


def ours(x, mean, var, w, b):
    return FF.batch_norm(x, mean, var, w, b, True, 0.1, 1e-5)


def torchs(x, mean, var, w, b):
    return F.batch_norm(x, mean, var, w, b, True, 0.1, 1e-5)


def float64(x, mean, var, w, b):
    y, new_mean, new_var = reference.batch_norm(
        x, mean, var, w, b, True, 0.1, 1e-5, None, "identity"
    )
    mean.copy_(new_mean)
    var.copy_(new_var)
    return y


def outcome(call, x: Tensor, dy: Tensor, dtype: torch.dtype, small: torch.dtype) -> list[Tensor]:
    x = x.to(dtype).requires_grad_()
    w = torch.tensor([1.0, 0.5, -2.0], device=x.device, dtype=small).requires_grad_()
    b = torch.tensor([0.0, 1.0, -1.0], device=x.device, dtype=small).requires_grad_()
    mean, var = (
        torch.zeros(3, device=x.device, dtype=small),
        torch.ones(3, device=x.device, dtype=small),
    )
    y = call(x, mean, var, w, b)
    gradients = torch.autograd.grad(y, (x, w, b), dy.to(dtype))
    return [y.detach(), *gradients, mean, var]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_torchs(backend, name, shape, dtype):
    if name == "large" and dtype is torch.float64:
        pytest.skip("the float64 reference overflows where its input nearly does")
    x = adversarial(name, shape, dtype).to(backend)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(backend, dtype)
    small = torch.float64 if dtype is torch.float64 else torch.float32
    got = outcome(ours, x, dy, dtype, small)
    theirs = outcome(torchs, x, dy, dtype, small)
    want = outcome(float64, x.double(), dy.double(), torch.float64, torch.float64)
    # Float64 is measured against float64, whose own mean is off by eps · |x|; κ is what that does.
    spread = x.double().movedim(1, 0).flatten(1).std(1).clamp(min=1e-3)
    kappa = (x.abs().max() / spread).max().item() if dtype is torch.float64 else 1.0
    for label, g, t, r in zip(
        ("y", "dx", "dw", "db", "mean", "var"), got, theirs, want, strict=True
    ):
        mine, others = error(g, r), error(t, r)
        floor = 4 * torch.finfo(g.dtype).eps + 4 * torch.finfo(small).eps * shape[0] * kappa
        if label == "dx":  # what is left where the true gradient cancels to nearly nothing
            floor *= max(1.0, (dy.abs().max() * r.abs().max().reciprocal().clamp(max=1e6)).item())
        if label == "mean":  # relative to the elements that were added, not to what is left of them
            floor *= max(1.0, (0.1 * x.abs().max() / r.abs().max().clamp(min=1e-300)).item())
        assert mine <= max(2 * others, floor), (label, mine, others, floor)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_infinities_and_nan_go_where_torchs_go(backend, value, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(backend)
    x[1, 1] = value
    results = []
    for call in (ours, torchs):
        y, *_, mean, var = outcome(call, x, torch.ones_like(x), torch.float32, torch.float32)
        results.append((y.isnan(), mean, var.isnan()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], equal_nan=True)
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shape", [(64, 3), (40, 3, 3), (4, 3, 21, 21)], ids=str)
def test_channels_do_not_see_one_another(backend, shape, value):
    """Planes of 3 positions are neighbours in one tile, and merged by the power of two above."""
    x, dy = torch.randn((2, *shape), generator=torch.Generator().manual_seed(8)).to(backend)
    changed = x.clone()
    changed[:, 1] *= value
    results = []
    for each in (x, changed):
        y, dx, *small = outcome(ours, each, dy, torch.float32, torch.float32)
        results.append([y[:, ::2], dx[:, ::2], *(t[::2] for t in small)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "elu", "hardswish", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("graph", [False, True], ids=["", "create_graph"])
def test_nan_and_infinity_pass_activations_as_in_torch(backend, activation, residual, graph):
    """Evaluation with mean 0 and variance 1: the activation sees the special values themselves."""
    special = [math.nan, math.inf, -math.inf, -3.0, 3.0, 0.0, -0.0, 6.0, 7.0, -7.0]
    x = torch.tensor(special, device=backend)[:, None].expand(-1, 2).contiguous()
    zero, one = torch.zeros(2, device=backend), torch.ones(2, device=backend)
    results = []
    for call in (FF.batch_norm, None):
        leaf = x.clone().requires_grad_()
        added = torch.zeros_like(x).requires_grad_() if residual else None
        if call is None:
            # below nn.functional, which in torch 2.11 takes no eps of 0 in evaluation either
            z = torch.batch_norm(leaf, None, None, zero, one, False, 0.0, 0.0, False)
            z = z if added is None else z + added
            act = getattr(F, activation)
            if graph or fastnorm.backend_for(x) == "eager":
                y = act(z)
            else:  # torch's vectors, as wide as a CPU's, do otherwise with NaN than one number does
                y = torch.stack([act(number) for number in z.flatten()]).view_as(z)
        else:
            y = call(leaf, zero, one, eps=0.0, residual=added, activation=activation)
        leaves = [leaf] if added is None else [leaf, added]
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=graph)
        results.append([y, *gradients])
    got, want = results
    torch.testing.assert_close(got[0], want[0], equal_nan=True)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        if activation == "relu6":  # torch's own gradient at NaN differs between its vector widths
            mine, theirs = mine[1:], theirs[1:]
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("graph", [False, True], ids=["", "create_graph"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_a_closed_gate_lets_no_infinity_through(backend, residual, activation, graph):
    """As in torch: an overflow behind a dead unit is not its weight's."""
    x = torch.tensor([[-4.0, 1.0], [2.0, -5.0], [-9.0, 3.0]], device=backend)
    dy = torch.tensor([[math.inf, 0.5], [0.25, -math.inf], [math.nan, 2.0]], device=backend)
    zero, one = torch.zeros(2, device=backend), torch.ones(2, device=backend)
    leaves = [x, one.clone(), zero.clone()] + [torch.zeros_like(x)] * residual
    leaves = [t.clone().requires_grad_() for t in leaves]
    added = leaves[3] if residual else None
    options = {"residual": added, "activation": activation}
    y = FF.batch_norm(leaves[0], zero, one, *leaves[1:3], **options)
    got = torch.autograd.grad(y, leaves, dy, create_graph=graph)
    z = F.batch_norm(leaves[0], zero, one, *leaves[1:3])
    want = torch.autograd.grad(
        getattr(F, activation)(z if added is None else z + added), leaves, dy
    )
    for mine, theirs in zip(got, want, strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("activation", ["elu", "tanh"])
def test_activations_of_small_numbers_keep_their_digits(backend, activation, dtype):
    """Relative to each: e^z - 1 would cancel. Evaluation with mean 0 and variance 1."""
    size = torch.cat([torch.logspace(-30, -2, 57), torch.linspace(0.01, 2, 200)]).double()
    x = torch.cat([-size, size]).to(backend, dtype)[:, None]
    zero, one = (torch.full((1,), v, device=backend, dtype=dtype) for v in (0.0, 1.0))
    y = FF.batch_norm(x, zero, one, eps=0.0, activation=activation).double()
    exact = x.double()
    want = exact.tanh() if activation == "tanh" else torch.where(exact > 0, exact, exact.expm1())
    torch.testing.assert_close(y, want, rtol=8 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_zero_weight(backend, weight):
    """γ = 0 kills dx, not dγ."""
    x = (
        torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(5))
        .to(backend)
        .requires_grad_()
    )
    w = torch.full((3,), weight, device=backend).requires_grad_()
    dy = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(6)).to(backend)
    dx, dw = torch.autograd.grad(FF.batch_norm(x, None, None, w, None, True), (x, w), dy)
    assert dx.abs().max() <= abs(weight) * 10
    xhat = (x - x.mean((0, 2), keepdim=True)) / x.std((0, 2), keepdim=True, correction=0)
    torch.testing.assert_close(dw, (dy * xhat).sum((0, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 1.0])
def test_eps(backend, eps):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(7)).to(backend, torch.float64)
    y = FF.batch_norm(x, None, None, training=True, eps=eps)
    want, _, _ = reference.batch_norm(x, None, None, None, None, True, 0.1, eps, None, "identity")
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)
