"""Random calls of layer norm and RMS norm, with and without a sum, against float64.

As in test_fuzz.py: shapes, trailing axes, strides, dtypes, options, wanted gradients. Sizes are
small; in most of the cases constants of the launch policy are made small with them, so that every
kernel is taken. A failure prints a `Case`: `check(Case(...), torch.device("cpu"))` repeats it.

Tolerances are those of cases.py, relative to the intermediate results of each row, which this file
knows: an error of the mean or of x counts κ = |x|·rstd times in x̂.
"""

import contextlib
from dataclasses import dataclass

import pytest
import reference
import torch
from cases import FLOATS, compute_dtype
from fuzzing import LAYOUTS, Bounds, Call, at_length, fuzz, near_a_kink
from hypothesis import strategies as st
from probes import INTERPRETED, kernels_run, kernels_seen
from row_ways import WAYS, taking
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS

checked = contextlib.nullcontext
if INTERPRETED:
    from checker import checked

pytestmark = pytest.mark.unchecked  # each example is, on its own

KINDS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


@dataclass(frozen=True)
class Case:
    """One call."""

    kind: str
    shape: tuple[int, ...]
    axes: int = 1
    dtype: torch.dtype = torch.float32
    residual: torch.dtype | str | None = None  # "x": the input itself
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    layout: str = "contiguous"  # of x
    residual_layout: str = "contiguous"
    dy_layout: str = "contiguous"  # of the outputs' gradients
    vector_layout: str = "contiguous"  # of weight and bias
    axis: int = 0  # that is sliced, expanded or moved
    offset: float = 0.5  # mean of x, in its standard deviations
    eps: float | None = 1e-5
    activation: str = "identity"
    wanted: frozenset[str] = frozenset(Call.LEAVES)
    used: str = "both"  # outputs
    way: str = "shipped"
    seed: int = 0

    @property
    def size(self) -> int:
        return torch.Size(self.shape[-self.axes :]).numel()

    @property
    def center(self) -> bool:
        return "layer" in self.kind


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kind = draw(st.sampled_from(KINDS))
    rows = st.sampled_from([1, 2, 3, 1, 4, 5, 7, 8, 9, 17, 33, 70])
    columns = st.sampled_from([8, 1, 2, 3, 4, 5, 7, 16, 17, 24, 31, 33, 40, 64, 65, 127, 200, 400])
    axes = draw(st.sampled_from([1, 1, 2, 3]))
    few = st.sampled_from([2, 1, 3, 4, 5])
    shape = [
        *draw(st.lists(rows, max_size=2)),
        *(draw(few) for _ in range(axes - 1)),
        draw(columns),
    ]
    way = draw(st.sampled_from(list(WAYS)))
    while torch.Size(shape).numel() > (6000 if way == "shipped" else 1500):
        longest = shape.index(max(shape))
        shape[longest] = (shape[longest] + 1) // 2
    axis = draw(st.integers(0, len(shape) - 1))
    if draw(st.integers(0, 24)) == 24:
        shape[axis] = 0
    dtype = draw(st.sampled_from(FLOATS[::-1]))
    small = st.sampled_from([dtype, None, *FLOATS])
    layout = st.sampled_from(LAYOUTS)
    some = st.frozensets(st.sampled_from(Call.LEAVES))
    eps = st.sampled_from([1e-5, 1e-3, 1.0] + [None] * (2 * ("rms" in kind)))
    return Case(
        kind,
        shape=tuple(shape),
        axes=axes,
        dtype=dtype,
        residual=draw(st.sampled_from([dtype, "x", *FLOATS])) if "add" in kind else None,
        weight=draw(small),
        bias=draw(small) if "layer" in kind else None,
        layout=draw(layout),
        residual_layout=draw(layout),
        dy_layout=draw(layout),
        vector_layout=draw(st.sampled_from(["contiguous", "sliced", "expanded", "offset"])),
        axis=axis,
        offset=draw(st.sampled_from([0.5, 0.0, 30.0])),
        eps=draw(eps),
        activation=draw(st.sampled_from(["identity", *sorted(ACTIVATIONS)])),
        wanted=draw(st.one_of(st.just(frozenset(Call.LEAVES)), some)),
        used=draw(st.sampled_from(["both", "both", "output", "sum"][: 4 if "add" in kind else 1])),
        way=way,
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip


# ---- one case ------------------------------------------------------------------------------------
class RowCall(Call):
    """The tensors of a case, the call, and what float64 says."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        trailing = case.shape[-case.axes :]
        self.x = self.large(self.draw(*case.shape) + case.offset, case.dtype, case.layout)
        self.weight = self.vector(self.draw(*trailing) * 0.5 + 1, case.weight, case.vector_layout)
        self.bias = self.vector(self.draw(*trailing), case.bias, case.vector_layout)
        self.residual = None
        if isinstance(case.residual, torch.dtype):
            values = self.draw(*case.shape) * 2
            self.residual = self.large(values, case.residual, case.residual_layout)
            self.dtype = torch.promote_types(case.dtype, case.residual)
        elif case.residual == "x":
            self.residual = self.x
        self.total = self.x if self.residual is None else self.x + self.residual
        count = 1 if self.residual is None else 2
        self.seeds = [
            self.large(self.draw(*case.shape), self.dtype, case.dy_layout) for _ in range(count)
        ]

    def inputs(self, leaves: dict[str, Tensor]) -> list[Tensor]:
        if self.residual is None:
            return [leaves["x"]]
        return [leaves["x"], leaves["x"] if self.residual is self.x else leaves["residual"]]

    def ours(self) -> dict[str, Tensor | None]:
        """Outputs and wanted gradients; the arguments are unchanged."""
        case = self.case
        leaves = {n: t.detach().requires_grad_(n in case.wanted) for n, t in self.leaves().items()}
        parameters = [leaves.get("weight"), leaves.get("bias")][: 1 + case.center]
        before = [t.detach().clone() for t in (*leaves.values(), *self.seeds)]
        outputs = getattr(FF, case.kind)(
            *self.inputs(leaves), case.shape[-case.axes :], *parameters, case.eps,
            activation=case.activation,
        )  # fmt: skip
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert outputs[0].requires_grad == bool(self.wanted())
        found = self.gradients(leaves, outputs, self.seeds)
        for now, then in zip((*leaves.values(), *self.seeds), before, strict=True):
            assert torch.equal(now.detach(), then), "an argument was written to"
        return found

    def gradients(
        self, leaves: dict[str, Tensor], outputs: tuple[Tensor, ...], seeds: list[Tensor]
    ) -> dict[str, Tensor | None]:
        """Outputs, and gradients of the used ones."""
        found: dict[str, Tensor | None] = {
            name: y.detach() for name, y in zip(("y", "sum"), outputs, strict=False)
        }
        used = {"both": slice(None), "output": slice(0, 1), "sum": slice(1, 2)}[self.case.used]
        pairs = [p for p in zip(outputs[used], seeds[used], strict=True) if p[0].requires_grad]
        if pairs:
            gradients = torch.autograd.grad(
                [y for y, _ in pairs], [leaves[n] for n in self.wanted()],
                [dy for _, dy in pairs], allow_unused=True,
            )  # fmt: skip
            found |= {f"d{n}": g for n, g in zip(self.wanted(), gradients, strict=True)}
        return found

    def want(self, activation: str | None = None) -> dict[str, Tensor | None]:
        """The same in float64; the sum is what its dtype rounds it to."""
        case = self.case
        leaves = {
            n: t.detach().double().requires_grad_(n in case.wanted)
            for n, t in self.leaves().items()
        }
        total = sum(self.inputs(leaves))
        total = total + (self.total.double() - total).detach()
        eps = torch.finfo(compute_dtype(self.dtype)).eps if case.eps is None else case.eps
        y = reference.layer_norm(
            total, case.axes, leaves.get("weight"), leaves.get("bias"), eps,
            activation or case.activation, case.center,
        )  # fmt: skip
        outputs = (y,) if self.residual is None else (y, total)
        return self.gradients(leaves, outputs, [dy.double() for dy in self.seeds])


class RowBounds(Bounds):
    """Of each row."""

    def __init__(self, call: RowCall, kernels: bool) -> None:
        super().__init__(call)
        case = call.case
        x = self.rows(call.total)
        mean = x.mean(1) if case.center else torch.zeros_like(x[:, 0])
        eps = torch.finfo(compute_dtype(call.dtype)).eps if case.eps is None else case.eps
        rstd = (((x - mean[:, None]) ** 2).mean(1) + eps).rsqrt()
        weight = 1.0 if call.weight is None else call.weight.detach().double().abs().max()
        self.xhat = ((x - mean[:, None]) * rstd[:, None]).abs().amax(1)
        self.kappa = (x.abs().amax(1) + mean.abs()) * rstd
        self.gain = rstd * weight
        self.z = self.kappa * weight
        if call.bias is not None:
            self.z = self.z + call.bias.detach().double().abs().max()
        if not kernels and call.dtype in (torch.float16, torch.bfloat16):
            self.between = 2 * torch.finfo(call.dtype).eps
            self.between_dz = 3 * torch.finfo(call.dtype).eps

    def rows(self, t: Tensor) -> Tensor:
        return t.detach().double().reshape(-1, self.call.case.size)

    def allowed(self, name: str, got: Tensor) -> Tensor:
        """Absolute error of each row; of all columns for the parameters' gradients."""
        call = self.call
        dy, dsum = (self.rows(t).abs().amax(1) for t in (call.seeds[0], call.seeds[-1]))
        dz = dy * (1 + self.z)  # what an error of z does to act′(z)
        # Errors of a sum add up like √n, unless all of dy is one number and they have one sign.
        rows = len(dy) ** (1.0 if call.case.dy_layout == "expanded" else 0.5)
        between = self.between_dz
        if name == "y":
            size, between = self.z, self.between
        elif name == "dbias":
            size = rows * dz.amax(0, keepdim=True)
        elif name == "dweight":
            size = rows * (dz * (self.xhat.clamp(min=1) + self.kappa)).amax(0, keepdim=True)
        else:
            size = self.gain * dz * (2 + self.xhat + self.kappa)
            if call.residual is not None:  # rounded as the sum's gradient, and again as the leaf's
                size = size + dsum
                between = between + torch.finfo(call.dtype).eps
            if call.residual is call.x:
                size, between = 2 * size, between + torch.finfo(got.dtype).eps
        return self.unit(got.dtype) * size.clamp(min=1) + between * size


def avoid_kinks(call: RowCall, bounds: RowBounds) -> None:
    """Set dy to 0 where z is so near a kink that rounding decides."""
    z = bounds.rows(call.want("identity")["y"])
    band = (bounds.uncertainty() + 2 * torch.finfo(call.dtype).smallest_normal)[:, None]
    near = near_a_kink(call.case.activation, z, band)
    if near.any():
        if call.case.dy_layout == "expanded":
            call.seeds[0] = call.seeds[0].contiguous()
        call.seeds[0][near.reshape(call.case.shape)] = 0


def check(case: Case, device: torch.device) -> None:
    kernels = kernels_run(device)
    call = RowCall(case, device)
    if call.x.numel() == 0:
        check_empty(call)
        return
    bounds = RowBounds(call, kernels)
    avoid_kinks(call, bounds)
    want = call.want()
    with taking(case.way, kernels), checked():
        got = call.ours()
    assert got.keys() == want.keys()
    assert got["y"].dtype is call.dtype
    assert "sum" not in got or torch.equal(got.pop("sum"), call.total)
    for name, value in got.items():
        assert (value is None) == (want[name] is None), name
        if value is None:
            continue
        if name != "y":
            leaf = call.leaves()[name[1:]]
            assert (value.dtype, value.shape) == (leaf.dtype, leaf.shape), name
        allowed = bounds.allowed(name, value)[:, None]
        rows = value.reshape(-1, case.size)
        worst = bounds.worst(rows, bounds.rows(want[name]), allowed)
        assert worst <= 1, f"{name}: error {worst:.3g} times what is allowed"


def check_empty(call: RowCall) -> None:
    with checked():
        got = call.ours()
    assert got["y"].shape == call.case.shape
    assert got["y"].dtype is call.dtype
    for name in call.wanted():
        gradient = got.get(f"d{name}")
        if gradient is not None:
            assert gradient.shape == call.leaves()[name].shape
            assert not gradient.any()


# ---- the two runs --------------------------------------------------------------------------------
KERNELS = {
    "layer_norm_fwd_kernel",
    "layer_norm_fwd_loop_kernel",
    "layer_norm_fwd_moments_kernel",
    "layer_norm_fwd_apply_kernel",
    "layer_norm_bwd_kernel",
    "layer_norm_bwd_reduce_kernel",
    "sum_partials_kernel",
}


def test_layer_norm(backend):
    kernels = kernels_run(backend)
    with kernels_seen() as seen:
        fuzz(cases(), lambda case: check(case, backend), 25 if kernels else 150)
    assert seen == (KERNELS if kernels and INTERPRETED else set())


@pytest.mark.slow
def test_layer_norm_at_length(backend):
    fuzz(cases(), lambda case: check(case, backend), at_length(backend))
