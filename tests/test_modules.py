"""Modules are torch.nn's with another forward: same parameters, buffers, state dict and results."""

import copy
import inspect
import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import (
    MODIFIED,
    Pair,
    Squared,
    assert_same_state,
    close,
    copies,
    gradients_or_refusal,
    randomize,
    train,
)

import fastnorm
from fastnorm.eager.activations import ACTIVATIONS

NORMS = {
    "BatchNorm1d, (N, C)": ("BatchNorm1d", (6, 3)),
    "BatchNorm1d, (N, C, L)": ("BatchNorm1d", (4, 3, 5)),
    "BatchNorm2d": ("BatchNorm2d", (4, 3, 5, 2)),
    "BatchNorm3d": ("BatchNorm3d", (2, 3, 2, 3, 4)),
}
CLASSES = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
CONVOLUTIONS = ("Conv1dBatchNorm", "Conv2dBatchNorm", "Conv3dBatchNorm")


def _linear(bias: bool = False, **options: Any) -> nn.Module:
    layers = {"linear": nn.Linear(4, 3, bias), "norm": nn.BatchNorm1d(3, **options)}
    return nn.Sequential(OrderedDict(**layers, act=nn.ReLU()))


def _convolution(rank: int, kernel: int, **geometry: Any) -> Callable[..., nn.Module]:
    def build(bias: bool = False, **options: Any) -> nn.Module:
        conv = getattr(nn, f"Conv{rank}d")(4, 6, kernel, bias=bias, **geometry)
        norm = getattr(nn, f"BatchNorm{rank}d")(6, **options)
        return nn.Sequential(OrderedDict(conv=conv, norm=norm, act=nn.ReLU()))

    return build


def _our_convolution(rank: int, kernel: int, **geometry: Any) -> Callable[..., nn.Module]:
    kind = getattr(fastnorm, f"Conv{rank}dBatchNorm")
    return lambda **options: kind(4, 6, kernel, **geometry, **options)


def _convolutions() -> Iterator[tuple[str, Pair]]:
    plain: dict[str, Any] = {}
    grouped = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    for name, rank, kernel, geometry, shape in [
        ("Conv1dBatchNorm", 1, 3, plain, (3, 4, 6)),
        ("Conv1dBatchNorm, 1", 1, 1, plain, (3, 4, 6)),
        ("Conv2dBatchNorm", 2, 3, plain, (3, 4, 5, 4)),
        ("Conv2dBatchNorm, 1", 2, 1, plain, (3, 4, 3, 4)),
        ("Conv2dBatchNorm, geometry", 2, 3, grouped, (3, 4, 7, 8)),
        ("Conv2dBatchNorm, same", 2, 3, {"padding": "same"}, (3, 4, 5, 4)),
        ("Conv3dBatchNorm", 3, 2, plain, (2, 4, 3, 3, 3)),
    ]:
        ours, theirs = (
            _our_convolution(rank, kernel, **geometry),
            _convolution(rank, kernel, **geometry),
        )
        yield name, Pair(ours, theirs, shape)


def _norms() -> Iterator[tuple[str, Pair]]:
    for name, (kind, shape) in NORMS.items():
        ours, theirs = getattr(fastnorm, kind), getattr(nn, kind)
        yield (
            name,
            Pair(
                lambda ours=ours, **options: ours(3, **options),
                lambda theirs=theirs, **options: theirs(3, **options),
                shape,
            ),
        )


PAIRS = {
    **dict(_norms()),
    "LinearBatchNorm": Pair(lambda **o: fastnorm.LinearBatchNorm(4, 3, **o), _linear, (6, 4)),
    **dict(_convolutions()),
}
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "other numbers": {"momentum": 0.7, "eps": 0.1},
    "frozen numbers": {"momentum": 0.0},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "untracked, cumulative": {"track_running_stats": False, "momentum": None},
}
each_pair = pytest.mark.parametrize("name", PAIRS)


# ---- state dict, copies --------------------------------------------------------------------------
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_pair
def test_state_dict_both_ways(name, options):
    pair = PAIRS[name]
    ours, theirs = pair.ours(**options), pair.theirs(**options)
    randomize(theirs)
    assert not list(ours.load_state_dict(theirs.state_dict(), strict=True).missing_keys)
    assert_same_state(ours, theirs)
    back = pair.theirs(**options)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(back, theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert ours.state_dict()._metadata.keys() >= {
        k for k in theirs.state_dict()._metadata if k != "act"
    }


@each_pair
def test_state_dict_with_bias(name):
    pair = PAIRS[name]
    if "bias" not in inspect.signature(pair.theirs).parameters:
        pytest.skip("a norm without a product before it")
    ours, theirs = pair.ours(bias=True), pair.theirs(bias=True)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs)


def test_strict_names_what_is_missing():
    state = nn.BatchNorm1d(3).state_dict()
    del state["running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        fastnorm.BatchNorm1d(3).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fastnorm.BatchNorm1d(4).load_state_dict(nn.BatchNorm1d(3).state_dict())


@pytest.mark.parametrize("kind", CLASSES)
def test_checkpoints_from_before_batches_were_counted(kind):
    """Version 1 has no num_batches_tracked; torch keeps the module's own."""
    state = dict(getattr(nn, kind)(3).state_dict())
    del state["num_batches_tracked"]
    ours = getattr(fastnorm, kind)(3)
    ours.load_state_dict(state, strict=True)
    assert ours.num_batches_tracked.item() == 0


@each_pair
def test_copies_are_the_same_and_apart(name):
    pair = PAIRS[name]
    ours = pair.ours(activation="elu", momentum=None, eps=0.25).double()
    randomize(ours)
    x = pair.batch(torch.device("cpu"), torch.float64)
    for way, twin in copies(ours).items():
        assert type(twin) is type(ours)
        assert repr(twin) == repr(ours)
        assert_same_state(twin, ours)
        want = copy.deepcopy(ours)(x)
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        assert torch.equal(twin(x), want), way
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()), way
        twin.eval()
        assert torch.equal(twin(x), twin(x))
        assert ours.training


def test_a_saved_state_dict_is_plain_tensors():
    """torch.load with weights_only, its default, takes it."""
    ours, theirs = PAIRS["Conv2dBatchNorm, 1"].ours(), PAIRS["Conv2dBatchNorm, 1"].theirs()
    randomize(ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(theirs, ours)


# ---- constructor, class, repr --------------------------------------------------------------------
@pytest.mark.parametrize("kind", CLASSES)
def test_is_torchs_class(kind):
    ours, torchs = getattr(fastnorm, kind), getattr(nn, kind)
    assert issubclass(ours, torchs)
    assert issubclass(ours, nn.modules.batchnorm._BatchNorm)
    assert ours.__name__ == kind
    assert not isinstance(ours(3), tuple(getattr(nn, other) for other in CLASSES if other != kind))


@pytest.mark.parametrize("kind", CLASSES)
def test_constructor_takes_what_torchs_takes(kind):
    ours, torchs = getattr(fastnorm, kind), getattr(nn, kind)
    values = {
        "num_features": 5, "eps": 0.5, "momentum": None, "affine": True,
        "track_running_stats": True, "device": "cpu", "dtype": torch.float64, "bias": False,
    }  # fmt: skip
    parameters = inspect.signature(torchs).parameters
    assert set(parameters) <= set(values), "the installed torch takes something new: test it"
    by_position = [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    by_keyword = {n: values[n] for n in parameters if n not in by_position}
    for positional in range(1, len(by_position) + 1):
        arguments = [values[n] for n in by_position[:positional]]
        a, b = ours(*arguments, **by_keyword), torchs(*arguments, **by_keyword)
        assert_same_state(a, b)
        assert a.extra_repr() == b.extra_repr()
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(a, name) == getattr(b, name)
        assert (a.bias is None) == (b.bias is None)
    for name in by_position[1:]:
        a, b = ours(3, **{name: values[name]}), torchs(3, **{name: values[name]})
        assert a.extra_repr() == b.extra_repr()
        assert_same_state(a, b)


@pytest.mark.parametrize("kind", CLASSES)
def test_activation_is_keyword_only(kind):
    with pytest.raises(TypeError):
        getattr(fastnorm, kind)(3, 1e-5, 0.1, True, True, None, None, "relu")


def test_compound_constructors_take_what_their_parts_take():
    names = {
        fastnorm.LinearBatchNorm: ["in_features", "out_features", "bias"],
        fastnorm.Conv2dBatchNorm: [
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
            "bias",
        ],
    }  # fmt: skip
    shared = ["eps", "momentum", "affine", "track_running_stats", "device", "dtype"]
    for kind, own in names.items():
        parameters = inspect.signature(kind).parameters
        by_position = [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
        assert by_position == own + shared
        assert [n for n in parameters if n not in by_position] == ["activation"]
        assert parameters["activation"].default == "relu"
        assert parameters["bias"].default is False
    linear = fastnorm.LinearBatchNorm(4, 3, True, 0.5, None, True, True, "cpu", torch.float64)
    assert linear.linear.bias.dtype == linear.norm.weight.dtype == torch.float64
    assert (linear.norm.eps, linear.norm.momentum) == (0.5, None)
    conv = fastnorm.Conv2dBatchNorm(
        4, 6, (3, 1), (1, 2), (1, 0), 1, 2, True, 0.5, 0.2, False, False, "cpu", torch.float64
    )
    assert (conv.conv.stride, conv.conv.padding, conv.conv.groups) == ((1, 2), (1, 0), 2)
    assert conv.conv.bias.dtype == torch.float64
    assert (conv.norm.eps, conv.norm.momentum) == (0.5, 0.2)
    assert conv.norm.weight is None
    assert conv.norm.running_mean is None


@each_pair
def test_device_and_dtype(name):
    made = PAIRS[name].ours(device="meta", dtype=torch.float16)
    tensors = list(made.state_dict().values())
    assert tensors
    assert all(t.is_meta for t in tensors)
    assert {t.dtype for t in tensors} == {torch.float16, torch.int64}


@pytest.mark.parametrize("kind", CLASSES)
def test_extra_repr(kind):
    ours, torchs = getattr(fastnorm, kind), getattr(nn, kind)
    assert ours(3).extra_repr() == torchs(3).extra_repr()
    assert repr(ours(3, eps=0.5, momentum=None)) == repr(torchs(3, eps=0.5, momentum=None))
    for activation in ACTIVATIONS:
        shown = ours(3, activation=activation).extra_repr()
        assert shown.startswith(torchs(3).extra_repr())
        assert (repr(activation) in shown) == (activation != "identity")


@pytest.mark.parametrize("kind", ["LinearBatchNorm", *CONVOLUTIONS])
def test_repr_of_compounds(kind):
    sizes = (4, 3) if kind == "LinearBatchNorm" else (4, 3, 1)
    shown = repr(getattr(fastnorm, kind)(*sizes, activation="silu"))
    assert shown.startswith(f"{kind}(\n")
    assert "activation='silu'" in shown
    assert repr(getattr(fastnorm, kind)(*sizes, activation="identity")).count("activation") == 0


# ---- training ------------------------------------------------------------------------------------


EVERY_OPTION = ("BatchNorm1d, (N, C)", "Conv2dBatchNorm, 1")


@pytest.mark.parametrize(
    ("name", "options"),
    [(n, o) for n in PAIRS for o in (OPTIONS if n in EVERY_OPTION else ["default"])],
)
def test_trains_as_torchs(backend, name, options):
    """Outputs, gradients, parameters and buffers of two steps and an evaluation."""
    pair = PAIRS[name]
    ours, theirs = pair.both(backend, torch.float64, **OPTIONS[options])
    batches = [pair.batch(backend, torch.float64, seed) for seed in range(3)]
    results = zip(train(ours, batches), train(theirs, batches), strict=True)
    for i, (got, want) in enumerate(results):
        close(got, want, f"result {i}")
    assert_same_state(ours, theirs, exact=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["BatchNorm2d", "LinearBatchNorm"])
def test_trains_as_torchs_in_fewer_bits(backend, name, dtype):
    pair = PAIRS[name]
    ours, theirs = pair.both(backend, dtype)
    batches = [pair.batch(backend, dtype, seed) for seed in range(3)]
    for got, want in zip(train(ours, batches), train(theirs, batches), strict=True):
        assert got.dtype == want.dtype
        tolerance = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["BatchNorm1d, (N, C)", "BatchNorm2d", "LinearBatchNorm"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_are_counted_in_training_alone(backend, name, momentum):
    pair = PAIRS[name]
    module = pair.ours(momentum=momentum).to(backend)
    norm = getattr(module, "norm", module)
    steps = [(1, True), (2, True), (2, False), (3, True), (3, False)]
    for seed, (expected, training) in enumerate(steps):
        module.train(training)
        before = norm.running_mean.clone()
        module(pair.batch(backend, torch.float32, seed))
        assert norm.num_batches_tracked.item() == expected
        assert norm.num_batches_tracked.dtype == torch.int64
        assert torch.equal(norm.running_mean, before) == (not training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["BatchNorm1d", "LinearBatchNorm"])
def test_buffers_that_move_are_of_another_version(backend, kind, training):
    """By which autograd knows that what it saved has changed."""
    norm = getattr(fastnorm, kind)(*[3] * (1 + (kind != "BatchNorm1d")), device=backend)
    norm.train(training)
    before = [buffer._version for buffer in norm.buffers()]
    x = torch.randn(4, 3, device=backend)
    norm(x)
    moved = [b._version > v for b, v in zip(norm.buffers(), before, strict=True)]
    if fastnorm.backend_for(x) == "triton":
        assert moved == [training] * 3
    assert moved[2] == training  # of the others torch's operator says nothing on a CPU


def test_cumulative_average_is_the_average_of_the_batches(backend):
    ours = fastnorm.BatchNorm1d(3, momentum=None).to(backend, torch.float64)
    batches = [torch.randn(5, 3, dtype=torch.float64).to(backend) + i for i in range(4)]
    for x in batches:
        ours(x)
    close(ours.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0))
    close(ours.running_var, torch.stack([x.var(0) for x in batches]).mean(0))


def test_evaluation_does_not_depend_on_the_batch(backend):
    ours = fastnorm.BatchNorm2d(3, activation="silu").to(backend, torch.float64)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, device=backend)
    ours(x)
    ours.eval()
    close(ours(x)[:1], ours(x[:1]))
    close(ours(x[:1, :, :1, :1]), ours(x)[:1, :, :1, :1])


def test_attributes_changed_later(backend):
    """What people set on a norm after it was made has torch's effect."""
    x = torch.randn(4, 3, 5, dtype=torch.float64, device=backend)
    changes = [
        {"momentum": 0.9},
        {"momentum": None},
        {"eps": 1.0},
        {"track_running_stats": False},  # batch statistics in training, buffers in evaluation
        {"running_mean": None, "running_var": None},  # batch statistics, always
        {"num_batches_tracked": None},
        {"num_batches_tracked": None, "momentum": None},
        {"weight": None, "bias": None},
    ]
    for change in changes:
        ours, theirs = PAIRS["BatchNorm1d, (N, C, L)"].both(backend, torch.float64)
        for norm in (ours, theirs):
            for name, value in change.items():
                setattr(norm, name, value)
        for training in (True, True, False):
            close(ours.train(training)(x), theirs.train(training)(x), str(change))
        assert_same_state(ours, theirs, exact=False)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_numbers_of_numpy(backend, kind):
    """What a sweep over np.linspace passes on; torch takes them as numbers."""
    x = torch.randn(4, 3, dtype=torch.float64, device=backend)
    ours, theirs = PAIRS["BatchNorm1d, (N, C)"].both(
        backend, torch.float64, momentum=kind(0.25), eps=kind(0.5)
    )
    close(ours(x), theirs(x))
    assert_same_state(ours, theirs, exact=False)
    whole, wholes = PAIRS["BatchNorm1d, (N, C)"].both(backend, torch.float64, momentum=np.int64(1))
    close(whole(x), wholes(x))


def test_reset(backend):
    ours, theirs = PAIRS["BatchNorm2d"].both(backend, torch.float64)
    ours.reset_running_stats()
    theirs.reset_running_stats()
    assert_same_state(ours, theirs)
    ours.reset_parameters()
    theirs.reset_parameters()
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input", "everything"])
def test_frozen(backend, frozen, training):
    """What does not require a gradient gets none, and the others are unchanged."""
    shape = (4, 3, 5)
    ours, theirs = PAIRS["BatchNorm1d, (N, C, L)"].both(backend, torch.float64)
    results = []
    for norm in (ours, theirs):
        norm.train(training)
        norm.weight.requires_grad_(frozen not in ("weight", "both", "everything"))
        norm.bias.requires_grad_(frozen not in ("bias", "both", "everything"))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        x = x.to(backend).requires_grad_(frozen not in ("input", "everything"))
        y = norm(x)
        assert y.requires_grad == (frozen != "everything")
        if y.requires_grad:
            (y**2).sum().backward()
        results.append((x.grad, norm.weight.grad, norm.bias.grad))
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            close(got, want)
    assert_same_state(ours, theirs, exact=False)


# ---- activation, residual ------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["BatchNorm2d", "LinearBatchNorm", "Conv1dBatchNorm"])
def test_every_activation_reaches_the_function(kind):
    shape, sizes = {
        "BatchNorm2d": ((4, 3, 2, 2), (3,)),
        "LinearBatchNorm": ((4, 3), (3, 3)),
        "Conv1dBatchNorm": ((4, 3, 2), (3, 3, 1)),
    }[kind]
    x = torch.randn(shape, dtype=torch.float64)
    plain = getattr(fastnorm, kind)(*sizes, activation="identity").double()
    for activation in ACTIVATIONS:
        ours = getattr(fastnorm, kind)(*sizes, activation=activation).double()
        ours.load_state_dict(plain.state_dict())
        z = copy.deepcopy(plain)(x)
        if activation == "gelu_tanh":
            want = F.gelu(z, approximate="tanh")
        else:
            want = z if activation == "identity" else getattr(F, activation)(z)
        close(ours(x), want, activation)


def test_residual_by_position_and_by_keyword(backend):
    ours, theirs = PAIRS["BatchNorm2d"].both(backend, torch.float64)
    ours.activation = "relu"
    x, residual = (torch.randn(4, 3, 5, 2, dtype=torch.float64, device=backend) for _ in range(2))
    z = theirs(x)
    want = F.relu(z + residual)
    close(ours(x, residual), want)
    close(ours(x, residual=residual), want)
    close(ours(input=x, residual=residual), want)
    close(ours(x, None), F.relu(z))


def test_in_sequential(backend):
    """One argument in, one tensor out."""
    ours = nn.Sequential(nn.Linear(4, 3), fastnorm.BatchNorm1d(3, activation="relu"))
    theirs = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    ours.to(backend, torch.float64)
    theirs.to(backend, torch.float64).load_state_dict(ours.state_dict())
    x = torch.randn(6, 4, dtype=torch.float64, device=backend)
    close(ours(x), theirs(x))


def test_a_block_with_a_residual_trains_as_torchs(backend):
    """The sum of a ResNet's block, where the residual is also the input of the branch."""

    def run(norm: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64).to(backend)
        x.requires_grad_()
        y = call(norm, x * 2 + 1, x)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(backend)
        return [y, *torch.autograd.grad(y, [x, norm.weight, norm.bias], dy)]

    ours, theirs = PAIRS["BatchNorm2d"].both(backend, torch.float64)
    ours.activation = "relu"
    got = run(ours, lambda norm, z, x: norm(z, x))
    want = run(theirs, lambda norm, z, x: F.relu(norm(z) + x))
    for mine, others in zip(got, want, strict=True):
        close(mine, others)


# ---- leading axes, dtypes, memory formats --------------------------------------------------------
@pytest.mark.parametrize(
    "shape", [(6, 4), (2, 3, 4), (2, 1, 3, 4), (1, 1, 1, 2, 4), (0, 3, 4)], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_linear_over_leading_axes(backend, shape, training):
    """Statistics over every row, as on the input flattened to two axes."""
    ours, theirs = PAIRS["LinearBatchNorm"].both(backend, torch.float64, bias=True)
    ours.train(training)
    theirs.train(training)
    x = torch.randn(shape, dtype=torch.float64, device=backend).requires_grad_()
    y = ours(x)
    assert y.shape == (*shape[:-1], 3)
    want = theirs(x.flatten(0, -2)).view(y.shape)
    close(y, want)
    dy = torch.randn(shape[:-1], dtype=torch.float64, device=backend)[..., None].expand(y.shape)
    leaves = (x, ours.linear.weight, ours.linear.bias, ours.norm.weight, ours.norm.bias)
    got = torch.autograd.grad(y, leaves, dy)
    leaves = (x, theirs.linear.weight, theirs.linear.bias, theirs.norm.weight, theirs.norm.bias)
    for mine, others in zip(got, torch.autograd.grad(want, leaves, dy), strict=True):
        close(mine, others)
    assert_same_state(ours, theirs, exact=False)


def test_linear_on_a_transposed_input(backend):
    ours, theirs = PAIRS["LinearBatchNorm"].both(backend, torch.float64)
    x = torch.randn(4, 5, 2, dtype=torch.float64, device=backend).permute(2, 1, 0)
    close(ours(x), theirs(x.reshape(-1, 4)).view(2, 5, 3))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "LinearBatchNorm", "Conv1dBatchNorm, 1"])
def test_casts(backend, name, cast):
    pair = PAIRS[name]
    wide, theirs = pair.both(backend, torch.float64)
    ours = getattr(copy.deepcopy(wide), cast)()
    theirs = getattr(theirs, cast)()
    assert_same_state(ours, theirs)
    norm = getattr(ours, "norm", ours)
    dtype = norm.weight.dtype
    assert norm.num_batches_tracked.dtype == torch.int64
    x = pair.batch(backend, dtype)
    y = ours(x)
    assert y.dtype == dtype
    wide.load_state_dict(theirs.state_dict())
    product = getattr(wide, "linear", getattr(wide, "conv", None))
    if product is None:
        want = wide(x.double())
        assert_close(y, want, x.numel() // x.shape[1])
        assert_close(norm.running_var, wide.running_var, x.numel() // x.shape[1])
    else:  # the product is rounded before it is normalized
        want = wide(x.double())
        step = 8 * torch.finfo(dtype).eps * want.abs().max().item()
        torch.testing.assert_close(y.double(), want, rtol=0, atol=step)


@pytest.mark.parametrize("parameters", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["BatchNorm2d", "LinearBatchNorm", "Conv2dBatchNorm, 1"])
def test_parameters_of_another_dtype(backend, name, parameters):
    """Accepted also where torch's CPU operators raise; the output has the input's dtype."""
    pair = PAIRS[name]
    module = pair.ours().to(backend, parameters)
    x = pair.batch(backend, torch.float16).requires_grad_()
    y = module(x)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert x.grad.dtype == torch.float16
    assert all(p.grad.dtype == parameters for p in module.parameters())
    assert module.eval()(x).dtype == torch.float16


@pytest.mark.parametrize(
    ("kind", "shape", "memory_format"),
    [
        ("BatchNorm2d", (2, 6, 4, 5), torch.channels_last),
        ("BatchNorm3d", (2, 6, 2, 4, 5), torch.channels_last_3d),
        ("Conv2dBatchNorm", (2, 6, 4, 5), torch.channels_last),
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_channels_last_modules(backend, kind, shape, memory_format, training):
    sizes = (6,) if kind.startswith("Batch") else (6, 6, 1)
    plain = getattr(fastnorm, kind)(*sizes).to(backend, torch.float64).train(training)
    module = copy.deepcopy(plain).to(memory_format=memory_format)
    x = torch.randn(shape, dtype=torch.float64, device=backend)
    dense = x.to(memory_format=memory_format).requires_grad_()
    y = module(dense)
    assert y.is_contiguous(memory_format=memory_format)
    close(y, plain(x))
    (y**2).sum().backward()
    assert dense.grad.is_contiguous(memory_format=memory_format)
    assert_same_state(module, plain, exact=False)


# ---- autograd modes ------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["BatchNorm1d, (N, C)", "BatchNorm2d", "LinearBatchNorm"])
def test_without_gradients(backend, name, mode):
    pair = PAIRS[name]
    for training in (True, False):
        ours, theirs = pair.both(backend, torch.float64)
        x = pair.batch(backend, torch.float64)
        with mode():
            y = ours.train(training)(x)
            want = theirs.train(training)(x)
        assert not y.requires_grad
        assert y.is_inference() == want.is_inference()
        close(y, want)
        assert_same_state(ours, theirs, exact=False)
        ours.train()(x.clone().requires_grad_()).sum().backward()  # training goes on


def test_trains_and_evaluates_inside_inference_mode(backend):
    with torch.inference_mode():
        ours = fastnorm.BatchNorm1d(3, device=backend)
        ours(torch.ones(2, 3, device=backend))
        assert ours.num_batches_tracked.item() == 1
        ours.eval()(torch.ones(2, 3, device=backend))


TRACKING = {
    "BatchNorm1d": lambda kind: kind(3),
    "InstanceNorm1d": lambda kind: kind(3, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "no gradient"])
@pytest.mark.parametrize("name", TRACKING)
def test_buffers_made_inside_inference_mode(backend, name, gradient):
    """They move, or may not, as torch's; outside it only some operators may change them."""
    found = []
    for library in (fastnorm, nn):
        norm = TRACKING[name](getattr(library, name)).to(backend)
        with torch.inference_mode():
            norm.running_mean = torch.zeros(3, device=backend)
            norm.running_var = torch.ones(3, device=backend)
        x = torch.arange(24.0, device=backend).view(2, 3, 4).requires_grad_(gradient)
        try:
            with torch.set_grad_enabled(gradient):
                norm(x)
            found.append(norm.running_mean.tolist())
        except RuntimeError as error:
            found.append(str(error).split(".")[0])
    assert found[0] == pytest.approx(found[1])
    assert isinstance(found[0], str) == (gradient or name == "InstanceNorm1d")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("changed", ["input", "weight", "bias", "output", "nothing"])
def test_a_change_in_place_is_noticed_where_torch_notices(backend, changed, training):
    refused = {}
    for kind in (fastnorm.BatchNorm2d, nn.BatchNorm2d):
        norm = kind(3).to(backend).train(training)
        x = torch.randn(4, 3, 5, 2, device=backend).requires_grad_()
        y = norm(x)
        target = {"input": x, "weight": norm.weight, "bias": norm.bias, "output": y}.get(changed)
        if target is not None:
            with torch.no_grad():
                target.add_(1)
        result = gradients_or_refusal(y, [x], torch.ones_like(y))
        refused[kind.__module__.split(".")[0]] = isinstance(result, str) and MODIFIED in result
    assert refused["fastnorm"] == refused["torch"]


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu", "relu6", "elu"])
@pytest.mark.parametrize("changed", ["input", "residual", "bias", "output"])
def test_a_change_in_place_never_gives_another_gradient(backend, changed, activation):
    """What the backward needs again is either noticed or not needed."""
    x, residual = (torch.randn(4, 3, 5, device=backend) for _ in range(2))
    results = []
    for change in (False, True):
        norm = fastnorm.BatchNorm1d(3, activation=activation, device=backend)
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y = norm(*leaves)
        targets = {"input": leaves[0], "residual": leaves[1], "bias": norm.bias, "output": y}
        if change:
            with torch.no_grad():
                targets[changed].add_(1)
        results.append(gradients_or_refusal(y, [*leaves, norm.weight], x))
    want, got = results
    assert not isinstance(want, str)
    if isinstance(got, str):
        assert MODIFIED in got
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["BatchNorm2d", "LinearBatchNorm", "Conv2dBatchNorm, 1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_autocast_gives_torchs_dtypes(backend, name, dtype):
    pair = PAIRS[name]
    ours, theirs = pair.both(backend, torch.float32)
    for training in (True, False):
        outcomes = []
        for module in (ours, theirs):
            module.train(training).zero_grad()
            x = pair.batch(backend, dtype).requires_grad_()
            with torch.autocast(backend.type, dtype=torch.bfloat16):
                y = module(x)
            y.float().pow(2).sum().backward()
            gradients = [p.grad.dtype for p in module.parameters()]
            outcomes.append((y.dtype, x.grad.dtype, gradients, y.detach()))
        assert outcomes[0][:3] == outcomes[1][:3]
        torch.testing.assert_close(outcomes[0][3], outcomes[1][3], rtol=0.05, atol=0.05)
        assert_dtypes(ours, theirs)


def assert_dtypes(ours: nn.Module, theirs: nn.Module) -> None:
    got, want = ours.state_dict(), theirs.state_dict()
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in want.items()}


def test_autocast_with_a_wider_residual(backend):
    """The sum is promoted, as torch's is."""
    norm = fastnorm.BatchNorm1d(3, device=backend, activation="relu")
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        x = torch.randn(4, 3, device=backend, dtype=torch.bfloat16)
        assert norm(x, torch.randn(4, 3, device=backend)).dtype is torch.float32
        assert norm(x, x).dtype is torch.bfloat16


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize(
    "norm",
    [
        fastnorm.BatchNorm1d(4),
        fastnorm.GroupNorm(2, 4),
        fastnorm.GroupNorm(1, 4),
        fastnorm.InstanceNorm1d(4, affine=True, track_running_stats=True),
    ],
    ids=repr,
)
def test_a_float64_residual_keeps_its_digits(backend, norm, activation):
    """It is added in float64, as torch adds it, to what is normalized in float32."""
    norm = copy.deepcopy(norm).to(backend)
    norm.activation = activation
    wide = copy.deepcopy(norm).double()
    x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)).to(backend)
    residual = x.double().flip(0) * 1e6 + 1 / 3
    for training in (True, False):
        leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        wider = [t.detach().double().requires_grad_() for t in leaves]
        y, want = norm.train(training)(*leaves), wide.train(training)(*wider)
        torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-5)
        dy = torch.cos(want.detach())
        got = torch.autograd.grad(y, leaves, dy)
        for one, other in zip(got, torch.autograd.grad(want, wider, dy), strict=True):
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=1e-4)


# ---- what else torch does with a module ----------------------------------------------------------


def test_parametrized_weight(backend):
    ours, theirs = PAIRS["BatchNorm2d"].both(backend, torch.float64)
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, device=backend)
    results = []
    for norm in (ours, theirs):
        parametrize.register_parametrization(norm, "weight", Squared())
        y = norm(x)
        y.pow(3).sum().backward()
        results.append((y, norm.parametrizations.weight.original.grad))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_parametrized_linear_weight(backend):
    ours, theirs = PAIRS["LinearBatchNorm"].both(backend, torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, device=backend)
    results = []
    for module in (ours, theirs):
        parametrizations.weight_norm(module.linear)
        y = module(x)
        y.pow(3).sum().backward()
        originals = module.linear.parametrizations.weight
        results.append((y, originals.original0.grad, originals.original1.grad))
    for got, want in zip(*results, strict=True):
        close(got, want)


def test_update_bn(backend):
    """torch.optim.swa_utils resets and averages whatever is a BatchNorm."""
    batches = [torch.randn(5, 4, dtype=torch.float64).to(backend) + i for i in range(3)]
    ours, theirs = PAIRS["LinearBatchNorm"].both(backend, torch.float64)
    torch.optim.swa_utils.update_bn(batches, ours)
    torch.optim.swa_utils.update_bn(batches, theirs)
    assert ours.norm.num_batches_tracked.item() == 3
    assert_same_state(ours, theirs, exact=False)


def test_functional_call(backend):
    ours, theirs = PAIRS["BatchNorm2d"].both(backend, torch.float64)
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64, device=backend)
    other = {k: v + 1 for k, v in theirs.state_dict().items()}
    moved = {k: v.clone() for k, v in other.items()}
    close(
        torch.func.functional_call(ours, other, (x,)),
        torch.func.functional_call(theirs, moved, (x,)),
    )
    close(other["running_mean"], moved["running_mean"])
    assert_same_state(ours, theirs)


def test_forward_hooks(backend):
    """Hooks on a norm see its arguments and its output, in Sequential as anywhere."""
    norm = fastnorm.BatchNorm1d(3, device=backend)
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs)))
    norm.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    norm(torch.ones(2, 3, device=backend), torch.ones(2, 3, device=backend))
    assert seen == [2, (2, 3)]


COMPOUND = {"LinearBatchNorm": "linear", "Conv2dBatchNorm, 1": "conv"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("rule", ["weight_norm", "spectral_norm", "prune"])
@pytest.mark.parametrize("kind", COMPOUND)
def test_weights_that_hooks_compute(backend, kind, rule):
    """torch.nn.utils has them computed before each call of the layer within."""
    part, x = COMPOUND[kind], PAIRS[kind].batch(backend, torch.float64)
    results = []
    for module in PAIRS[kind].both(backend, torch.float64):
        torch.manual_seed(0)
        layer = module.get_submodule(part)
        if rule == "prune":
            prune.l1_unstructured(layer, "weight", 0.5)
        else:
            getattr(nn.utils, rule)(layer)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(2):
            (module(x) * x.mean()).square().sum().backward()
            optimizer.step()
        results.append([module(x), *module.parameters()])
    for got, want in zip(*results, strict=True):
        close(got, want)


@pytest.mark.parametrize("kind", COMPOUND)
def test_parts_that_somebody_watches_or_replaces(backend, kind):
    part, x = COMPOUND[kind], PAIRS[kind].batch(backend, torch.float64)
    module, other = PAIRS[kind].both(backend, torch.float64)
    seen = []
    for name in (part, "norm"):
        module.get_submodule(name).register_forward_hook(lambda one, *_: seen.append(type(one)))
    close(module(x), other(x))
    assert seen == [type(module.get_submodule(part)), type(module.norm)]
    for one in (module, other):
        one.set_submodule(part, nn.Sequential(one.get_submodule(part), nn.Tanh()))
    close(module(x), other(x))


@pytest.mark.parametrize("kind", COMPOUND)
def test_backward_hooks_of_parts_are_called(backend, kind):
    x = PAIRS[kind].batch(backend, torch.float64).requires_grad_()
    for hook in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        for name in (COMPOUND[kind], "norm"):
            module, seen = PAIRS[kind].both(backend, torch.float64)[0], []
            getattr(module.get_submodule(name), hook)(lambda *_, seen=seen: seen.append(1))
            module(x).sum().backward()
            assert seen == [1], (hook, name)


@pytest.mark.parametrize("kind", COMPOUND)
def test_a_forward_put_in_the_place_of_a_parts_own_is_called(backend, kind):
    """As libraries that quantize or move layers do, to one object."""
    x = PAIRS[kind].batch(backend, torch.float64)
    for name in (COMPOUND[kind], "norm"):
        module, seen = PAIRS[kind].both(backend, torch.float64)[0], []
        want = copy.deepcopy(module)(x)
        part = module.get_submodule(name)
        part.forward = lambda z, plain=part.forward, seen=seen: (seen.append(1), plain(z))[1]
        close(module(x), want)
        assert seen == [1], name


def test_a_norm_with_a_forward_of_its_own(backend):
    class Twice(fastnorm.BatchNorm1d):
        def forward(self, input, residual=None):
            return 2 * super().forward(input, residual)

    module = fastnorm.LinearBatchNorm(4, 3, device=backend).eval()
    x = torch.randn(6, 4, device=backend)
    want = 2 * module(x)
    module.norm = Twice(3, activation="relu", device=backend).eval()
    assert_close(module(x), want)


@pytest.mark.parametrize("kind", COMPOUND)
def test_a_norm_of_another_class_is_called(backend, kind):
    part, x = COMPOUND[kind], PAIRS[kind].batch(backend, torch.float64)
    module, _ = PAIRS[kind].both(backend, torch.float64)
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module).eval()
    assert type(module.norm) is nn.SyncBatchNorm
    for norm in (module.norm, nn.Identity()):
        module.norm = norm
        want = norm(module.get_submodule(part)(x))
        close(module(x), want)
        close(fastnorm.fold(module)(x), want)
        with fastnorm.signals.record(module) as signals:
            close(module(x), want)
        assert signals.findings() == []


def test_shared_norm_called_twice_before_its_backward(backend):
    """As in a siamese network: both calls move the buffers, both backwards work."""
    results = []
    for norm in PAIRS["BatchNorm2d"].both(backend, torch.float64):
        generator = torch.Generator().manual_seed(5)
        x, other = (
            torch.randn(4, 3, 5, 2, generator=generator, dtype=torch.float64).to(backend)
            for _ in range(2)
        )
        x.requires_grad_()
        first, second = norm(x), norm(x * other)
        ((first - second) ** 2).sum().backward()
        results.append((first, second, x.grad, norm.weight.grad, norm.bias.grad))
    for got, want in zip(*results, strict=True):
        close(got, want)
