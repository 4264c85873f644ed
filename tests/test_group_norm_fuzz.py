"""Random calls of group norm and instance norm against float64: shapes, strides, dtypes, options.

As in test_fuzz.py: sizes are small, in part of the cases the constants of the launch policy and of
the eager path are, too, and a failure prints a `Case` that `check` repeats. The tolerances are
those of cases.py, relative to the intermediate results of each sample and channel.
"""

import contextlib
import importlib
from dataclasses import dataclass

import pytest
import reference
import torch
from cases import FLOATS
from fuzzing import LAYOUTS, Call, at_length, fuzz
from fuzzing_channels import WAYS, ChannelBounds, ChannelCall, constants, judge
from hypothesis import strategies as st
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import batch_norm_cpu, direct, group_norm_cpu, native
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
    vector_layout: str = "contiguous"  # of weight, bias and buffers
    axis: int = 0  # that is sliced, expanded or moved
    offset: float = 0.5  # mean of x, in its standard deviations
    eps: float = 1e-5
    activation: str = "identity"
    wanted: frozenset[str] = frozenset(Call.LEAVES)
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
    way = draw(st.sampled_from(WAYS))
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
    some = st.frozensets(st.sampled_from(Call.LEAVES))
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
        wanted=draw(st.one_of(st.just(frozenset(Call.LEAVES)), some)),
        way=way,
        seed=draw(st.integers(0, 99)),
    )


def taking(way: str) -> contextlib.AbstractContextManager[None]:
    """Make small tensors take the ways of large ones."""
    # its package has a function so named
    instance = importlib.import_module("fastnorm.eager.instance_norm")
    return constants(
        way,
        (direct, {"SHORT": 0}),
        (group_norm_cpu, {"SMALL": 0, "LARGE": 0, "FEW": 4, "ROWS": 64, "SHORT_PLANE": 2}),
        (batch_norm_cpu, {"SMALL": 0, "SHORT_PLANE": 2}),
        (instance, {"SMALL": 0}),
        (native, {"is_huge": lambda input: way == "huge", "LONG_SUM": 4}),
    )


class GroupNormCall(ChannelCall):
    """Of instance norm, where there are buffers."""

    def normalize(self, leaves: dict[str, Tensor], residual: Tensor | None) -> Tensor:
        case = self.case
        parameters = leaves.get("weight"), leaves.get("bias")
        options = {"residual": residual, "activation": case.activation}
        if case.running is None:
            return FF.group_norm(leaves["x"], case.num_groups, *parameters, case.eps, **options)
        buffers = self.mean, self.var
        return FF.instance_norm(leaves["x"], *buffers, *parameters, eps=case.eps, **options)

    def exact(
        self, leaves: dict[str, Tensor], residual: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        case, mean, var = self.case, None, None
        parameters = leaves.get("weight"), leaves.get("bias")
        y = reference.group_norm(
            leaves["x"], case.num_groups, *parameters, case.eps, residual, activation
        )
        if self.mean is not None and self.var is not None:
            buffers = self.mean.double(), self.var.double()
            _, mean, var = reference.instance_norm(
                leaves["x"].detach(), *buffers, None, None, True, 0.1, 1e-5, None, "identity"
            )
        return y, mean, var


class GroupNormBounds(ChannelBounds):
    """Of each sample and channel."""

    def __init__(self, call: GroupNormCall, kernels: bool) -> None:
        super().__init__(call, kernels)
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

    def on_channels(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(self.per_group, dim=1)

    def of_group(self, t: Tensor) -> Tensor:
        """The largest of each group, on its channels."""
        return self.on_channels(t.reshape(len(t), -1, self.per_group).amax(2))

    def largest(self, t: Tensor) -> Tensor:
        return t.detach().double().reshape(*self.call.case.shape[:2], -1).abs().amax(2)

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


def check(case: Case, device: torch.device) -> None:
    call = GroupNormCall(case, device)
    judge(call, GroupNormBounds(call, call.takes_kernels(device)), taking)


def test_group_norm(backend):
    examples = 15 if fastnorm.backend_for(torch.ones(1, device=backend)) == "triton" else 120
    fuzz(cases(), lambda case: check(case, backend), examples)


@pytest.mark.slow
def test_group_norm_at_length(backend):
    fuzz(cases(), lambda case: check(case, backend), at_length(backend))
