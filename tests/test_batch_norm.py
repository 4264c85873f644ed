"""BatchNorm's output, gradients and buffers against float64, on every backend."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from cases import FLOATS, assert_close, compute_dtype, memory_formats
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS
from fastnorm.ops.channels import left_to_eager
from fastnorm.ops.layout import channel_view, laid_out_as, sample_view


@dataclass
class Problem:
    """Arguments of one call, and what it should give."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dy: Tensor
    training: bool = True
    momentum: float = 0.1
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

    def run(self) -> dict[str, Tensor]:
        """Output, gradients and buffers of ours."""
        leaves = self.leaves()
        mean, var = (
            None if t is None else t.clone() for t in (self.running_mean, self.running_var)
        )
        y = FF.batch_norm(
            leaves["x"],
            mean,
            var,
            leaves.get("weight"),
            leaves.get("bias"),
            self.training,
            self.momentum,
            self.eps,
            residual=leaves.get("residual"),
            activation=self.activation,
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.to(y.dtype))
        return self._collect(y, leaves, gradients, mean, var)

    def reference(self) -> dict[str, Tensor]:
        leaves = self.leaves(torch.float64)
        mean, var = (
            None if t is None else t.double() for t in (self.running_mean, self.running_var)
        )
        y, mean, var = reference.batch_norm(
            leaves["x"],
            mean,
            var,
            leaves.get("weight"),
            leaves.get("bias"),
            self.training,
            self.momentum,
            self.eps,
            leaves.get("residual"),
            self.activation,
        )
        gradients = torch.autograd.grad(y, list(leaves.values()), self.dy.double())
        return self._collect(y, leaves, gradients, mean, var)

    @staticmethod
    def _collect(
        y: Tensor, leaves: dict[str, Tensor], gradients: Any, mean: Any, var: Any
    ) -> dict[str, Tensor]:
        found = {"y": y} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
        buffers = {"running_mean": mean, "running_var": var}
        return found | {n: t for n, t in buffers.items() if t is not None}

    def check(self) -> dict[str, Tensor]:
        got, want = self.run(), self.reference()
        terms = self.x.numel() // self.x.shape[1]
        # With residual and activation dz is stored, rounded, between the passes; so is torch's.
        roundings = 1 + (self.residual is not None and self.activation != "identity")
        for name, value in got.items():
            assert_close(
                value, want[name], terms, name, roundings, compute=compute_dtype(self.x.dtype)
            )
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
    affine: str = "wb",
    residual: bool = False,
    tracked: bool = True,
    mean: float = 0.5,
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
        x=large(draw(*shape) * 1.5 + mean),
        weight=(draw(channels) * 0.3 + 1).to(**small) if "w" in affine else None,
        bias=draw(channels).mul(0.5).to(**small) if "b" in affine else None,
        residual=large(draw(*shape)) if residual else None,
        running_mean=draw(channels).to(**small) if tracked else None,
        running_var=(draw(channels).abs() + 0.5).to(**small) if tracked else None,
        dy=large(draw(*shape)),
        **options,
    )


SHAPES = [
    (2, 1),  # one channel
    (3, 5),
    (127, 33),  # a prime number of rows, an odd number of channels
    (129, 8),  # 2ᵏ + 1 rows
    (5000, 3),  # more rows than a program's share: split over programs
    (2, 3, 7),
    (4, 16, 64),
    (1, 2, 1, 2),  # two elements a channel
    (2, 10, 5, 5),
    (3, 2, 17, 31),
    (33, 3, 7, 7),  # several samples in a tile
    (9, 16, 7, 7),  # eight channels' planes are one aligned run of a sample
    (100, 12, 3, 5),  # four of them
    (4000, 3, 2, 2),  # likewise, whatever their number, and split over programs
    (5, 8, 21, 21),  # long runs
    (2, 2, 120, 121),  # a channel larger than a tile, and not a multiple of it
    (2, 3, 4, 5, 6),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype, training):
    for memory_format in memory_formats(len(shape)):
        case = problem(shape, backend, dtype, memory_format=memory_format, training=training)
        got = case.check()
        assert got["y"].dtype == dtype
        assert got["y"].stride() == case.x.stride(), "the memory format is kept"
        assert got["dx"].shape == case.x.shape


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape", [(3, 8, 17, 31), (2, 8, 15, 17), (5, 8, 13, 19), (1, 16, 1, 9)], ids=str
)
def test_rows_that_begin_within_vectors(backend, small_tiles, shape, training):
    """Odd ones of 16 bits: of several tiles, and full ones; programs own several, and one."""
    options = {"training": training, "mean": 100.0}
    problem(shape, backend, torch.bfloat16, activation="silu", **options).check()
    problem(shape, backend, torch.float16, activation="relu", residual=True, **options).check()


def test_what_lies_beside_a_row_is_not_its_own(backend, small_tiles):
    """Whole vectors are read, and with them a neighbour's numbers, which need not be finite."""
    x = torch.randn(2, 8, 9, 15).to(backend, torch.bfloat16)
    x[:, ::2] = float("inf")
    x[:, 1::4, 0, 0] = x[:, 3::4, -1, -1] = 300.0
    y = FF.batch_norm(x, None, None, training=True)
    assert y[:, ::2].isnan().all()
    assert_close(y[:, 1::2], FF.batch_norm(x[:, 1::2].double(), None, None, training=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 2, 70, 71), (9, 8, 7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(backend, activation, residual, dtype, shape, training):
    problem(
        shape, backend, dtype, residual=residual, activation=activation, training=training
    ).check()


@pytest.mark.parametrize("parameters", FLOATS, ids=lambda d: f"parameters {d}"[17:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: f"input {d}"[12:])
def test_mixed_dtypes(backend, dtype, parameters):
    """Parameters and buffers of any floating dtype, also where torch's CPU operators raise."""
    for training in (True, False):
        case = problem((7, 6, 3), backend, dtype, parameters=parameters, training=training)
        got = case.check()
        assert got["y"].dtype == dtype
        assert got["running_mean"].dtype == parameters


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_residual_of_another_dtype(backend, training):
    """The output has the dtype that torch promotes to; the residual's gradient its own."""
    case = problem((5, 4, 6), backend, torch.bfloat16, training=training, activation="relu")
    case.residual = torch.randn_like(case.x, dtype=torch.float32)
    assert case.check()["y"].dtype is torch.float32


def test_layouts_that_are_kept():
    """One copy of what is not dense leaves channels innermost; of both layouts the longer runs."""
    gaps = torch.randn(2, 5, 6, 8).permute(0, 3, 1, 2)[:, :6]
    dense, view = channel_view(gaps)
    assert torch.equal(dense, gaps)
    assert dense.is_contiguous(memory_format=torch.channels_last)
    assert view == (1, 6, 60, True)
    one, view = channel_view(gaps[:, :1])
    assert one.is_contiguous()
    assert view == (2, 1, 30, False)
    for shape, columns in (((6, 12, 1, 1), True), ((6, 12), True), ((3, 1, 5, 6), False)):
        assert sample_view(torch.randn(shape))[1].columns is columns
    x, residual = torch.randn(2, 6, 3, 4).bfloat16(), gaps[..., :3, :4]
    like = laid_out_as(residual, x)  # in its own dtype
    assert like.stride() == x.stride()
    assert torch.equal(like, residual)


def test_only_a_residual_that_is_wider_is_left_to_torch():
    """Kernels compute in float64 where the input is."""
    wide, narrow = torch.ones(2, 3, dtype=torch.float64), torch.ones(2, 3)
    assert left_to_eager(narrow, wide)
    assert not left_to_eager(narrow, None)
    for residual in (wide, narrow, None):
        assert not left_to_eager(wide, residual)


@pytest.mark.parametrize("affine", ["", "w", "b"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_without_parameters_or_buffers(backend, affine, tracked):
    problem((9, 4, 5), backend, affine=affine, tracked=tracked, activation="silu").check()
    problem((9, 4, 5), backend, affine=affine, training=False, residual=True).check()


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_saved_tensors(backend, training, activation, residual):
    """The input; and the output, or the residual and the bias, where act′ asks for them."""
    case = problem((3, 4, 5), backend, residual=residual, activation=activation)
    leaves = case.leaves()
    if fastnorm.backend_for(leaves["x"]) == "eager":
        pytest.skip("torch's operators save what they read")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = FF.batch_norm(
            leaves["x"], case.running_mean, case.running_var, leaves["weight"], leaves["bias"],
            training, residual=leaves.get("residual"), activation=activation,
        )  # fmt: skip
    sign = residual and activation in ("relu", "leaky_relu")
    kept = {"x", "weight", *(["y"] if sign else [])}
    if activation != "identity" and not sign:
        kept |= {"bias", *(["residual"] if residual else [])}
    known = {t.data_ptr(): name for name, t in (leaves | {"y": y}).items()}
    found = {known.get(t.data_ptr(), "statistics") for t in saved}
    assert found == kept | {"statistics"}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu"])
def test_only_what_is_asked_for(backend, activation, residual, training):
    """Each gradient alone is the same as with all the others."""
    for shape in ((5, 3, 4), (2, 2, 90, 90), (3000, 4, 2, 2)):
        case = problem(shape, backend, residual=residual, activation=activation, training=training)
        want = case.run()
        for wanted in case.leaves():
            leaves = case.leaves()
            for name, leaf in leaves.items():
                leaf.requires_grad_(name == wanted)
            y = FF.batch_norm(
                leaves["x"], case.running_mean.clone(), case.running_var.clone(),
                leaves["weight"], leaves["bias"], training,
                residual=leaves.get("residual"), activation=activation,
            )  # fmt: skip
            (got,) = torch.autograd.grad(y, leaves[wanted], case.dy)
            torch.testing.assert_close(got, want[f"d{wanted}"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="launches are listed in the interpreter")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_nobody_asks_for_is_not_computed(training):
    import interpreter

    options = {"residual": True, "activation": "relu", "training": training}
    case = problem((5, 3, 4), torch.device("cpu"), **options)
    results = {"x": "dx_ptr", "residual": "dz_ptr", "weight": "dw_ptr", "bias": "db_ptr"}
    for wanted, result in results.items():
        leaves = {n: t.requires_grad_(n == wanted) for n, t in case.leaves().items()}
        with fastnorm.use_backend("triton"), interpreter.trace() as launches:
            y = FF.batch_norm(
                leaves["x"], case.running_mean.clone(), case.running_var.clone(),
                leaves["weight"], leaves["bias"], training,
                residual=leaves["residual"], activation="relu",
            )  # fmt: skip
            launches.clear()
            torch.autograd.grad(y, leaves[wanted], case.dy)
        (launch,) = launches
        assert [name for name in results.values() if name in launch.tensors] == [result]
        _, once, _, stored = launch.traffic()[result]
        assert stored == once
        summed = wanted in ("weight", "bias") or (training and wanted == "x")
        assert ("x_ptr" in launch.tensors) == summed  # y shows what relu asks


def strided_inputs(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    return {
        "(N, L, C) transposed": draw(4, 9, 5).transpose(1, 2),
        "every second sample": draw(8, 3, 5, 6)[::2],
        "some channels": draw(4, 8, 5, 6)[:, 2:5],
        "width outermost": draw(6, 4, 3, 5).permute(1, 2, 3, 0),
        "expanded": draw(4, 3, 1, 1).expand(4, 3, 5, 6),
        "columns of a matrix": draw(10, 7)[:, 1:4],
        "some channels, channels_last": draw(2, 5, 6, 8).permute(0, 3, 1, 2)[:, :6],
        "a single position": draw(6, 4, 1, 1),
    }


@pytest.mark.parametrize("name", strided_inputs(torch.device("cpu")))
def test_any_strides(backend, name):
    x = strided_inputs(backend)[name]
    case = problem(tuple(x.shape), backend, activation="relu", residual=True)
    case.x = x
    want = case.reference()
    leaves = case.leaves() | {"x": x.detach().requires_grad_()}  # clone() would drop the strides
    y = FF.batch_norm(
        leaves["x"], None, None, leaves["weight"], leaves["bias"], True,
        residual=leaves["residual"], activation="relu",
    )  # fmt: skip
    got = torch.autograd.grad(y, list(leaves.values()), case.dy)
    assert_close(y, want["y"], name="y")
    for leaf, gradient in zip(leaves, got, strict=True):
        assert_close(gradient, want[f"d{leaf}"], 100, leaf)


NORMS = {
    "batch": lambda x: FF.batch_norm(x, None, None, training=True, activation="relu"),
    "group": lambda x: FF.group_norm(x, 1, activation="relu"),
    "instance": lambda x: FF.instance_norm(x, activation="relu"),
}


@pytest.mark.parametrize("norm", NORMS)
def test_layout_of_sequences(backend, norm):
    """(N, L, C) transposed stays so in the kernels, which copy nothing; on a CPU it is torch's."""
    x = strided_inputs(backend)["(N, L, C) transposed"].requires_grad_()
    y = NORMS[norm](x)
    (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape, device=backend))
    kept = (
        x.stride() if fastnorm.backend_for(x) == "triton" else F.relu(F.instance_norm(x)).stride()
    )
    assert y.stride() == kept
    if fastnorm.backend_for(x) == "triton":
        assert dx.stride() == kept


def test_channels_innermost_are_seen(backend):
    """Sizes of 1 have any stride: what is dense both ways is taken for columns."""
    shapes = ((4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 5), (1, 3, 1, 5))
    more = ((2, 3, 2, 4, 5), (2, 3, 1, 1, 1), (1, 1, 2, 1, 5), (2, 3, 2, 2, 2, 2))
    for shape in (*shapes, *more):
        plain = torch.empty(shape, device=backend)
        last = torch.empty(shape[0], *shape[2:], shape[1], device=backend).movedim(-1, 1)
        for x in (plain, last, plain[::2], last[:, :1], plain[:0]):
            innermost = x.movedim(1, -1).is_contiguous()
            found, view = channel_view(x)
            assert (found is x) == (innermost or x.is_contiguous())
            assert found is not x or view.columns == innermost


@pytest.mark.parametrize("layout", ["expanded", "other format", "sliced"])
def test_any_strides_of_dy_and_residual(backend, layout):
    shape = (3, 4, 5, 6)
    case = problem(shape, backend, residual=True, activation="tanh")
    if layout == "expanded":  # what y.sum().backward() makes
        case.dy = torch.ones((), device=backend).expand(shape)
    elif layout == "other format":
        case.dy = case.dy.to(memory_format=torch.channels_last)
        case.residual = case.residual.to(memory_format=torch.channels_last)
    else:
        case.dy = torch.randn(3, 4, 5, 12, device=backend)[..., ::2]
        case.residual = torch.randn(6, 4, 5, 6, device=backend)[::2]
    case.check()


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (700, 2, 5, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, "tensor", None])
def test_running_statistics(backend, shape, momentum):
    """Three batches move the buffers as float64 does; None is the cumulative average."""
    dtype = torch.float32
    mean = torch.zeros(shape[1], device=backend)
    var, count = torch.ones_like(mean), torch.tensor(0, device=backend)
    want_mean, want_var = mean.double(), var.double()
    for step in range(3):
        case = problem(shape, backend, dtype, seed=step)
        given = torch.tensor(0.25, device=backend) if momentum == "tensor" else momentum
        FF.batch_norm(case.x, mean, var, training=True, momentum=given, num_batches_tracked=count)
        factor = {"tensor": 0.25, None: 1 / (step + 1)}.get(momentum, momentum)
        _, want_mean, want_var = reference.batch_norm(
            case.x.double(), want_mean, want_var, None, None, True, factor, 1e-5, None, "identity"
        )
        assert_close(mean, want_mean)
        assert_close(var, want_var)
        assert count.item() == step + 1


def test_gradcheck(backend):
    for training in (True, False):
        for residual, activation in ((False, "identity"), (True, "tanh"), (True, "silu")):
            case = problem((2, 2, 3), backend, torch.float64, residual=residual, training=training)

            def call(x, weight, bias, residual=None, case=case, activation=activation):
                return FF.batch_norm(
                    x, case.running_mean.clone(), case.running_var.clone(), weight, bias,
                    case.training, residual=residual, activation=activation,
                )  # fmt: skip

            leaves = tuple(case.leaves().values())
            assert torch.autograd.gradcheck(call, leaves)
            assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_second_derivatives_of_strided_inputs(backend):
    """A copy that the kernels needed must not cut the graph."""
    x = torch.randn(2, 4, 3, dtype=torch.float64, device=backend).requires_grad_()
    residual = torch.randn(2, 8, 3, dtype=torch.float64, device=backend).requires_grad_()

    def call(x, residual):
        return FF.batch_norm(
            x[:, ::2], None, None, training=True, residual=residual[:, ::4], activation="silu"
        )

    assert torch.autograd.gradgradcheck(call, (x, residual))


def test_same_bits_every_time(backend):
    case = problem((300, 3, 9, 9), backend, torch.bfloat16, residual=True, activation="relu")
    first, second = case.run(), case.run()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_inputs_are_left_alone(backend):
    """Nothing is written into x, residual, dy or the parameters."""
    for training in (True, False):
        case = problem((4, 3, 5), backend, residual=True, activation="relu", training=training)
        before = {n: getattr(case, n).clone() for n in ("x", "residual", "dy", "weight", "bias")}
        leaves = {n: getattr(case, n).requires_grad_() for n in case.names}
        y = FF.batch_norm(
            case.x, case.running_mean, case.running_var, case.weight, case.bias, training,
            residual=case.residual, activation="relu",
        )  # fmt: skip
        torch.autograd.grad(y, list(leaves.values()), case.dy)
        for name, value in before.items():
            assert torch.equal(getattr(case, name), value), name


def test_backward_keeps_the_statistics_of_its_forward(backend):
    """In evaluation the buffers may move between forward and backward."""
    case = problem((4, 3, 5), backend, training=False)
    want = case.run()
    leaves = case.leaves()
    mean, var = case.running_mean.clone(), case.running_var.clone()
    y = FF.batch_norm(leaves["x"], mean, var, leaves["weight"], leaves["bias"])
    if y.grad_fn is not None and "BatchNormFunction" not in type(y.grad_fn).__name__:
        pytest.skip("torch's own operator saves the buffers themselves, and says when they moved")
    mean.fill_(7)
    var.fill_(7)
    got = torch.autograd.grad(y, list(leaves.values()), case.dy)
    for name, gradient in zip(leaves, got, strict=True):
        assert torch.equal(gradient, want[f"d{name}"])
