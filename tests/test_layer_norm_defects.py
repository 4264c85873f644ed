"""The LayerNorm and RMSNorm defects found in other libraries, one test each, as in test_defects.py.

Numbers are those of the families of defects there: overflow, shapes, gradients in place, extremes,
mixed precision.
"""

from collections.abc import Iterator
from typing import Any

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
    kernels_seen,
    largest_error,
    launches,
    reserved,
)
from row_ways import WAYS, taking
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import native

KINDS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
PLAIN = KINDS[:2]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_plain_kind = pytest.mark.parametrize("kind", PLAIN)


@pytest.fixture(params=["shipped", "one program", "many programs"])
def way(request, backend) -> Iterator[str]:
    """Each way of sharing rows between programs, for short ones; eager knows but one."""
    kernels = kernels_run(backend)
    if not kernels and request.param != "shipped":
        pytest.skip("of the kernels")
    with taking(request.param, kernels):
        yield request.param


def call(
    kind: str, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, axes: int = 1,
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(y,), or (y, sum) with a residual of zeros: the sum is x."""
    inputs = (x, torch.zeros_like(x)) if "add" in kind else (x,)
    parameters = (weight, bias) if "layer" in kind else (weight,)
    y = getattr(FF, kind)(*inputs, x.shape[-axes:], *parameters, eps=1e-5, **options)
    return y if isinstance(y, tuple) else (y,)


def compare(
    kind: str, x: Tensor, axes: int = 1, activation: str = "identity", affine: bool = True
) -> None:
    """Output and every gradient with float64's."""
    size = x.shape[-axes:]
    weight, bias = (draw(*size, device=x.device, seed=s) for s in (7, 8))
    leaves = {"x": x.detach(), "weight": weight, "bias": bias}
    absent = ("weight", "bias") if not affine else ("bias",) if "rms" in kind else ()
    for name in absent:
        del leaves[name]
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    dy = draw(*x.shape, device=x.device, seed=9)
    y, *_ = call(kind, *leaves.values(), axes=axes, activation=activation)
    got = torch.autograd.grad(y, list(leaves.values()), dy)
    exact = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    want = reference.layer_norm(
        exact["x"], axes, exact.get("weight"), exact.get("bias"), 1e-5, activation, "layer" in kind
    )
    wanted = torch.autograd.grad(want, list(exact.values()), dy.double())
    rows, kappa = x.numel() // size.numel(), 64  # torch's own operators, on rows that agree
    assert_close(y, want.detach(), size.numel() + kappa, "y")
    for name, mine, theirs in zip(leaves, got, wanted, strict=True):
        assert mine.shape == leaves[name].shape
        assert_close(mine, theirs, (size.numel() if name == "x" else rows) + kappa, f"d{name}")


# ---- 2: overflow ---------------------------------------------------------------------------------
@pytest.mark.skipif(HAS_GPU, reason="memory is not lazy on a GPU")
@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 24), (2**31 + 8, 1)),  # a row lies beyond 2³¹ elements
        ((5, 24), (2**29 + 3, 1)),  # the last rows do
        ((2, 3, 8), (2**31 + 48, 16, 1)),
        ((3, 2), (1, 2**31 + 3)),  # a column does
    ],
    ids=str,
)
@each_kind
def test_strides_beyond_32_bits(backend, kind, shape, strides):
    """32-bit row offsets fail silently beyond 2³¹ elements. No other memory is touched."""
    whole = reserved(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    assert whole.numel() > 2**31
    values = draw(*shape, device=backend)
    x = whole.as_strided(shape, strides).copy_(values)
    before = committed()
    with kernels_seen() as seen:
        compare(kind, x)
    assert committed() - before < 2**28
    assert ("layer_norm_fwd_kernel" in seen) == (INTERPRETED and kernels_run(backend))


@pytest.mark.parametrize("shape", [(65537, 3), (2, 32769, 2)], ids=str)
@each_plain_kind
def test_many_rows(backend, kind, shape):
    """65,536 rows: a grid of which an axis no longer fits."""
    x = draw(*shape, device=backend)
    x[..., 0] += 9  # so that no row has a spread of nearly nothing
    compare(kind, x)


@pytest.mark.parametrize("shape", [(1, 140001)], ids=str)
@each_plain_kind
def test_long_rows(backend, kind, shape):
    """N ≥ 131,072: wider than any tile, and than 16 bits."""
    # in the interpreter the parameters' sums would be thousands of programs, one after another
    compare(
        kind, draw(*shape, device=backend) + 1, affine=not (INTERPRETED and kernels_run(backend))
    )


# ---- 3: shapes -----------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(2, 3, 40), (1, 2, 1, 3, 20), (40,)], ids=str)
@each_plain_kind
def test_inputs_that_are_not_2d(backend, way, kind, shape):
    """A backward that assumes two axes: x.shape[0] rows, where there are more."""
    compare(kind, draw(*shape, device=backend) + 0.5)


@pytest.mark.parametrize("axes", [2, 3])
@each_plain_kind
def test_several_trailing_axes(backend, way, kind, axes):
    """dweight of the last axis alone."""
    compare(kind, draw(3, 2, 5, 6, device=backend), axes=axes)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("size", [7, 40])
@each_plain_kind
def test_fewer_rows_than_programs(backend, way, kind, rows, size):
    """M = 1 among them: partial sums of programs without a row are left unwritten, and added."""
    compare(kind, draw(rows, size, device=backend) + 0.5, activation="gelu")


@each_kind
def test_no_program_is_without_a_row(backend, kind):
    """Or its partial sums would have to be zeros: every launch is as wide as its work."""
    if not (INTERPRETED and kernels_run(backend)):
        pytest.skip("launches are seen in the interpreter")
    for name, multiprocessors in WAYS.items():
        if multiprocessors is None:
            continue
        for rows in (1, 9):
            with taking(name, True), launches() as seen:
                compare(kind, draw(rows, 40, device=backend))
            by_name = {launch.kernel: launch for launch in seen}
            backward = by_name["layer_norm_bwd_kernel"]
            partials = by_name["sum_partials_kernel"].scalars["P"]
            tiles = backward.scalars["tiles"]
            assert 1 <= partials <= tiles
            assert (partials - 1) * backward.scalars["tiles_per_program"] < tiles


# ---- 5: gradients in place -----------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["relu"])
@each_kind
def test_gradients_leave_dy_alone(backend, way, kind, activation):
    """In-place gradients: writing dX into dY breaks whoever still holds dY, or the sum's."""
    x = draw(5, 40, device=backend).requires_grad_()
    outputs = call(kind, x, activation=activation)
    seeds = [draw(5, 40, device=backend, seed=2 + i) for i in range(len(outputs))]
    before = [t.clone() for t in (x.detach(), *outputs, *seeds)]
    first = torch.autograd.grad(outputs, x, seeds, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(outputs, x, seeds)[0]
    assert torch.equal(first, kept)
    assert torch.equal(first, second)
    for now, then in zip((x.detach(), *outputs, *seeds), before, strict=True):
        assert torch.equal(now, then)
    pointers = {t.data_ptr() for t in (x, *outputs, *seeds)}
    assert not {first.data_ptr(), second.data_ptr()} & pointers


# ---- 6: extremes ---------------------------------------------------------------------------------
def results(function: Any, x: Tensor, dy: Tensor, *parameters: Any) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf, x.shape[-1:], *parameters)
    return [y.detach(), *torch.autograd.grad(y, leaf, dy)]


def exact(kind: str, x: Tensor, dy: Tensor) -> list[Tensor]:
    """In float64, at the eps that the tests of extremes use."""
    leaf = x.detach().double().requires_grad_()
    y = reference.layer_norm(leaf, 1, None, None, 1e-5, "identity", kind == "layer_norm")
    return [y.detach(), *torch.autograd.grad(y, leaf, dy.double())]


def extremes(kind: str, x: Tensor, dy: Tensor) -> tuple[list[float], list[float]]:
    """Errors of y and dx: ours, and torch's."""
    parameters = (None, None, 1e-5) if kind == "layer_norm" else (None, 1e-5)
    want = exact(kind, x, dy)
    both = []
    for function in (getattr(FF, kind), getattr(F, kind)):
        got = results(function, x, dy, *parameters)
        both.append([largest_error(g, w) for g, w in zip(got, want, strict=True)])
    return both[0], both[1]


@pytest.mark.parametrize("size", [40, 200])
def test_large_mean_small_variance(backend, way, size):
    """Large mean, small variance: NaN from a negative variance, of E[x²] − E[x]²."""
    for mean, spread in ((1e4, 1e-2), (1e6, 0.1), (-3e7, 4.0), (1.0, 0.0)):
        x = draw(3, size, device=backend) * spread + mean
        dy = draw(3, size, device=backend, seed=1)
        got = results(FF.layer_norm, x, dy)
        assert all(t.isfinite().all() for t in got)
        assert got[0].abs().max() < 1.01 * size**0.5
        ours, torchs = extremes("layer_norm", x, dy)
        scale = exact("layer_norm", x, dy)[1].abs().max().item()
        assert ours[0] <= max(2 * torchs[0], 1e-4)
        assert ours[1] <= max(2 * torchs[1], 1e-4 * scale)


@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
@each_plain_kind
def test_values_near_the_largest(backend, way, kind, size):
    """|x| near 1e30: overflow in the sum of squares. Finite, and right, wherever torch is."""
    x = draw(3, 200, device=backend).clamp(-3, 3) * (size / 4)
    dy = draw(3, 200, device=backend, seed=1)
    ours, torchs = extremes(kind, x, dy)
    assert ours[0] <= max(2 * torchs[0], 1e-4)
    assert ours[1] <= max(2 * torchs[1], 1e-30)
    if kernels_run(backend):
        assert ours[0] <= 1e-4, "the kernels are right also where torch is not"


@each_plain_kind
def test_small_values_among_the_largest(backend, way, kind):
    """One huge row must not cost the others their bits, nor one huge element its row its mean."""
    x = draw(6, 200, device=backend)
    x[2] *= 1e37
    x[3, 100] = 1e30
    x[4] *= 1e-30
    dy = draw(6, 200, device=backend, seed=1)
    parameters = (None, None, 1e-5) if kind == "layer_norm" else (None, 1e-5)
    got, want = results(getattr(FF, kind), x, dy, *parameters), exact(kind, x, dy)
    if not kernels_run(backend):
        got, want = ([t[[0, 1, 4, 5]] for t in ts] for ts in (got, want))  # torch's operators
    assert_close(got[0], want[0], 200)
    rows = want[1].abs().amax(1, keepdim=True).clamp(min=1e-37)
    assert_close((got[1].double() / rows).float(), want[1] / rows, 200)


# ---- 9: mixed precision --------------------------------------------------------------------------
NO_WORK = {
    "empty", "empty_like", "empty_strided", "detach", "view", "select", "promote_types",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """The names of torch's operators that run in a block, but for allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name not in NO_WORK:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.unchecked  # the checker's own operators would be among those counted
@each_kind
def test_16_bit_input_with_float32_parameters_stays_fused(monkeypatch, backend, kind, dtype):
    """bf16 input with fp32 weight losing the fused path: one launch forward, no cast in between."""
    if not (INTERPRETED and kernels_run(backend)):
        pytest.skip("launches are seen in the interpreter")
    # a mode that counts is no graph being recorded: launch as for anyone else
    monkeypatch.setattr(native, "observed", lambda tensor: False)
    x = draw(6, 40, device=backend, dtype=dtype).requires_grad_()
    parameters = [draw(40, device=backend, seed=s).requires_grad_() for s in (1, 2)]
    parameters = parameters[: 2 if "layer" in kind else 1]
    with launches() as seen:
        zeros = (torch.zeros_like(x),) if "add" in kind else ()
        with Operators() as forward:
            outputs = getattr(FF, kind)(x, *zeros, (40,), *parameters, 1e-5)
        y = outputs[0] if zeros else outputs
        assert [launch.kernel for launch in seen] == ["layer_norm_fwd_kernel"]
        assert forward.seen == []
        dy = torch.ones_like(y)
        with Operators() as backward:
            gradients = torch.autograd.grad(y, [x, *parameters], dy)
    assert [launch.kernel for launch in seen[1:]] == [
        "layer_norm_bwd_kernel",
        "sum_partials_kernel",
    ]
    assert backward.seen == []
    assert y.dtype is dtype
    assert [g.dtype for g in gradients] == [dtype] + [torch.float32] * len(parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_plain_kind
def test_float32_parameters_keep_their_precision(backend, kind, dtype):
    """A weight rounded to the input's dtype before it is used, or its gradient after."""
    x = draw(300, 8, device=backend, dtype=dtype)
    weight = (1 + 2**-12 * draw(8, device=backend, seed=1)).requires_grad_()
    y, *_ = call(kind, x, weight)
    dy = draw(300, 8, device=backend, dtype=dtype, seed=2)
    (dw,) = torch.autograd.grad(y, weight, dy)
    gamma = weight.detach().double().requires_grad_()
    want = reference.layer_norm(x.double(), 1, gamma, None, 1e-5, "identity", kind == "layer_norm")
    (want_dw,) = torch.autograd.grad(want, gamma, dy.double())
    assert dw.dtype is torch.float32
    if kernels_run(backend):  # torch's own operator adds dweight up in 16 bits on a CPU
        assert_close(dw, want_dw, 300)
    rounded = reference.layer_norm(
        x.double(), 1, gamma.to(dtype).double(), None, 1e-5, "identity", kind == "layer_norm"
    )
    if kernels_run(backend):
        assert (y.double() - want).norm() < (y.double() - rounded).norm()


@pytest.mark.parametrize("graph", [False, True], ids=["", "create_graph"])
def test_float32_biases_keep_their_precision(backend, graph):
    """A bias's gradient rounded to the input's dtype before it is widened."""
    x, dy = (draw(300, 8, device=backend, dtype=torch.bfloat16, seed=i) for i in range(2))
    bias = torch.zeros(8, device=backend, requires_grad=True)
    y = FF.layer_norm(x, (8,), torch.ones(8, device=backend), bias)
    (db,) = torch.autograd.grad(y, bias, dy, create_graph=graph)
    assert db.dtype is torch.float32
    if kernels_run(backend):  # torch's own operator adds up in 16 bits on a CPU
        assert_close(db, dy.double().sum(0), 300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["AddLayerNorm", "AddRMSNorm"])
def test_autocast(backend, kind, dtype):
    """Autocast refused: a pre-norm block trains under it, with a float32 stream and parameters."""
    torch.manual_seed(0)
    linear, norm = nn.Linear(8, 8), getattr(fastnorm, kind)(8, activation="silu")
    model = nn.ModuleList([linear, norm]).to(backend)
    stream = draw(6, 8, device=backend)
    with torch.autocast(backend.type, dtype=dtype):
        y, total = norm(linear(stream), stream)
        loss = linear(y).float().square().mean() + total.square().mean()
    loss.backward()
    assert total.dtype is torch.float32
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters())
