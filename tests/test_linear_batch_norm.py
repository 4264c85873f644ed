"""Linear + BatchNorm + activation against float64, by every algorithm, on every backend.

Errors are norms, relative to the reference, and are compared with those of torch's own three
operators in the same dtype: single elements of a gradient may flip with the sign of a rounded z.
"""

import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import assert_close, compute_dtype, each_dtype
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS

LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias")
each_algorithm = pytest.mark.parametrize("algorithm", ["gram", "epilogue", "unfused"])
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@dataclass
class Problem:
    """Arguments of one call, and what it should give."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dy: Tensor
    training: bool = True
    activation: str = "relu"
    algorithm: str = "auto"
    momentum: float = 0.1
    eps: float = 1e-5

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in LEAVES if getattr(self, name) is not None}
        return {
            name: t.detach().clone().to(dtype or t.dtype).requires_grad_()
            for name, t in found.items()
        }

    def buffers(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        return [
            None if t is None else t.clone().to(dtype or t.dtype)
            for t in (self.running_mean, self.running_var)
        ]

    def forward(self, leaves: dict[str, Tensor], mean: Tensor | None, var: Tensor | None) -> Tensor:
        x, weight, *others = (leaves.get(name) for name in LEAVES)
        assert x is not None
        assert weight is not None
        bias, norm_weight, norm_bias = others
        return FF.linear_batch_norm(
            x, weight, bias, mean, var, norm_weight, norm_bias, self.training, self.momentum,
            self.eps, activation=self.activation, algorithm=self.algorithm,
        )  # fmt: skip

    def ours(self) -> dict[str, Tensor]:
        leaves, (mean, var) = self.leaves(), self.buffers()
        y = self.forward(leaves, mean, var)
        return self._collect(y, leaves, mean, var)

    def torchs(self) -> dict[str, Tensor]:
        """By torch's own operators, in the dtype of the input."""
        leaves, (mean, var) = self.leaves(), self.buffers()
        z = F.linear(leaves["x"], leaves["weight"], leaves.get("bias")).flatten(0, -2)
        z = F.batch_norm(
            z, mean, var, leaves.get("norm_weight"), leaves.get("norm_bias"),
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        y = ACTIVATIONS[self.activation](z).view(self.dy.shape)
        return self._collect(y, leaves, mean, var)

    def reference(self) -> dict[str, Tensor]:
        leaves, (mean, var) = self.leaves(torch.float64), self.buffers(torch.float64)
        y, mean, var = reference.linear_batch_norm(
            leaves["x"].flatten(0, -2), leaves["weight"], leaves.get("bias"), mean, var,
            leaves.get("norm_weight"), leaves.get("norm_bias"),
            self.training, self.momentum, self.eps, self.activation,
        )  # fmt: skip
        return self._collect(y.view(self.dy.shape), leaves, mean, var)

    def _collect(
        self, y: Tensor, leaves: dict[str, Tensor], mean: Tensor | None, var: Tensor | None
    ) -> dict[str, Tensor]:
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        found = {"y": y} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
        buffers = {"running_mean": mean, "running_var": var}
        found |= {n: t for n, t in buffers.items() if t is not None}
        return {name: t.detach() for name, t in found.items()}

    def check(self, names: tuple[str, ...] = (), factor: float = 2.0) -> dict[str, Tensor]:
        """Errors at most `factor` times torch's own, or a few roundings."""
        got, theirs, want = self.ours(), self.torchs(), self.reference()
        rows = self.x.shape[:-1].numel()
        for name in names or got:
            assert got[name].dtype == theirs[name].dtype, name
            if name == "dbias" and self.training:
                continue  # the reference's is what float64 leaves of zero
            ours, others = error(got[name], want[name]), error(theirs[name], want[name])
            step = torch.finfo(compute_dtype(self.x.dtype)).eps
            # a rounding at the store is 0.3 eps of a typical element
            floor = torch.finfo(got[name].dtype).eps / 2 + step * rows**0.5
            assert ours <= max(factor * others, floor), (name, ours, others)
        return got


def error(got: Tensor, want: Tensor) -> float:
    distance = torch.linalg.vector_norm(got.double() - want)
    return (distance / torch.linalg.vector_norm(want).clamp_min(1e-30)).item()


def problem(
    M: int | tuple[int, ...],
    K: int,
    N: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    mean: float = 0.5,
    small: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    rows = M if isinstance(M, tuple) else (M,)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def parameter(t: Tensor) -> Tensor:
        return t.to(device, small or compute_dtype(dtype))

    return Problem(
        x=(draw(*rows, K) + mean).to(device, dtype),
        weight=(draw(N, K) / K**0.5).to(device, dtype),
        bias=draw(N).to(device, dtype),
        norm_weight=parameter(draw(N) * 0.3 + 1),
        norm_bias=parameter(draw(N) * 0.5),
        running_mean=parameter(draw(N)),
        running_var=parameter(draw(N).abs() + 0.5),
        dy=draw(*rows, N).to(device, dtype),
        **options,
    )


SHAPES = [
    (2, 1, 1),
    (7, 5, 3),  # less than one tile of anything
    (127, 33, 40),  # odd and prime: no vector is aligned
    (129, 64, 16),  # 2ᵏ + 1 rows, one tile of columns
    (260, 72, 150),  # more than a tile in each direction
]


@each_algorithm
@each_mode
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype, training, algorithm):
    problem(*shape, backend, dtype, training=training, algorithm=algorithm).check()


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, dtype, training):
    """Every activation by whatever serves it; gram where the output tells its derivative."""
    case = problem(70, 24, 40, backend, dtype, training=training, activation=activation)
    for algorithm in ("gram", "epilogue", "unfused", "auto"):
        if algorithm == "gram" and activation not in OUTPUT_GRADS:
            with pytest.raises(ValueError, match="function of its output") as caught:
                replace(case, algorithm=algorithm).ours()
            assert repr(activation) in str(caught.value)
            assert all(name in str(caught.value) for name in OUTPUT_GRADS)
        else:
            replace(case, algorithm=algorithm).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", OUTPUT_GRADS)
def test_gates_from_the_output_alone(backend, activation, dtype):
    """Of y as it was rounded, in float32: tiny ones are not 0, and relu6's ends are closed.

    Evaluation with W = 1, mean 0 and variance 1, where dX is G.
    """
    tiny = 1.5 * torch.finfo(dtype).tiny
    special = torch.tensor([0.0, -0.0, tiny, -tiny, 1e-3, -1e-3, 5.97, 6.0, 6.5, 9.0, -9.0, 1.0])
    generator = torch.Generator().manual_seed(2)
    z = torch.cat([special, 3 * torch.randn(500, generator=generator)])
    x = z.view(-1, 16).to(backend, dtype).requires_grad_()
    dy = torch.randn(x.shape, generator=generator).to(backend, dtype)
    one = torch.ones(16, device=backend, dtype=compute_dtype(dtype))
    y = FF.linear_batch_norm(
        x, one.diag().to(dtype), None, 0 * one, one, eps=0.0, algorithm="gram",
        activation=activation,
    )  # fmt: skip
    (dx,) = torch.autograd.grad(y, x, dy)
    want = OUTPUT_GRADS[activation](dy.double(), y.detach().double())
    assert_close(dx, want)
    if dtype.itemsize == 2:  # and rounded once: two numbers, if any, lie that near to a tie
        assert (dx != want.to(dtype)).sum() <= 2


def test_gram_serves_what_the_design_lists():
    served = {"identity", "relu", "relu6", "leaky_relu", "tanh", "sigmoid", "elu"}
    assert set(OUTPUT_GRADS) == served


# ---- accuracy ------------------------------------------------------------------------------------
INPUTS = {
    "gaussian": lambda t: t,
    "after a relu": lambda t: t.relu(),
    "mean = 10 std": lambda t: t + 10,
    "mean = 1000 std": lambda t: t + 1000,
    "channels of many sizes": lambda t: (
        t * torch.logspace(-3, 3, t.shape[1], dtype=t.dtype, device=t.device)
    ),
}


def table_problem(
    inputs: str, device: torch.device, dtype: torch.dtype, M: int, K: int, N: int
) -> Problem:
    """A row of DESIGN's accuracy table."""
    case = problem(M, K, N, device, torch.float64, mean=0.0)
    low = {"x": INPUTS[inputs](case.x), "weight": case.weight, "bias": case.bias, "dy": case.dy}
    z = F.linear(low["x"].to(dtype).double(), case.weight.to(dtype).double())
    affine = (case.norm_weight.float().double(), (case.norm_bias * 0.4).float().double())
    z = F.batch_norm(z, None, None, *affine, training=True)
    low["dy"] = torch.where(z.abs() < 1e-6, 0.0, case.dy)  # no float32 can tell these signs
    return replace(
        case, algorithm="gram", **{n: t.to(dtype) for n, t in low.items()},
        norm_weight=case.norm_weight.float(), norm_bias=(case.norm_bias * 0.4).float(),
        running_mean=case.running_mean.float(), running_var=case.running_var.float(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("inputs", INPUTS)
def test_gram_is_as_accurate_as_torch(backend, inputs, dtype):
    table_problem(inputs, backend, dtype, 1024, 64, 96).check(factor=1.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("inputs", INPUTS)
def test_gram_is_as_accurate_as_torch_at_full_size(backend, inputs, dtype):
    table_problem(inputs, backend, dtype, 4096, 128, 512).check(factor=1.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("signal", "seed"), [(1, 0), (10, 0), (100, 0), (100, 1), (1000, 0)])
def test_a_signal_common_to_all_columns(backend, signal, seed, dtype):
    """Rows of W that sum to zero cancel it, and with it most digits of a float32 S, and of P."""
    case = problem(1024, 48, 64, backend, torch.float64, mean=0.0, seed=seed)
    common = torch.randn(1024, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = (case.weight.cpu() * 8).round() / 8  # few bits, so that the sums are exactly zero
    weight[:, -1] -= weight.sum(1)
    assert weight.sum(1).abs().max() == 0
    assert torch.equal(weight, weight.to(torch.bfloat16).double())
    case = replace(
        case, algorithm="gram", weight=weight.to(backend, dtype),
        x=(case.x + signal * common.to(backend)).to(dtype), dy=case.dy.to(dtype),
        bias=case.bias.to(dtype), norm_weight=case.norm_weight.float(),
        norm_bias=case.norm_bias.float(), running_mean=case.running_mean.float(),
        running_var=case.running_var.float(),
    )  # fmt: skip
    case.check(("y", "running_mean", "running_var"))
    replace(case, activation="identity").check()  # no sign is ambiguous: gradients too


@pytest.mark.parametrize("row", [0, 39])
def test_one_row_that_cancels_a_signal(backend, row):
    """Of those that other programs fold none does: S is made again if one of them asks for it."""
    case = problem(256, 24, 40, backend, torch.bfloat16, mean=0.0, algorithm="gram")
    common = torch.randn(256, 1, generator=torch.Generator().manual_seed(9)).to(backend)
    weight = (case.weight.double() * 8).round() / 8  # few bits: the sum is exactly zero
    weight[:, 0] += 1.0
    weight[row, -1] -= weight[row].sum()
    x, weight = (case.x + 1000 * common).to(torch.bfloat16), weight.to(torch.bfloat16)
    assert weight[row].double().sum() == 0
    case = replace(case, x=x, weight=weight, bias=None, activation="identity")
    got, want = case.ours(), case.reference()
    for name in ("y", "running_var"):
        assert error(got[name][..., row], want[name][..., row]) < 0.01, name


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_zero_norm_weights(backend, dtype, training):
    """As residual blocks begin: the largest of α ∘ W, which makes a unit, is 0. dγ is not."""
    case = problem(40, 24, 20, backend, dtype, training=training, activation="identity")
    case = replace(case, algorithm="gram", norm_weight=torch.zeros_like(case.norm_weight))
    got = case.check(("y", "dnorm_weight", "dnorm_bias"))
    assert got["dx"].count_nonzero() == got["dweight"].count_nonzero() == 0


def test_small_gradients_in_float16(backend):
    """A is products of 1/M with three small numbers: without a unit of its own it is zero."""
    case = problem(512, 32, 64, backend, torch.float16, algorithm="gram", activation="identity")
    x = case.x.double() * 100
    z = F.batch_norm(x @ case.weight.double().T, None, None, training=True)
    dy = (z * 2e-3).half()  # along ẑ: all that is left of it is lost without A
    replace(case, x=x.half(), dy=dy, bias=None).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_near_the_maximum(backend, dtype):
    """Squares of the inputs overflow; output and gradients do not."""
    case = problem(200, 16, 24, backend, dtype, mean=0.0, algorithm="gram", activation="identity")
    case = replace(case, x=case.x * 1e30, bias=None, running_mean=None, running_var=None)
    got, want = case.ours(), case.reference()
    for name in ("y", "dweight", "dnorm_weight", "dnorm_bias"):
        assert error(got[name], want[name]) < 0.02, name
    assert error(got["dx"] * 1e30, want["dx"] * 1e30) < 0.02


def test_squares_that_overflow_float32_alike(backend):
    """All terms of the variance are +inf there: no NaN says that 16-bit sums will not do."""
    case = problem(300, 1, 4, backend, torch.bfloat16, mean=0.0, algorithm="gram")
    for scale in (1e18, 1e22):  # in the sum of tiles, and in each of them
        large = replace(
            case, x=case.x * scale, bias=None, running_mean=None, running_var=None,
            activation="identity",
        )  # fmt: skip
        assert error(large.ours()["y"], large.reference()["y"]) < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["x", "weight"])
@each_mode
@each_algorithm
def test_nan_and_inf(backend, algorithm, training, where, bad):
    """Where torch gives a NaN, and only there."""
    for dtype in (torch.float32, torch.bfloat16):
        case = problem(40, 20, 24, backend, dtype, training=training, algorithm=algorithm)
        getattr(case, where)[3, 2] = bad
        got, theirs = case.ours(), case.torchs()
        for name in ("y", "dnorm_bias"):
            assert torch.equal(got[name].isnan(), theirs[name].isnan()), name
        for name in ("running_mean", "running_var"):
            assert torch.equal(got[name].isfinite(), theirs[name].isfinite()), name


# ---- statistics, bias, gradients -----------------------------------------------------------------
@each_mode
@each_algorithm
def test_buffers_that_move_are_of_another_version(backend, algorithm, training):
    """By which autograd knows that what it saved has changed."""
    case = problem(37, 8, 5, backend, training=training, algorithm=algorithm)
    buffers = case.buffers()
    before = [buffer._version for buffer in buffers]
    case.forward(case.leaves(), *buffers)
    moved = [b._version > v for b, v in zip(buffers, before, strict=True)]
    if fastnorm.backend_for(case.x) == "triton":  # of torch's operators a CPU's says nothing
        assert moved == [training] * 2
    assert training or not any(moved)


@each_algorithm
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, "tensor", None])
def test_running_statistics(backend, algorithm, momentum):
    """Three batches move the buffers as torch's layer does; None is the cumulative average."""
    norm = torch.nn.BatchNorm1d(5, momentum=0.25 if momentum == "tensor" else momentum).double()
    mean, var = torch.zeros(5, device=backend), torch.ones(5, device=backend)
    count = torch.tensor(0, device=backend)
    given = torch.tensor(0.25, device=backend) if momentum == "tensor" else momentum
    for step in range(3):
        case = problem(37, 8, 5, backend, seed=step)
        FF.linear_batch_norm(
            case.x, case.weight, case.bias, mean, var, training=True, momentum=given,
            algorithm=algorithm, num_batches_tracked=count,
        )  # fmt: skip
        norm(F.linear(case.x.double(), case.weight.double(), case.bias.double()).cpu())
        torch.testing.assert_close(mean.cpu().double(), norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var.cpu().double(), norm.running_var, rtol=1e-5, atol=1e-6)
        assert count.item() == step + 1
    before = mean.clone()
    FF.linear_batch_norm(case.x, case.weight, None, mean, var, algorithm=algorithm)
    assert torch.equal(mean, before)


@each_algorithm
def test_bias(backend, algorithm):
    """In training its gradient is exactly zero, and not None; running_mean includes it."""
    for dtype in (torch.float32, torch.bfloat16):
        case = problem(50, 8, 24, backend, dtype, algorithm=algorithm)
        got = case.ours()
        assert torch.equal(got["dbias"], torch.zeros_like(case.bias))
        assert got["dbias"].dtype == dtype
        without = replace(case, bias=None).ours()
        moved = got["running_mean"] - without["running_mean"]
        torch.testing.assert_close(moved, 0.1 * case.bias.float(), rtol=0.02, atol=2e-3)
        assert error(got["y"], without["y"].double()) < 0.02
        frozen = replace(case, training=False).ours()
        assert error(frozen["dbias"], replace(case, training=False).reference()["dbias"]) < 0.03


@each_algorithm
@each_mode
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_only_what_is_asked_for(backend, activation, training, algorithm):
    """Each gradient alone is the same as with all the others."""
    case = problem(
        66, 20, 24, backend, training=training, algorithm=algorithm, activation=activation
    )
    want = case.ours()
    for wanted in LEAVES:
        leaves = {n: t.requires_grad_(n == wanted) for n, t in case.leaves().items()}
        y = case.forward(leaves, *case.buffers())
        (got,) = torch.autograd.grad(y, leaves[wanted], case.dy)
        torch.testing.assert_close(got, want[f"d{wanted}"], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are listed in the interpreter")
def test_what_nobody_asks_for_is_not_computed():
    import interpreter

    case = problem(66, 20, 24, torch.device("cpu"), algorithm="gram")
    expected = {
        ("x",): {"weight", "fold", "products", "round", "input"},  # dx takes dγ
        ("weight",): {"weight", "fold"},
        ("norm_weight",): {"weight", "fold"},
        ("norm_bias",): {"weight", "fold"},  # without a product
        ("bias",): set(),
    }
    for training in (True, False):
        for wanted, kernels in expected.items():
            if not training:
                others = {"x": {"fold", "input"}, "bias": {"weight", "fold"}}
                kernels = others.get(wanted[0], kernels)
            leaves = {n: t.requires_grad_(n in wanted) for n, t in case.leaves().items()}
            with fastnorm.use_backend("triton"), interpreter.trace() as launches:
                y = replace(case, training=training).forward(leaves, *case.buffers())
                launches.clear()
                torch.autograd.grad(y, [leaves[n] for n in wanted], case.dy)
            found = {launch.kernel.split("_")[-2] for launch in launches}
            assert found == kernels, (training, wanted)
            if wanted in (("norm_bias",), ("bias",)):
                weights = [launch for launch in launches if "bwd_weight" in launch.kernel]
                assert all(launch.constants["p_partial_ptr"] is None for launch in weights)


@each_algorithm
@each_mode
def test_gradcheck(backend, training, algorithm):
    for activation in ("tanh", "identity") if algorithm == "gram" else ("silu",):
        case = problem(
            4, 2, 3, backend, torch.float64,
            training=training, algorithm=algorithm, activation=activation,
        )  # fmt: skip
        leaves = case.leaves()

        def call(*tensors, case=case, names=tuple(leaves)):
            return case.forward(dict(zip(names, tensors, strict=True)), *case.buffers())

        assert torch.autograd.gradcheck(call, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@each_algorithm
def test_same_bits_every_time(backend, algorithm):
    case = problem(700, 40, 50, backend, torch.bfloat16, algorithm=algorithm)
    first, second = case.ours(), case.ours()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@each_algorithm
def test_inputs_are_left_alone(backend, algorithm):
    for training in (True, False):
        case = problem(30, 16, 24, backend, training=training, algorithm=algorithm)
        before = {n: getattr(case, n).clone() for n in (*LEAVES, "dy")}
        leaves = {n: getattr(case, n).requires_grad_() for n in LEAVES}
        y = case.forward(leaves, *case.buffers())
        torch.autograd.grad(y, list(leaves.values()), case.dy)
        for name, value in before.items():
            assert torch.equal(getattr(case, name), value), name


# ---- memory --------------------------------------------------------------------------------------
class _Allocations(TorchDispatchMode):
    """Sizes of the storages that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if _is(t)}
        for t in filter(_is, tree_leaves(result)):
            if t.untyped_storage().data_ptr() not in given:
                self.kept.append(t)  # or its address would come again
                self.sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return result


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


@each_mode
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_saved_tensors(backend, activation, training):
    """X, Y, W and small ones: no pre-activation, and no Y where nothing is gated by it."""
    case = problem(3000, 16, 24, backend, training=training, activation=activation)
    leaves = case.leaves()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = replace(case, algorithm="gram").forward(leaves, *case.buffers())
    large = [t for t in saved if t.numel() >= 3000]
    assert {t.data_ptr() for t in large} == {leaves["x"].data_ptr()} | (
        {y.data_ptr()} if activation != "identity" else set()
    )
    assert all(t.numel() <= 16 * 24 for t in saved if t.numel() < 3000)


@each_mode
@pytest.mark.unchecked  # it keeps what is allocated
def test_no_temporary_is_as_large_as_the_output(backend, training, monkeypatch):
    # it steps aside for those who watch
    monkeypatch.setattr(fastnorm.eager.native, "observed", lambda x: False)
    M, K, N = 40000, 8, 32
    case = problem(M, K, N, backend, training=training, algorithm="gram")
    leaves = case.leaves()
    size = M * N * 4
    if backend.type == "cpu" and fastnorm.backend.implementation(case.x).__name__.endswith("ops"):
        M = 4000  # the interpreter is slow, and its kernels have no temporaries at all
        case = problem(M, K, N, backend, training=training, algorithm="gram")
        leaves, size = case.leaves(), M * N * 4
    with _Allocations() as forward:
        y = case.forward(leaves, *case.buffers())
    assert [s for s in forward.sizes.values() if s >= size] == [size], "Y alone"
    with _Allocations() as backward:
        torch.autograd.grad(y, list(leaves.values()), case.dy)
    assert not [s for s in backward.sizes.values() if s >= size]


# ---- shapes and layouts --------------------------------------------------------------------------
@each_algorithm
def test_leading_axes_and_strides(backend, algorithm):
    case = problem((3, 7, 5), 12, 20, backend, algorithm=algorithm)
    assert case.check()["y"].shape == (3, 7, 5, 20)
    wide = torch.randn(64, 40, device=backend)
    for x in (wide[:, 4:16], wide[::2, :12], wide[:48, :12].T.contiguous().T):
        strided = problem(x.shape[0], 12, 20, backend, algorithm=algorithm)
        want = replace(strided, x=x).ours()
        leaves = strided.leaves() | {"x": x.detach().requires_grad_()}
        weight = leaves["weight"].detach().T.contiguous().T.requires_grad_()
        y = strided.forward(leaves | {"weight": weight}, *strided.buffers())
        dx, dw = torch.autograd.grad(y, (leaves["x"], weight), strided.dy.T.contiguous().T)
        for name, got in {"y": y, "dx": dx, "dweight": dw}.items():
            torch.testing.assert_close(got, want[name], rtol=1e-5, atol=1e-5)


@each_algorithm
@each_mode
@pytest.mark.parametrize("sizes", [(0, 4, 3), (5, 0, 3), (5, 1, 1)], ids=str)
def test_empty_and_tiny(backend, sizes, training, algorithm):
    case = problem(*sizes, backend, training=training, algorithm=algorithm)
    case = replace(case, running_mean=case.running_mean.abs())

    def outcome(call):
        try:
            return {name: (t.shape, t.dtype) for name, t in call().items()}
        except Exception as error:
            return type(error)

    assert outcome(case.ours) == outcome(case.torchs)


@each_algorithm
@each_mode
def test_mixed_dtypes_and_absent_parameters(backend, training, algorithm):
    for dtype, small in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        case = problem(40, 16, 24, backend, dtype, small=small, training=training)
        case = replace(case, algorithm=algorithm, weight=case.weight.to(small))
        got, want = case.ours(), case.reference()
        for name, t in got.items():
            assert name == "dbias" or error(t, want[name]) < 0.06, name
        assert got["y"].dtype == dtype
        assert got["dweight"].dtype == got["dnorm_weight"].dtype == small
    plain = problem(40, 16, 24, backend, training=training, algorithm=algorithm)
    plain = replace(plain, bias=None, norm_weight=None, norm_bias=None)
    plain.check()
    if training:
        replace(plain, running_mean=None, running_var=None).check()


@each_algorithm
def test_autocast(backend, algorithm):
    """Output and gradients have the dtypes that torch's operators give them."""
    case = problem(40, 16, 24, backend, algorithm=algorithm)
    with torch.autocast(backend.type, torch.bfloat16):
        got, theirs = case.ours(), case.torchs()
    for name, t in got.items():
        assert t.dtype == theirs[name].dtype, name
    assert got["y"].dtype is torch.bfloat16
    assert error(got["y"], case.reference()["y"]) < 0.02


POSITIONS = [(1,), (3,), (9, 7), (4, 16), (2, 3, 4)]


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_convolution_of_one_position(
    backend, positions, channels_last, dtype, training, monkeypatch
):
    """A 1×1 convolution is the linear problem in either layout, and neither is copied."""
    from fastnorm.kernels import cost

    monkeypatch.setattr(cost, "choose", lambda *args, **kwargs: "gram")
    monkeypatch.setattr(cost, "SMALL", 0)
    case = problem((5, *positions), 12, 40, backend, dtype, training=training)
    want, theirs = case.reference(), case.torchs()

    def nchw(t: Tensor) -> Tensor:
        t = t.movedim(-1, 1)
        return t if channels_last else t.contiguous()

    leaves = case.leaves()
    x = nchw(leaves["x"].detach()).requires_grad_()
    weight = leaves["weight"].view(*leaves["weight"].shape, *[1] * len(positions))
    mean, var = case.buffers()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = FF.conv_batch_norm(
            x, weight, leaves["bias"], mean, var, leaves["norm_weight"], leaves["norm_bias"],
            training,
        )  # fmt: skip
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    assert y.stride() == nchw(case.dy).stride() or positions == (1,)
    sources = [x, *(leaves[name] for name in LEAVES[1:])]
    dx, *others = torch.autograd.grad(y, sources, nchw(case.dy))
    got = {"y": y.movedim(1, -1), "dx": dx.movedim(1, -1)}
    got |= {f"d{name}": g for name, g in zip(LEAVES[1:], others, strict=True)}
    got |= {"running_mean": mean, "running_var": var}
    step = torch.finfo(dtype).eps
    for name, t in got.items():
        if name != "dbias" or not training:
            bound = max(2 * error(theirs[name], want[name]), step / 2 + 1e-6)
            assert error(t, want[name]) < bound, name


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_epilogue_of_images(backend, activation, dtype, training, monkeypatch):
    """channels_last goes as rows, there and back; NCHW has no rows, and is `unfused`."""
    from fastnorm.kernels import cost

    monkeypatch.setattr(cost, "choose", lambda *args, **kwargs: "epilogue")
    case = problem((3, 5, 7), 12, 40, backend, dtype, training=training, activation=activation)
    want, theirs = case.reference(), case.torchs()
    for channels_last in (True, False):

        def nchw(t: Tensor, channels_last: bool = channels_last) -> Tensor:
            t = t.movedim(-1, 1)
            return t if channels_last else t.contiguous()

        leaves, (mean, var) = case.leaves(), case.buffers()
        x = nchw(leaves["x"].detach()).requires_grad_()
        y = FF.conv_batch_norm(
            x, leaves["weight"][:, :, None, None], leaves["bias"], mean, var,
            leaves["norm_weight"], leaves["norm_bias"], training, activation=activation,
        )  # fmt: skip
        sources = [x, *(leaves[name] for name in LEAVES[1:])]
        dx, *others = torch.autograd.grad(y, sources, nchw(case.dy))
        assert y.stride() == nchw(case.dy).stride()
        assert dx.stride() == x.stride()
        got = {"y": y.movedim(1, -1), "dx": dx.movedim(1, -1)}
        got |= {f"d{name}": g for name, g in zip(LEAVES[1:], others, strict=True)}
        got |= {"running_mean": mean, "running_var": var}
        for name, t in got.items():
            if name != "dbias" or not training:
                bound = max(2 * error(theirs[name], want[name]), torch.finfo(dtype).eps / 2 + 1e-6)
                assert error(t, want[name]) < bound, name


def test_convolution_that_is_none(backend):
    """Larger kernels, strides, padding and groups are torch's convolution still."""
    x = torch.randn(2, 4, 6, 6, device=backend)
    weight = torch.randn(8, 4, 1, 1, device=backend)
    for options in ({"stride": 2}, {"padding": 1}, {"stride": (1, 2)}, {"padding": (0, 1)}):
        got = FF.conv_batch_norm(x, weight, training=True, **options)
        z = F.conv2d(x, weight, **options)
        torch.testing.assert_close(got, F.batch_norm(z, None, None, training=True).relu())
    grouped = FF.conv_batch_norm(x, weight[:, :2], training=True, groups=2)
    z = F.conv2d(x, weight[:, :2], groups=2)
    torch.testing.assert_close(grouped, F.batch_norm(z, None, None, training=True).relu())
    same = FF.conv_batch_norm(x, weight, training=True, padding="same", stride=(1, 1))
    torch.testing.assert_close(same, FF.conv_batch_norm(x, weight, training=True))


# ---- precision of float32 ------------------------------------------------------------------------
def test_torchs_precision_settings(monkeypatch):
    """The kernels multiply float32 as torch was told, by its older setting or by its newer one."""
    kernels = pytest.importorskip("fastnorm.kernels.products")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for asked in ("tf32", "ieee"):
            matmul.fp32_precision = asked
            assert kernels.precision(torch.float32) == asked
            assert kernels.precision(torch.bfloat16) == kernels.precision(torch.float64) == "ieee"
    finally:
        matmul.fp32_precision = before


OLD_SETTING = """
import torch
from fastnorm.kernels.products import precision
assert precision(torch.float32) == "ieee"
torch.backends.cuda.matmul.allow_tf32 = True
assert precision(torch.float32) == "tf32"
torch.backends.cuda.matmul.allow_tf32 = False
assert precision(torch.float32) == "ieee"
torch.set_float32_matmul_precision("high")
assert precision(torch.float32) == "tf32"
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert precision(torch.float32) == "ieee"
torch.backends.fp32_precision = "tf32"
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert precision(torch.float32) == "ieee", "of products alone, it goes before that of all"
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert precision(torch.float32) == "tf32"
"""


def test_older_and_newer_setting_mixed():
    """In a process of its own: torch remembers which of its settings were used."""
    done = subprocess.run([sys.executable, "-c", OLD_SETTING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU rounds, the interpreter truncates")
def test_tf32_is_used_where_it_is_allowed():
    case = problem(100, 32, 24, torch.device("cpu"), algorithm="gram")
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    want = case.reference()
    errors = {}
    try:
        with fastnorm.use_backend("triton"):
            for asked in ("ieee", "tf32"):
                matmul.fp32_precision = asked
                errors[asked] = error(case.ours()["y"], want["y"])
    finally:
        matmul.fp32_precision = before
    assert errors["ieee"] < 1e-6 < 1e-5 < errors["tf32"] < 1e-2


def test_what_rounding_a_mean_leaves_counts():
    """The mean of X is 1e6 of its deviations, and rounded by a hundredth of one."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, 4, generator=generator) for size in (512, 3))
    x += 1e6
    y = FF.linear_batch_norm(x, w, training=True, activation="identity", algorithm="gram")
    want, _, _ = reference.linear_batch_norm(
        x.double(), w.double(), None, None, None, None, None, True, 0.1, 1e-5, "identity"
    )
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-4)


def test_an_infinity_in_the_first_row_makes_the_mean_infinite(backend):
    x, w = torch.ones(8, 4, device=backend), torch.ones(3, 4, device=backend)
    x[0, 1] = float("inf")
    mean, var = torch.zeros(3, device=backend), torch.ones(3, device=backend)
    FF.linear_batch_norm(x, w, None, mean, var, training=True, algorithm="gram")
    assert mean.isinf().all()
    assert var.isnan().all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kernel", [1, 3], ids=["1", "3"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_convolution_refuses_a_rank_as_torchs_layers_do(backend, axes, kernel, training):
    """No rank but its own: the convolution takes one sample alone, and the norm refuses it."""
    options = {"padding": kernel // 2, "bias": False}
    ours = getattr(fastnorm, f"Conv{axes}dBatchNorm")(4, 5, kernel, **options)
    theirs = torch.nn.Sequential(
        getattr(torch.nn, f"Conv{axes}d")(4, 5, kernel, **options),
        getattr(torch.nn, f"BatchNorm{axes}d")(5),
    )
    for rank in {1, 2, 3, 4, 5, 6} - {axes + 2}:
        x = torch.ones([4] * rank, device=backend)
        with pytest.raises((RuntimeError, ValueError)) as theirs_says:
            theirs.to(backend).train(training)(x)
        with pytest.raises(theirs_says.type, match=re.escape(str(theirs_says.value))):
            ours.to(backend).train(training)(x)
