"""The BatchNorm defects found in other libraries, one test each: ours must not have them.

The docstrings name the defect. General checks of the same things are in test_batch_norm.py and
test_batch_norm_adversarial.py; here each defect is set up as it bites a user.
"""

import inspect
import math
import sys

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import assert_close
from probes import (
    HAS_GPU,
    INTERPRETED,
    committed,
    draw,
    kernels_run,
    largest_error,
    launches,
    reserved,
)
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as FF
from fastnorm import use_backend

interpreted_only = pytest.mark.skipif(
    not INTERPRETED, reason="launches are seen in the interpreter"
)


# ---- 1: BatchNorm --------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 70, 71)], ids=str)
def test_backward_in_evaluation_uses_the_running_statistics(backend, shape):
    """Eval-mode backward that uses the batch's formula: there dx is dy·γ·rstd, and nothing more."""
    mean, var = draw(3, device=backend), draw(3, device=backend).abs() + 0.5
    weight, bias = draw(3, device=backend, seed=1), draw(3, device=backend, seed=2)
    x = draw(*shape, device=backend, seed=3).requires_grad_()
    y = FF.batch_norm(x, mean, var, weight.requires_grad_(), bias.requires_grad_())
    dy = torch.ones_like(y)  # what the batch's formula turns into zeros
    dx, dw, db = torch.autograd.grad(y, (x, weight, bias), dy)
    column = [1, 3] + [1] * (len(shape) - 2)
    rstd = 1 / (var.double() + 1e-5).sqrt()
    assert_close(dx, (weight * rstd).reshape(column).expand(shape).detach())
    xhat = (x.double() - mean.reshape(column)) * rstd.reshape(column)
    terms = x.numel() // 3
    assert_close(dw, xhat.transpose(0, 1).flatten(1).sum(1).detach(), terms)
    assert_close(db, torch.full((3,), float(terms), device=backend), terms)


def test_backward_in_evaluation_after_a_training_forward_in_between(backend):
    """Eval-mode backward that reads statistics which another forward has overwritten."""
    norm = fastnorm.BatchNorm1d(3, device=backend).eval()
    x = draw(6, 3, device=backend).requires_grad_()
    (want,) = torch.autograd.grad(norm(x), x, torch.ones_like(x))
    y = norm(x)
    if "NativeBatchNorm" in type(y.grad_fn).__name__:
        pytest.skip("torch's own operator saves the buffers themselves, and has this defect")
    norm.train()(draw(6, 3, device=backend, seed=1) * 9)
    (got,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert torch.equal(got, want)


def test_batches_are_counted(backend):
    """num_batches_tracked never incremented, or incremented on the host only."""
    norm = fastnorm.BatchNorm2d(3, device=backend)
    count = norm.num_batches_tracked
    for expected in (1, 2, 3):
        norm(draw(2, 3, 4, 4, device=backend))
        assert norm.num_batches_tracked is count
        assert count.item() == expected


@pytest.mark.parametrize("momentum", [0.1, None, "tensor"])
def test_evaluation_counts_and_moves_nothing(backend, momentum):
    """Buffers that change in evaluation, when they are passed all the same."""
    if momentum == "tensor":
        momentum = torch.tensor(0.5, device=backend)
    x, mean, var = draw(6, 3, device=backend), *torch.ones(2, 3, device=backend)
    count = torch.tensor(5, device=backend)
    FF.batch_norm(x, mean, var, momentum=momentum, num_batches_tracked=count)
    weight = draw(3, 3, device=backend)
    FF.linear_batch_norm(x, weight, None, mean, var, momentum=momentum, num_batches_tracked=count)
    assert count.item() == 5
    assert torch.equal(mean, torch.ones_like(mean))
    assert torch.equal(var, torch.ones_like(var))


def test_momentum_none(backend):
    """momentum=None unsupported: it is the average over all batches since the reset."""
    norm = fastnorm.BatchNorm1d(3, momentum=None, device=backend)
    batches = [draw(5, 3, device=backend, seed=i) * (i + 1) + i for i in range(4)]
    for x in batches:
        norm(x)
    exact = [x.double() for x in batches]
    assert_close(norm.running_mean, torch.stack([x.mean(0) for x in exact]).mean(0), 4)
    assert_close(norm.running_var, torch.stack([x.var(0) for x in exact]).mean(0), 4)
    norm.reset_running_stats()
    norm(batches[2])
    assert_close(norm.running_mean, exact[2].mean(0), 4)


def test_one_value_per_channel(backend):
    """n / (n − 1) with n = 1: an error before, not an infinite running variance after."""
    for kind, shape in ((fastnorm.BatchNorm1d, (1, 3)), (fastnorm.BatchNorm2d, (1, 3, 1, 1))):
        norm = kind(3, device=backend)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            norm(torch.ones(shape, device=backend))
        assert torch.equal(norm.running_var, torch.ones(3, device=backend))
        assert norm.num_batches_tracked.item() == 0
        assert norm.eval()(torch.ones(shape, device=backend)).isfinite().all()


def test_two_values_per_channel(backend):
    """The smallest batch: the running variance is unbiased, the one that normalizes is not."""
    var = torch.zeros(1, device=backend)
    x = torch.tensor([[1.0], [3.0]], device=backend)
    y = FF.batch_norm(x, torch.zeros_like(var), var, training=True, momentum=1.0, eps=1e-12)
    assert var.item() == 2.0
    torch.testing.assert_close(y, torch.tensor([[-1.0], [1.0]], device=backend))


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 70, 71)], ids=str)
def test_input_survives_without_running_statistics(backend, shape):
    """Input overwritten when the running statistics are None."""
    x = draw(*shape, device=backend)
    before = x.clone()
    y = FF.batch_norm(x, None, None, training=True, activation="relu")
    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_not_kept_in_16_bits(backend, dtype):
    """Statistics saved in bf16: a mean of 300 std has no bits left there for dγ."""
    spread = 0.1 if dtype is torch.float16 else 2.0
    x = (draw(64, 3, device=backend) * spread + 300 * spread).to(dtype).requires_grad_()
    weight = torch.ones(3, device=backend, dtype=torch.float32).requires_grad_()
    dy = draw(64, 3, device=backend, dtype=dtype, seed=1)
    y = FF.batch_norm(x, None, None, weight, None, True)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    leaf, gamma = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want, _, _ = reference.batch_norm(
        leaf, None, None, gamma, None, True, 0.1, 1e-5, None, "identity"
    )
    want_dx, want_dw = torch.autograd.grad(want, (leaf, gamma), dy.double())
    assert_close(y, want.detach(), 64)
    assert_close(dx, want_dx, 64)
    # 300: float32's rounding of x, in units of its spread
    torch.testing.assert_close(dw.double(), want_dw, rtol=0, atol=300 * 2**-23 * 64)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (2, 3, 0), (0, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(backend, shape, training):
    """Empty batch putting NaN into running_mean."""
    kind = fastnorm.BatchNorm2d if len(shape) == 4 else fastnorm.BatchNorm1d
    norm = kind(3, activation="relu", device=backend).train(training)
    x = torch.empty(shape, device=backend).requires_grad_()
    y = norm(x, torch.empty(shape, device=backend))
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert torch.equal(norm.running_mean, torch.zeros(3, device=backend))
    assert torch.equal(norm.running_var, torch.ones(3, device=backend))
    assert norm.num_batches_tracked.item() == training
    for parameter in (norm.weight, norm.bias):
        assert torch.equal(parameter.grad, torch.zeros(3, device=backend))


# ---- 2: overflow ---------------------------------------------------------------------------------


@pytest.mark.skipif(HAS_GPU, reason="memory is not lazy on a GPU")
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3), (2**31 + 3, 1)),  # a row lies beyond 2³¹ elements
        ((5, 3), (2**29 + 5, 1)),  # the last rows do
        ((2, 3, 4), (17, 2**30 + 1, 1)),  # a channel does
        ((2, 2, 3), (1, 2, 2**30 + 1)),  # a position does
        ((2, 2, 2, 2), (1, 2**31 - 1, 2, 4)),
    ],
    ids=str,
)
def test_strides_beyond_32_bits(backend, shape, strides):
    """32-bit row offsets fail silently beyond 2³¹ elements. No other memory is touched."""
    whole = reserved(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    values = draw(*shape, device=backend)
    x = whole.as_strided(shape, strides).copy_(values)
    assert whole.numel() > 2**31
    before = committed()
    leaf = x.requires_grad_()
    y = FF.batch_norm(leaf, None, None, training=True)
    (dx,) = torch.autograd.grad(y, leaf, values)
    assert committed() - before < 2**28
    dense = values.double().requires_grad_()
    want, _, _ = reference.batch_norm(
        dense, None, None, None, None, True, 0.1, 1e-5, None, "identity"
    )
    (want_dx,) = torch.autograd.grad(want, dense, values.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx.double(), want_dx, rtol=1e-4, atol=1e-4)


ROWS = [(65537, 2), (131073, 1), (3, 65537), (2, 70001, 2)]


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_many_rows_and_many_channels(backend, shape, training):
    """65,536 rows, or N ≥ 131,072: a grid or an offset that no longer fits."""
    if kernels_run(backend) and INTERPRETED and shape[1] > 60000 and not training:
        pytest.skip("thousands of programs, one after another: seen in training")
    x = draw(*shape, device=backend)
    x[::2] += 9  # so that no channel has a spread of nearly nothing
    x.requires_grad_()
    mean, var = torch.zeros(shape[1], device=backend), torch.ones(shape[1], device=backend)
    y = FF.batch_norm(x, mean.clone(), var.clone(), training=training, activation="relu")
    dy = draw(*shape, device=backend, seed=1)
    (dx,) = torch.autograd.grad(y, x, dy)
    leaf = x.detach().double().requires_grad_()
    want, _, _ = reference.batch_norm(
        leaf, mean.double(), var.double(), None, None, training, 0.1, 1e-5, None, "relu"
    )
    (want_dx,) = torch.autograd.grad(want, leaf, dy.double())
    terms = x.numel() // shape[1]
    assert_close(y, want.detach(), terms)
    assert_close(dx, want_dx, terms)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_more_than_2_to_the_31_elements_on_a_gpu(layout):
    """The real thing: the last element is as right as the first."""
    if layout == "rows":
        x = torch.empty(3, 5, 2**28, device="cuda", dtype=torch.bfloat16)
    else:
        x = torch.empty(2**28, 12, device="cuda", dtype=torch.bfloat16)
    x.normal_()
    assert x.numel() > 2**31
    y = FF.batch_norm(x, None, None, training=True, activation="relu")
    last = (slice(-1, None), slice(-1, None))
    channel = x[:, -1].double()
    want = (x[last].double() - channel.mean()) / (channel.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(y[last].double(), want.clamp(min=0), rtol=2**-8, atol=1e-3)


# ---- 5: gradients in place -----------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 70, 71)], ids=str)
def test_gradients_leave_dy_alone(backend, shape, activation, training):
    """In-place gradients: writing dX into dY breaks whoever still holds dY."""
    norm = fastnorm.BatchNorm1d if len(shape) == 2 else fastnorm.BatchNorm2d
    norm = norm(3, activation=activation, device=backend).train(training)
    x = draw(*shape, device=backend).requires_grad_()
    residual = draw(*shape, device=backend, seed=1).requires_grad_()
    dy = draw(*shape, device=backend, seed=2)
    before = dy.clone()
    y = norm(x, residual)
    first = torch.autograd.grad(y, (x, residual), dy, retain_graph=True)
    assert torch.equal(dy, before)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(y, (x, residual), dy)
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_gradients_do_not_share_memory_with_one_another(backend, activation):
    """A gradient that is another one's memory doubles when both are accumulated."""
    norm = fastnorm.BatchNorm1d(3, activation=activation, device=backend)
    leaf = draw(6, 3, device=backend).requires_grad_()
    y = norm(leaf * 1, leaf * 1)
    dy = draw(6, 3, device=backend, seed=2)
    want = F.batch_norm(leaf, None, None, training=True) + leaf
    want = F.relu(want) if activation == "relu" else want
    (want_gradient,) = torch.autograd.grad(want, leaf, dy)
    y.retain_grad()
    y.backward(dy)
    torch.testing.assert_close(leaf.grad, want_gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(y.grad, dy)
    y.grad.zero_()
    assert leaf.grad.abs().sum() > 0


# ---- 6: extremes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 3), (4, 3, 60, 60)], ids=str)
def test_large_mean_small_variance(backend, shape):
    """Large mean, small variance: NaN from a negative variance, of E[x²] − E[x]²."""
    for mean, spread in ((1e4, 1e-2), (1e6, 0.1), (-3e7, 4.0), (1.0, 0.0)):
        x = (draw(*shape, device=backend) * spread + mean).requires_grad_()
        exact = x.detach().double().transpose(0, 1).flatten(1)
        errors = []
        for call in (FF.batch_norm, F.batch_norm):
            running = torch.zeros(3, device=backend), torch.zeros(3, device=backend)
            y = call(x, *running, training=True, momentum=1.0)
            (dx,) = torch.autograd.grad(y, x, draw(*shape, device=backend, seed=1))
            errors.append(largest_error(running[1], exact.var(1)))
            if call is FF.batch_norm:
                assert y.isfinite().all()
                assert dx.isfinite().all()
                assert y.abs().max() < 6
                assert (running[1] >= 0).all()
                assert_close(running[0], exact.mean(1))
        assert errors[0] <= max(2 * errors[1], 1e-5 * exact.var(1).max().item())


@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(64, 3), (4, 3, 60, 60)], ids=str)
def test_values_near_the_largest(backend, shape, size):
    """|x| near 1e30: overflow in the sum of squares. Finite, and right, wherever torch is."""
    x = (draw(*shape, device=backend).clamp(-3, 3) * (size / 4)).requires_grad_()
    want, _, _ = reference.batch_norm(
        x.double(), None, None, None, None, True, 0.1, 1e-5, None, "identity"
    )
    dy = draw(*shape, device=backend, seed=1)
    (want_dx,) = torch.autograd.grad(want, x, dy)
    errors = []
    for call in (FF.batch_norm, F.batch_norm):
        y = call(x, None, None, training=True)
        (dx,) = torch.autograd.grad(y, x, dy)
        errors.append((largest_error(y, want), largest_error(dx, want_dx)))
    (mine, mine_dx), (torchs, torchs_dx) = errors
    assert mine <= max(2 * torchs, 1e-4)
    assert mine_dx <= max(2 * torchs_dx, 1e-30)
    if kernels_run(backend):
        assert mine <= 1e-4, "the kernels are right also where torch is not"


# ---- 8: autotuning -------------------------------------------------------------------------------
def test_running_statistics_move_once_a_call(backend):
    """Autotuning that runs a kernel which updates running statistics several times."""
    for shape in ((4, 3), (4, 3, 7, 7), (2, 3, 70, 71)):
        x = draw(*shape, device=backend) + 1
        mean, var = torch.zeros(3, device=backend), torch.zeros(3, device=backend)
        count = torch.tensor(0, device=backend)
        FF.batch_norm(x, mean, var, training=True, momentum=0.25, num_batches_tracked=count)
        exact = x.double().transpose(0, 1).flatten(1)
        assert_close(mean, exact.mean(1) / 4)
        assert_close(var, exact.var(1) / 4)
        assert count.item() == 1


def test_nothing_is_tuned_at_run_time():
    """No kernel is wrapped in an autotuner, whose first calls would be repeated."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    kernels = {n: m for n, m in list(sys.modules.items()) if n.startswith("fastnorm.kernels")}
    with use_backend("triton"):  # imports the kernels where nothing has yet
        FF.batch_norm(torch.ones(2, 2, device="cuda" if HAS_GPU else "cpu"), None, None, None,
                      None, True)  # fmt: skip
    kernels = {n: m for n, m in list(sys.modules.items()) if n.startswith("fastnorm.kernels")}
    assert "fastnorm.kernels.batch_norm" in kernels
    for name, module in kernels.items():
        for kernel, value in inspect.getmembers(module):
            assert not isinstance(value, autotuner.Autotuner | autotuner.Heuristics), (name, kernel)


@interpreted_only
def test_a_new_size_is_seldom_a_new_kernel():
    """Autotuning, or compiling, for every new batch or image size."""
    from interpreter import trace

    def variants(sizes: list[tuple[int, ...]]) -> int:
        with trace() as seen:
            for size in sizes:
                FF.batch_norm(draw(*size, device=torch.device("cpu")), None, None, training=True)
        return len(
            {(launch.kernel, *sorted(map(str, launch.constants.items()))) for launch in seen}
        )

    with use_backend("triton"):
        assert variants([(n, 2, 5, 5) for n in range(17, 33)]) == 1
        assert variants([(n, 2, 5, 5) for n in range(2, 33, 3)]) <= 5, "a power of two of samples"
        assert variants([(2, 1, n, n) for n in range(33, 46)]) <= 4, "the alignments 1, 2, 4, 8"


# ---- 9: mixed precision --------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_input_with_float32_parameters_stays_fused(backend, dtype):
    """bf16 input with fp32 weight losing the fused path, or the parameters' precision."""
    norm = fastnorm.BatchNorm2d(3, activation="relu", device=backend)
    x = draw(4, 3, 5, 5, device=backend, dtype=dtype).requires_grad_()
    with launches() as seen:
        y = norm(x, x)
        y.backward(torch.ones_like(y))
    if kernels_run(backend) and INTERPRETED:
        assert len(seen) == 2, "one launch forward, one backward"
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert norm.weight.grad.dtype == norm.running_var.dtype == torch.float32
    exact = x.detach().double().transpose(0, 1).flatten(1)
    assert_close(norm.running_mean, exact.mean(1) / 10, 100)  # not rounded to 16 bits
    assert_close(norm.running_var, 0.9 + exact.var(1) / 10, 100)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 70, 71)], ids=str)
def test_a_16_bit_residual_does_not_round_the_other_gradients(backend, shape, narrow):
    """The residual's gradient, in 16 bits, taken for the gradient of everything before it."""
    x = draw(*shape, device=backend).requires_grad_()
    residual = draw(*shape, device=backend, dtype=narrow, seed=1).requires_grad_()
    y = FF.batch_norm(x, None, None, training=True, residual=residual, activation="silu")
    dy = draw(*shape, device=backend, seed=2)
    got = torch.autograd.grad(y, (x, residual), dy)
    leaf, added = (t.detach().double().requires_grad_() for t in (x, residual))
    want, _, _ = reference.batch_norm(leaf, None, None, None, None, True, 0.1, 1e-5, added, "silu")
    wanted = torch.autograd.grad(want, (leaf, added), dy.double())
    for name, gradient, exact in zip(("dx", "dresidual"), got, wanted, strict=True):
        assert_close(gradient, exact, x.numel() // 3, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    """Autocast refused: a model trains under it, its parameters' gradients are float32."""
    torch.manual_seed(0)
    model = nn.Sequential(
        fastnorm.LinearBatchNorm(5, 4), nn.Linear(4, 3), fastnorm.BatchNorm1d(3, activation="silu")
    ).to(backend)
    x = draw(8, 5, device=backend)
    with torch.autocast(backend.type, dtype=dtype):
        y = model(x)
        loss = y.float().square().mean()
    loss.backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- 10: channels_last ---------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(
    ("kind", "size", "memory_format"),
    [
        (fastnorm.BatchNorm2d, (4, 3), torch.channels_last),
        (fastnorm.BatchNorm3d, (2, 3, 2), torch.channels_last_3d),
    ],
)
def test_channels_last(backend, kind, size, memory_format, channels):
    """channels_last silently converted; wrong where C is not a power of two."""
    norm = kind(channels, activation="relu", device=backend)
    with torch.no_grad():
        norm.weight.copy_(draw(channels, device=backend))
    shape = (3, channels, *size)
    x = draw(*shape, device=backend).to(memory_format=memory_format).requires_grad_()
    with launches() as seen:
        y = norm(x)
        (dx,) = torch.autograd.grad(y, x, x.detach())
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)
    for launch in seen:
        if "x_ptr" in launch.tensors:
            assert launch.tensors["x_ptr"].data_ptr == x.data_ptr(), "no copy of the input"
    leaf = x.detach().double().requires_grad_()
    want, _, _ = reference.batch_norm(
        leaf, None, None, norm.weight.detach().double(), None, True, 0.1, 1e-5, None, "relu"
    )
    (want_dx,) = torch.autograd.grad(want, leaf, x.detach().double())
    assert_close(y, want.detach(), 36)
    assert_close(dx, want_dx, 36)


@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 6, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("strided", ["weight", "bias", "running_mean", "running_var", "scalar"])
def test_parameters_and_buffers_of_any_stride(backend, strided, training, shape):
    """Strides of the parameters ignored: torch's own CPU operator reads on past them."""
    x, dy = draw(*shape, device=backend).requires_grad_(), draw(*shape, device=backend, seed=1)

    def outcome(stride: bool) -> list[Tensor]:
        wide = draw(4, 3, 2, device=backend, seed=2).abs() + 0.5
        wide[..., 1] = float("nan")  # between the elements
        found = {}
        for name, row in zip(("weight", "bias", "running_mean", "running_var"), wide, strict=True):
            narrow = row[:, 0] if stride and name == strided else row[:, 0].clone()
            if strided == "scalar" and name == "weight":  # one number for all channels
                narrow = narrow[:1].expand(3) if stride else narrow[:1].repeat(3)
            found[name] = narrow
        leaves = [x, found["weight"].requires_grad_(), found["bias"].requires_grad_()]
        y = FF.batch_norm(leaves[0], **found | {"bias": leaves[2]}, training=training)
        gradients = torch.autograd.grad(y, leaves, dy)
        return [y, *gradients, found["running_mean"], found["running_var"]]

    for got, want in zip(outcome(True), outcome(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# ---- 12: transforms ------------------------------------------------------------------------------
# torch imports its decompositions on first use of forward mode, and warns about how it does.
transform = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return FF.batch_norm(x, None, None, weight, bias, True, activation="tanh")


def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(F.batch_norm(x, None, None, weight, bias, True))


def arguments(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    double = {"device": device, "dtype": torch.float64}
    return draw(4, 3, 2, **double), draw(3, **double, seed=1), draw(3, **double, seed=2)


TRANSFORMS = {
    "grad": lambda f, a: torch.func.grad(lambda *a: (f(*a) ** 3).sum(), argnums=(0, 1, 2))(*a),
    "vjp": lambda f, a: torch.func.vjp(f, *a)[1](a[0]),
    "jvp": lambda f, a: torch.func.jvp(f, a, tuple(2 * t for t in a)),
    "jacrev": lambda f, a: torch.func.jacrev(f, argnums=1)(*a),
    "jacfwd": lambda f, a: torch.func.jacfwd(f, argnums=1)(*a),
    "hessian": lambda f, a: torch.func.hessian(lambda w: (f(a[0], w, a[2]) ** 3).sum())(a[1]),
    "vmap over weights": lambda f, a: torch.func.vmap(f, (None, 0, 0))(
        a[0], torch.stack([a[1], 2 * a[1]]), torch.stack([a[2], -a[2]])
    ),
    "vmap over inputs": lambda f, a: torch.func.vmap(f, (0, None, None))(
        torch.stack([a[0], a[0] ** 2]), a[1], a[2]
    ),
    "vmap of grad": lambda f, a: torch.func.vmap(
        torch.func.grad(lambda x, w, b: (f(x, w, b) ** 3).sum()), (0, None, None)
    )(torch.stack([a[0], a[0] ** 2]), a[1], a[2]),
}


@transform
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(backend, name):
    """torch.func and forward-mode AD: missing in every peer."""
    got = TRANSFORMS[name](ours, arguments(backend))
    want = TRANSFORMS[name](torchs, arguments(backend))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@transform
def test_forward_mode(backend):
    """Dual numbers pass through, also where a backend was forced."""
    x, weight, bias = arguments(backend)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, weight[0] * x**2)
        got = torch.autograd.forward_ad.unpack_dual(ours(dual, weight, bias))
        want = torch.autograd.forward_ad.unpack_dual(torchs(dual, weight, bias))
    torch.testing.assert_close(got.primal, want.primal, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.tangent, want.tangent, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu", "elu"])
def test_double_backward(backend, activation, residual, training):
    """Double backward: a gradient penalty through the norm has torch's gradient."""

    def penalty(fused: bool) -> list[Tensor]:
        x, weight, bias = (t.requires_grad_() for t in arguments(backend))
        added = draw(4, 3, 2, device=backend, dtype=torch.float64, seed=5)
        added = added.requires_grad_() if residual else None
        mean, var = bias.detach().clone(), weight.detach() ** 2 + 0.5
        if fused:
            y = FF.batch_norm(
                x, mean, var, weight, bias, training, residual=added, activation=activation
            )
        else:
            z = F.batch_norm(x, mean, var, weight, bias, training)
            z = z if added is None else z + added
            y = z if activation == "identity" else getattr(F, activation)(z)
        leaves = [t for t in (x, weight, bias, added) if t is not None]
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        total = sum((g**2).sum() for g in first)
        return [*first, *torch.autograd.grad(total, leaves)]

    for got, want in zip(penalty(True), penalty(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graph", [False, True], ids=["", "create_graph"])
def test_float32_biases_keep_their_precision(backend, graph):
    """A bias's gradient rounded to the input's dtype before it is widened."""
    x, dy = (draw(50, 8, 6, device=backend, dtype=torch.bfloat16, seed=i) for i in range(2))
    bias = torch.zeros(8, device=backend, requires_grad=True)
    y = FF.batch_norm(x, None, None, torch.ones(8, device=backend), bias, True)
    (db,) = torch.autograd.grad(y, bias, dy, create_graph=graph)
    assert db.dtype is torch.float32
    assert_close(db, dy.double().sum((0, 2)), 300)


def test_a_module_under_torch_func(backend):
    """Per-sample gradients of a model in evaluation, as in meta-learning and privacy."""
    double = {"device": backend, "dtype": torch.float64}
    torch.manual_seed(0)
    ours = fastnorm.LinearBatchNorm(4, 3, activation="tanh", **double).eval()
    theirs = nn.Sequential(nn.Linear(4, 3, False), nn.BatchNorm1d(3), nn.Tanh()).to(**double).eval()
    theirs[0].weight = ours.linear.weight
    x = draw(5, 4, **double)

    def per_sample(model: nn.Module, names: list[str]) -> list[Tensor]:
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, row[None]).square().sum()

        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        return [found[name] for name in names]

    got = per_sample(ours, ["linear.weight", "norm.weight", "norm.bias"])
    want = per_sample(theirs, ["0.weight", "1.weight", "1.bias"])
    for mine, others in zip(got, want, strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-9, atol=1e-9)
        assert mine.shape[0] == 5
        assert math.isfinite(mine.sum().item())
