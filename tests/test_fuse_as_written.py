"""A converted model does what its forward says now, whatever has changed around it since."""

import copy
import logging
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from side_by_side import near
from torch import nn

import fastnorm
from fastnorm.existing.classes import PLANS
from fastnorm.existing.fuse import FusedForward, Plan

X = (2, 4, 6, 6)
FACTOR = 2.0
LOG: list[int] = []
SEEN: dict[str, torch.Tensor] = {}
GENERATOR = np.random.default_rng(0)


class Block(nn.Module):
    """Convolution, norm, activation: one operation once fused."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()

    def before(self, x):
        return self.act(self.norm(self.conv(x)))

    def forward(self, x):
        return self.before(x)


def pair(module):
    """(as written, converted), with equal weights; the second has something fused."""
    torch.manual_seed(0)
    for one in module.modules():
        for tensor in (getattr(one, "weight", None), getattr(one, "bias", None)):
            if isinstance(tensor, nn.Parameter):
                nn.init.normal_(tensor)
    ours = fastnorm.convert(copy.deepcopy(module))
    assert is_fused(ours)
    return module, ours


def is_fused(model):
    return any(
        isinstance(plan, Plan) and plan.holds()
        for module in model.modules() if isinstance(module, FusedForward)
        for plan in module.__dict__[PLANS].values()
    )  # fmt: skip


def assert_alike(theirs, ours, x=None):
    x = torch.randn(X, generator=torch.manual_seed(1)) if x is None else x
    near(ours(x), theirs(x))


class Doubled(nn.Module):
    def forward(self, tensor):
        return tensor * 2 + 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()),
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()),
        lambda: nn.Sequential(nn.LayerNorm(6), nn.GELU()),
        lambda: nn.Sequential(nn.RMSNorm(6), nn.GELU()),
    ],
    ids=["batch", "group", "layer", "rms"],
)
@pytest.mark.parametrize("way", ["parametrized", "replica"])
def test_weights_that_are_no_parameters(make, way):
    """torch.nn.utils.parametrize makes them properties, nn.DataParallel plain attributes."""
    theirs, ours = pair(make())
    if way == "parametrized":
        for model in (theirs, ours):
            for name in [name for name, _ in model[0].named_parameters()]:
                nn.utils.parametrize.register_parametrization(model[0], name, Doubled())
    else:
        ours = replica(ours)
    assert_alike(theirs, ours)


def replica(model):
    """What nn.DataParallel runs on a device: torch.nn.parallel.replicate, on a CPU."""
    module = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        module._modules[name] = replica(child)
    for name, parameter in model._parameters.items():
        setattr(module, name, parameter * 1 if parameter is not None else None)
    return module


def test_a_replica_leaves_no_plans_behind():
    """Its children are its own, and guards on them would say nothing of the model's."""
    theirs, ours = pair(Block())
    plans = dict(ours.__dict__[PLANS])
    x = torch.randn(X).requires_grad_()
    replica(ours).forward(x=x)  # a way to call it that has not been yet
    assert ours.__dict__[PLANS] == plans
    theirs.act = ours.act = nn.Tanh()
    near(ours(x=x), theirs(x=x))


@pytest.mark.parametrize("number", [1 / np.sqrt(2), np.float64(0.25)], ids=["root", "float64"])
def test_numpys_floats_are_numbers(number):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear, self.factor = nn.LayerNorm(6), nn.Linear(6, 6), number

        def forward(self, x, times=1.0):
            return self.norm(x + self.linear(x) * self.factor * times)

    theirs, ours = pair(Scaled())
    assert_alike(theirs, ours)
    x = torch.randn(X)
    near(ours(x, np.float64(3.0)), theirs(x, np.float64(3.0)))


def test_a_float_whose_repr_is_no_number_is_left_alone():
    class Percent(float):
        def __repr__(self):
            return f"{100 * self} %"

    class Scaled(Block):
        factor = Percent(0.5)

        def forward(self, x):
            return self.before(x) * self.factor

    theirs = Scaled()
    ours = fastnorm.convert(copy.deepcopy(theirs))
    assert "it computes with a Percent" in fastnorm.summary(ours)
    assert_alike(theirs, ours)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.std(), bias)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.conv, "padding_mode", "circular"),
        lambda block: setattr(block, "conv", nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        lambda block: setattr(block, "conv", Standardized(4, 4, 3)),
        lambda block: setattr(
            block.conv, "_conv_forward", lambda x, w, b: F.conv2d(x, w.abs(), b, padding=1)
        ),
    ],
    ids=["padding set", "padding", "subclass", "method"],
)
def test_convolutions_of_another_kind(change):
    """In Conv2dBatchNorm, and in a block that has been fused before."""
    theirs, fused = pair(Block())
    theirs.conv.padding = fused.conv.padding = (1, 1)
    ours = fastnorm.Conv2dBatchNorm(4, 4, 3, padding=1)
    ours.conv, ours.norm = copy.deepcopy(theirs.conv), fastnorm.convert(copy.deepcopy(theirs.norm))
    ours.norm.activation = "relu"
    for block in (theirs, fused, ours):
        torch.manual_seed(2)
        change(block)
        block.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]  # torch pads by it
    assert_alike(theirs, ours)
    assert_alike(theirs, fused)


@torch.fx.wrap
def gelu(x):
    return x.clamp(min=0.5)


@torch.library.custom_op("fastnorm_tests::relu", mutates_args=())
def custom_relu(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0.25)


@torch.library.custom_op("fastnorm_tests::halve", mutates_args=("x",))
def halve(x: torch.Tensor) -> None:
    x.mul_(0.5)


@pytest.mark.parametrize(
    "function",
    [lambda x: gelu(x), lambda x: torch.ops.fastnorm_tests.relu(x)],
    ids=["wrapped", "custom"],
)
def test_a_name_is_no_function(function):
    class Named(Block):
        def forward(self, x):
            return function(self.norm(self.conv(x)))

    theirs, ours = pair(Named())
    assert_alike(theirs.eval(), ours.eval())  # a custom operator has no gradient


CHANGES = {
    "select": lambda r: r.select(1, 0).zero_(),
    "narrow": lambda r: r.narrow(1, 0, 2).zero_(),
    "detach": lambda r: r.detach().zero_(),
    "T": lambda r: r.mT.zero_(),
    "expand_as": lambda r: r.expand_as(r).zero_(),
    "as_strided": lambda r: torch.as_strided(r, (8,), (1,)).zero_(),
    "tensor_split": lambda r: r.tensor_split(2, 1)[0].zero_(),
    "view": lambda r: r.view(-1).zero_(),
    "view of a view": lambda r: r.moveaxis(1, 0).diagonal().zero_(),
    "a custom operator": lambda r: torch.ops.fastnorm_tests.halve(r),
    "inplace": lambda r: F.relu(r, inplace=True).zero_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_through_views(name):
    """Between a norm and the sum that takes the same tensor."""
    change = CHANGES[name]

    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)

        def forward(self, x):
            r = self.conv(x)
            y = self.norm(r)
            change(r)
            return F.silu(y + r)

    torch.manual_seed(0)
    theirs = Between()
    ours = fastnorm.convert(copy.deepcopy(theirs))
    with torch.no_grad():
        assert_alike(theirs, ours)


def test_an_attribute_named_activation_stays():
    class Holds(nn.BatchNorm2d):
        def __init__(self, activation):
            super().__init__(4)
            self.activation = activation

    for activation in (nn.Tanh(), "tanh", torch.tanh, None):
        theirs = nn.Sequential(Holds(activation))
        ours = fastnorm.convert(copy.deepcopy(theirs))
        assert type(ours[0].activation) is type(activation)
        assert "its attribute activation is" in fastnorm.summary(ours)
        assert_alike(theirs, ours)
    same = fastnorm.convert(nn.Sequential(Holds("identity")))
    assert isinstance(same[0], fastnorm.BatchNorm2d)


class OfClass(Block):
    gain = 1.0

    def after(self, x):
        return x + 1

    def forward(self, x):
        return self.after(self.before(x)) * self.gain * FACTOR


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("what", ["gain", "own gain", "after", "own after", "global"])
def test_changes_of_the_class_and_of_globals(what, compiled, monkeypatch):
    torch._dynamo.reset()
    theirs, ours = pair(OfClass())
    run = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    assert_alike(theirs, run)
    if what == "gain":
        monkeypatch.setattr(OfClass, "gain", 5.0)
    elif what == "after":
        monkeypatch.setattr(OfClass, "after", lambda self, x: x - 1)
    elif what == "global":
        monkeypatch.setitem(globals(), "FACTOR", -3.0)
    for block in (theirs, ours):
        if what == "own gain":
            block.gain = 7.0
        elif what == "own after":
            block.after = types.MethodType(lambda self, x: x * 7, block)
    assert_alike(theirs, run)


@pytest.mark.parametrize(
    ("when", "how"),
    [
        *(("before", how) for how in ("append", "replace", "hook", "inner hook")),
        *(("after", how) for how in ("append", "replace")),  # no hooks: torch guards none
    ],
)
def test_changes_under_compile(how, when):
    def change(model):
        if how == "append":
            model.append(nn.Sigmoid())
        elif how == "replace":
            model[2] = nn.Tanh()
        else:
            model[0 if how == "hook" else 1].register_forward_hook(lambda m, i, o: o + 1)

    layers = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    theirs, ours = pair(nn.Sequential(*layers).eval())
    torch._dynamo.reset()
    if when == "before":
        change(ours)
    run = torch.compile(ours, backend="eager", fullgraph=True)
    x = torch.randn(X)
    run(x)
    if when == "after":
        change(ours)
    change(theirs)
    near(run(x), theirs(x))
    exported = torch.export.export(ours, (x,)).module()
    near(exported(x), theirs(x))


@torch.no_grad()
def test_equal_blocks_compile_once(monkeypatch):
    """Each compiled by itself, as large models are; torch.compile gives up after eight versions."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    pairs = [pair(OfClass()) for _ in range(6)]
    theirs, ours = (nn.Sequential(*(blocks[i] for blocks in pairs)) for i in (0, 1))
    for block in (*theirs, *ours):
        block.conv.padding = (1, 1)
    for block in ours:
        block.compile(backend="eager", fullgraph=True)
    assert_alike(theirs, ours)
    for model in (theirs, ours):
        model[4].gain = 3.0
    assert_alike(theirs, ours)


def test_classes_compile_apart(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    for index in range(5):
        kind = type(f"Block{index}", (Block,), {"forward": Block.forward})
        theirs, ours = pair(kind())
        ours.compile(backend="eager", fullgraph=True)
        assert_alike(theirs, ours)


EFFECTS = {
    "numpy": (lambda x: x * np.random.uniform(), "draws random numbers"),
    "a generator": (lambda x: x * GENERATOR.normal(), "may ask GENERATOR for random numbers"),
    "python": (lambda x: x * random.random(), "calls random"),
    "list": (lambda x: LOG.append(1) or x, "it changes LOG"),
    "dict": (lambda x: SEEN.update(x=1) or x, "it changes SEEN"),
    "log": (lambda x: logging.getLogger("tests").debug("x") or x, "it calls getLogger"),
    "default": (lambda x: x.to(torch.get_default_dtype()), "it calls get_default_dtype"),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_what_the_next_call_may_do_otherwise_is_left_alone(name):
    function, reason = EFFECTS[name]

    class Effect(Block):
        def forward(self, x):
            return function(self.before(x))

    drawn = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    ours = fastnorm.convert(Effect())
    assert reason in fastnorm.summary(ours)
    assert not is_fused(ours)
    assert drawn == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])


def test_numpy_may_have_another_generator():
    if not hasattr(np.random, "set_bit_generator"):
        pytest.skip("NumPy is too old")
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        first = copy.deepcopy(np.random.get_state(legacy=False))
        pair(Block())
        assert np.random.get_state(legacy=False) == first
    finally:
        np.random.set_bit_generator(before)


def test_tensors_on_the_class_are_compared_by_identity(monkeypatch):
    class Shifted(Block):
        shifts = torch.zeros(2)

        def forward(self, x):
            return self.before(x) if self.shifts is not None else x

    theirs, ours = pair(Shifted())
    monkeypatch.setattr(Shifted, "shifts", torch.ones(2))
    assert_alike(theirs, ours)
    monkeypatch.setattr(Shifted, "shifts", None)
    assert_alike(theirs, ours)


def test_an_item_of_a_global_is_set_at_each_call():
    class Keeps(Block):
        def forward(self, x):
            SEEN["features"] = y = self.before(x)
            return y

    ours = fastnorm.convert(Keeps())
    assert "forward changes SEEN" in fastnorm.summary(ours)
    x = torch.randn(X)
    assert ours(x) is SEEN["features"]
