"""Products of rows that go to oneDNN as convolutions, on whatever processor this is."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import assert_close
from test_linear_batch_norm import each_mode, problem

import fastnorm
from fastnorm import processor
from fastnorm.eager import linear_batch_norm_fwd, native, products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN"
)
CPU = torch.device("cpu")
ZEN_5 = {"vendor_id": "AuthenticAMD", "cpu family": "26"}
ZEN_4 = ZEN_5 | {"cpu family": "25"}
INTEL = {"vendor_id": "GenuineIntel", "cpu family": "30"}
SHAPES = [(128, 16, 16), (7, 5, 3), (129, 64, 1), (131, 1, 40), (260, 72, 150)]


@pytest.fixture
def taken(monkeypatch):
    """How many products are convolutions, where all that can be are."""
    monkeypatch.setattr(products, "_mkl_leaves_half", lambda: True)
    monkeypatch.setattr(products, "ROWS", 2)
    monkeypatch.setattr(products, "MULTIPLICATIONS", 1)
    counted = []
    convolution = products.convolution
    monkeypatch.setattr(
        products, "convolution", lambda *args: counted.append(args) or convolution(*args)
    )
    with fastnorm.use_backend("eager"):
        yield counted


def rows(M=96, K=20, **options):
    return torch.randn(M, K, **options)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(taken, shape, bias):
    M, K, N = shape
    leaves = [rows(M, K), rows(N, K), torch.randn(N)][: 3 if bias else 2]
    leaves = [t.requires_grad_() for t in leaves]
    dy = torch.randn(M, N)
    y = products.linear(*leaves, *[] if bias else [None])
    assert len(taken) == 1
    assert y.is_contiguous()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = F.linear(*exact)
    assert_close(y, want, K, "y", roundings=2)
    gradients = torch.autograd.grad(y, leaves, dy)
    wanted = torch.autograd.grad(want, exact, dy.double())
    for got, right, terms in zip(gradients, wanted, (N, M, M), strict=False):
        assert got.is_contiguous()
        assert_close(got, right, terms, roundings=2)


def test_second_derivatives(taken):
    x, weight = rows(8, 3).requires_grad_(), rows(5, 3).requires_grad_()

    def penalty(x, weight, linear):
        (dx,) = torch.autograd.grad(linear(x, weight, None).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, weight))

    got = penalty(x, weight, products.linear)
    assert taken
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    for ours, want in zip(got, penalty(*exact, F.linear), strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-4)


@each_mode
@pytest.mark.parametrize("activation", ["relu", "identity", "tanh"])
@pytest.mark.parametrize("algorithm", ["gram", "unfused"])
@pytest.mark.parametrize("huge", [False, True], ids=["", "huge"])
def test_linear_batch_norm(taken, monkeypatch, huge, algorithm, activation, training):
    """Whole, and some rows at a time, the last ones fewer."""
    if huge:
        monkeypatch.setattr(native, "HUGE", 1)
        monkeypatch.setattr(linear_batch_norm_fwd, "CONVOLVED_BYTES", 100 * 4 * 40)
    case = problem(260, 33, 40, CPU, algorithm=algorithm, activation=activation, training=training)
    case.check()
    parts = 3 if algorithm == "gram" and huge else 1
    assert len(taken) == parts


def test_a_convolution_of_one_position(taken):
    """Channels innermost: rows. In evaluation their folded product is torch's convolution too."""
    norm = fastnorm.Conv2dBatchNorm(64, 256, 1, device=CPU).eval()
    x = torch.randn(4, 64, 48, 48).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = norm(x)
        want = norm.norm(norm.conv(x)).relu()
    assert len(taken) == 1
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


class Watched(torch.Tensor):
    """A tensor that somebody may watch."""


@pytest.mark.parametrize(
    "x",
    [
        rows(1), rows().double(), rows().bfloat16(), rows(40, 192).T[:, :20], rows(0),
        rows(device="meta"), rows().as_subclass(Watched),
    ],
    ids=["one row", "float64", "bfloat16", "transposed", "empty", "meta", "subclass"],
)  # fmt: skip
def test_what_is_left_to_torch(taken, x):
    weight = torch.randn(8, 20, dtype=x.dtype, device=x.device)
    assert products.convolves(rows(), torch.randn(8, 20))
    assert not products.convolves(x, weight)
    products.linear(x, weight, None)
    assert not taken


def test_a_weight_that_is_watched(taken):
    weight = torch.randn(8, 20)
    assert products.convolves(rows(), torch.nn.Parameter(weight))
    assert not products.convolves(rows(), weight.as_subclass(Watched))


@pytest.mark.filterwarnings("ignore:`torch.jit.(trace|script)` is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes that are asked for
def test_under_transforms_and_compile(taken):
    x, weight = rows(), torch.randn(8, 20)
    torch.func.vmap(lambda row: products.linear(row, weight, None))(x[None])
    torch.func.jvp(lambda x: products.linear(x, weight, None), (x,), (x,))
    compiled = torch.compile(products.linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, None), F.linear(x, weight))
    torch.jit.trace(lambda x: products.linear(x, weight, None), x, check_trace=False)
    assert not taken


def test_who_asks_for_less_than_float32_gets_torchs_product(taken):
    settings = torch.backends.mkldnn
    x, weight = rows(), torch.randn(8, 20)
    for kind, asked in itertools.product((settings.matmul, settings.conv), ("bf16", "tf32")):
        before = kind.fp32_precision
        try:
            kind.fp32_precision = asked
            assert not products.convolves(x, weight)
            kind.fp32_precision = "ieee"
            assert products.convolves(x, weight)
        finally:
            kind.fp32_precision = before


def test_without_onednn(taken, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products.convolves(rows(), torch.randn(8, 20))
    monkeypatch.undo()
    assert torch.backends.mkldnn.enabled


def test_the_same_bits_every_time(taken):
    x, weight = rows(400, 64), torch.randn(96, 64, requires_grad=True)
    dy = torch.randn(400, 96)

    def step():
        y = products.linear(x, weight, None)
        return y, *torch.autograd.grad(y, weight, dy)

    for got, want in zip(step(), step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("facts", "want"), [(ZEN_5, True), (ZEN_4, False), (INTEL, False), ({}, False)]
)
def test_processors(facts, want):
    assert products.is_zen_5(facts) is want


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_what_is_asked_of_this_processor(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(processor, "facts", lambda: ZEN_5)
    assert products._mkl_leaves_half.__wrapped__() is (capability == "AVX512")
