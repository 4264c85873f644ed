"""Each way that eager batch norm can take, forced on small tensors, against torch's composition.

What is asked of every backend is in test_batch_norm.py; here is what only these ways can get wrong.
"""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

import fastnorm
from fastnorm.eager import batch_norm_cpu, native
from fastnorm.eager.activations import ACTIVATIONS

eager = importlib.import_module("fastnorm.eager.batch_norm")  # the package has a function so named

NEVER = 1 << 62
CL, CL3 = torch.channels_last, torch.channels_last_3d
CONTIGUOUS = torch.contiguous_format


@pytest.fixture(params=["direct", "planes", "centred planes", "huge", "centred huge"])
def way(request, monkeypatch):
    """torch's operator, moments of ours (near and far means), own outputs and two-pass backward."""
    monkeypatch.setattr(batch_norm_cpu, "SMALL", 0)
    monkeypatch.setattr(batch_norm_cpu, "SHORT_PLANE", NEVER if request.param == "direct" else 2)
    monkeypatch.setattr(native, "is_huge", lambda input: "huge" in request.param)
    monkeypatch.setattr(native, "LONG_COLUMN", 7)
    monkeypatch.setattr(native, "NEAR", 0 if "centred" in request.param else 1e3)
    return request.param


@pytest.fixture
def planes(monkeypatch):
    monkeypatch.setattr(batch_norm_cpu, "SMALL", 0)
    monkeypatch.setattr(batch_norm_cpu, "SHORT_PLANE", 2)


def draw(*shape, dtype=torch.float64, memory_format=CONTIGUOUS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.contiguous(memory_format=memory_format)


def composition(x, mean, var, w, b, training, momentum, eps, residual, activation):
    z = F.batch_norm(x, mean, var, w, b, training, momentum, eps)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


def ours(x, mean, var, w, b, training, momentum, eps, residual, activation, count=None):
    return eager.batch_norm(
        x, mean, var, w, b, training, momentum, eps, residual, activation, count
    )


def everything(function, x, dy, *, training, residual=None, activation="identity", eps=1e-5):
    """Output, gradients and moved buffers."""
    C = x.shape[1]
    kind = {"dtype": torch.float64 if x.dtype is torch.float64 else torch.float32}
    w, b = draw(C, seed=1).to(**kind) + 1, draw(C, seed=2).to(**kind)
    mean, var = draw(C, seed=3).to(**kind), draw(C, seed=4).abs().add(0.5).to(**kind)
    leaves = [t.clone().requires_grad_() for t in (x, w, b, residual) if t is not None]
    r = leaves[3] if residual is not None else None
    y = function(*leaves[:1], mean, var, *leaves[1:3], training, 0.3, eps, r, activation)
    return y.detach(), *torch.autograd.grad(y, leaves, dy), mean, var


LAYOUTS = [
    ((6, 5), CONTIGUOUS),
    ((4, 3, 10), CONTIGUOUS),
    ((4, 5, 3, 4), CONTIGUOUS),
    ((4, 5, 3, 4), CL),
    ((2, 3, 2, 3, 4), CONTIGUOUS),
    ((2, 3, 2, 3, 4), CL3),
    ((3, 1, 4, 4), CL),  # contiguous and channels_last at once
    ((7, 4, 1, 1), CL),
    ((1, 3, 8), CONTIGUOUS),
    ((40, 1), CONTIGUOUS),  # one channel, a plane to us
    ((40, 1, 2), CONTIGUOUS),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "leaky_relu", "silu"])
def test_equals_the_composition(way, activation, with_residual, shape, memory_format, training):
    x, dy, r = (draw(*shape, memory_format=memory_format, seed=s) for s in (5, 6, 7))
    options = {"training": training, "activation": activation}
    options["residual"] = r if with_residual else None
    got = everything(ours, x, dy, **options)
    want = everything(composition, x, dy, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got[0].stride() == want[0].stride()


def test_one_channel_is_a_plane(planes, monkeypatch):
    """Also a column of a table, with or without activation and gradients."""
    seen = []
    inner = native._planes

    def spy(x, mean):
        seen.append(tuple(x.shape))
        return inner(x, mean)

    monkeypatch.setattr(native, "_planes", spy)
    table = draw(300, 3)
    for x in (table[:, 1:2], table[:, :1].contiguous(), draw(300, 1, 1).transpose(1, 2)):
        for activation in ("identity", "relu", "tanh"):
            module = fastnorm.BatchNorm1d(1, activation=activation, dtype=torch.float64)
            y = module(x)
            want = torch.nn.BatchNorm1d(1, dtype=torch.float64)(x)
            if activation != "identity":
                want = getattr(torch, activation)(want)
            torch.testing.assert_close(y, want)
            assert y.is_contiguous()
    assert seen == [(1, 1, 300)] * 9


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_first_and_second_derivatives(way, training):
    for shape, memory_format in [((3, 2, 4), CONTIGUOUS), ((2, 2, 1, 3), CL), ((5, 2), CONTIGUOUS)]:
        for activation in ("identity", "leaky_relu", "tanh"):
            x, r = (draw(*shape, memory_format=memory_format, seed=s) for s in (5, 7))
            w, b = draw(2, seed=1) + 2, draw(2, seed=2)
            mean, var = (None, None) if training else (draw(2, seed=3), draw(2, seed=4).abs())

            def function(x, w, b, r, mean=mean, var=var, activation=activation):
                return ours(x, mean, var, w, b, training, 0.1, 1e-3, r, activation)

            leaves = [t.requires_grad_() for t in (x, w, b, r)]
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)


def test_second_derivative_of_each_leaf_alone(way):
    x, w, b = draw(3, 2, 4), draw(2, seed=1), draw(2, seed=2)
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, w, b))]
        results = []
        for function in (ours, composition):
            y = function(leaves[0], None, None, *leaves[1:], True, 0.1, 1e-3, None, "relu")
            (first,) = torch.autograd.grad(y.pow(3).sum(), leaves[wanted], create_graph=True)
            results.append((first, *torch.autograd.grad(first.pow(2).sum(), leaves[wanted])))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_each_way_is_taken(way, monkeypatch):
    """The fixture would test nothing if the constants it changes did not steer."""
    taken = []

    def spy(module, name):
        inner = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: (taken.append(name), inner(*a, **k))[1])

    spy(native, "moments")
    spy(torch, "sub")
    spy(native, "scale_shift")
    x = draw(4, 3, 5, 5)
    everything(ours, x, draw(*x.shape, seed=6), training=True)
    assert (
        taken
        == {
            "direct": [],
            "planes": ["moments", "scale_shift"],
            "centred planes": ["moments", "sub", "scale_shift"],
            "huge": ["moments", "scale_shift", "scale_shift"],
            "centred huge": ["moments", "sub", "scale_shift", "scale_shift"],
        }[way]
    )


def test_arguments_are_left_alone(way):
    """In-place work on outputs and gradients must not reach what the caller holds."""
    for memory_format in (CONTIGUOUS, CL):
        for activation in ("identity", "relu"):
            x, dy, r = (draw(4, 3, 5, 2, memory_format=memory_format, seed=s) for s in (5, 6, 7))
            before = [t.clone() for t in (x, dy, r)]
            leaves = [t.requires_grad_() for t in (x, r)]
            y = ours(x, None, None, None, None, True, 0.1, 1e-5, r, activation)
            _, dr = torch.autograd.grad(y, leaves, dy, retain_graph=True)
            kept = dr.clone()
            torch.autograd.grad(y, leaves, dy)
            assert torch.equal(dr, kept)
            assert all(map(torch.equal, (x, dy, r), before))


def test_gradients_of_another_format(way):
    """dy need not have x's strides: expanded, or channels_last after a contiguous x."""
    x = draw(4, 3, 5, 2)
    for dy in (torch.ones(1, dtype=x.dtype).expand(x.shape), draw(*x.shape, memory_format=CL)):
        for x_format in (CONTIGUOUS, CL):
            arguments = x.contiguous(memory_format=x_format), dy
            got = everything(ours, *arguments, training=True, activation="relu")
            want = everything(composition, *arguments, training=True, activation="relu")
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


STRIDED = {
    "(N, L, C)": lambda: draw(3, 6, 4).transpose(1, 2),
    "transposed": lambda: draw(4, 6).t(),
    "channels skipped": lambda: draw(3, 8, 5, 2)[:, ::2],
    "channels_last, fewer channels": lambda: draw(3, 8, 5, 2, memory_format=CL)[:, :4],
    "channels_last, rows skipped": lambda: draw(3, 4, 6, 2, memory_format=CL)[:, :, ::2],
    "permuted": lambda: draw(3, 4, 5, 2).permute(0, 1, 3, 2),
    "channels_last_3d, fewer": lambda: draw(2, 4, 3, 3, 2, memory_format=CL3)[:, :3],
    "expanded": lambda: draw(1, 4, 5, 2).expand(3, 4, 5, 2),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_strided_inputs(way, name, training):
    x = STRIDED[name]()
    dy = draw(*x.shape, seed=6)
    got = everything(ours, x, dy, training=training, activation="relu")
    want = everything(composition, x, dy, training=training, activation="relu")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got[0].stride() == want[0].stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_16_bit_is_as_torch(way, dtype):
    """Statistics in float32, then rounded between the operators as torch.nn's are."""
    for memory_format in (CONTIGUOUS, CL):
        x, dy, r = (draw(4, 8, 5, 4, dtype=dtype, memory_format=memory_format) for _ in range(3))
        got = everything(ours, x, dy, training=True, residual=r, activation="relu")
        want = everything(composition, x, dy, training=True, residual=r, activation="relu")
        assert all(map(torch.equal, got, want))


def test_small_16_bit_is_rounded_once():
    x, dy, r = (draw(4, 8, 5, 4, dtype=torch.bfloat16, seed=s) for s in (5, 6, 7))
    got = everything(ours, x, dy, training=True, residual=r, activation="silu")
    options = {"training": True, "residual": r.float(), "activation": "silu"}
    want = everything(composition, x.float(), dy.float(), **options)
    assert torch.equal(got[0], want[0].bfloat16())
    assert torch.equal(got[1], want[1].bfloat16())


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(way, dtype):
    """Parameters, buffers and residual of any dtype: everything comes back in its own."""
    x, w = draw(4, 3, 5, dtype=dtype, seed=5).requires_grad_(), draw(3, seed=1)
    exact = draw(4, 3, 5, dtype=dtype, seed=5).double()
    for other in DTYPES:
        weight = w.to(other, copy=True).requires_grad_()
        mean, var = torch.zeros(3, dtype=other), torch.ones(3, dtype=other)
        r = draw(4, 3, 5, dtype=other, seed=7).requires_grad_()
        for training in (True, False):
            y = ours(x, mean, var, weight, None, training, 0.1, 1e-5, r, "relu")
            grads = torch.autograd.grad(y, (x, weight, r), torch.ones_like(y))
            assert y.dtype == torch.promote_types(dtype, other)
            assert [g.dtype for g in grads] == [dtype, other, other]
            assert mean.dtype == var.dtype == other
        statistics = torch.float64 if dtype is torch.float64 else torch.float32
        tolerance = 4 * max(torch.finfo(t).eps for t in (other, statistics))
        torch.testing.assert_close(mean.double(), 0.1 * exact.mean((0, 2)), rtol=0, atol=tolerance)
        want = 0.9 + 0.1 * exact.var((0, 2))
        torch.testing.assert_close(var.double(), want, rtol=tolerance, atol=0)


def test_16_bit_statistics_are_float32(way):
    """Also where no parameter and no buffer is: torch alone would round the mean to 8 bits."""
    x = draw(64, 2, 8).add(100).bfloat16()
    y = ours(x, None, None, None, None, True, 0.1, 1e-5, None, "identity")
    want = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("buffers", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_cumulative_average(way, buffers):
    """momentum=None: after k batches the buffers are the means over the batches."""
    batches = [draw(4, 3, 6, seed=s).float() for s in range(5)]
    mean, var = torch.full((3,), 7.0, dtype=buffers), torch.full((3,), 7.0, dtype=buffers)
    count = torch.tensor(0)
    for batch in batches:
        ours(batch, mean, var, None, None, True, None, 1e-5, None, "identity", count)
    assert count == 5
    tolerance = {"rtol": 4 * torch.finfo(buffers).eps, "atol": 4 * torch.finfo(buffers).eps}
    tolerance = {name: max(value, 1e-6) for name, value in tolerance.items()}
    wants = [torch.stack([f(b) for b in batches]).mean(0) for f in (
        lambda b: b.double().mean((0, 2)), lambda b: b.double().var((0, 2))
    )]  # fmt: skip
    torch.testing.assert_close(mean.double(), wants[0], **tolerance)
    torch.testing.assert_close(var.double(), wants[1], **tolerance)


def test_cumulative_share_has_no_16_bits():
    count = torch.tensor(3, device="meta")
    running = torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert eager._cumulative(count, running).dtype is torch.float32


def test_buffers_of_float64_keep_their_digits():
    """The batch's mean is exactly 0."""
    x, old = torch.tensor([[1.0], [-1.0]]), 1 + 2**-40
    mean, var = (torch.full((1,), old, dtype=torch.float64) for _ in range(2))
    ours(x, mean, var, None, None, True, 0.25, 1e-5, None, "identity")
    assert mean.item() == 0.75 * old
    assert var.item() == 0.75 * old + 0.25 * 2


def test_bias_alone_of_another_dtype(way):
    x, w, b = draw(6, 3, dtype=torch.float32), torch.ones(3), draw(3)
    got, want = (ours(x, None, None, w, one, True, 0.1, 1e-5, None, "relu")
                 for one in (b, b.float()))  # fmt: skip
    assert torch.equal(got, want)


def test_momentum_tensor_is_the_number(way):
    x, states = draw(4, 3, 6), []
    for momentum in (0.3, torch.tensor(0.3, dtype=torch.float64)):
        mean, var = draw(3, seed=3), draw(3, seed=4).abs()
        ours(x, mean, var, None, None, True, momentum, 1e-5, None, "identity")
        states.append((mean, var))
    torch.testing.assert_close(*states, rtol=1e-14, atol=1e-14)


def test_overflow_inf_and_nan_are_torchs(planes):
    """Where float32 cannot hold the squares, torch's own forward answers, bit for bit."""
    x, dy = draw(4, 3, 8, dtype=torch.float32), draw(4, 3, 8, dtype=torch.float32, seed=6)
    odd = [x * 1e30, x * 1e20]
    for value in (math.inf, -math.inf, math.nan):
        odd.append(x.clone())
        odd[-1][1, 1, 3] = value
    for case in odd:
        got = everything(ours, case, dy, training=True, activation="relu")
        want = everything(composition, case, dy, training=True, activation="relu")
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_tiny_eps_is_torchs(planes):
    x = draw(4, 3, 8, dtype=torch.float32) * 1e-25
    got = everything(ours, x, x, training=True, eps=1e-40)
    want = everything(composition, x, x, training=True, eps=1e-40)
    assert all(map(torch.equal, got, want))


CASES = {
    "mean 1e4, std 1e-2": lambda x: x * 1e-2 + 1e4,
    "mean 1e3": lambda x: x + 1e3,
    "mean just near": lambda x: x + 0.99 * native.NEAR,
    "mean just far": lambda x: x + 1.01 * native.NEAR,
    "constant channel": lambda x: torch.full_like(x, 10000.3),
    "one loud sample": lambda x: torch.cat([torch.full_like(x[:1], 1e4), x[1:]]),
    "normal": lambda x: x,
    "large": lambda x: x * 1e15,
}


@pytest.mark.parametrize("name", CASES)
def test_centred_planes_are_as_exact_as_torch(planes, monkeypatch, name):
    """Worst error against float64: never above torch's by more than a few roundings."""
    x = CASES[name](draw(8, 4, 28, 28, dtype=torch.float32, seed=5))
    dy = draw(*x.shape, dtype=torch.float32, seed=6)
    want = everything(composition, x.double(), dy.double(), training=True)
    step = torch.finfo(torch.float32).eps
    for huge in (False, True):
        monkeypatch.setattr(native, "is_huge", lambda input, huge=huge: huge)
        got = everything(ours, x, dy, training=True)
        torchs = everything(composition, x, dy, training=True)
        for mine, theirs, exact in zip(got, torchs, want, strict=True):
            unit = exact.abs().max().clamp_min(1e-30)
            errors = [((t.double() - exact).abs().max() / unit).item() for t in (mine, theirs)]
            assert errors[0] <= 2 * errors[1] + 8 * step


def test_large_mean_is_subtracted_in_two_parts(planes):
    """One float32 cannot hold a mean of 1e4 to the precision of a std of 1e-2."""
    x = draw(8, 4, 28, 28, dtype=torch.float32) * 1e-2 + 1e4
    y = ours(x, None, None, None, None, True, 0.1, 1e-5, None, "identity")
    want = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), want, rtol=0, atol=2e-6)


def test_long_sums_of_equal_numbers(planes, monkeypatch):
    """Half a picture is one number: added up one by one, its squares are rounded the same way."""
    x = torch.full((2, 3, 128, 128), 1000.1)
    x[:, :, 64:] = 0.3
    step = torch.finfo(torch.float32).eps
    for near in (native.NEAR, 0):
        monkeypatch.setattr(native, "NEAR", near)
        var = torch.zeros(3)
        ours(x, torch.zeros(3), var, None, None, True, 1.0, 1e-5, None, "identity")
        torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=4 * step, atol=0)


def test_variance_of_constants_is_not_negative(planes):
    """Rounded, Σ² less the square of Σ can be below zero; with a tiny eps its root would be NaN."""
    x = torch.linspace(1e3, 2e3, 20).view(1, -1, 1).expand(5, 20, 9973).contiguous()  # 9973: prime
    y = ours(x, None, None, None, None, True, 0.1, 1e-20, None, "identity")
    assert y.isfinite().all()


def test_empty_batch_leaves_mixed_buffers():
    mean, var = torch.full((3,), 7.0).double(), torch.full((3,), 8.0).double()
    y = ours(torch.empty(0, 3, 4), mean, var, None, None, True, 0.1, 1e-5, None, "relu")
    assert y.shape == (0, 3, 4)
    assert (mean == 7).all()
    assert (var == 8).all()


def test_pieces_of_a_plane():
    """As few as possible, equal, none longer than 512 nor shorter than 32; or all of it."""
    assert [native._pieces(size, 512) for size in (1, 49, 512, 784, 56 * 56, 111 * 111, 997)] == [
        1, 1, 1, 2, 7, 37, 1
    ]  # fmt: skip


def test_backward_uses_the_buffers_of_its_forward(monkeypatch):
    """Evaluation, then the buffers move, then the gradient: torch refuses, our own way is right."""
    monkeypatch.setattr(batch_norm_cpu, "SMALL", 0)
    monkeypatch.setattr(native, "is_huge", lambda input: True)
    x, mean, var = draw(4, 3, 6).requires_grad_(), draw(3), draw(3).abs()
    y = ours(x, mean, var, None, None, False, 0.1, 1e-5, None, "identity")
    want = (var.clone() + 1e-5).rsqrt()[:, None].expand_as(x)
    mean.zero_()
    var.fill_(9)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], want)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is without oneDNN")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tensors_in_onednn_s_own_layout(way, training):
    """torch.utils.mkldnn and JIT-compiled models have them; their memory is not to be looked at."""
    x, w, b = draw(4, 8, 6, 5, dtype=torch.float32), torch.rand(8), torch.rand(8)
    results = []
    for function in (ours, composition):
        mean, var = torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
        y = function(x.to_mkldnn(), mean, var, w, b, training, 0.3, 1e-5, None, "relu")
        results.append([y.to_dense(), mean, var])
    assert all(map(torch.equal, *results))


def test_same_bits_every_time(way):
    x, dy = draw(4, 3, 20, 20, dtype=torch.float32), draw(4, 3, 20, 20, dtype=torch.float32, seed=6)
    first, second = (everything(ours, x, dy, training=True, activation="relu") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_without_gradients(way):
    """no_grad, inference mode and a differentiable call give the same bits."""
    x, w = draw(4, 3, 6), draw(3, seed=1).requires_grad_()
    for training in (True, False):
        results = []
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            mean, var = torch.zeros(3).double(), torch.ones(3).double()
            with context():
                y = ours(x, mean, var, w, None, training, 0.1, 1e-5, None, "relu")
            results.append((y.detach().clone(), mean, var))
        assert all(map(torch.equal, results[0], results[1]))
        assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:DeprecationWarning"
)  # torch's own, in its forward AD
def test_transforms(way):
    """vmap, jvp, grad of grad and forward mode see torch's operators, whatever the size."""
    x, v, w = draw(2, 4, 3, 5), draw(2, 4, 3, 5, seed=6), draw(3, seed=1)

    def by(function):
        return lambda x: function(x, None, None, w, None, True, 0.1, 1e-5, x, "silu")

    got, want = by(ours), by(composition)
    torch.testing.assert_close(torch.func.vmap(got)(x), torch.func.vmap(want)(x))
    torch.testing.assert_close(
        torch.func.jvp(got, (x[0],), (v[0],)), torch.func.jvp(want, (x[0],), (v[0],))
    )
    hessians = (
        torch.func.hessian(lambda x, f=f: f(x).pow(3).sum())(x[0][:2, :, :2]) for f in (got, want)
    )
    torch.testing.assert_close(*hessians)
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(f(forward_ad.make_dual(x[0], v[0]))) for f in (got, want)
        ]
    torch.testing.assert_close(*tangents)


def test_compiles_in_one_graph(way):
    """Under torch.compile the operators stay visible, and no size or address is looked at."""
    x, mean, var, count = draw(4, 3, 6), draw(3), draw(3).abs(), torch.tensor(0)

    def function(x, mean, var, count):
        return ours(x, mean, var, None, None, True, None, 1e-5, x, "relu", count)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        state = [t.clone() for t in (mean, var, count)]
        results.append((call(x, *state), *state))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_huge_pages_are_only_a_hint(monkeypatch):
    """The kernel accepts the range, and it is inside the tensor."""
    x = torch.empty(native.HUGE // 4 + 3)
    libc, replies = native._libc(), []
    if libc is None:
        pytest.skip("huge pages are not granted on request here")

    class Spy:
        mincore = libc.mincore

        def madvise(self, start, length, advice):
            replies.append((start, length, libc.madvise(start, length, advice)))

    monkeypatch.setattr(native, "_libc", Spy)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: x)  # in use already: left as it is
    native.empty_like(x.fill_(1))
    assert not replies
    monkeypatch.undo()

    monkeypatch.setattr(native, "_libc", Spy)
    y = native.empty_like(torch.empty(8 * native.HUGE // 4 + 3))
    ((start, length, reply),) = replies
    assert reply == 0
    assert y.data_ptr() <= start
    assert start + length <= y.data_ptr() + y.nbytes


def test_huge_pages_nobody_grants(monkeypatch):
    """Where they are for everyone, for no one, or unknown, nothing is huge."""
    for text in ("always [never]", "[always] madvise never", None):

        def read(path, text=text):
            if text is None:
                raise FileNotFoundError
            return text

        monkeypatch.setattr(native.Path, "read_text", read)
        monkeypatch.setattr(native, "_libc", native._libc.__wrapped__)
        x = torch.empty(native.HUGE // 4)
        assert not native.is_huge(x)
        assert native.empty_like(x).shape == x.shape
        monkeypatch.undo()


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CL], ids=str)
@pytest.mark.parametrize("with_gradients", [False, True], ids=["", "gradients"])
def test_16_bit_models_in_evaluation(memory_format, with_gradients):
    """Parameters and buffers of 16 bits cost no precision, cast or not: all is rounded once."""
    x = draw(8, 5, 6, 7, memory_format=memory_format).bfloat16()
    mean, var, w, b = (draw(5, seed=s).abs().add(0.5).bfloat16() for s in range(4))
    dy = draw(8, 5, 6, 7, seed=9).bfloat16()
    results = []
    for dtype in (None, torch.float64):
        given = [t.to(dtype or t.dtype).requires_grad_(with_gradients) for t in (x, w, b)]
        y = ours(
            given[0], mean.to(given[0].dtype), var.to(given[0].dtype), *given[1:],
            False, 0.1, 1e-5, None, "relu",
        )  # fmt: skip
        found = torch.autograd.grad(y, given, dy.to(y.dtype)) if with_gradients else ()
        results.append([y.detach(), *found])
    for got, want in zip(*results, strict=True):
        assert got.dtype is torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-8 * want.std().item())


def test_16_bit_buffers_move_as_float32_do():
    """They are rounded once a batch, whatever they are cast to in between."""
    moved = []
    for dtype in (torch.bfloat16, torch.float64):
        mean, var = (draw(5, seed=s).abs().bfloat16().to(dtype) for s in (1, 2))
        ours(draw(8, 5, 9).bfloat16(), mean, var, None, None, True, 0.3, 1e-5, None, "identity")
        moved.append((mean.double(), var.double()))
    torch.testing.assert_close(*moved, rtol=2**-8, atol=0)
