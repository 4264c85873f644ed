"""Linear + BatchNorm whose dX is a library's product of what the kernel of P stores in passing.

The model takes that form for wide K; here it is made to, for shapes that an interpreter can run.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_linear_batch_norm import (
    INPUTS,
    LEAVES,
    Problem,
    _Allocations,
    error,
    problem,
    table_problem,
)

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import OUTPUT_GRADS
from fastnorm.kernels import cost

BF16, F32 = torch.bfloat16, torch.float32
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=lambda d: str(d)[6:])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    kind = request.param
    if kind == "interpreted" and torch.cuda.is_available():
        pytest.skip("with a GPU the kernels run compiled: see the same test there")
    with fastnorm.use_backend("triton"):
        yield torch.device("cuda" if kind == "compiled" else "cpu")


@contextlib.contextmanager
def form(joined: bool) -> Iterator[list[bool]]:
    """Within the block dX is a library's product wherever it may be, or nowhere."""
    asked: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "joins", lambda p: asked.append(p.joins) or (joined and p.joins))
        yield asked


def both(case: Problem) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the two forms give; but for dX the bits are the same."""
    with form(joined=False):
        fused = case.ours()
    with form(joined=True) as asked:
        joined = case.ours()
    assert asked == [True]
    for name, value in fused.items():
        if name != "dx":
            assert torch.equal(joined[name], value), name
    return joined, fused


def gram(*args, **options) -> Problem:
    return problem(*args, algorithm="gram", **options)


@each_mode
@each_dtype
@pytest.mark.parametrize("shape", [(2, 1, 1), (7, 5, 3), (130, 72, 140)], ids=str)
def test_matches_float64(device, shape, dtype, training):
    case = gram(*shape, device, dtype, training=training)
    both(case)
    with form(joined=True):
        case.check()


@each_mode
@pytest.mark.parametrize("activation", OUTPUT_GRADS)
def test_activations(device, activation, training):
    for dtype in (F32, BF16):
        with form(joined=True):
            gram(70, 24, 40, device, dtype, training=training, activation=activation).check()


@each_dtype
@pytest.mark.parametrize("inputs", INPUTS)
def test_is_as_accurate_as_torch(device, inputs, dtype):
    with form(joined=True):
        table_problem(inputs, device, dtype, 512, 64, 96).check(("dx",), factor=1.1)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("inputs", INPUTS)
def test_is_as_accurate_as_torch_at_full_size(device, inputs, dtype):
    with form(joined=True):
        table_problem(inputs, device, dtype, 4096, 128, 512).check(factor=1.1)


@each_dtype
def test_a_gradient_with_a_mean(device, dtype):
    """The offset takes it away again: were it rounded to 16 bits, or that of a W which was not, an
    error of its size would stay."""
    case = gram(512, 24, 40, device, dtype, activation="identity")
    case = replace(case, dy=(case.dy.double() * 0.1 + 3.0).to(dtype))
    both(case)
    for joined in (True, False):
        with form(joined):
            case.check(("dx",), factor=1.1)


def test_a_mean_that_the_dtype_does_not_hold(device):
    """X is stored less x̄ as it is rounded; what that is off by goes to the offset."""
    case = gram(256, 24, 40, device, BF16, activation="identity", mean=10.0)
    case = replace(case, dy=(case.dy.double() + 3 * case.reference()["y"]).to(BF16))
    with form(joined=True):
        case.check(("dx",), factor=1.1)


@pytest.mark.parametrize("signal", [1, 100, 1000])
def test_a_signal_common_to_all_columns(device, signal):
    """Where W cancels it, A has a second part, and the fused kernel makes dX after all."""
    case = gram(512, 48, 64, device, torch.float64, mean=0.0)
    common = torch.randn(512, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = (case.weight.cpu() * 8).round() / 8
    weight[:, -1] -= weight.sum(1)
    case = replace(
        case, weight=weight.to(device, BF16), x=(case.x + signal * common.to(device)).to(BF16),
        dy=case.dy.to(BF16), bias=None, activation="identity",
        **{n: getattr(case, n).float() for n in (
            "norm_weight", "norm_bias", "running_mean", "running_var"
        )},
    )  # fmt: skip
    joined, fused = both(case)
    assert torch.equal(joined["dx"], fused["dx"]) == (signal >= 100)
    with form(joined=True):
        case.check(("dx", "dweight"))


@each_dtype
def test_out_of_range(device, dtype):
    """A, the square of 1 / x, is no number of 8 bits of exponent: it needs its unit."""
    for scale in (1e30, 1e-30):
        case = gram(200, 16, 24, device, dtype, mean=0.0, activation="identity", eps=1e-80)
        x = (case.x.double() * scale).to(dtype)
        case = replace(case, x=x, bias=None, running_mean=None, running_var=None)
        joined, fused = both(case)
        assert torch.equal(joined["dx"], fused["dx"])
        want = case.reference()["dx"] * scale
        assert error(joined["dx"].double() * scale, want) < 4 * torch.finfo(dtype).eps


@each_mode
def test_only_what_is_asked_for(device, training):
    """A gradient alone is the same as with all the others, and G is stored for dX and P alone."""
    case = gram(66, 20, 24, device, training=training)
    with form(joined=True) as asked:
        want = case.ours()
        for wanted in LEAVES:
            del asked[:]
            leaves = {n: t.requires_grad_(n == wanted) for n, t in case.leaves().items()}
            y = case.forward(leaves, *case.buffers())
            (got,) = torch.autograd.grad(y, leaves[wanted], case.dy)
            torch.testing.assert_close(got, want[f"d{wanted}"], rtol=1e-5, atol=1e-6)
            assert len(asked) == (wanted == "x" and training), wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are listed in the interpreter")
def test_launches():
    import interpreter

    for training, expected in (
        (True, ["join", "weight", "fold", "products", "round", "input"]),
        (False, ["weight", "fold"]),
    ):
        case = gram(66, 20, 24, torch.device("cpu"), BF16, training=training)
        with fastnorm.use_backend("triton"), form(joined=True), interpreter.trace() as launches:
            case.ours()
        backward = [n.kernel for n in launches if "bwd" in n.kernel]
        assert [name.split("_")[-2] for name in backward] == expected
        for launch in launches:
            if launch.kernel.endswith("bwd_input_kernel"):  # A is in range: there is nothing to do
                loaded = {name for name, moved in launch.traffic().items() if sum(moved)}
                assert loaded == {"todo_ptr"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")
@each_mode
def test_bytes(training):
    """dY, Y and X are read and G written; X is read for its copy; the product reads both."""
    import interpreter

    M, K, N = 512, 32, 64
    case = gram(M, K, N, torch.device("cpu"), BF16, training=training)
    with fastnorm.use_backend("triton"), form(joined=True), interpreter.trace() as launches:
        case.ours()
    large = ("dy_ptr", "y_ptr", "x_ptr", "h_ptr", "dx_ptr")
    moved = 0
    for launch in launches:
        if "bwd" in launch.kernel:
            for name, (loaded, stored, _, _) in launch.traffic().items():
                moved += loaded + stored if name in large else 0
    copied = 2 * K if training else 0
    assert moved == 2 * M * ((3 * N + K) + copied)


def test_what_stays_with_the_fused_kernel(device):
    """float16 cannot hold A without a unit, float64's digits are more, and NCHW is no matrix."""
    H200 = fastnorm.kernels.devices.Device(132)
    for dtype in (torch.float16, torch.float64):
        with form(joined=True) as asked:
            gram(40, 20, 24, device, dtype).check()
        assert asked == [False]
    for columns in (True, False):
        p = cost.problem(65536, 512, 2048, BF16, H200, True, True, columns=columns)
        assert cost.joins(p) == columns


@each_mode
def test_images(device, training, monkeypatch):
    """channels_last is rows; dX is laid out as x."""
    monkeypatch.setattr(cost, "choose", lambda *args, **kwargs: "gram")
    for channels_last in (True, False):
        case = gram((5, 4, 6), 12, 40, device, BF16, training=training)
        want = case.reference()
        leaves, (mean, var) = case.leaves(), case.buffers()
        x = leaves["x"].detach().movedim(-1, 1)
        x = (x if channels_last else x.contiguous()).requires_grad_()
        weight = leaves["weight"].detach()[:, :, None, None].requires_grad_()
        others = [leaves[name] for name in LEAVES[2:]]
        with form(joined=True) as asked:
            y = FF.conv_batch_norm(x, weight, others[0], mean, var, *others[1:], training)
            dx, _ = torch.autograd.grad(y, (x, weight), case.dy.movedim(-1, 1))
        assert asked == [channels_last]
        assert dx.stride() == x.stride()
        assert error(dx.movedim(1, -1), want["dx"]) < 0.02


# ---- memory --------------------------------------------------------------------------------------
@each_mode
@pytest.mark.unchecked  # it keeps what is allocated
def test_memory(device, training, monkeypatch):
    """The forward saves the same; the backward has one buffer, which does not outlive it."""
    M, K, N = 3000, 16, 32
    case = gram(M, K, N, device, BF16, training=training)
    # it steps aside for those who watch
    monkeypatch.setattr(fastnorm.eager.native, "observed", lambda x: False)
    saved: dict[bool, list[tuple[torch.Size, torch.dtype]]] = {}
    large: dict[bool, list[int]] = {}
    for joined in (True, False):
        made: list[weakref.ref[torch.Tensor]] = []

        def strided(*args, made=made, original=torch.empty_strided, **kwargs):
            tensor = original(*args, **kwargs)
            made.append(weakref.ref(tensor))
            return tensor

        leaves = case.leaves()
        found = saved.setdefault(joined, [])
        with (
            form(joined),
            monkeypatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, found=found: found.append((t.shape, t.dtype)) or t, lambda t: t
            ),
        ):
            y = case.forward(leaves, *case.buffers())
            dy = case.dy.clone()
            patch.setattr(torch, "empty_strided", strided)
            torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
            assert len(made) == joined
            assert all(reference() is None for reference in made)
            patch.undo()
            with form(joined), _Allocations() as backward:
                torch.autograd.grad(y, list(leaves.values()), dy)
        assert torch.equal(dy, case.dy), "G is never dY"
        large[joined] = [s for s in backward.sizes.values() if s >= M * N * 2]
    assert saved[True] == saved[False]
    depth = 64  # N + K + 8, or N, in whole lines
    assert large[False] == []
    assert len(large[True]) == 1
    assert large[True][0] <= M * depth * 2


def test_same_bits_every_time(device):
    case = gram(300, 40, 50, device, BF16)
    with form(joined=True):
        assert torch.equal(case.ours()["dx"], case.ours()["dx"])


def test_autocast_leaves_the_backward_alone(device):
    """A backward within the block multiplies float32 as one outside of it does."""
    case = gram(66, 20, 24, device)
    leaves = case.leaves()
    with form(joined=True):
        y = case.forward(leaves, *case.buffers())
        (want,) = torch.autograd.grad(y, leaves["x"], case.dy, retain_graph=True)
        with torch.autocast(device.type, BF16):
            (got,) = torch.autograd.grad(y, leaves["x"], case.dy)
    assert torch.equal(got, want)


def test_nan_stays_in_its_row(device):
    """In evaluation, as in torch: a row of dX is of its own dY and Y."""
    case = gram(40, 20, 24, device, BF16, training=False)
    case.dy[3, 2] = float("nan")
    theirs = case.torchs()["dx"]
    with form(joined=True):
        assert torch.equal(case.ours()["dx"].isnan(), theirs.isnan())
