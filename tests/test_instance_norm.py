"""InstanceNorm against the float64 reference: outputs, gradients and running statistics."""

from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import FLOATS, assert_close, compute_dtype, each_dtype, memory_formats
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import direct, native
from fastnorm.eager.activations import ACTIVATIONS


@dataclass
class Problem:
    """One call and its upstream gradient, and what it should give."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dy: Tensor
    use_input_stats: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str = "identity"

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh copies that require gradients; in `dtype` where given."""
        found = {}
        for name in ("x", "weight", "bias", "residual"):
            tensor = getattr(self, name)
            if tensor is not None:
                found[name] = tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()
        return found

    def run(self) -> dict[str, Tensor]:
        """Output, gradients and buffers of ours."""
        leaves = self.leaves()
        buffers = [None if t is None else t.clone() for t in (self.running_mean, self.running_var)]
        y = FF.instance_norm(
            leaves["x"], *buffers, leaves.get("weight"), leaves.get("bias"),
            self.use_input_stats, self.momentum, self.eps,
            residual=leaves.get("residual"), activation=self.activation,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return self._collect(y, leaves, gradients, buffers)

    def reference(self) -> dict[str, Tensor]:
        leaves = self.leaves(torch.float64)
        buffers = [None if t is None else t.double() for t in (self.running_mean, self.running_var)]
        y, *buffers = reference.instance_norm(
            leaves["x"], *buffers, leaves.get("weight"), leaves.get("bias"),
            self.use_input_stats, self.momentum, self.eps, leaves.get("residual"), self.activation,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.double())
        return self._collect(y, leaves, gradients, buffers)

    @staticmethod
    def _collect(y: Tensor, leaves: Any, gradients: Any, buffers: Any) -> dict[str, Tensor]:
        found = {"y": y} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
        names = ("running_mean", "running_var")
        return found | {n: t for n, t in zip(names, buffers, strict=True) if t is not None}

    def check(self) -> dict[str, Tensor]:
        got, want = self.run(), self.reference()
        terms = self.x.numel() // self.x.shape[1]
        # With residual and activation dz is stored, rounded, between the passes; so is torch's.
        roundings = 1 + (self.residual is not None and self.activation != "identity")
        for name, value in got.items():
            compute = compute_dtype(self.x.dtype)
            assert_close(value, want[name], terms, name, roundings, compute=compute)
        for name, leaf in self.leaves().items():
            assert got[f"d{name}"].dtype == leaf.dtype
        return got


def problem(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    parameters: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    affine: bool = True,
    residual: bool = False,
    tracked: bool = True,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def large(values: Tensor) -> Tensor:
        return values.to(device, dtype).to(memory_format=memory_format)

    channels = shape[1]
    small = {"device": device, "dtype": parameters or dtype}
    return Problem(
        x=large(draw(*shape) * 1.5 + 0.5),
        weight=(draw(channels) * 0.3 + 1).to(**small) if affine else None,
        bias=draw(channels).mul(0.5).to(**small) if affine else None,
        residual=large(draw(*shape)) if residual else None,
        running_mean=draw(channels).to(**small) if tracked else None,
        running_var=(draw(channels).abs() + 0.5).to(**small) if tracked else None,
        dy=large(draw(*shape)),
        **options,
    )


SHAPES = [
    (3, 1, 5),  # one channel
    (2, 3, 7),
    (300, 5, 9),  # more samples than a merging tile
    (2, 40, 4, 4),
    (3, 2, 17, 31),
    (2, 3, 120, 121),  # a channel larger than a tile
    (2, 3, 4, 5, 6),
]


@pytest.mark.parametrize("use_input_stats", [True, False], ids=["train", "eval"])
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype, use_input_stats):
    for memory_format in memory_formats(len(shape)):
        case = problem(
            shape, backend, dtype, memory_format=memory_format, use_input_stats=use_input_stats
        )
        got = case.check()
        assert got["y"].dtype == dtype
        assert got["y"].stride() == case.x.stride(), "the memory format is kept"


@pytest.mark.parametrize("use_input_stats", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(backend, activation, residual, use_input_stats):
    options = {"activation": activation, "use_input_stats": use_input_stats}
    problem((3, 6, 5), backend, residual=residual, **options).check()


@pytest.mark.parametrize("parameters", FLOATS, ids=lambda d: f"parameters {d}"[17:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: f"input {d}"[12:])
def test_mixed_dtypes(backend, dtype, parameters):
    """Parameters and buffers of any floating dtype, also where torch's CPU operators raise."""
    for use_input_stats in (True, False):
        options = {"parameters": parameters, "use_input_stats": use_input_stats}
        got = problem((7, 6, 5), backend, dtype, **options).check()
        assert got["y"].dtype == dtype
        assert got["running_mean"].dtype == parameters


def test_without_parameters_or_buffers(backend):
    for tracked in (True, False):
        for affine in (True, False):
            problem((9, 4, 5), backend, affine=affine, tracked=tracked).check()


@pytest.mark.parametrize("memory_format", memory_formats(4), ids=lambda f: str(f)[6:])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, "tensor"])
def test_running_statistics(backend, momentum, memory_format):
    """Three batches move the buffers as float64, and torch, do: averages over the samples."""
    shape = (5, 3, 6, 7)
    mean = torch.zeros(3, device=backend)
    var = torch.ones_like(mean)
    want = torchs = (mean.double(), var.double())
    torchs = tuple(t.clone() for t in torchs)
    given = torch.tensor(0.25, device=backend) if momentum == "tensor" else momentum
    factor = 0.25 if momentum == "tensor" else momentum
    for step in range(3):
        x = problem(shape, backend, memory_format=memory_format, seed=step).x * (step + 1)
        FF.instance_norm(x, mean, var, momentum=given)
        _, *want = reference.instance_norm(
            x.double(), *want, None, None, True, factor, 1e-5, None, "identity"
        )
        torch.nn.functional.instance_norm(x.double(), *torchs, momentum=factor)
        for got, wanted, theirs in zip((mean, var), want, torchs, strict=True):
            assert_close(got, wanted)
            assert_close(theirs, wanted)


def test_strided_buffers_move(backend):
    case = problem((4, 3, 6), backend)
    wide = torch.zeros(6, device=backend), torch.ones(6, device=backend)
    mean, var = (t[::2] for t in wide)
    FF.instance_norm(case.x, mean, var)
    want_mean, want_var = torch.zeros(3, device=backend), torch.ones(3, device=backend)
    FF.instance_norm(case.x, want_mean, want_var)
    assert_close(mean, want_mean.double())
    assert_close(var, want_var.double())
    assert not wide[0][1::2].any()


def test_buffers_that_move_are_of_another_version(backend):
    """By which autograd knows that what it saved has changed."""
    buffers = torch.zeros(3, device=backend), torch.ones(3, device=backend)
    before = [buffer._version for buffer in buffers]
    x = torch.randn(2, 3, 5, device=backend)
    FF.instance_norm(x, *buffers, use_input_stats=False)
    assert [buffer._version for buffer in buffers] == before
    FF.instance_norm(x, *buffers)
    assert all(b._version > v for b, v in zip(buffers, before, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=str)
def test_empty_batches_move_nothing(backend, shape):
    """torch's write NaN into the buffers."""
    mean, var = torch.zeros(3, device=backend), torch.ones(3, device=backend)
    x = torch.zeros(shape, device=backend)
    y = FF.instance_norm(x, mean, var, residual=x)
    assert y.shape == shape
    assert torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(var, torch.ones_like(var))


def test_gradcheck(backend):
    for use_input_stats in (True, False):
        for residual, activation in ((False, "identity"), (True, "silu")):
            case = problem((2, 2, 3), backend, torch.float64, residual=residual)

            def call(
                x, weight, bias, residual=None, case=case, stats=use_input_stats, act=activation
            ):
                return FF.instance_norm(
                    x, case.running_mean.clone(), case.running_var.clone(), weight, bias, stats,
                    residual=residual, activation=act,
                )  # fmt: skip

            leaves = tuple(case.leaves().values())
            assert torch.autograd.gradcheck(call, leaves)
            assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_same_bits_every_time(backend):
    for shape in ((300, 4, 9, 9), (2, 4, 130, 131)):
        case = problem(shape, backend, torch.bfloat16, residual=True, activation="relu")
        first, second = case.run(), case.run()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("shape", [(2, 4, 12, 18, 10), (2, 4, 72, 30)], ids=str)
def test_gradients_with_channels_last(backend, shape):
    """torch.nn's, of a channels_last_3d input, are wrong by as much as they are large (2.13)."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    problem(shape, backend, torch.float32, memory_format=memory_format).check()


def test_gradient_of_large_samples_is_laid_out_as_they_are():
    x = torch.randn(2, 4, 96, 96).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = FF.instance_norm(x)
    for dy in (torch.randn_like(y), torch.randn(y.shape)):
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert dx.stride() == y.stride() == x.stride()


EXTREMES = {
    "large": (1e20, 0.0, 1e-5),
    "constant": (0.0, 1e20, 1e-5),
    "small": (1e-20, 0.0, 0.0),  # the cube of rstd is no float32 number either
}


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in EXTREMES
        for way in ("direct", "general", "huge")
        if (name, way) != ("small", "huge")  # whose own gradient has the square of rstd
    ],
)
def test_planes_whose_squares_are_no_numbers_are_finite_where_torchs_are(
    monkeypatch, name, way, gradient
):
    spread, mean, eps = EXTREMES[name]
    monkeypatch.setattr(native, "is_huge", lambda input: way == "huge")
    monkeypatch.setattr(direct, "SHORT", 1 << 17 if way == "direct" else 0)
    activation = "identity" if way == "direct" else "relu"
    x = (torch.randn(2, 3, 20, 30, dtype=torch.float64) * spread + mean).float()
    x[1, 1] = torch.randn(20, 30)  # one that is like others
    weight, bias, dy = torch.rand(3) + 0.5, torch.randn(3), torch.randn_like(x)
    leaves = [t.requires_grad_(gradient) for t in (x, weight, bias)]
    with fastnorm.use_backend("eager"):
        y = FF.instance_norm(x, None, None, weight, bias, eps=eps, activation=activation)
    want = F.instance_norm(x, None, None, weight, bias, eps=eps)
    want = want if activation == "identity" else want.relu()
    results = [(y, want)]
    if gradient:
        results += zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, want)), strict=True)
    for got, torchs in results:
        assert torchs.isfinite().all()
        assert got.isfinite().all()
    for got, torchs in results[:2]:  # y and dx: torch's of the others are no more than finite
        assert_close(got[1, 1], torchs[1, 1], terms=600)


@pytest.mark.parametrize("positions", [50, 5000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_squares_beyond_float32_with_a_residual(dtype, positions):
    """On a CPU torch's batch norm, which its InstanceNorm is, sums in double."""
    x = (1e30 * torch.randn(2, 3, positions)).to(dtype)
    r = torch.randn(2, 3, positions).to(dtype)
    y = fastnorm.InstanceNorm1d(3, affine=True)(x, residual=r)
    want = torch.nn.functional.instance_norm(x.double() / 1e30, eps=0.0) + r.double()
    # torch's rstd, in float32, is lost where the variance is
    assert y.isfinite().all()
    theirs = torch.nn.InstanceNorm1d(3, affine=True)(x) + r
    error, allowed = ((t.double() - want).abs().max() for t in (y, theirs))
    assert error <= 2 * allowed
