"""The ways of the eager GroupNorm and InstanceNorm that only large tensors take, on small ones."""

import importlib
import subprocess
import sys

import pytest
import torch
from cases import assert_close, memory_formats
from test_group_norm import problem
from test_instance_norm import problem as instance_problem

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import direct, group_norm_cpu, native

eager = importlib.import_module("fastnorm.eager.group_norm")  # its package has such a function
instances = importlib.import_module("fastnorm.eager.instance_norm")
SHAPES = [((3, 6, 4, 5), 2), ((2, 6, 7, 9), 6), ((2, 12, 6, 6), 1), ((2, 6, 3, 4, 5), 3)]


@pytest.fixture(params=["large", "huge", "huge, centred"])
def way(request, monkeypatch):
    """Small tensors are treated as those of many megabytes are."""
    monkeypatch.setattr(direct, "SHORT", 0)
    monkeypatch.setattr(group_norm_cpu, "SMALL", 0)
    monkeypatch.setattr(group_norm_cpu, "LARGE", 0)
    monkeypatch.setattr(group_norm_cpu, "FEW", 100)
    monkeypatch.setattr(group_norm_cpu, "ROWS", 64)
    monkeypatch.setattr(instances, "SMALL", 0)
    monkeypatch.setattr(group_norm_cpu, "SHORT_PLANE", 2)
    monkeypatch.setattr(native, "is_huge", lambda input: "huge" in request.param)
    monkeypatch.setattr(native, "LONG_COLUMN", 7)
    monkeypatch.setattr(native, "NEAR", 0 if "centred" in request.param else 1e3)
    with fastnorm.use_backend("eager"):
        yield request.param


def took_our_way(y: torch.Tensor) -> bool:
    return "GroupNormFunction" in type(y.grad_fn).__name__


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_matches_float64(way, monkeypatch, shape, num_groups, dtype, residual, activation):
    # 16 bits as large ones are: z is rounded where torch.nn rounds it
    monkeypatch.setattr(eager, "rounds_between", lambda *_: False)
    for memory_format in memory_formats(len(shape)):
        case = problem(
            shape, num_groups, torch.device("cpu"), dtype, memory_format=memory_format,
            parameters=torch.float64 if dtype is torch.float64 else torch.float32,
            residual=residual, activation=activation,
        )  # fmt: skip
        if dtype is torch.bfloat16 and (residual or activation != "identity"):
            case.names = ("x", "weight", "bias")
            y = case.call(case.leaves())
            want = case.reference()["y"]
            torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2)
            continue
        got = case.check()
        last = memory_format is not torch.contiguous_format
        if activation != "silu":
            assert took_our_way(got["y"]) == (last or "huge" in way)
        assert got["y"].stride() == case.x.stride()


@pytest.mark.parametrize("affine", ["", "w", "b"])
def test_without_parameters(way, affine):
    for memory_format in memory_formats(4):
        case = problem(
            (3, 6, 4, 5), 2, torch.device("cpu"), affine=affine, memory_format=memory_format
        )
        case.check()


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual"])
def test_only_what_is_asked_for(way, wanted):
    for memory_format in memory_formats(4):
        case = problem(
            (3, 6, 4, 5), 2, torch.device("cpu"), residual=True, activation="relu",
            memory_format=memory_format,
        )  # fmt: skip
        want = case.reference()
        leaves = case.leaves()
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        (got,) = torch.autograd.grad(case.call(leaves), leaves[wanted], case.dy)
        assert_close(got, want[f"d{wanted}"], 60, wanted)


def test_second_derivatives(way):
    for memory_format in memory_formats(4):
        case = problem(
            (2, 4, 2, 3), 2, torch.device("cpu"), torch.float64, residual=True,
            memory_format=memory_format,
        )  # fmt: skip

        def call(*tensors, case=case):
            return case.call(dict(zip(case.leaves(), tensors, strict=True)))

        leaves = tuple(case.leaves().values())
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_without_gradients(way):
    """Nothing is saved, and the same comes out."""
    for memory_format in memory_formats(4):
        case = problem(
            (3, 6, 4, 5), 2, torch.device("cpu"), residual=True, activation="relu",
            memory_format=memory_format,
        )  # fmt: skip
        want = case.reference()["y"].detach()
        with torch.no_grad():
            y = case.call(case.leaves())
        assert y.grad_fn is None
        assert_close(y, want)


def test_a_large_mean(way):
    """A mean of many standard deviations is left to torch, which merges float32 means better."""
    case = problem((2, 6, 7, 9), 2, torch.device("cpu"), mean=3e3)
    got = case.run()
    case.x = case.x.double()
    want = torch.nn.functional.group_norm(case.x, 2, case.weight.double(), case.bias.double())
    torch.testing.assert_close(got["y"].double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_what_is_not_finite(way, value):
    for memory_format in memory_formats(4):
        case = problem((2, 6, 7, 9), 2, torch.device("cpu"), memory_format=memory_format)
        case.x[1, 2, 3, 4] = value
        want = torch.nn.functional.group_norm(case.x, 2, case.weight, case.bias)
        torch.testing.assert_close(case.run()["y"], want, equal_nan=True)


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_instance_norm(way, dtype, activation):
    for memory_format in memory_formats(4):
        for residual in (False, True):
            for tracked in (False, True):
                case = instance_problem(
                    (3, 6, 4, 5), torch.device("cpu"), dtype, memory_format=memory_format,
                    activation=activation, residual=residual, tracked=tracked,
                )  # fmt: skip
                got = case.check()
                assert got["y"].stride() == case.x.stride()
                if memory_format is torch.channels_last and dtype is torch.float32:
                    graph = "InstanceNormFunction" if activation != "silu" else "Silu"
                    assert graph in type(got["y"].grad_fn).__name__


def test_second_derivatives_of_instance_norm(way):
    case = instance_problem(
        (2, 3, 2, 3), torch.device("cpu"), torch.float64, memory_format=torch.channels_last
    )

    def call(x, weight, bias):
        return FF.instance_norm(x, weight=weight, bias=bias)

    leaves = tuple(case.leaves().values())
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 8, 3, 3), (8, 256, 28, 28)], ids=str)
def test_frozen_input_in_channels_last(shape):
    """torch's backward for the parameters alone writes dx where there is none, and may crash: in a
    process of its own, since a failure ends it."""
    code = f"""
import torch, fastnorm.functional as FF
x = torch.randn({shape}).to(memory_format=torch.channels_last)
w, b = torch.randn(2, {shape[1]}, requires_grad=True)
for _ in range(4):
    dy = torch.randn_like(x)
    dw, db = torch.autograd.grad(FF.group_norm(x, 4, w, b), (w, b), dy)
    again, = torch.autograd.grad(FF.group_norm(x.clone().requires_grad_(), 4, w, b), w, dy)
    torch.testing.assert_close(dw, again, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(db, dy.sum((0, 2, 3)), rtol=1e-4, atol=1e-3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_strided_inputs_keep_one_copy():
    """A dense copy is made once, before the forward, and is what the backward reads."""
    x = torch.randn(4, 6, 10, 12)[..., ::2].requires_grad_()
    with fastnorm.use_backend("eager"):
        y = FF.group_norm(x, 2)
    assert y.is_contiguous()
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.shape == x.shape


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("layout", ["every second", "expanded"])
@pytest.mark.parametrize("num_groups", [2, 6])
def test_strided_parameters(way, num_groups, layout, gradient):
    """torch's operators behind its functions take them for dense ones."""
    wide = torch.randn(2, 6, 2)
    views = wide[..., 0] if layout == "every second" else wide[:, :1, 0].expand(2, 6)
    dy = torch.randn(3, 6, 4, 5)
    for memory_format in memory_formats(4):
        x = torch.randn(3, 6, 4, 5).contiguous(memory_format=memory_format)
        for call in (
            lambda x, weight, bias: FF.group_norm(x, num_groups, weight, bias),
            lambda x, weight, bias: FF.instance_norm(x, None, None, weight, bias),
        ):
            got, want = (
                _with_gradients(call, x, weight, bias, dy if gradient else None)
                for weight, bias in (views, views.contiguous())
            )
            torch.testing.assert_close(got, want)


def _with_gradients(call, x, weight, bias, dy):
    """Output, and dx, dγ and dβ where there is a dy; parameters keep their strides."""
    leaves = [t.detach().requires_grad_(dy is not None) for t in (x, weight, bias)]
    y = call(*leaves)
    return (y,) if dy is None else (y, *torch.autograd.grad(y, leaves, dy))


def test_16_bit_parameters_without_a_backward(monkeypatch):
    """Nothing is cast for the output alone, and it is as precise."""
    case = problem((4, 6, 5, 7), 3, "cpu", torch.bfloat16, parameters=torch.bfloat16)
    case.check()
    monkeypatch.setattr(eager, "prepared", lambda *_: pytest.fail("cast"))
    with torch.no_grad():
        y = FF.group_norm(case.x, 3, case.weight, case.bias)
        want = torch.group_norm(case.x.double(), 3, case.weight.double(), case.bias.double())
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-6)


def test_sums_of_instance_norm_in_evaluation_are_torchs():
    """Near bfloat16's maximum those over all samples at once overflow where torch.nn's do not."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(9, 36, 20, 20, generator=generator)
        x = (drawn * 4e36).bfloat16().to(memory_format=torch.channels_last)
        dy = torch.randn(drawn.shape, generator=generator).bfloat16()
        found = []
        for library in (torch.nn, fastnorm):
            norm = library.InstanceNorm2d(36, affine=True, track_running_stats=True).eval()
            norm(x).backward(dy)
            found.append(norm.weight.grad.isfinite())
        assert found[0].any()
        assert found[1][found[0]].all()
