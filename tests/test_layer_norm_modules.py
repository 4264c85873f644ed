"""LayerNorm's and RMSNorm's modules are torch.nn's with another forward; Add* forms are of the sum.

As in test_modules.py. An Add module's twin is torch's norm applied to `input + residual`.
"""

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrize
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

MIXED = (
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float16),
)
CLASSES = ("LayerNorm", "RMSNorm")
ADDED = ("AddLayerNorm", "AddRMSNorm")
SHAPES = {"one axis": ((4,), (6, 4)), "two axes": ((3, 4), (2, 5, 3, 4)), "no batch": ((5,), (5,))}


def torchs(kind: str) -> type[nn.Module]:
    return getattr(nn, kind.removeprefix("Add"))


class Summed(nn.Module):
    """What an Add module stands for, made of torch's norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = input + residual
        return self.norm(total), total


def pair(kind: str, size: tuple[int, ...] = (4,), shape: tuple[int, ...] = (6, 4)) -> Pair:
    return Pair(
        lambda **options: getattr(fastnorm, kind)(size, **options),
        lambda **options: torchs(kind)(size, **options),
        shape,
    )


PAIRS = {
    f"{kind}, {name}": pair(kind, *sizes) for kind in CLASSES for name, sizes in SHAPES.items()
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "eps": {"eps": 0.1},
    "not affine": {"elementwise_affine": False},
    "no bias": {"bias": False},
    "not affine, bias asked for": {"elementwise_affine": False, "bias": True},
}


def options_of(kind: str, name: str) -> dict[str, Any]:
    """RMSNorm has no bias."""
    given = OPTIONS[name]
    return {k: v for k, v in given.items() if not (k == "bias" and "RMS" in kind)}


each_pair = pytest.mark.parametrize("name", PAIRS)
each_class = pytest.mark.parametrize("kind", CLASSES)
each_kind = pytest.mark.parametrize("kind", [*CLASSES, *ADDED])
each_added = pytest.mark.parametrize("kind", ADDED)


def both_added(
    kind: str, device: torch.device, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """An Add module and its twin with the same random parameters."""
    ours, theirs = pair(kind).both(device, dtype, **options)
    return ours, Summed(theirs)


def batch(device: torch.device, *size: int, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype)


def first(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def arguments(kind: str, x: Tensor) -> tuple[Tensor, ...]:
    """Of a module's call: an Add module also takes a residual."""
    return (x, x.detach() * 0.5 + 1) if "Add" in kind else (x,)


# ---- state dict, copies --------------------------------------------------------------------------
@pytest.mark.parametrize("options", OPTIONS)
@each_kind
def test_state_dict_both_ways(kind, options):
    given = options_of(kind, options)
    ours, theirs = getattr(fastnorm, kind)((3, 4), **given), torchs(kind)((3, 4), **given)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    back = torchs(kind)((3, 4), **given)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(back, theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert not list(ours.named_buffers())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@each_kind
def test_strict_names_what_is_wrong(kind):
    state = torchs(kind)(3).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        getattr(fastnorm, kind)(4).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected.*weight"):
        getattr(fastnorm, kind)(3, elementwise_affine=False).load_state_dict(state)
    del state["weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*weight"):
        getattr(fastnorm, kind)(3).load_state_dict(state)
    if "RMS" in kind:  # a LayerNorm's checkpoint is not an RMSNorm's
        with pytest.raises(RuntimeError, match=r"Unexpected.*bias"):
            getattr(fastnorm, kind)(3).load_state_dict(nn.LayerNorm(3).state_dict())


@each_kind
def test_copies_are_the_same_and_apart(kind):
    ours = getattr(fastnorm, kind)((3, 4), eps=0.25, activation="elu").double()
    randomize(ours)
    x = arguments(kind, batch(torch.device("cpu"), 5, 3, 4))
    want = ours(*x)
    for way, twin in copies(ours).items():
        assert type(twin) is type(ours)
        assert repr(twin) == repr(ours)
        assert twin.normalized_shape == (3, 4)
        assert_same_state(twin, ours)
        assert torch.equal(first(twin(*x)), first(want)), way
        with torch.no_grad():
            twin.weight.zero_()
        assert torch.equal(first(ours(*x)), first(want)), way


@each_kind
def test_a_saved_state_dict_is_plain_tensors(kind):
    ours, theirs = getattr(fastnorm, kind)(4), torchs(kind)(4)
    randomize(ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(theirs, ours)


# ---- constructor, class, repr --------------------------------------------------------------------
@each_kind
def test_is_torchs_class(kind):
    ours = getattr(fastnorm, kind)
    assert issubclass(ours, torchs(kind))
    assert issubclass(ours, getattr(fastnorm, kind.removeprefix("Add")))
    assert ours.__name__ == kind
    other = {"LayerNorm": nn.RMSNorm, "RMSNorm": nn.LayerNorm}[kind.removeprefix("Add")]
    assert not issubclass(ours, other)


@each_kind
def test_constructor_takes_what_torchs_takes(kind):
    ours, theirs = getattr(fastnorm, kind), torchs(kind)
    values = {
        "normalized_shape": [2, 5], "eps": 0.5, "elementwise_affine": True, "bias": False,
        "device": "cpu", "dtype": torch.float64,
    }  # fmt: skip
    parameters = inspect.signature(theirs).parameters
    assert set(parameters) <= set(values), "the installed torch takes something new: test it"
    by_position = [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    by_keyword = {n: values[n] for n in parameters if n not in by_position}

    def compare(*args: Any, **kwargs: Any) -> None:
        a, b = ours(*args, **kwargs), theirs(*args, **kwargs)
        assert_same_state(a, b)
        assert a.extra_repr() == b.extra_repr()
        for name in ("normalized_shape", "eps", "elementwise_affine"):
            assert getattr(a, name) == getattr(b, name)
        assert type(a.normalized_shape) is type(b.normalized_shape)
        assert getattr(a, "bias", 0) is None or getattr(b, "bias", 0) is not None

    for positional in range(1, len(by_position) + 1):
        compare(*[values[n] for n in by_position[:positional]], **by_keyword)
    for name in by_position[1:]:
        compare(3, **{name: values[name]})
    for shape in (3, [3], (3,), torch.Size([2, 3])):
        compare(shape)
        compare(normalized_shape=shape)


@each_kind
def test_activation_is_keyword_only(kind):
    count = len(inspect.signature(torchs(kind)).parameters)
    positional = [3, 1e-5, True, True, None, None][: count - ("RMS" in kind)]
    with pytest.raises(TypeError):
        getattr(fastnorm, kind)(*positional, None, "relu")


@each_kind
def test_device_and_dtype(kind):
    made = getattr(fastnorm, kind)((2, 3), device="meta", dtype=torch.float16)
    assert all(t.is_meta and t.dtype is torch.float16 for t in made.parameters())
    assert len(list(made.parameters())) == 2 - ("RMS" in kind)


@each_kind
def test_extra_repr(kind):
    ours, theirs = getattr(fastnorm, kind), torchs(kind)
    for options in ({}, {"eps": 0.5}, {"elementwise_affine": False}):
        assert ours((2, 3), **options).extra_repr() == theirs((2, 3), **options).extra_repr()
    assert repr(ours(3)) == repr(theirs(3)).replace(torchs(kind).__name__, kind)
    for activation in ACTIVATIONS:
        shown = ours(3, activation=activation).extra_repr()
        assert shown.startswith(theirs(3).extra_repr())
        assert (repr(activation) in shown) == (activation != "identity")


@each_kind
def test_reset(kind):
    ours, theirs = getattr(fastnorm, kind)(3), torchs(kind)(3)
    randomize(ours)
    ours.reset_parameters()
    theirs.reset_parameters()
    assert_same_state(ours, theirs)


@each_kind
def test_forward_names_its_arguments_as_torchs(kind):
    """Keyword calls, such as those of a traced model, go on working."""
    names = list(inspect.signature(getattr(fastnorm, kind).forward).parameters)
    if "Add" in kind:
        assert names == ["self", "input", "residual"]
    else:
        assert names == list(inspect.signature(torchs(kind).forward).parameters)


# ---- training ------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", OPTIONS)
@each_pair
def test_trains_as_torchs(backend, name, options):
    """Outputs, gradients and parameters of two steps and an evaluation."""
    twins = PAIRS[name]
    ours, theirs = twins.both(backend, torch.float64, **options_of(name, options))
    batches = [twins.batch(backend, torch.float64, seed) for seed in range(3)]
    results = zip(train(ours, batches), train(theirs, batches), strict=True)
    for i, (got, want) in enumerate(results):
        close(got, want, f"result {i}")
    assert_same_state(ours, theirs, exact=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_class
def test_trains_as_torchs_in_fewer_bits(backend, kind, dtype):
    twins = pair(kind)
    ours, theirs = twins.both(backend, dtype)
    batches = [twins.batch(backend, dtype, seed) for seed in range(3)]
    for got, want in zip(train(ours, batches), train(theirs, batches), strict=True):
        assert got.dtype == want.dtype
        tolerance = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


class Block(nn.Module):
    """A pre-norm transformer's, with its sums inside the norms, or beside them."""

    def __init__(self, kind: str, fused: bool) -> None:
        super().__init__()
        make = getattr(fastnorm, kind) if fused else torchs(kind)
        self.norms = nn.ModuleList(make(4) for _ in range(4))
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        stream = x
        for norm, branch in zip(self.norms, self.branches, strict=True):
            if self.fused:
                z, stream = norm(x, stream)
            else:
                stream = x + stream
                z = norm(stream)
            x = torch.tanh(branch(z))
        return x + stream


def blocks(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[Block, Block]:
    torch.manual_seed(0)
    theirs = Block(kind, False).to(device, dtype)
    ours = Block(kind, True).to(device, dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@each_added
def test_a_chain_of_blocks_that_share_their_sum(backend, kind):
    """Each sum goes into the norm, the next sum and the end: its gradients meet in the backward."""
    ours, theirs = blocks(kind, backend, torch.float64)
    batches = [batch(backend, 6, 4, seed=seed) for seed in range(3)]
    for got, want in zip(train(ours, batches), train(theirs, batches), strict=True):
        close(got, want)


@each_added
def test_a_chain_of_blocks_in_16_bits(backend, kind):
    """No further from float64 than torch's own."""
    x = batch(backend, 64, 4, dtype=torch.bfloat16)
    ours, theirs = blocks(kind, backend, torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    results = [list(train(model, [x.to(t)] * 2)) for model, t in (
        (ours, x.dtype), (theirs, x.dtype), (exact, torch.float64))]  # fmt: skip
    step = 2 + len(list(ours.parameters()))  # later ones depend on how these were rounded
    for got, others, want in list(zip(*results, strict=True))[:step]:
        error, torchs_error = ((t.double() - want).norm().item() for t in (got, others))
        assert error <= 1.5 * torchs_error + 1e-3 * want.norm().item()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("activation", ["identity", "silu"])
@each_added
def test_added_forms_give_both_outputs(backend, kind, options, activation):
    given = options_of(kind, options)
    ours, theirs = both_added(kind, backend, **given)
    ours.activation = activation
    x, residual = batch(backend, 6, 4), batch(backend, 6, 4, seed=1)
    y, total = ours(x, residual)
    want, want_total = theirs(x, residual)
    close(y, want if activation == "identity" else getattr(F, activation)(want))
    assert torch.equal(total, want_total)
    for other in (ours(x, residual=residual), ours(input=x, residual=residual)):
        assert torch.equal(other[0], y)
        assert torch.equal(other[1], total)


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "output": lambda y, total: (y**3).sum(),
    "sum": lambda y, total: (total**3).sum(),
    "both": lambda y, total: (y**3).sum() + (total**2).sum(),
    "product": lambda y, total: (y * total).sum(),
    "part of either": lambda y, total: (y[:2] ** 3).sum() + (total[3:] ** 3).sum(),
    "a number": lambda y, total: y.sum() + total.sum(),  # gradients that are expanded
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("frozen", ["nothing", "input", "residual", "parameters"])
@each_added
def test_gradients_through_either_output(backend, kind, use, frozen):
    results = []
    for module in both_added(kind, backend):
        leaves = [batch(backend, 6, 4), batch(backend, 6, 4, seed=1)]
        for name, leaf in zip(("input", "residual"), leaves, strict=True):
            leaf.requires_grad_(name != frozen)
        module.requires_grad_(frozen != "parameters")
        USES[use](*module(*leaves)).backward()
        results.append([t.grad for t in (*leaves, *module.parameters())])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            close(got, want)


@each_added
def test_a_sum_of_constants_requires_no_gradient(backend, kind):
    """Whatever the parameters do; an output without gradient at all requires none either."""
    for module in both_added(kind, backend):
        y, total = module(batch(backend, 6, 4), batch(backend, 6, 4, seed=1))
        assert (y.requires_grad, total.requires_grad) == (True, False)
        y.pow(3).sum().backward()
        assert module.state_dict(keep_vars=True).popitem()[1].grad is not None
        module.requires_grad_(False)
        assert not any(t.requires_grad for t in module(y.detach(), total))


@each_added
def test_input_as_its_own_residual(backend, kind):
    """x + x: both gradients go to x, and neither is the other's memory."""
    results = []
    for module in both_added(kind, backend):
        x = batch(backend, 6, 4).requires_grad_()
        y, total = module(x, x)
        ((y**3).sum() + (total**2).sum()).backward()
        results.append(x.grad)
    close(*results)


@each_added
def test_gradients_do_not_share_memory(backend, kind):
    """A gradient that is another's memory, or the sum's, is spoilt when that is changed."""
    module = getattr(fastnorm, kind)(4).to(backend)
    for use in USES.values():
        x, residual = (
            batch(backend, 6, 4, dtype=torch.float32, seed=s).requires_grad_() for s in (0, 1)
        )
        y, total = module(x, residual)
        total.retain_grad()
        use(y, total).backward()
        kept = residual.grad.clone()
        x.grad.zero_()
        assert torch.equal(residual.grad, kept)
        if total.grad is not None:
            kept = total.grad.clone()
            residual.grad.zero_()
            assert torch.equal(total.grad, kept)


@pytest.mark.parametrize("residual", FLOATS, ids=lambda d: f"residual {d}"[15:])
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: f"input {d}"[12:])
@each_added
def test_residual_of_another_dtype(backend, kind, dtype, residual):
    """The sum and the output have the dtype of torch's sum; each gradient that of its leaf."""
    module = getattr(fastnorm, kind)(4, activation="silu").to(backend)
    x = batch(backend, 6, 4, dtype=dtype).requires_grad_()
    r = batch(backend, 6, 4, dtype=residual, seed=1).requires_grad_()
    y, total = module(x, r)
    want = x.detach() + r.detach()
    assert y.dtype is total.dtype is want.dtype
    assert torch.equal(total, want)
    ((y.double() ** 3).sum() + total.double().sum()).backward()
    assert (x.grad.dtype, r.grad.dtype) == (dtype, residual)
    assert all(p.grad.dtype is torch.float32 for p in module.parameters())
    narrow = max(torch.finfo(d).eps for d in (dtype, residual))
    torch.testing.assert_close(x.grad.double(), r.grad.double(), rtol=4 * narrow, atol=1e-6)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "input", "everything"])
@each_class
def test_frozen(backend, kind, frozen):
    """What does not require a gradient gets none, and the others are unchanged."""
    results = []
    for norm in pair(kind).both(backend, torch.float64):
        norm.weight.requires_grad_(frozen not in ("weight", "both", "everything"))
        if getattr(norm, "bias", None) is not None:
            norm.bias.requires_grad_(frozen not in ("bias", "both", "everything"))
        x = batch(backend, 6, 4).requires_grad_(frozen not in ("input", "everything"))
        y = norm(x)
        assert y.requires_grad == any(t.requires_grad for t in (x, *norm.parameters()))
        if y.requires_grad:
            (y**3).sum().backward()
        results.append([t.grad for t in (x, *norm.parameters())])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            close(got, want)


@each_class
def test_attributes_changed_later(backend, kind):
    """What people set on a norm after it was made has torch's effect."""
    x = batch(backend, 6, 4)
    changes: list[dict[str, Any]] = [
        {"eps": 1.0},
        {"weight": None},
        {"normalized_shape": (6, 4), "weight": None, "bias": None},
        {"normalized_shape": [4]},
    ]
    if kind == "LayerNorm":
        changes += [{"bias": None}, {"weight": None, "bias": None}]
    else:
        changes.append({"eps": None})
    for change in changes:
        ours, theirs = pair(kind).both(backend, torch.float64)
        for norm in (ours, theirs):
            for name, value in change.items():
                setattr(norm, name, value)
        close(ours(x), theirs(x), str(change))


@pytest.mark.parametrize(
    "number",
    [np.float32(0.25), np.float64(0.25), np.float16(0.25), 1, True, torch.tensor(0.25 + 0j)],
)
@each_kind
def test_numbers_of_other_types(backend, kind, number):
    """What a sweep over np.linspace passes on; torch takes them as numbers."""
    ours, theirs = pair(kind).both(backend, torch.float64, eps=number)
    x = arguments(kind, batch(backend, 6, 4))
    close(first(ours(*x)), theirs(sum(x)))


@pytest.mark.parametrize("kind", ["RMSNorm", "AddRMSNorm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rms_norms_default_eps(backend, kind, dtype):
    """Where x is so small that only eps counts: torch's, of the dtype it computes in."""
    ours, theirs = getattr(fastnorm, kind)(4, device=backend), nn.RMSNorm(4, device=backend)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = arguments(kind, batch(backend, 6, 4, dtype=dtype) * 1e-4)
    x = (x[0], x[0]) if len(x) == 2 else x
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(first(ours(*x)), theirs(sum(x)), rtol=tolerance, atol=tolerance)


# ---- activation ----------------------------------------------------------------------------------
@each_kind
def test_every_activation_reaches_the_function(kind):
    x = arguments(kind, batch(torch.device("cpu"), 6, 4))
    plain = getattr(fastnorm, kind)(4).double()
    randomize(plain)
    z = first(plain(*x))
    for activation in ACTIVATIONS:
        ours = getattr(fastnorm, kind)(4, activation=activation).double()
        ours.load_state_dict(plain.state_dict())
        if activation == "gelu_tanh":
            want = F.gelu(z, approximate="tanh")
        else:
            want = z if activation == "identity" else getattr(F, activation)(z)
        close(first(ours(*x)), want, activation)


@each_class
def test_in_sequential(backend, kind):
    """One argument in, one tensor out."""
    ours = nn.Sequential(nn.Linear(4, 3), getattr(fastnorm, kind)(3, activation="relu"))
    theirs = nn.Sequential(nn.Linear(4, 3), torchs(kind)(3), nn.ReLU())
    ours.to(backend, torch.float64)
    theirs.to(backend, torch.float64).load_state_dict(ours.state_dict())
    x = batch(backend, 6, 4)
    close(ours(x), theirs(x))


# ---- dtypes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@each_kind
def test_casts(backend, kind, cast):
    wide, theirs = pair(kind).both(backend, torch.float64)
    ours = getattr(copy.deepcopy(wide), cast)()
    assert_same_state(ours, getattr(theirs, cast)())
    x = arguments(kind, batch(backend, 6, 4).to(ours.weight.dtype))
    y = first(ours(*x))
    assert y.dtype == ours.weight.dtype
    wide.load_state_dict(ours.state_dict())
    total = sum(x).double()
    want = wide(total) if "Add" not in kind else wide(total, torch.zeros_like(total))
    assert_close(y, first(want).detach(), 4)


@pytest.mark.parametrize(("dtype", "parameters"), MIXED, ids=str)
@each_kind
def test_parameters_of_another_dtype(backend, kind, dtype, parameters):
    """Accepted also where torch's CPU operators raise; the output has the input's dtype."""
    module = getattr(fastnorm, kind)(4, activation="relu").to(backend, parameters)
    x = batch(backend, 6, 4, dtype=dtype).requires_grad_()
    y = first(module(*arguments(kind, x)))
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == parameters for p in module.parameters())


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [torch.float64, torch.float16], ids=str)
def test_weight_and_bias_of_two_dtypes(backend, weight, bias):
    module = fastnorm.LayerNorm(4, device=backend)
    module.weight = nn.Parameter(module.weight.detach().to(weight))
    module.bias = nn.Parameter(module.bias.detach().to(bias))
    y = module(batch(backend, 6, 4, dtype=torch.float32))
    y.pow(3).sum().backward()
    assert y.dtype is torch.float32
    assert (module.weight.grad.dtype, module.bias.grad.dtype) == (weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16], ids=lambda d: f"under {d}")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of its own
@each_class
def test_autocast_gives_torchs_dtypes(backend, kind, dtype, under):
    """Of outputs and gradients; torch has lists of operators that autocast casts for."""
    outcomes = []
    for module in pair(kind).both(backend, torch.float32):
        x = batch(backend, 6, 4, dtype=dtype).requires_grad_()
        with torch.autocast(backend.type, dtype=under):
            y = module(x)
        y.float().pow(2).sum().backward()
        gradients = [p.grad.dtype for p in module.parameters()]
        outcomes.append((y.dtype, x.grad.dtype, gradients, y.detach()))
    assert outcomes[0][:3] == outcomes[1][:3]
    torch.testing.assert_close(outcomes[0][3], outcomes[1][3], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("under", [torch.bfloat16, torch.float16], ids=str)
@each_added
def test_autocast_gives_torchs_dtypes_of_sums(backend, kind, under):
    for dtypes in ((torch.float32, torch.float32), (under, torch.float32), (under, under)):
        outcomes = []
        for module in both_added(kind, backend, torch.float32):
            x, residual = (batch(backend, 6, 4, dtype=d).requires_grad_() for d in dtypes)
            with torch.autocast(backend.type, dtype=under):
                y, total = module(x, residual)
            (y.float().pow(2).sum() + total.float().sum()).backward()
            outcomes.append((y.dtype, total.dtype, x.grad.dtype, residual.grad.dtype))
        assert outcomes[0] == outcomes[1], dtypes


@each_class
def test_a_model_trains_under_autocast(backend, kind):
    """Linear gives 16 bits, and the norm takes them with its float32 parameters."""
    torch.manual_seed(0)
    norm = getattr(fastnorm, kind)(4, activation="gelu")
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 2)).to(backend)
    with torch.autocast(backend.type, dtype=torch.bfloat16):
        loss = model(batch(backend, 6, 4, dtype=torch.float32)).float().square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# ---- autograd modes ------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_kind
def test_without_gradients(backend, kind, mode):
    ours, theirs = pair(kind).both(backend, torch.float64)
    x = arguments(kind, batch(backend, 6, 4))
    with mode():
        y, want = first(ours(*x)), theirs(sum(x))
    assert not y.requires_grad
    assert y.is_inference() == want.is_inference()
    close(y, want)
    first(ours(*x)).sum().backward()  # training goes on


@each_kind
def test_a_norm_made_inside_inference_mode(backend, kind):
    x = arguments(kind, batch(backend, 6, 4, dtype=torch.float32))
    with torch.inference_mode():
        y = first(getattr(fastnorm, kind)(4, device=backend)(*x))
    assert y.shape == (6, 4)


@pytest.mark.parametrize("size", [8, 1 << 12], ids=["small", "large"])
def test_rms_norm_of_an_inference_tensor(size):
    """Its weight has a gradient, as with torch; on a GPU torch refuses it, as with other norms."""
    with torch.inference_mode():
        x = batch(torch.device("cpu"), 64, size, dtype=torch.float32)
    found = []
    for norm in (fastnorm.RMSNorm(size), nn.RMSNorm(size)):
        norm(x).square().sum().backward()
        found.append(norm.weight.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("changed", ["input", "weight", "output", "nothing"])
@each_class
def test_a_change_in_place_is_noticed_where_torch_notices(backend, kind, changed):
    """But for the bias, which torch's LayerNorm keeps and no first derivative needs."""
    refused = []
    for norm in pair(kind).both(backend, torch.float32):
        x = batch(backend, 6, 4, dtype=torch.float32).requires_grad_()
        y = norm(x)
        target = {"input": x, "weight": norm.weight, "output": y}.get(changed)
        if target is not None:
            with torch.no_grad():
                target.add_(1)
        result = gradients_or_refusal(y, [x, norm.weight], torch.ones_like(y))
        refused.append(isinstance(result, str) and MODIFIED in result)
    assert refused[0] == refused[1]


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("changed", ["input", "residual", "weight", "bias", "output", "sum"])
@each_kind
def test_a_change_in_place_never_gives_another_gradient(backend, kind, changed, activation):
    """What the backward needs again is either noticed or not needed."""
    x, residual, dy, dsum = (batch(backend, 6, 4, dtype=torch.float32, seed=s) for s in range(4))
    results = []
    for change in (False, True):
        norm = getattr(fastnorm, kind)(4, activation=activation, device=backend)
        leaves = [t.clone().requires_grad_() for t in ((x, residual) if "Add" in kind else (x,))]
        outputs = norm(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        targets = dict(zip(("input", "residual"), leaves, strict=False))
        targets |= dict(zip(("output", "sum"), outputs, strict=False))
        targets |= dict(norm.named_parameters())
        if change:
            if changed not in targets:
                pytest.skip("has none")
            with torch.no_grad():
                targets[changed].add_(1)
        results.append(
            gradients_or_refusal(
                sum((y * d).sum() for y, d in zip(outputs, (dy, dsum), strict=False)),
                [*leaves, norm.weight],
                torch.ones((), device=backend),
            )
        )
    want, got = results
    assert not isinstance(want, str)
    if isinstance(got, str):
        assert MODIFIED in got
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_kind
def test_backward_twice(backend, kind):
    """retain_graph: the same gradients again; without it torch's error."""
    norm = getattr(fastnorm, kind)(4, activation="silu", device=backend)
    x = batch(backend, 6, 4, dtype=torch.float32).requires_grad_()
    y = first(norm(*arguments(kind, x)))
    dy = batch(backend, 6, 4, dtype=torch.float32, seed=2)
    leaves = [x, *norm.parameters()]
    one = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    two = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, dy)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (4,)], ids=str)
@each_kind
def test_the_output_may_be_changed_in_place(backend, kind, shape):
    """As by nn.ReLU(inplace=True): what a custom function returns must be no view."""
    norm = getattr(fastnorm, kind)(4, device=backend)
    results = []
    for inplace in (True, False):
        x = batch(backend, *shape, dtype=torch.float32).requires_grad_()
        y = nn.ReLU(inplace)(first(norm(*arguments(kind, x))))
        results.append(torch.autograd.grad(y.pow(2).sum(), x)[0])
    assert torch.equal(*results)


@each_added
def test_the_sum_may_be_changed_in_place_where_no_backward_needs_it(backend, kind):
    """As torch's own: `stream += branch` fails only if the norm is differentiated after it."""
    for module in both_added(kind, backend, torch.float32):
        x = batch(backend, 6, 4, dtype=torch.float32).requires_grad_()
        y, total = module(x, x)
        total += 1
        (dx,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
        assert torch.equal(dx, torch.full_like(dx, 2))
        with pytest.raises(RuntimeError, match=MODIFIED):
            torch.autograd.grad(y.pow(3).sum(), x)


# ---- what else torch does with a module ----------------------------------------------------------
@each_kind
def test_parametrized_weight(backend, kind):
    x = arguments(kind, batch(backend, 6, 4))
    results = []
    ours, theirs = pair(kind).both(backend, torch.float64)
    for norm, given in ((ours, x), (theirs, (sum(x),))):
        parametrize.register_parametrization(norm, "weight", Squared())
        y = first(norm(*given))
        y.pow(3).sum().backward()
        results.append((y, norm.parametrizations.weight.original.grad))
    for got, want in zip(*results, strict=True):
        close(got, want)


@each_kind
def test_functional_call(backend, kind):
    ours, theirs = pair(kind).both(backend, torch.float64)
    x = arguments(kind, batch(backend, 6, 4))
    other = {k: (v + 1).requires_grad_() for k, v in theirs.state_dict().items()}
    got = first(torch.func.functional_call(ours, other, x))
    want = torch.func.functional_call(theirs, other, (sum(x),))
    close(got, want)
    leaves = list(other.values())
    for mine, others in zip(
        torch.autograd.grad((got**3).sum(), leaves),
        torch.autograd.grad((want**3).sum(), leaves),
        strict=True,
    ):
        close(mine, others)
    assert_same_state(ours, theirs)


@each_kind
def test_hooks(backend, kind):
    """Forward hooks see arguments and outputs and may replace them; backward hooks gradients."""
    norm = getattr(fastnorm, kind)(4, device=backend)
    seen = []
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs)))
    norm.register_forward_hook(lambda _, inputs, output: seen.append(type(output)))
    norm.register_full_backward_hook(lambda _, given, got: seen.append((len(given), len(got))))
    x = [t.requires_grad_() for t in arguments(kind, batch(backend, 6, 4, dtype=torch.float32))]
    first(norm(*x)).sum().backward()
    several = 2 if "Add" in kind else 1
    assert seen == [several, tuple if "Add" in kind else Tensor, (several, several)]
    norm.register_forward_hook(lambda _, inputs, output: inputs[0] * 2)
    assert torch.equal(norm(*x), x[0] * 2)


@each_kind
def test_tensor_hooks_on_parameters_and_post_accumulation(backend, kind):
    """What an optimizer in the backward relies on."""
    norm = getattr(fastnorm, kind)(4, device=backend)
    seen = []
    norm.weight.register_hook(lambda gradient: gradient * 2)
    norm.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x = arguments(kind, batch(backend, 6, 4, dtype=torch.float32))
    first(norm(*x)).pow(2).sum().backward()
    (doubled,) = seen
    plain = getattr(fastnorm, kind)(4, device=backend)
    first(plain(*x)).pow(2).sum().backward()
    assert torch.equal(doubled, plain.weight.grad * 2)


@each_kind
def test_a_norm_called_twice_before_its_backward(backend, kind):
    results = []
    ours, theirs = pair(kind).both(backend, torch.float64)
    for norm, added in ((ours, "Add" in kind), (theirs, False)):
        x = batch(backend, 6, 4).requires_grad_()
        other = batch(backend, 6, 4, seed=5)
        zero = torch.zeros_like(other)
        y, z = (first(norm(t, zero) if added else norm(t)) for t in (x, x * other))
        ((y - z) ** 2).sum().backward()
        results.append([y, z, x.grad, *(p.grad for p in norm.parameters())])
    for got, want in zip(*results, strict=True):
        close(got, want)


@each_kind
def test_a_shared_parameter(backend, kind):
    """Tied weights add up their gradients."""
    results = []
    for make in (getattr(fastnorm, kind), torchs(kind)):
        norms = [make(4, device=backend, dtype=torch.float64) for _ in range(2)]
        norms[1].weight = norms[0].weight
        x = batch(backend, 6, 4)
        added = (torch.zeros_like(x),) if make.__name__.startswith("Add") else ()
        y = first(norms[1](first(norms[0](x, *added)), *added))
        y.pow(3).sum().backward()
        results.append(norms[0].weight.grad)
    close(*results)


@each_kind
def test_gradient_checkpointing(backend, kind):
    """The forward again in the backward: same bits."""
    norm = getattr(fastnorm, kind)(4, activation="gelu", device=backend)
    results = []
    for kept in (True, False):
        x = batch(backend, 6, 4, dtype=torch.float32).requires_grad_()
        given = arguments(kind, x)
        norm.zero_grad()
        if kept:
            y = first(norm(*given))
        else:
            y = first(torch.utils.checkpoint.checkpoint(norm, *given, use_reentrant=False))
        y.pow(3).sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in norm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
