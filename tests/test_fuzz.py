"""Random calls of batch norm against float64: shapes, strides, dtypes, options, wanted gradients.

Sizes are small. In part of the cases constants of the launch policy and of the eager path are made
small with them, so that every way through the code is taken. A failure prints a `Case`, all there
is to know about it: `check(Case(...), torch.device("cpu"))` repeats it.

The tolerances are those of cases.py, relative to the intermediate results of each channel, which
this file knows: an error of the mean or of x counts κ = |x|·rstd times in x̂. Where z is so close to
a kink of its activation that rounding decides its side, dy is 0 and the gradient does not care.
"""

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import reference
import torch
from cases import FLOATS, compute_dtype, tolerance
from fuzzing import KINKS, LAYOUTS, at_length, fuzz, laid_out
from hypothesis import strategies as st
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import batch_norm_cpu, native
from fastnorm.eager.activations import ACTIVATIONS

if torch.cuda.is_available():
    checked = contextlib.nullcontext
else:
    from checker import checked

pytestmark = pytest.mark.unchecked  # each example is, on its own


LEAVES = ("x", "weight", "bias", "residual")


@dataclass(frozen=True)
class Case:
    """One call."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    running: torch.dtype | None = None
    residual: torch.dtype | str | None = None  # "x": the input itself
    layout: str = "contiguous"  # of x
    residual_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    vector_layout: str = "contiguous"  # of weight, bias and buffers
    axis: int = 0  # that is sliced, expanded or moved
    offset: float = 0.5  # mean of x, in its standard deviations
    training: bool = True
    momentum: float | str | None = 0.1  # "tensor": 0.25 on the device
    count: int | None = None
    eps: float = 1e-5
    activation: str = "identity"
    wanted: frozenset[str] = frozenset(LEAVES)
    way: str = "shipped"
    seed: int = 0

    @property
    def per_channel(self) -> int:
        return self.shape[0] * torch.Size(self.shape[2:]).numel()


# ---- cases ---------------------------------------------------------------------------------------
@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.sampled_from([2, 3, 1, 4, 5, 6, 7, 8, 9, 16, 17, 31, 33, 64, 127, 300, 1500])
    channels = st.sampled_from([3, 1, 2, 4, 5, 7, 8, 9, 16, 17, 33])
    shape = [draw(sizes), draw(channels), *draw(st.lists(sizes, max_size=3))]
    way = draw(st.sampled_from(["shipped", "small", "small, many programs", "huge"]))
    largest = 6000 if way == "shipped" else 1500
    while torch.Size(shape).numel() > largest:
        longest = shape.index(max(shape))
        shape[longest] = (shape[longest] + 1) // 2
    axis = draw(st.integers(0, len(shape) - 1))
    if axis != 1 and draw(st.integers(0, 15)) == 15:
        shape[axis] = 0
    dtype = draw(st.sampled_from(FLOATS[::-1]))
    small = st.sampled_from([dtype, None, *FLOATS])
    layout = st.sampled_from(LAYOUTS)
    tracked = draw(st.sampled_from([True, True, False]))
    training = draw(st.sampled_from([True, True, False])) or not tracked
    count = draw(st.sampled_from([0, 3, None]))
    momenta = [0.1, None, "tensor", 0.0, 1.0, 0.37]
    some = st.frozensets(st.sampled_from(LEAVES))
    return Case(
        shape=tuple(shape),
        dtype=dtype,
        weight=draw(small),
        bias=draw(small),
        running=draw(st.sampled_from([dtype, *FLOATS])) if tracked else None,
        residual=draw(st.sampled_from([None, dtype, "x", *FLOATS])),
        layout=draw(layout),
        residual_layout=draw(layout),
        dy_layout=draw(layout),
        vector_layout=draw(st.sampled_from(["contiguous", "sliced", "expanded", "offset"])),
        axis=axis,
        offset=draw(st.sampled_from([0.5, 0.0, 30.0])),
        training=training,
        momentum=draw(st.sampled_from([m for m in momenta if m is not None or count is not None])),
        count=count,
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        wanted=draw(st.one_of(st.just(frozenset(LEAVES)), some)),
        way=way,
        seed=draw(st.integers(0, 99)),
    )


@contextlib.contextmanager
def taking(way: str) -> Iterator[None]:
    """Make small tensors take the ways of large ones."""
    with contextlib.ExitStack() as stack:
        if way != "shipped":
            huge = way == "huge"
            for owner, name, value in (
                (batch_norm_cpu, "SMALL", 0),
                (batch_norm_cpu, "SHORT_PLANE", 2),
                (native, "is_huge", lambda input: huge),
                (native, "LONG_SUM", 4),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
        if way != "shipped" and fastnorm.backend_for(torch.ones(1)) == "triton":
            launch = importlib.import_module("fastnorm.kernels.launch")
            kernels = importlib.import_module("fastnorm.kernels.batch_norm")
            for owner, name, value in (
                (launch, "TILE_BYTES", 512),
                (launch, "WHOLE_BYTES", 1024),
                (kernels, "MERGE_PARTIALS", 4),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            programs = 64 if way == "small, many programs" else 2
            stack.enter_context(launch.assume(launch.Device(programs)))
        yield


# ---- one case ------------------------------------------------------------------------------------
class Call:
    """The tensors of a case, the call, and what float64 says."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        channels = case.shape[1]
        self.x = self.large(self.draw(*case.shape) + case.offset, case.dtype, case.layout)
        self.weight = self.vector(self.draw(channels) * 0.5 + 1, case.weight)
        self.bias = self.vector(self.draw(channels), case.bias)
        self.mean = self.vector(self.draw(channels), case.running)
        self.var = self.vector(self.draw(channels).abs() + 0.5, case.running)
        self.residual = None
        if isinstance(case.residual, torch.dtype):
            values = self.draw(*case.shape) * 2
            self.residual = self.large(values, case.residual, case.residual_layout)
        elif case.residual == "x":
            self.residual = self.x
        self.y_dtype = case.dtype
        if self.residual is not None:
            self.y_dtype = torch.promote_types(case.dtype, self.residual.dtype)
        self.dy = self.large(self.draw(*case.shape), self.y_dtype, case.dy_layout)
        count = case.count
        self.count = None if count is None else torch.tensor(count, device=device)
        self.momentum = case.momentum
        if case.momentum == "tensor":
            self.momentum = torch.tensor(0.25, device=device)

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def large(self, values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
        return laid_out(values.to(self.device, dtype), layout, self.case.axis)

    def vector(self, values: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        if dtype is None:
            return None
        layout = self.case.vector_layout
        if values is not None and layout == "expanded" and dtype is self.case.running:
            layout = "sliced"  # a buffer of which all elements are one cannot be written
        return laid_out(values.to(self.device, dtype), layout, 0)

    def leaves(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in LEAVES}
        if self.residual is self.x:
            del found["residual"]
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def wanted(self) -> list[str]:
        return [name for name in self.leaves() if name in self.case.wanted]

    def ours(self) -> dict[str, Tensor]:
        """Output, wanted gradients and buffers; the arguments are unchanged but for the buffers."""
        case = self.case
        leaves = {n: t.detach().requires_grad_(n in case.wanted) for n, t in self.leaves().items()}
        residual = leaves["x"] if self.residual is self.x else leaves.get("residual")
        before = {n: t.detach().clone() for n, t in (leaves | {"dy": self.dy}).items()}
        y = FF.batch_norm(
            leaves["x"], self.mean, self.var, leaves.get("weight"), leaves.get("bias"),
            case.training, self.momentum, case.eps,
            residual=residual, activation=case.activation, num_batches_tracked=self.count,
        )  # fmt: skip
        assert y.requires_grad == bool(self.wanted())
        found = {"y": y.detach(), "running_mean": self.mean, "running_var": self.var}
        if y.requires_grad:
            gradients = torch.autograd.grad(y, [leaves[n] for n in self.wanted()], self.dy)
            found |= {f"d{n}": g for n, g in zip(self.wanted(), gradients, strict=True)}
        for name, tensor in before.items():
            now = self.dy if name == "dy" else leaves[name].detach()
            assert torch.equal(now, tensor), f"{name} was written to"
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def factor(self) -> float:
        """How far the buffers move."""
        if self.case.momentum is None:
            return 1 / (self.case.count + 1)
        return 0.25 if self.case.momentum == "tensor" else self.case.momentum

    def want(self) -> dict[str, Tensor]:
        """The same in float64."""
        case = self.case
        leaves = {n: t.detach().double().requires_grad_() for n, t in self.leaves().items()}
        residual = leaves["x"] if self.residual is self.x else leaves.get("residual")
        mean, var = (None if t is None else t.double() for t in (self.mean, self.var))
        y, mean, var = reference.batch_norm(
            leaves["x"], mean, var, leaves.get("weight"), leaves.get("bias"),
            case.training, self.factor(), case.eps, residual, case.activation,
        )  # fmt: skip
        found = {"y": y.detach(), "running_mean": mean, "running_var": var}
        names = self.wanted()
        if names:
            gradients = torch.autograd.grad(y, [leaves[n] for n in names], self.dy.double())
            found |= {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Bounds:
    """How large the intermediate results of each channel are, and so what errors are allowed."""

    def __init__(self, call: Call, kernels: bool) -> None:
        case, n = call.case, call.case.per_channel
        self.call, self.n, self.kernels = call, n, kernels
        x = self.by_channel(call.x)
        if case.training:
            self.mean, var = x.mean(1), x.var(1, correction=0)
        else:
            self.mean, var = call.mean.double(), call.var.double()
        rstd = (var + case.eps).rsqrt()
        self.xhat = ((x - self.mean[:, None]) * rstd[:, None]).abs().amax(1)
        self.x_size = x.abs().amax(1) + self.mean.abs()
        self.kappa = self.x_size * rstd
        self.gain = rstd if call.weight is None else rstd * call.weight.double().abs()
        self.z = self.x_size * self.gain
        if call.bias is not None:
            self.z = self.z + call.bias.double().abs()
        if call.residual is not None:
            self.z = self.z + self.by_channel(call.residual).abs().amax(1)
        # Where values are stored in between, in 16 bits say; in units of half an ulp each.
        eps = torch.finfo(case.dtype).eps
        self.between, self.between_dz = 0.0, 0.0
        if kernels:
            if call.residual is not None and case.activation != "identity":
                self.between_dz = torch.finfo(call.y_dtype).eps
        elif case.dtype in (torch.float16, torch.bfloat16):
            self.between = 0.0 if case.way == "shipped" else 2 * eps
            self.between_dz = 3 * eps

    @staticmethod
    def by_channel(t: Tensor) -> Tensor:
        return t.detach().double().transpose(0, 1).flatten(1)

    def uncertainty(self) -> Tensor:
        """Of z."""
        return self.unit(self.call.case.dtype) * self.z.clamp(min=1) + self.between * self.z

    def unit(self, dtype: torch.dtype) -> float:
        """What cases.py allows a result of size one."""
        compute = compute_dtype(self.call.case.dtype)
        return tolerance(dtype, torch.ones(1), compute=compute)["atol"]

    def allowed(self, name: str, got: Tensor, want: dict[str, Tensor]) -> Tensor:
        """Absolute error of each channel."""
        dy = self.by_channel(self.call.dy).abs().amax(1)
        dz = dy * (1 + self.z)  # what an error of z does to act′(z)
        # Errors of a sum add up like √n, unless all of dy is one number and they have one sign.
        sums = self.n ** (1.0 if self.call.case.dy_layout == "expanded" else 0.5)
        between = self.between_dz
        if name == "y":
            size, between = self.z, self.between
        elif name == "dx":
            size = self.gain * dz
            if self.call.case.training:
                size = size * (2 + self.xhat) + self.gain * dy * self.kappa
            if self.call.residual is self.call.x:
                size = size + dz
                between = between + 2 * torch.finfo(got.dtype).eps
        elif name == "dresidual":
            size = dz
        elif name == "dbias":
            size = sums * dz
        elif name == "dweight":
            total = want.get("dbias", dz * sums)
            size = sums * (dz * self.xhat.clamp(min=1) + dy * self.kappa) + self.kappa * total.abs()
        elif name == "running_mean":
            size, between = self.x_size, 0.0
        else:
            size, between = self.x_size**2 / self.kappa.clamp(min=1) + want["running_var"], 0.0
        return self.unit(got.dtype) * size.clamp(min=1) + between * size


def avoid_kinks(call: Call, bounds: Bounds) -> None:
    """Set dy to 0 where z is so near a kink that rounding decides."""
    kinks = KINKS.get(call.case.activation, ())
    if not kinks:
        return
    z, _, _ = reference.batch_norm(
        *(None if t is None else t.detach().double() for t in
          (call.x, call.mean, call.var, call.weight, call.bias)),
        call.case.training, 0.0, call.case.eps,
        None if call.residual is None else call.residual.detach().double(), "identity",
    )  # fmt: skip
    band = bounds.uncertainty() + 2 * torch.finfo(call.y_dtype).smallest_normal
    band = band.reshape([1, -1] + [1] * (z.ndim - 2))
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in kinks:
        near |= (z - kink).abs() <= band
    if near.any():
        if call.case.dy_layout == "expanded":
            call.dy = call.dy.contiguous()
        call.dy[near] = 0


def check(case: Case, device: torch.device) -> None:
    kernels = fastnorm.backend_for(torch.ones(1, device=device)) == "triton"
    call = Call(case, device)
    buffers = [None if t is None else t.clone() for t in (call.mean, call.var)]
    if case.training and case.per_channel == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            call.ours()
        assert call.count is None or call.count.item() == case.count
    elif call.x.numel() == 0:
        check_empty(call)
    else:
        check_full(call, kernels)
        return
    for now, before in zip((call.mean, call.var), buffers, strict=True):
        assert now is None or torch.equal(now, before)


def check_full(call: Call, kernels: bool) -> None:
    case = call.case
    if case.training and call.mean is not None and not call.mean.is_contiguous():
        kernels = False  # buffers that move are left to eager
    bounds = Bounds(call, kernels)
    avoid_kinks(call, bounds)
    want = call.want()
    with taking(case.way), checked():
        got = call.ours()
    assert got.keys() == want.keys()
    assert got["y"].dtype is call.y_dtype
    assert call.count is None or call.count.item() == case.count + case.training
    for name, leaf in call.leaves().items():
        if f"d{name}" in got:
            assert got[f"d{name}"].dtype is leaf.dtype, name
            assert got[f"d{name}"].shape == leaf.shape, name
    for kind in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        ndim = {torch.channels_last: 4, torch.channels_last_3d: 5}.get(kind, len(case.shape))
        if ndim == len(case.shape) and call.x.is_contiguous(memory_format=kind):
            assert got["y"].is_contiguous(memory_format=kind), "the memory format is kept"
    for name, value in got.items():
        allowed = bounds.allowed(name, value, want)
        if value.ndim > 1:
            allowed = allowed.reshape([1, -1] + [1] * (value.ndim - 2))
        compute = compute_dtype(case.dtype)
        relative = tolerance(value.dtype, torch.ones(1), compute=compute)["rtol"]
        error = (value.double() - want[name]).abs() - relative * want[name].abs()
        worst = (error / allowed).max().item()
        assert worst <= 1, f"{name}: error {worst:.3g} times what is allowed"


def check_empty(call: Call) -> None:
    case = call.case
    with checked():
        got = call.ours()
    assert got["y"].shape == case.shape
    assert got["y"].dtype is call.y_dtype
    for name in call.wanted():
        gradient = got[f"d{name}"]
        assert gradient.shape == call.leaves()[name].shape
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert call.count is None or call.count.item() == case.count + case.training


# ---- the two runs --------------------------------------------------------------------------------
def test_batch_norm(backend):
    examples = 60 if fastnorm.backend_for(torch.ones(1, device=backend)) == "triton" else 240
    fuzz(cases(), lambda case: check(case, backend), examples)


@pytest.mark.slow
def test_batch_norm_at_length(backend):
    fuzz(cases(), lambda case: check(case, backend), at_length(backend))
