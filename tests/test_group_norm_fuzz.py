"""Random calls of group norm and instance norm against float64: shapes, strides, dtypes, options.

As in test_fuzz.py: sizes are small, in part of the cases the constants of the launch policy and of
the eager path are, too, and a failure prints a `Case` that `check` repeats. The tolerances are
those of cases.py, relative to the intermediate results of each sample and channel.
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
from fuzzing import at_length
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import KINKS, LAYOUTS, LEAVES, checked, laid_out
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import batch_norm_cpu, group_norm_cpu, native
from fastnorm.eager.activations import ACTIVATIONS

pytestmark = pytest.mark.unchecked  # each example is, on its own


@dataclass(frozen=True)
class Case:
    """One call."""

    shape: tuple[int, ...]
    num_groups: int
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    residual: torch.dtype | None = None
    running: torch.dtype | None = None  # of instance norm
    layout: str = "contiguous"  # of x
    residual_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    axis: int = 0  # that is sliced, expanded or moved
    offset: float = 0.5  # mean of x, in its standard deviations
    eps: float = 1e-5
    activation: str = "identity"
    wanted: frozenset[str] = frozenset(LEAVES)
    way: str = "shipped"
    seed: int = 0

    @property
    def positions(self) -> int:
        return torch.Size(self.shape[2:]).numel()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = st.sampled_from([2, 3, 1, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 127, 300])
    num_groups = draw(st.sampled_from([2, 1, 3, 4, 5, 8, 32]))
    per_group = draw(st.sampled_from([1, 3, 2, 4, 5, 7, 10, 16, 40]))
    positions = draw(st.lists(sizes, max_size=3))
    batch = draw(sizes)
    way = draw(st.sampled_from(["shipped", "small", "small, many programs", "huge"]))
    largest = 6000 if way == "shipped" else 1500
    while batch * num_groups * per_group * torch.Size(positions).numel() > largest:
        if batch > max([*positions, 1]):
            batch = (batch + 1) // 2
        elif max([*positions, 1]) > 2:
            longest = positions.index(max(positions))
            positions[longest] = (positions[longest] + 1) // 2
        else:
            num_groups = 1
            positions = positions[:1]
    channels = num_groups * per_group
    if batch * channels == num_groups and torch.Size(positions).numel() == 1:
        batch = 2  # one value in all: refused
    dtype = draw(st.sampled_from(FLOATS[::-1]))
    small = st.sampled_from([dtype, None, *FLOATS])
    layout = st.sampled_from(LAYOUTS)
    instance = per_group == 1 and torch.Size(positions).numel() > 1
    some = st.frozensets(st.sampled_from(LEAVES))
    return Case(
        shape=(batch, channels, *positions),
        num_groups=num_groups,
        dtype=dtype,
        weight=draw(small),
        bias=draw(small),
        residual=draw(st.sampled_from([None, dtype, *FLOATS])),
        running=draw(st.sampled_from([None, dtype, *FLOATS])) if instance else None,
        layout=draw(layout),
        residual_layout=draw(layout),
        dy_layout=draw(layout),
        axis=draw(st.integers(0, len(positions) + 1)),
        offset=draw(st.sampled_from([0.5, 0.0, 30.0])),
        eps=draw(st.sampled_from([1e-3, 1e-5, 1.0])),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        wanted=draw(st.one_of(st.just(frozenset(LEAVES)), some)),
        way=way,
        seed=draw(st.integers(0, 99)),
    )


@contextlib.contextmanager
def taking(way: str) -> Iterator[None]:
    """Make small tensors take the ways of large ones."""
    eager, instance = (  # their package has functions so named
        importlib.import_module(f"fastnorm.eager.{name}_norm") for name in ("group", "instance")
    )
    with contextlib.ExitStack() as stack:

        def put(owner: object, **constants: object) -> None:
            for name, value in constants.items():
                stack.enter_context(mock.patch.object(owner, name, value))

        if way != "shipped":
            put(eager, SHORT=0)
            put(group_norm_cpu, SMALL=0, LARGE=0, FEW=4, ROWS=64, SHORT_PLANE=2)
            put(batch_norm_cpu, SMALL=0, SHORT_PLANE=2)
            put(instance, SMALL=0)
            put(native, is_huge=lambda input: way == "huge", LONG_SUM=4)
        if way != "shipped" and fastnorm.backend_for(torch.ones(1)) == "triton":
            launch = importlib.import_module("fastnorm.kernels.launch")
            kernels = importlib.import_module("fastnorm.kernels.group_norm")
            put(launch, TILE_BYTES=512, WHOLE_BYTES=1024, GROUP_LANES=32)
            put(kernels, GROUP_MERGE_PARTIALS=4, MERGE_PARTIALS=4)
            programs = 64 if way == "small, many programs" else 2
            stack.enter_context(launch.assume(launch.Device(programs)))
        yield


class Call:
    """The tensors of a case, the call, and what float64 says."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator().manual_seed(case.seed)
        C = case.shape[1]
        self.x = self.large(self.draw(*case.shape) + case.offset, case.dtype, case.layout)
        self.weight = self.vector(self.draw(C) * 0.5 + 1, case.weight)
        self.bias = self.vector(self.draw(C), case.bias)
        self.mean = self.vector(self.draw(C), case.running)
        self.var = self.vector(self.draw(C).abs() + 0.5, case.running)
        self.residual = None
        self.y_dtype = case.dtype
        if case.residual is not None:
            values = self.draw(*case.shape) * 2
            self.residual = self.large(values, case.residual, case.residual_layout)
            self.y_dtype = torch.promote_types(case.dtype, case.residual)
        self.dy = self.large(self.draw(*case.shape), self.y_dtype, case.dy_layout)

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def large(self, values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
        return laid_out(values.to(self.device, dtype), layout, self.case.axis)

    def vector(self, values: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else values.to(self.device, dtype)

    def leaves(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in LEAVES}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def wanted(self) -> list[str]:
        return [name for name in self.leaves() if name in self.case.wanted]

    def ours(self) -> dict[str, Tensor]:
        """Output, wanted gradients and buffers; the arguments are unchanged but for the buffers."""
        case = self.case
        leaves = {n: t.detach().requires_grad_(n in case.wanted) for n, t in self.leaves().items()}
        before = {n: t.detach().clone() for n, t in (leaves | {"dy": self.dy}).items()}
        parameters = leaves.get("weight"), leaves.get("bias")
        options = {"residual": leaves.get("residual"), "activation": case.activation}
        if case.running is None:
            y = FF.group_norm(leaves["x"], case.num_groups, *parameters, case.eps, **options)
        else:
            buffers = self.mean, self.var
            y = FF.instance_norm(leaves["x"], *buffers, *parameters, eps=case.eps, **options)
        assert y.requires_grad == bool(self.wanted())
        found = {"y": y.detach(), "running_mean": self.mean, "running_var": self.var}
        if y.requires_grad:
            gradients = torch.autograd.grad(y, [leaves[n] for n in self.wanted()], self.dy)
            found |= {f"d{n}": g for n, g in zip(self.wanted(), gradients, strict=True)}
        for name, tensor in before.items():
            now = self.dy if name == "dy" else leaves[name].detach()
            assert torch.equal(now, tensor), f"{name} was written to"
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def normalized(self, leaves: dict[str, Tensor], activation: str) -> Tensor:
        case = self.case
        parameters = leaves.get("weight"), leaves.get("bias")
        return reference.group_norm(
            leaves["x"], case.num_groups, *parameters, case.eps, leaves.get("residual"), activation
        )

    def want(self) -> dict[str, Tensor]:
        """The same in float64."""
        leaves = {n: t.detach().double().requires_grad_() for n, t in self.leaves().items()}
        y = self.normalized(leaves, self.case.activation)
        found = {"y": y.detach()}
        if self.mean is not None and self.var is not None:
            buffers = self.mean.double(), self.var.double()
            _, mean, var = reference.instance_norm(
                leaves["x"].detach(), *buffers, None, None, True, 0.1, 1e-5, None, "identity"
            )
            found |= {"running_mean": mean, "running_var": var}
        names = self.wanted()
        if names:
            gradients = torch.autograd.grad(y, [leaves[n] for n in names], self.dy.double())
            found |= {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Bounds:
    """How large the intermediate results of each sample and channel are, and so what errors."""

    def __init__(self, call: Call, kernels: bool) -> None:
        self.call = call
        case = call.case
        N, C = case.shape[:2]
        self.per_group = C // case.num_groups
        x = call.x.double().reshape(N, case.num_groups, -1)
        mean, var = x.mean(2), x.var(2, correction=0)
        rstd = (var + case.eps).rsqrt()
        xhat = ((x - mean[..., None]) * rstd[..., None]).abs().amax(2)
        self.x_size = self.on_channels(x.abs().amax(2) + mean.abs())
        self.xhat, self.rstd = self.on_channels(xhat), self.on_channels(rstd)
        self.kappa = self.x_size * self.rstd
        if not kernels and not call.x.is_contiguous():
            # torch's channels_last variance is E[x²] − E[x]², on a CPU
            self.kappa = self.kappa * self.kappa.clamp(min=1)
        w = torch.ones(C) if call.weight is None else call.weight.double().abs()
        self.w = w.to(x)
        self.z = self.kappa * self.w
        if call.bias is not None:
            self.z = self.z + call.bias.double().abs()
        if call.residual is not None:
            self.z = self.z + self.largest(call.residual)
        # Where values are stored in between, in 16 bits say; in units of half an ulp each.
        eps = torch.finfo(case.dtype).eps
        self.between, self.between_dz = 0.0, 0.0
        if kernels:
            if call.residual is not None and case.activation != "identity":
                self.between_dz = torch.finfo(call.y_dtype).eps
        elif case.dtype in (torch.float16, torch.bfloat16):
            self.between = 0.0 if case.way == "shipped" else 2 * eps
            self.between_dz = 3 * eps

    def on_channels(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(self.per_group, dim=1)

    def of_group(self, t: Tensor) -> Tensor:
        """The largest of each group, on its channels."""
        return self.on_channels(t.reshape(len(t), -1, self.per_group).amax(2))

    def largest(self, t: Tensor) -> Tensor:
        return t.detach().double().reshape(*self.call.case.shape[:2], -1).abs().amax(2)

    def unit(self, dtype: torch.dtype) -> float:
        """What cases.py allows a result of size one."""
        compute = compute_dtype(self.call.case.dtype)
        return tolerance(dtype, torch.ones(1), compute=compute)["atol"]

    def uncertainty(self) -> Tensor:
        """Of z."""
        return self.unit(self.call.case.dtype) * self.z.clamp(min=1) + self.between * self.z

    def allowed(self, name: str, got: Tensor, want: dict[str, Tensor]) -> Tensor:
        """Absolute error of each sample and channel, or of each channel."""
        case = self.call.case
        dy = self.largest(self.call.dy)
        dz = dy * (1 + self.z)  # what an error of z does to act′(z)
        n = case.shape[0] * case.positions
        # Errors of a sum add up like √n, unless all of dy is one number and they have one sign.
        sums = n ** (1.0 if case.dy_layout == "expanded" else 0.5)
        between = self.between_dz
        if name == "y":
            size, between = self.z, self.between
        elif name == "dx":
            wdz, wdy = self.of_group(self.w * dz), self.of_group(self.w * dy)
            size = self.rstd * (1 + self.xhat) * (wdz * (2 + self.xhat) + wdy * self.kappa)
        elif name == "dresidual":
            size = dz
        elif name == "dbias":
            size = sums * dz.amax(0)
        elif name == "dweight":
            size = sums * (dz * self.xhat.clamp(min=1) + dy * self.kappa).amax(0)
            total = want.get("dbias", dz.amax(0) * sums)
            size = size + (self.kappa * total.abs()).amax(0)
        elif name == "running_mean":
            size, between = self.x_size.amax(0), 0.0
        else:
            size = (self.x_size**2 / self.kappa.clamp(min=1)).amax(0) + want["running_var"]
            between = 0.0
        return self.unit(got.dtype) * size.clamp(min=1) + between * size


def avoid_kinks(call: Call, bounds: Bounds) -> None:
    """Set dy to 0 where z is so near a kink that rounding decides."""
    kinks = KINKS.get(call.case.activation, ())
    if not kinks:
        return
    z = call.normalized({n: t.detach().double() for n, t in call.leaves().items()}, "identity")
    band = bounds.uncertainty() + 2 * torch.finfo(call.y_dtype).smallest_normal
    band = band.reshape(*call.case.shape[:2], *[1] * (z.ndim - 2))
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
    bounds = Bounds(call, kernels)
    avoid_kinks(call, bounds)
    want = call.want()
    with taking(case.way), checked():
        got = call.ours()
    assert got.keys() == want.keys()
    assert got["y"].dtype is call.y_dtype
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
            allowed = allowed.reshape(*case.shape[:2], *[1] * (value.ndim - 2))
        compute = compute_dtype(case.dtype)
        relative = tolerance(value.dtype, torch.ones(1), compute=compute)["rtol"]
        error = (value.double() - want[name]).abs() - relative * want[name].abs()
        worst = (error / allowed).max().item()
        assert worst <= 1, f"{name}: error {worst:.3g} times what is allowed"


def fuzz(device: torch.device, examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        check(case, device)

    run()


def test_group_norm(backend):
    fuzz(backend, 15 if fastnorm.backend_for(torch.ones(1, device=backend)) == "triton" else 120)


@pytest.mark.slow
def test_group_norm_at_length(backend):
    fuzz(backend, at_length(backend))
