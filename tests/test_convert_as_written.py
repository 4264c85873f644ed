"""A converted norm of another class does what its forward says in every call, not only the usual.

Its proof compares calls with one tensor. Whatever else it is called with, and once one of its
attributes was set anew, its own forward serves.
"""

import copy
import inspect
import pickle

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastnorm
from fastnorm.existing.foreign import Foreign


class RootMeanSquare(nn.Module):
    """As transformers writes it."""

    def __init__(self, size=8):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, size))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states, gate=None):
        if gate is not None:
            hidden_states = hidden_states * nn.functional.silu(gate)
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class Scaled(nn.LayerNorm):
    def forward(self, input, *args, scale=None, **kwargs):
        y = super().forward(input)
        return y if scale is None else y * (1 + scale)


class Skipped(nn.GroupNorm):
    """Its second argument is no residual of ours."""

    def forward(self, x, skip=None):
        y = super().forward(x)
        return y if skip is None else y - skip


class Clipped(RootMeanSquare):
    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class Mended(RootMeanSquare):
    def forward(self, x):
        return super().forward(torch.nan_to_num(x))


class Counting(RootMeanSquare):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Nothing(RootMeanSquare):
    def __init__(self):
        super().__init__(0)


X, OTHER = torch.randn(2, 2, 5, 8)
CALLS = {
    "positional": (RootMeanSquare, (X, OTHER), {}),
    "keyword": (RootMeanSquare, (X,), {"gate": OTHER}),
    "only keywords": (RootMeanSquare, (), {"gate": OTHER, "hidden_states": X}),
    "its own name": (RootMeanSquare, (), {"hidden_states": X}),
    "defaults": (RootMeanSquare, (X, None), {}),
    "integers": (RootMeanSquare, (torch.arange(8).view(1, 8),), {}),
    "keyword-only": (Scaled, (X,), {"scale": OTHER}),
    "more": (Scaled, (X, 1, 2), {"note": "unused"}),
    "no residual": (Skipped, (X.transpose(1, 2), OTHER.transpose(1, 2)), {}),
}


def make(kind):
    return kind(2, 8) if kind is Skipped else kind(8) if kind is Scaled else kind()


def converted(module):
    (found,) = fastnorm.convert(nn.ModuleList([copy.deepcopy(module)]))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    kind, args, kwargs = CALLS[name]
    module = make(kind)
    ours = converted(module)
    assert isinstance(ours, Foreign)
    torch.testing.assert_close(ours(*args, **kwargs), module(*args, **kwargs))
    assert inspect.signature(ours.forward) == inspect.signature(module.forward)


@pytest.mark.parametrize("kind", [RootMeanSquare, Scaled, Skipped])
def test_arguments_that_are_wrong_are_the_written_forwards(kind):
    for wrong in ({}, {"nonsense": X, "hidden_states": None}):
        with pytest.raises((TypeError, AttributeError)) as theirs:
            make(kind)(**wrong)
        with pytest.raises(theirs.type) as ours:
            converted(make(kind))(**wrong)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("kind", [Clipped, Mended, Counting, Nothing])
def test_what_one_usual_call_does_not_show_stays(kind):
    assert type(converted(make(kind))) is kind


def change(module):
    module.variance_epsilon = 0.5
    return module


def compiled(module):
    return torch.compile(module, backend="aot_eager")


@pytest.mark.parametrize("again", [nn.Module.eval, copy.deepcopy, compiled])
def test_attributes_that_are_set_later(again):
    """By the module or by code that knows its names, as `module.variance_epsilon = …` does."""
    module = nn.Sequential(RootMeanSquare(), nn.Linear(8, 8))
    ours = fastnorm.convert(copy.deepcopy(module))
    run = again(ours)
    torch.testing.assert_close(run(X), module(X))
    change(module[0])
    change(getattr(run, "_orig_mod", run)[0])
    torch.testing.assert_close(run(X), module(X))
    assert "set since convert()" in fastnorm.summary(getattr(run, "_orig_mod", run))


def test_attributes_that_change_nothing():
    """Modes, moves and what is not there yet leave a norm with us; eps is followed."""
    module = nn.ModuleList([Scaled(8)])
    (ours,) = fastnorm.convert(module)
    module.eval().double().requires_grad_(False).to("cpu")
    ours.note, ours.eps = "new", 0.5
    assert not ours.attributes_changed
    want = nn.functional.layer_norm(X.double(), (8,), ours.weight, ours.bias, 0.5)
    torch.testing.assert_close(ours(X.double()), want)


def test_a_sum_is_not_fused_with_a_changed_norm():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RootMeanSquare()

        def forward(self, x, y):
            total = x + y
            return self.norm(total), total

    block = Block()
    ours = fastnorm.convert(copy.deepcopy(block))
    assert "fused" in fastnorm.summary(ours)
    for one in (block, ours):
        change(one.norm)
    for got, want in zip(ours(X, OTHER), block(X, OTHER), strict=True):
        torch.testing.assert_close(got, want)
    assert "fused" not in fastnorm.summary(fastnorm.fuse(copy.deepcopy(ours)))


def test_pickled():
    ours = converted(RootMeanSquare())
    again = pickle.loads(pickle.dumps(ours))
    assert isinstance(again, Foreign)
    torch.testing.assert_close(again(X, OTHER), RootMeanSquare()(X, OTHER))


def test_inference_mode_and_fake_tensors():
    """Proofs need gradients and numbers: the first has them, the second converts nothing."""
    with torch.inference_mode():
        assert isinstance(converted(RootMeanSquare()), Foreign)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(fastnorm.convert(nn.ModuleList([RootMeanSquare()]))[0]) is RootMeanSquare


def test_numbers_of_other_libraries():
    """A count of groups that numpy or a tensor has computed, as torch takes it."""
    x = torch.randn(2, 48, 5)
    for groups in (numpy.gcd(32, 48), torch.tensor(16)):
        want = nn.GroupNorm(16, 48)(x)
        torch.testing.assert_close(fastnorm.GroupNorm(groups, 48)(x), want)
        model = fastnorm.convert(nn.ModuleList([nn.GroupNorm(groups, 48)]))
        torch.testing.assert_close(model[0](x), want)
