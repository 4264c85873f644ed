"""LayerNorm's and RMSNorm's outputs and gradients, with and without a sum, against float64."""

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from cases import FLOATS, assert_close, compute_dtype
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager import direct
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.kernels import devices, row_plans
from fastnorm.kernels.launch import divisor_class

KINDS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")


@dataclass
class Problem:
    """Arguments of one call, and what it should give."""

    kind: str
    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    dsum: Tensor
    axes: int = 1
    eps: float = 1e-5
    activation: str = "identity"

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh copies that require gradients; in `dtype` where given."""
        given = {n: getattr(self, n) for n in ("x", "residual", "weight", "bias")}
        return {
            name: t.detach().clone().to(dtype or t.dtype).requires_grad_()
            for name, t in given.items()
            if t is not None
        }

    def call(self, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(y,), or (y, sum), of ours."""
        inputs = [leaves[n] for n in ("x", "residual") if n in leaves]
        parameters = [leaves.get("weight")]
        if "layer" in self.kind:
            parameters.append(leaves.get("bias"))
        y = getattr(FF, self.kind)(
            *inputs, self.x.shape[-self.axes :], *parameters, self.eps, activation=self.activation
        )
        return y if isinstance(y, tuple) else (y,)

    def reference_call(self, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x = leaves["x"]
        rounded = torch.promote_types(
            self.x.dtype, self.x.dtype if self.residual is None else self.residual.dtype
        )
        if self.residual is not None:  # the sum is what its dtype rounds it to, here and in torch
            total = x + leaves["residual"]
            x = total + ((self.x + self.residual).to(rounded).double() - total).detach()
        y = reference.layer_norm(
            x, self.axes, leaves.get("weight"), leaves.get("bias"), self.eps, self.activation,
            "layer" in self.kind,
        )  # fmt: skip
        return (y,) if self.residual is None else (y, x)

    def run(self, call: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        outputs = call(leaves)
        seeds = [s.to(y.dtype) for s, y in zip((self.dy, self.dsum), outputs, strict=False)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds)
        found = dict(zip(("y", "sum"), outputs, strict=False))
        return found | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}

    def statistics(self) -> tuple[Tensor, Tensor]:
        """mean and rstd of each row."""
        x = (self.x if self.residual is None else self.x + self.residual).double()
        x = x.flatten(-self.axes)
        mean = x.mean(-1) * ("layer" in self.kind)
        return mean, ((x - mean[..., None]).square().mean(-1) + self.eps).rsqrt()

    def condition(self) -> float:
        """Largest |mean| · rstd: so many roundings it costs torch's operators, not our kernels."""
        if fastnorm.backend_for(self.x) == "triton":
            return 1.0
        mean, rstd = self.statistics()
        return max(1.0, (mean.abs() * rstd).max().item())

    def intermediate(self) -> float:
        """|dy w| rstd, from which dx is what is left after two projections."""
        weight = 1.0 if self.weight is None else self.weight.abs().max().item()
        return max(1.0, weight * self.dy.abs().max().item() * self.statistics()[1].max().item())

    def roundings(self, name: str) -> int:
        """How often a result is rounded, the last time included."""
        # the gradient of the sum is rounded before it is given to input and residual
        count = 1 + (name in ("dx", "dresidual") and self.residual is not None)
        if self.in_16_bits():
            count += self.activation != "identity"  # z is stored in between, as in torch.nn
        return count

    def in_16_bits(self) -> bool:
        return fastnorm.backend_for(self.x) == "eager" and self.x.dtype.itemsize == 2

    def check(self) -> dict[str, Tensor]:
        got = self.run(self.call, self.leaves())
        want = self.run(self.reference_call, self.leaves(torch.float64))
        size = self.x.shape[-self.axes :].numel()
        rows = self.x.numel() // size
        kappa = self.condition()
        for name, value in got.items():
            terms = (rows if name in ("dweight", "dbias") else size) * kappa**2
            roundings = self.roundings(name)
            compute = compute_dtype(self.x.dtype)
            if "layer" in self.kind and self.in_16_bits():  # torch's operator adds rows up in those
                compute = self.x.dtype
            intermediate = self.intermediate() if name in ("dx", "dresidual") else 1.0
            assert_close(
                value, want[name], terms, f"{self.kind} {name}", roundings, compute, intermediate
            )
        for name, leaf in self.leaves().items():
            assert got[f"d{name}"].dtype == leaf.dtype
            assert got[f"d{name}"].shape == leaf.shape
        return got


def problem(
    kind: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    axes: int = 1,
    parameters: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    affine: str = "wb",
    mean: float = 0.5,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    small = {"device": device, "dtype": parameters or dtype}
    trailing = shape[-axes:]
    return Problem(
        kind,
        x=(draw(*shape) * 1.5 + mean).to(device, dtype),
        residual=draw(*shape).to(device, residual_dtype or dtype) if "add" in kind else None,
        weight=(draw(*trailing) * 0.3 + 1).to(**small) if "w" in affine else None,
        bias=draw(*trailing).mul(0.5).to(**small) if "b" in affine and "layer" in kind else None,
        dy=draw(*shape).to(device, dtype),
        dsum=draw(*shape).to(device, dtype),
        axes=axes,
        **options,
    )


SHAPES = [
    (1, 1),
    (3, 1),
    (1, 7),
    (7, 2),
    (5, 33),
    (300, 64),  # more rows than a program's tile
    (17, 127),  # primes
    (2, 3, 129),
    (2, 2, 2, 96),
    (6, 513),  # one more than a power of two
    (3, 1024),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype, kind):
    case = problem(kind, shape, backend, dtype)
    got = case.check()
    assert got["y"].dtype == dtype
    assert got["y"].shape == case.x.shape
    assert got["y"].is_contiguous()


@pytest.fixture(params=["registers", "looped", "split"])
def way(request, monkeypatch) -> str:
    """Each way of sharing rows, at sizes that the interpreter can bear."""
    if request.param != "registers":
        monkeypatch.setattr(row_plans, "WIDEST_ROW", 64)
        monkeypatch.setattr(row_plans, "WIDEST_ROW_BACKWARD", 64)
        monkeypatch.setattr(row_plans, "LOOP_TILE", 128)
        monkeypatch.setattr(row_plans, "COLUMN_TILE", (2, 64))
    return request.param


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(torch.float32, "identity"), (torch.bfloat16, "silu"), (torch.float64, "gelu")],
    ids=str,
)
def test_every_way_of_sharing_rows(backend, way, kind, dtype, activation):
    for size in (65, 300):  # one tile, and several of which the last is not full
        shape = (1 if way == "split" else 3, size)
        problem(kind, shape, backend, dtype, activation=activation).check()


def test_the_ways_are_taken(monkeypatch):
    """Or the test above would say nothing of them; the policy itself decides on these."""
    device = devices.Device(multiprocessors=132)
    assert row_plans.row_plan(4096, 4096, 2, 8, 2, device).whole
    looped = row_plans.row_plan(4096, 32768, 2, 8, 2, device)
    assert (looped.whole, looped.programs) == (False, 1)
    assert row_plans.row_plan(16, 1 << 22, 2, 8, 2, device).programs > 1
    assert row_plans.row_sums_plan(4096, 8192, 2, 8, 4, device) is None
    assert row_plans.row_sums_plan(4096, 16384, 2, 8, 4, device).programs == 1
    assert row_plans.row_sums_plan(1, 1_000_003, 4, 1, 8, device).programs > 100
    for kind in ("WIDEST_ROW", "WIDEST_ROW_BACKWARD", "LOOP_TILE"):
        monkeypatch.setattr(row_plans, kind, 64)
    assert not row_plans.row_plan(11, 65, 4, 1, 4, devices.INTERPRETER).whole
    assert row_plans.row_plan(11, 200, 4, 8, 4, devices.INTERPRETER).programs == 1
    assert row_plans.row_plan(1, 200, 4, 8, 4, devices.INTERPRETER).programs > 1
    assert row_plans.row_sums_plan(1, 200, 4, 8, 8, devices.INTERPRETER).programs > 1


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("N", [1, 2, 40, 96, 257, 1024, 4096, 30_000])
def test_a_thread_holds_the_rows_that_it_folds(N, gated, itemsize):
    """Vectors of a tile go to threads in turn: what is summed first needs no other thread."""
    align = divisor_class(N, itemsize)
    device = devices.Device(multiprocessors=132)
    plan = row_plans.row_gradient_plan(4096, N, itemsize, align, 2 * itemsize, gated, device)
    threads, vector = 32 * plan.options["num_warps"], min(align, plan.block_n)
    element = torch.arange(plan.block_m * plan.block_n)
    thread = element // vector % threads
    # as device/tiles.py's fold views it: rows that are block_m / fold apart
    folded = thread.view(plan.fold, -1)
    assert (folded == folded[0]).all()
    assert plan.fold == plan.block_m or folded.shape[1] <= threads * vector, "could fold more"


@pytest.mark.parametrize("shared", [64, 99, 163, 227])
def test_what_is_loaded_ahead_fits_shared_memory(shared):
    """Of all programs that are resident together, with their scratch; else fewer tiles are."""
    device = devices.Device(multiprocessors=132, shared=shared << 10)
    ahead = set()
    for itemsize, tensors, width in itertools.product((2, 4, 8), (1, 2, 3), range(1, 15)):
        N, loaded = 1 << width, itemsize * tensors
        for plan in (
            row_plans.row_plan(1 << 20, N, itemsize, 8, loaded, device),
            row_plans.row_gradient_plan(1 << 20, N, itemsize, 8, loaded, False, device),
        ):
            if plan.whole:
                tile = plan.block_m * plan.block_n * loaded
                programs = row_plans.cdiv(plan.programs, device.multiprocessors)
                room = device.shared - row_plans.scratch(plan.block_n) * programs
                assert (plan.stages - 1) * tile * programs <= max(room, 0)
                ahead.add(plan.stages - 1)
    assert ahead == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, kind):
    for dtype in (torch.float32, torch.bfloat16):
        problem(kind, (9, 40), backend, dtype, activation=activation).check()


@pytest.mark.parametrize("parameters", FLOATS, ids=lambda d: f"parameters {d}"[17:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: f"input {d}"[12:])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes(backend, kind, dtype, parameters):
    for affine in ("wb", "w", "b"):
        case = problem(kind, (7, 24), backend, dtype, parameters=parameters, affine=affine)
        assert case.check()["y"].dtype == dtype


@pytest.mark.parametrize("kind", ["add_layer_norm", "add_rms_norm"])
def test_residual_of_another_dtype(backend, kind):
    """The sum and the output have the dtype that torch promotes to; each gradient its own."""
    pair = {"dtype": torch.bfloat16, "residual_dtype": torch.float32}
    got = problem(kind, (5, 24), backend, **pair, activation="silu").check()
    assert got["y"].dtype is got["sum"].dtype is torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", ["", "w", "b"])
def test_without_parameters(backend, kind, affine):
    for activation in ("identity", "silu"):
        problem(kind, (9, 40), backend, affine=affine, activation=activation).check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_trailing_axes(backend, kind, axes):
    problem(kind, (3, 4, 5, 6), backend, axes=axes, activation="relu").check()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_only_what_is_asked_for(backend, way, kind, activation):
    """Each gradient alone is the same as with all the others."""
    case = problem(kind, (1 if way == "split" else 5, 200), backend, activation=activation)
    want = case.run(case.call, case.leaves())
    for wanted in case.leaves():
        leaves = case.leaves()
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        outputs = case.call(leaves)
        if wanted in ("weight", "bias"):
            outputs = outputs[:1]
        (got,) = torch.autograd.grad(outputs, leaves[wanted], [case.dy, case.dsum][: len(outputs)])
        torch.testing.assert_close(got, want[f"d{wanted}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["add_layer_norm", "add_rms_norm"])
def test_either_output_alone(backend, kind):
    """The gradient of one output is that of both with zeros for the other."""
    case = problem(kind, (5, 40), backend)
    for used in (0, 1):
        leaves = case.leaves()
        wanted = list(leaves)[: 4 if used == 0 else 2]
        seeds = [case.dy, case.dsum]
        got = torch.autograd.grad(case.call(leaves)[used], [leaves[n] for n in wanted], seeds[used])
        seeds[1 - used] = torch.zeros_like(seeds[used])
        leaves = case.leaves()
        want = torch.autograd.grad(case.call(leaves), [leaves[n] for n in wanted], seeds)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


def strided_inputs(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    return {
        "transposed": draw(12, 9).t(),
        "every second row": draw(8, 12)[::2],
        "a row stride": draw(6, 20)[:, 3:15],
        "a row stride, 3d": draw(2, 3, 16)[..., :12],
        "rows that do not collapse": draw(2, 6, 12)[:, ::2],
        "expanded rows": draw(1, 12).expand(5, 12),
        "expanded columns": draw(5, 1).expand(5, 12),
        "every second column": draw(5, 24)[:, ::2],
        "channels_last": draw(2, 3, 4, 12).to(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("name", strided_inputs(torch.device("cpu")))
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(backend, kind, name):
    x = strided_inputs(backend)[name]
    case = problem(kind, tuple(x.shape), backend, activation="silu")
    case.x = x
    want = case.run(case.reference_call, case.leaves(torch.float64))
    leaves = case.leaves() | {"x": x.detach().requires_grad_()}  # clone() would drop the strides
    for leaf, value in case.run(case.call, leaves).items():
        assert_close(value, want[leaf], 100, leaf)


@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 5)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_memory_format_of_the_output_is_torchs(backend, monkeypatch, name, shape, small):
    """torch's RMS norm keeps channels_last; its layer norm gives rows."""
    for module in (direct, sys.modules["fastnorm.eager.rms_norm"]):
        monkeypatch.setattr(module, "SMALL", 1 << 17 if small else 0)
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    dense = torch.randn(shape, device=backend).contiguous(memory_format=last)
    for x in (dense, dense[:, :, ::2], dense.contiguous()):
        y = getattr(FF, name)(x, shape[-1:], activation="silu")
        assert y.stride() == getattr(torch.nn.functional, name)(x, shape[-1:]).stride()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_memory_format_of_a_sum_is_torchs(backend, name):
    """And of the norm of that sum. Both operands are asked, the first of them first."""
    torch.manual_seed(0)  # no row of five that is all but 0
    dense = torch.randn(2, 3, 4, 5, device=backend)
    last = dense.to(memory_format=torch.channels_last)
    turned = torch.randn(3, 2, 4, 5, device=backend).transpose(0, 1)
    columns = torch.randn(2, 3, 5, 4, device=backend).mT
    operands = (dense, last, turned, columns, last[:, :, ::2].repeat(1, 1, 2, 1))
    for x, r in itertools.product(operands, repeat=2):
        leaves = [t.detach().requires_grad_() for t in (x, r)]
        y, total = getattr(FF, f"add_{name}")(*leaves, (5,), activation="silu")
        assert torch.equal(total, x + r)
        assert total.stride() == (x + r).stride()
        assert y.stride() == getattr(torch.nn.functional, name)(x + r, (5,)).stride()
        dy = torch.randn_like(y)
        exact = (x + r).double().requires_grad_()  # the sum as it is rounded
        want = torch.nn.functional.silu(getattr(torch.nn.functional, name)(exact, (5,)))
        found = torch.autograd.grad((y, total), leaves, (dy, dy))
        (expected,) = torch.autograd.grad((want, exact), exact, (dy.double(), dy.double()))
        for dx in found:
            assert_close(dx, expected, 100)


@pytest.mark.parametrize("given", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("parameter", [None, torch.float32, torch.complex64], ids=str)
def test_complex_numbers(backend, given, parameter):
    """RMS norm is torch's, which squares them as they are. Layer norm knows none, as torch's."""
    x = 1e-4 * torch.randn(3, 8, dtype=given, device=backend)
    weight = None if parameter is None else torch.randn(8, dtype=parameter, device=backend)
    for eps in (None, 1e-5):
        want = torch.nn.functional.rms_norm(x, (8,), weight, eps)
        torch.testing.assert_close(FF.rms_norm(x, (8,), weight, eps), want)
        both = FF.add_rms_norm(x / 4, 0.75 * x, (8,), weight, eps, activation="tanh")
        torch.testing.assert_close(both, (want.tanh(), x))
    leaf = x.detach().requires_grad_()
    again = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(FF.rms_norm(leaf, (8,), weight), leaf, x)
    (want,) = torch.autograd.grad(torch.nn.functional.rms_norm(again, (8,), weight), again, x)
    torch.testing.assert_close(dx, want)
    for call in (FF.layer_norm, torch.nn.functional.layer_norm):
        with pytest.raises(NotImplementedError, match="Complex"):
            call(x, (8,))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides_of_dy_and_residual(backend, kind, layout):
    shape = (6, 8)
    case = problem(kind, shape, backend, activation="tanh")
    if layout == "expanded":  # what y.sum().backward() makes
        case.dy = case.dsum = torch.ones((), device=backend).expand(shape)
    elif layout == "transposed":
        case.dy, case.dsum = case.dy.reshape(8, 6).t(), case.dsum.reshape(8, 6).t()
    else:
        case.dy = torch.randn(6, 20, device=backend)[:, 3:11]
        case.dsum = torch.randn(6, 20, device=backend)[:, 8:16]
        if case.residual is not None:
            case.residual = torch.randn(6, 20, device=backend)[:, 5:13]
    case.check()


@pytest.mark.parametrize("odd", ["x", "residual", "dy", "dsum"])
def test_rows_of_one_tensor_that_start_anywhere(backend, odd):
    """Vectors are loaded of what divides every row's start, whoever's it is."""
    case = problem("add_layer_norm", (6, 8), backend, activation="tanh")
    wide = torch.zeros(6, 11, device=backend)
    wide[:, :8] = getattr(case, odd)
    setattr(case, odd, wide[:, :8])
    want = case.run(case.reference_call, case.leaves(torch.float64))
    leaves = case.leaves()  # clone() drops the strides
    leaves |= {n: getattr(case, n).detach().requires_grad_() for n in ("x", "residual")}
    for name, value in case.run(case.call, leaves).items():
        assert_close(value, want[name], 100, name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are listed in the interpreter")
def test_what_nobody_asks_for_is_not_computed(monkeypatch):
    """In long rows, whose sums take a launch of their own."""
    import interpreter

    monkeypatch.setattr(row_plans, "WIDEST_ROW_BACKWARD", 64)
    case = problem("layer_norm", (4, 200), torch.device("cpu"), activation="relu")
    results = {"x": "dx_ptr", "weight": "dw_partial_ptr", "bias": "db_partial_ptr"}
    for wanted, result in results.items():
        leaves = {n: t.requires_grad_(n == wanted) for n, t in case.leaves().items()}
        with fastnorm.use_backend("triton"), interpreter.trace() as launches:
            y = case.call(leaves)[0]
            launches.clear()
            torch.autograd.grad(y, leaves[wanted], case.dy)
        (own,) = (each for each in launches if each.kernel == "layer_norm_bwd_kernel")
        assert [name for name in results.values() if name in own.tensors] == [result]
        assert any("reduce" in each.kernel for each in launches) == (wanted == "x")


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
def test_default_eps_of_rms_norm(backend, kind, dtype):
    """None is torch's: of the dtype that is computed in."""
    case = problem(kind, (3, 8), backend, dtype)
    case.x, case.dy = case.x * 1e-4, case.dy
    if case.residual is not None:
        case.residual = case.residual * 1e-4
    case.eps = None
    leaves = case.leaves()
    got = case.call(leaves)[0]
    case.eps = torch.finfo(compute_dtype(dtype)).eps
    want = case.reference_call(case.leaves(torch.float64))[0]
    assert_close(got, want, 8)
    x = case.x if case.residual is None else case.x + case.residual
    torchs = torch.nn.functional.rms_norm(x, (8,), case.weight)
    assert_close(got, torchs, 8, roundings=2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend, kind):
    for activation in ("identity", "silu"):
        case = problem(kind, (2, 3), backend, torch.float64, activation=activation)
        leaves = case.leaves()

        def call(*tensors, case=case, names=tuple(leaves)):
            return case.call(dict(zip(names, tensors, strict=True)))

        assert torch.autograd.gradcheck(call, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(call, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_of_strided_inputs(backend, kind):
    """A copy that the kernels needed must not cut the graph."""
    case = problem(kind, (3, 4), backend, torch.float64)
    wide = torch.randn(6, 8, dtype=torch.float64, device=backend).requires_grad_()

    def call(wide):
        return case.call({"x": wide[::2, ::2], "residual": wide[1::2, 1::2]} if case.residual
                         is not None else {"x": wide[::2, ::2]})  # fmt: skip

    assert torch.autograd.gradgradcheck(call, wide)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_time(backend, way, kind):
    case = problem(kind, (1 if way == "split" else 5, 300), backend, torch.bfloat16)
    first, second = (case.run(case.call, case.leaves()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_alone(backend, kind):
    case = problem(kind, (4, 12), backend, activation="relu")
    names = [
        n for n in ("x", "residual", "weight", "bias", "dy", "dsum") if getattr(case, n) is not None
    ]
    before = {n: getattr(case, n).clone() for n in names}
    leaves = {n: getattr(case, n).requires_grad_() for n in case.leaves()}
    case.run(case.call, leaves)
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 0, 3)], ids=str)
def test_empty(backend, kind, shape):
    """As torch: an empty output, and zeros for the parameters' gradients."""
    case = problem(kind, shape, backend)
    leaves = case.leaves()
    outputs = case.call(leaves)
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [torch.ones_like(y) for y in outputs]
    )
    for leaf, gradient in zip(leaves.values(), gradients, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()
    for y in outputs:
        assert y.shape == torch.Size(shape)


def test_default_eps_is_that_of_the_sums_dtype():
    x, r = torch.full((2, 4), 1e-5), torch.zeros(2, 4, dtype=torch.float64)
    y, total = FF.add_rms_norm(x, r, (4,))
    want, _ = FF.add_rms_norm(x, r, (4,), eps=torch.finfo(torch.float64).eps)
    assert total.dtype is torch.float64
    assert torch.equal(y, want)
