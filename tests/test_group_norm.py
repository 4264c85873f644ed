"""GroupNorm against the float64 reference: outputs and gradients, every option."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
from cases import FLOATS, assert_close, compute_dtype, each_dtype, memory_formats
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS


@dataclass
class Problem:
    """One call and its upstream gradient, and what it should give."""

    x: Tensor
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    dy: Tensor
    eps: float = 1e-5
    activation: str = "identity"
    names: tuple[str, ...] = field(default=("x", "weight", "bias", "residual"))

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh copies that require gradients; in `dtype` where given."""
        found = {}
        for name in self.names:
            tensor = getattr(self, name)
            if tensor is not None:
                found[name] = tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()
        return found

    def call(self, leaves: dict[str, Tensor]) -> Tensor:
        return FF.group_norm(
            leaves["x"], self.num_groups, leaves.get("weight"), leaves.get("bias"), self.eps,
            residual=leaves.get("residual"), activation=self.activation,
        )  # fmt: skip

    def run(self) -> dict[str, Tensor]:
        """Output and gradients of ours."""
        leaves = self.leaves()
        y = self.call(leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return {"y": y} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    def reference(self) -> dict[str, Tensor]:
        leaves = self.leaves(torch.float64)
        y = reference.group_norm(
            leaves["x"], self.num_groups, leaves.get("weight"), leaves.get("bias"), self.eps,
            leaves.get("residual"), self.activation,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.double())
        return {"y": y} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    def check(self) -> dict[str, Tensor]:
        got, want = self.run(), self.reference()
        # the longest sum: over a group, or of a parameter's gradient over the batch
        terms = self.x.numel() // min(self.x.shape[1], self.x.shape[0] * self.num_groups)
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
    num_groups: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    parameters: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    affine: str = "wb",
    residual: bool = False,
    mean: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def large(values: Tensor) -> Tensor:
        return values.to(device, dtype).to(memory_format=memory_format)

    small = {"device": device, "dtype": parameters or dtype}
    return Problem(
        x=large(draw(*shape) * 1.5 + mean),
        num_groups=num_groups,
        weight=(draw(shape[1]) * 0.3 + 1).to(**small) if "w" in affine else None,
        bias=draw(shape[1]).mul(0.5).to(**small) if "b" in affine else None,
        residual=large(draw(*shape)) if residual else None,
        dy=large(draw(*shape)),
        **options,
    )


SHAPES = [
    ((2, 12), 3),  # no positions
    ((1, 4), 1),  # four elements in all
    ((3, 1, 5), 1),  # one channel
    ((3, 4, 5), 2),
    ((130, 33), 3),  # many samples, an odd number of channels
    ((2, 6, 4, 4), 6),  # one channel a group
    ((5, 30, 7, 7), 3),  # ten channels a group, an odd run
    ((70, 3, 4, 4), 1),  # many samples in a program
    ((2, 320, 2, 2), 32),
    ((2, 40, 8, 8), 1),  # forty channels a group
    ((2, 96, 3, 3), 32),  # three channels a group
    ((1, 8, 32, 32), 1),  # more than a program keeps of many groups
    ((4, 12, 32, 32), 2),  # several tiles a group, all of them full
    ((2, 4, 50, 60), 2),  # several tiles a group, the last not full
    ((2, 4, 120, 121), 2),  # a channel larger than a tile, shared by programs
    ((2, 40, 24, 25), 1),
    ((2, 30, 31, 33), 3),
    ((2, 5000), 1),  # a group of more channels than a program has lanes
    ((1, 3000, 2), 2),
    ((2, 6, 4, 5, 6), 2),
    ((2, 6, 14, 15, 16), 3),
]


@each_dtype
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_matches_float64(backend, shape, num_groups, dtype):
    for memory_format in memory_formats(len(shape)):
        case = problem(shape, num_groups, backend, dtype, memory_format=memory_format)
        got = case.check()
        assert got["y"].dtype == dtype
        assert got["y"].stride() == case.x.stride(), "the memory format is kept"
        assert got["dx"].shape == case.x.shape


SHORT = [((9, 12), 3), ((5, 12, 2), 6), ((3, 70, 3), 35), ((300, 24), 3), ((4, 33, 7), 3)]
"""Few groups, short ones, more than a tile has, a tile of several samples, odd, many tiles."""
NONE_KEPT = dict.fromkeys(("KEPT_RUN", "WIDEST_ROW", "WIDEST_ROW_BACKWARD"), 0)
IN_TILES = NONE_KEPT | {"TILE_BYTES": 256, "RUN_WARPS": 1}  # no element is two threads'
SHARED = NONE_KEPT | dict.fromkeys(("RUN_BYTES", "RUN_BYTES_BACKWARD", "WHOLE_BYTES"), 0)
CONTIGUOUS = [("in registers", {}, *case) for case in SHORT]
for case in (((2, 12, 2), 6), ((3, 33, 7), 3), ((2, 6, 8, 8), 2)):  # one vector, odd, full tiles
    CONTIGUOUS += [("in tiles", IN_TILES, *case), ("shared", SHARED, *case)]


def plan_runs(monkeypatch, constants):
    for name, value in constants.items():
        monkeypatch.setattr(pytest.importorskip("fastnorm.kernels.run_plans"), name, value)


@pytest.mark.parametrize(
    ("way", "constants", "shape", "num_groups"),
    CONTIGUOUS,
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_contiguous_groups(backend, monkeypatch, way, constants, shape, num_groups):
    plan_runs(monkeypatch, constants)
    for dtype in (torch.float32, torch.bfloat16):
        for residual in (False, True):
            options = {"residual": residual, "activation": "silu"}
            problem(shape, num_groups, backend, dtype, **options).check()


@pytest.mark.parametrize(
    ("shape", "num_groups"), [((3, 8, 17, 31), 2), ((2, 16, 15, 17), 16), ((1, 8, 1, 9), 1)]
)
def test_rows_that_begin_within_vectors(backend, small_tiles, monkeypatch, shape, num_groups):
    """Odd ones of 16 bits, of groups that are shared: of several tiles, full ones, and one."""
    plan_runs(monkeypatch, SHARED)
    options = {"activation": "silu", "mean": 100.0}
    problem(shape, num_groups, backend, torch.bfloat16, **options).check()
    problem(shape, num_groups, backend, torch.float16, residual=True, **options).check()


@pytest.mark.parametrize(
    ("shape", "num_groups"), [((3, 6, 5), 2), ((2, 4, 70, 71), 2)], ids=["whole", "split"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(backend, activation, residual, dtype, shape, num_groups):
    options = {"residual": residual, "activation": activation}
    problem(shape, num_groups, backend, dtype, **options).check()


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize(
    ("shape", "num_groups"), [((3, 6, 4, 4), 2), ((2, 20, 50, 51), 2)], ids=["whole", "split"]
)
def test_activation_and_residual_channels_last(backend, shape, num_groups, activation):
    for residual in (False, True):
        options = {"residual": residual, "activation": activation}
        case = problem(
            shape, num_groups, backend, torch.bfloat16,
            memory_format=torch.channels_last, **options,
        )  # fmt: skip
        assert case.check()["y"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 64, 16, 16),
        (2, 36, 16, 16),  # the last channels
        (2, 64, 17, 13),  # the last positions
        (2, 36, 17, 13),
    ],
    ids=str,
)
def test_tiles_that_reach_beyond_a_sample(backend, shape, dtype):
    """Of channels_last, where programs share it; and those that do not."""
    case = problem(
        shape, 4, backend, dtype, memory_format=torch.channels_last,
        residual=True, activation="silu",
    )  # fmt: skip
    case.check()
    plans = pytest.importorskip("fastnorm.kernels.group_plans")
    N, C, *sides = shape
    plan = plans.group_plan(
        N, C, sides[0] * sides[1], True, C // 4, dtype.itemsize, plans.Device(4)
    )
    assert not plan.whole


@pytest.mark.parametrize("parameters", FLOATS, ids=lambda d: f"parameters {d}"[17:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: f"input {d}"[12:])
def test_mixed_dtypes(backend, dtype, parameters):
    """Parameters of any floating dtype, also where torch's CPU operators raise."""
    got = problem((7, 6, 3), 2, backend, dtype, parameters=parameters).check()
    assert got["y"].dtype == dtype
    case = problem((7, 6, 3), 2, backend, dtype, parameters=parameters)
    case.bias = case.bias.to(torch.float32)
    case.check()


def test_residual_of_another_dtype(backend):
    """The output has the dtype that torch promotes to; the residual's gradient its own."""
    case = problem((5, 4, 6), 2, backend, torch.bfloat16, activation="relu")
    case.residual = torch.randn_like(case.x, dtype=torch.float32)
    assert case.check()["y"].dtype is torch.float32


@pytest.mark.parametrize("affine", ["", "w", "b"])
def test_without_parameters(backend, affine):
    for dtype in (torch.float32, torch.bfloat16):
        problem((9, 4, 5), 2, backend, dtype, affine=affine, activation="silu").check()
        problem((2, 4, 90, 91), 2, backend, dtype, affine=affine, residual=True).check()


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_only_what_is_asked_for(backend, activation, residual):
    """Each gradient alone is the same as with all the others."""
    for shape in ((5, 4, 4), (2, 4, 90, 91)):
        case = problem(shape, 2, backend, residual=residual, activation=activation)
        want = case.run()
        for wanted in case.leaves():
            leaves = case.leaves()
            for name, leaf in leaves.items():
                leaf.requires_grad_(name == wanted)
            (got,) = torch.autograd.grad(case.call(leaves), leaves[wanted], case.dy)
            torch.testing.assert_close(got, want[f"d{wanted}"], rtol=1e-5, atol=1e-5)


def strided_inputs(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    return {
        "(N, L, C) transposed": draw(4, 9, 6).transpose(1, 2),
        "every second sample": draw(8, 4, 5, 6)[::2],
        "some channels": draw(4, 8, 5, 6)[:, 2:6],
        "width outermost": draw(6, 4, 4, 5).permute(1, 2, 3, 0),
        "expanded": draw(4, 4, 1, 1).expand(4, 4, 5, 6),
        "columns of a matrix": draw(10, 14)[:, 1:9],
        "some channels, channels_last": draw(2, 5, 6, 8).permute(0, 3, 1, 2)[:, :6],
        "a single position": draw(6, 12, 1, 1),
        "one channel, a picture": draw(3, 2, 5, 6)[:, :1].expand(3, 2, 5, 6),
    }


@pytest.mark.parametrize("name", strided_inputs(torch.device("cpu")))
def test_any_strides(backend, name):
    x = strided_inputs(backend)[name]
    case = problem(tuple(x.shape), 2, backend, activation="relu", residual=True)
    case.x = x
    want = case.reference()
    leaves = case.leaves() | {"x": x.detach().requires_grad_()}  # clone() would drop the strides
    y = case.call(leaves)
    got = torch.autograd.grad(y, list(leaves.values()), case.dy)
    assert_close(y, want["y"], name="y")
    for leaf, gradient in zip(leaves, got, strict=True):
        assert_close(gradient, want[f"d{leaf}"], 100, leaf)


@pytest.mark.parametrize("layout", ["expanded", "other format", "sliced"])
def test_any_strides_of_dy_and_residual(backend, layout):
    shape = (3, 4, 5, 6)
    case = problem(shape, 2, backend, residual=True, activation="tanh")
    if layout == "expanded":  # what y.sum().backward() makes
        case.dy = torch.ones((), device=backend).expand(shape)
    elif layout == "other format":
        case.dy = case.dy.to(memory_format=torch.channels_last)
        case.residual = case.residual.to(memory_format=torch.channels_last)
    else:
        case.dy = torch.randn(3, 4, 5, 12, device=backend)[..., ::2]
        case.residual = torch.randn(6, 4, 5, 6, device=backend)[::2]
    case.check()


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (2, 0, 4), (0, 6)], ids=str)
def test_empty(backend, shape):
    """As torch: an output of the shape, zeros for the parameters."""
    x = torch.zeros(shape, device=backend).requires_grad_()
    w, b = (torch.ones(shape[1], device=backend).requires_grad_() for _ in range(2))
    y = FF.group_norm(x, 3, w, b, residual=x, activation="relu")
    assert y.shape == shape
    for leaf, gradient in zip((x, w, b), torch.autograd.grad(y, (x, w, b), y), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_gradcheck(backend):
    first, last = memory_formats(4)
    for residual, activation, memory_format in (
        (False, "identity", first), (True, "tanh", first), (True, "silu", last)
    ):  # fmt: skip
        case = problem(
            (2, 4, 2, 1), 2, backend, torch.float64, residual=residual,
            memory_format=memory_format, activation=activation,
        )  # fmt: skip

        def call(*tensors, case=case):
            return case.call(dict(zip(case.leaves(), tensors, strict=True)))

        leaves = tuple(case.leaves().values())
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_second_derivatives_of_strided_inputs(backend):
    """A copy that the kernels needed must not cut the graph."""
    x = torch.randn(2, 8, 3, dtype=torch.float64, device=backend).requires_grad_()
    residual = torch.randn(2, 16, 3, dtype=torch.float64, device=backend).requires_grad_()

    def call(x, residual):
        return FF.group_norm(x[:, ::2], 2, residual=residual[:, ::4], activation="silu")

    assert torch.autograd.gradgradcheck(call, (x, residual))


def test_same_bits_every_time(backend):
    for shape in ((300, 4, 9, 9), (2, 4, 90, 91)):
        case = problem(shape, 2, backend, torch.bfloat16, residual=True, activation="relu")
        first, second = case.run(), case.run()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_inputs_are_left_alone(backend):
    """Nothing is written into x, residual, dy or the parameters."""
    for shape in ((4, 4, 5), (2, 4, 90, 91)):
        case = problem(shape, 2, backend, residual=True, activation="relu")
        before = {n: getattr(case, n).clone() for n in ("x", "residual", "dy", "weight", "bias")}
        leaves = {n: getattr(case, n).requires_grad_() for n in case.names}
        torch.autograd.grad(case.call(leaves), list(leaves.values()), case.dy)
        for name, value in before.items():
            assert torch.equal(getattr(case, name), value), name


def test_a_group_is_an_instance_where_it_has_one_channel(backend):
    case = problem((3, 4, 5, 6), 4, backend)
    got = FF.instance_norm(case.x, weight=case.weight, bias=case.bias)
    assert torch.equal(got, case.run()["y"])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own use of it
def test_transforms_and_forward_mode(backend):
    """vmap, jvp and the like are served, by operators that they can see through."""
    x = torch.randn(3, 2, 4, 5, dtype=torch.float64, device=backend)
    batched = torch.func.vmap(lambda t: FF.group_norm(t, 2, activation="silu"))(x)
    for one, whole in zip(x, batched, strict=True):
        assert_close(whole, reference.group_norm(one, 2, None, None, 1e-5, None, "silu"))
    tangent = torch.randn_like(x[0])
    _, got = torch.func.jvp(lambda t: FF.group_norm(t, 2), (x[0],), (tangent,))
    step = 1e-6
    up, down = (
        reference.group_norm(x[0] + sign * step * tangent, 2, None, None, 1e-5, None, "identity")
        for sign in (1, -1)
    )
    torch.testing.assert_close(got, (up - down) / (2 * step), rtol=1e-6, atol=1e-6)
    assert fastnorm.backend_for(x[:0]) == "eager"
