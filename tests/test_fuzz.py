"""Random calls of batch norm against float64: shapes, strides, dtypes, options, wanted gradients.

Sizes are small. In part of the cases constants of the launch policy and of the eager path are made
small with them, so that every way through the code is taken. A failure prints a `Case`, all there
is to know about it: `check(Case(...), torch.device("cpu"))` repeats it.

The tolerances are those of cases.py, relative to the intermediate results of each channel, which
this file knows: an error of the mean or of x counts κ = |x|·rstd times in x̂. Where z is so close to
a kink of its activation that rounding decides its side, dy is 0 and the gradient does not care.
"""

import contextlib
from dataclasses import dataclass

import pytest
import reference
import torch
from cases import FLOATS
from fuzzing import LAYOUTS, Call, at_length, fuzz
from fuzzing_channels import WAYS, ChannelBounds, ChannelCall, checked, constants, judge
from hypothesis import strategies as st
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import batch_norm_cpu, native
from fastnorm.eager.activations import ACTIVATIONS

pytestmark = pytest.mark.unchecked  # each example is, on its own


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
    wanted: frozenset[str] = frozenset(Call.LEAVES)
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
    way = draw(st.sampled_from(WAYS))
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
    some = st.frozensets(st.sampled_from(Call.LEAVES))
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
        wanted=draw(st.one_of(st.just(frozenset(Call.LEAVES)), some)),
        way=way,
        seed=draw(st.integers(0, 99)),
    )


def taking(way: str) -> contextlib.AbstractContextManager[None]:
    """Make small tensors take the ways of large ones."""
    return constants(
        way,
        (batch_norm_cpu, {"SMALL": 0, "SHORT_PLANE": 2}),
        (native, {"is_huge": lambda input: way == "huge", "LONG_SUM": 4}),
    )


# ---- one case ------------------------------------------------------------------------------------
class BatchNormCall(ChannelCall):
    """With a count of batches, and a momentum that may be a tensor."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        count = case.count
        self.count = None if count is None else torch.tensor(count, device=device)
        self.momentum = case.momentum
        if case.momentum == "tensor":
            self.momentum = torch.tensor(0.25, device=device)

    def normalize(self, leaves: dict[str, Tensor], residual: Tensor | None) -> Tensor:
        case = self.case
        return FF.batch_norm(
            leaves["x"], self.mean, self.var, leaves.get("weight"), leaves.get("bias"),
            case.training, self.momentum, case.eps,
            residual=residual, activation=case.activation, num_batches_tracked=self.count,
        )  # fmt: skip

    def exact(
        self, leaves: dict[str, Tensor], residual: Tensor | None, activation: str
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        case = self.case
        mean, var = (None if t is None else t.double() for t in (self.mean, self.var))
        return reference.batch_norm(
            leaves["x"], mean, var, leaves.get("weight"), leaves.get("bias"),
            case.training, self.factor(), case.eps, residual, activation,
        )  # fmt: skip

    def factor(self) -> float:
        """How far the buffers move."""
        if self.case.momentum is None:
            return 1 / (self.case.count + 1)
        return 0.25 if self.case.momentum == "tensor" else self.case.momentum


class BatchNormBounds(ChannelBounds):
    """Of each channel."""

    def __init__(self, call: BatchNormCall, kernels: bool) -> None:
        super().__init__(call, kernels)
        case = call.case
        self.n = case.per_channel
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

    @staticmethod
    def by_channel(t: Tensor) -> Tensor:
        return t.detach().double().transpose(0, 1).flatten(1)

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


def check(case: Case, device: torch.device) -> None:
    call = BatchNormCall(case, device)
    buffers = [None if t is None else t.clone() for t in (call.mean, call.var)]
    if case.training and case.per_channel == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            call.ours()
        assert call.count is None or call.count.item() == case.count
    elif call.x.numel() == 0:
        check_empty(call)
    else:
        check_full(call, call.takes_kernels(device))
        return
    for now, before in zip((call.mean, call.var), buffers, strict=True):
        assert now is None or torch.equal(now, before)


def check_full(call: BatchNormCall, kernels: bool) -> None:
    case = call.case
    if case.training and call.mean is not None and not call.mean.is_contiguous():
        kernels = False  # buffers that move are left to eager
    judge(call, BatchNormBounds(call, kernels), taking)
    assert call.count is None or call.count.item() == case.count + case.training


def check_empty(call: BatchNormCall) -> None:
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
