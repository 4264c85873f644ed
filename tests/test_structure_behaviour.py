"""Activations of other libraries are known by what they compute, and asking disturbs nothing."""

import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnorm import init
from fastnorm.structure import Activation, read
from fastnorm.structure.behaviour import activations_of

ROOT = math.sqrt(2 / math.pi)


class GELUActivation(nn.Module):
    """As the classes below, with the formulas of transformers.activations."""

    def __init__(self, use_gelu_python=False):
        super().__init__()
        self.act = self._gelu_python if use_gelu_python else nn.functional.gelu

    def _gelu_python(self, input):
        return input * 0.5 * (1.0 + torch.erf(input / math.sqrt(2.0)))

    def forward(self, input):
        return self.act(input)


class GELUTanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = functools.partial(nn.functional.gelu, approximate="tanh")

    def forward(self, input):
        return self.act(input)


class NewGELUActivation(nn.Module):
    def forward(self, input):
        cubic = input + 0.044715 * torch.pow(input, 3.0)
        return 0.5 * input * (1.0 + torch.tanh(ROOT * cubic))


class FastGELUActivation(nn.Module):
    def forward(self, input):
        inner = input * 0.7978845608 * (1.0 + 0.044715 * input * input)
        return 0.5 * input * (1.0 + torch.tanh(inner))


class AccurateGELUActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.precomputed_constant = ROOT

    def forward(self, input):
        inner = self.precomputed_constant * (input + 0.044715 * torch.pow(input, 3))
        return 0.5 * input * (1 + torch.tanh(inner))


class QuickGELUActivation(nn.Module):
    def forward(self, input):
        return input * torch.sigmoid(1.702 * input)


class ClippedGELUActivation(nn.Module):
    def __init__(self, min, max):
        super().__init__()
        self.min, self.max = min, max

    def forward(self, x):
        return torch.clip(F.gelu(x), self.min, self.max)


class MishActivation(nn.Module):
    def forward(self, input):
        return input * torch.tanh(nn.functional.softplus(input))


class LinearActivation(nn.Module):
    def forward(self, input):
        return input


class LaplaceActivation(nn.Module):
    def forward(self, input, mu=0.707107, sigma=0.282095):
        return 0.5 * (1.0 + torch.erf((input - mu).div(sigma * math.sqrt(2.0))))


class Swish(nn.Module):
    """As timm.layers writes it, and the next two."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return x.mul_(x.sigmoid()) if self.inplace else x.mul(x.sigmoid())


class HardSwish(nn.Module):
    def forward(self, x):
        return x * (F.relu6(x + 3.0) / 6.0)


class HardMish(nn.Module):
    def forward(self, x):
        return 0.5 * x * (x + 2).clamp(min=0, max=2)


class Leaky(nn.Module):
    def forward(self, x):
        return torch.maximum(x, 0.3 * x)


class Noisy(nn.Module):
    def forward(self, x):
        return F.relu(x + torch.randn_like(x) if self.training else x)


class Steps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(0)


class OwnFunction(nn.Module):
    def forward(self, x):
        return Steps.apply(x)


class Normalizes(nn.Module):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:])


class Pairs(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, -1)
        return a * b.sigmoid()


KINDS = [
    (GELUActivation(), Activation("gelu")),
    (GELUActivation(use_gelu_python=True), Activation("gelu")),
    (GELUTanh(), Activation("gelu_tanh")),
    (NewGELUActivation(), Activation("gelu_tanh")),
    (FastGELUActivation(), Activation("gelu_tanh")),
    (AccurateGELUActivation(), Activation("gelu_tanh")),
    (QuickGELUActivation(), Activation("gelu")),
    (ClippedGELUActivation(-10, 10), Activation("gelu")),
    (MishActivation(), Activation("mish")),
    (LinearActivation(), None),
    (LaplaceActivation(), None),
    (Swish(), Activation("silu")),
    (Swish(inplace=True), Activation("silu")),
    (HardSwish(), Activation("hardswish")),
    (HardMish(), None),
    (Leaky(), Activation("leaky_relu", 0.3)),
    (Noisy(), Activation("relu")),
    (OwnFunction(), Activation("relu")),
    (Normalizes(), None),
    (Pairs(), None),
]


@pytest.mark.parametrize(("module", "want"), KINDS)
def test_known_by_values(module, want):
    assert activations_of(module).get(module) == want


class Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [nn.Sequential, Untraceable])
@pytest.mark.parametrize("act", [NewGELUActivation(), QuickGELUActivation(), OwnFunction()])
def test_he_is_due_before_them(kind, act):
    report = init.initialize(kind(nn.Linear(4, 4), act, nn.Linear(4, 4)))
    assert report["0"].scheme == "he normal"
    assert report["2"].scheme == "xavier uniform"


def test_torch_s_composites_take_them_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=QuickGELUActivation())
    assert read(layer).following["linear1"] == Activation("gelu")


class Counts(nn.Module):
    """A ReLU that knows how often it was called, and how."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        self.last = x
        return x.relu() + 0 * torch.rand(1) + 0 * random.random()


def test_asking_leaves_no_trace():
    act = Counts()
    act.register_forward_hook(lambda *_: pytest.fail("a hook"))
    act.register_forward_pre_hook(lambda *_: pytest.fail("a hook"))
    before = dict(vars(act))
    states = torch.get_rng_state(), random.getstate()
    assert activations_of(act) == {act: Activation("relu")}
    assert vars(act) == before
    assert (act.calls, act.training) == (0, True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


class Refuses(nn.Module):
    def forward(self, x):
        pytest.fail("it was asked")


class Keeps(Refuses):
    def __init__(self, *kept):
        super().__init__()
        self.kept = kept[0] if len(kept) == 1 else kept


def with_buffer():
    module = Refuses()
    module.register_buffer("steps", torch.zeros(1))
    return module


class TwoInputs(Refuses):
    def forward(self, x, y):
        pytest.fail("it was asked")


@pytest.mark.parametrize(
    "module",
    [
        Keeps([]), Keeps({}), Keeps((1, [])), Keeps(torch.ones(1)),
        Keeps(functools.partial(max, [])), Keeps(nn.ReLU()),
        Keeps(nn.Parameter(torch.ones(1))), with_buffer(), TwoInputs(),
    ],
)  # fmt: skip
def test_modules_with_state_are_not_asked(module):
    assert module not in activations_of(module)


class Raises(nn.Module):
    def forward(self, x):
        raise RuntimeError("no")


class Drops(nn.Module):
    """Stochastic depth: in evaluation it does nothing."""

    def forward(self, x):
        return x if not self.training else x * torch.bernoulli(torch.full_like(x, 0.5))


@pytest.mark.parametrize("module", [Raises(), Drops()])
def test_what_is_no_activation_stays_unknown(module):
    model = nn.Sequential(nn.Linear(4, 4), module)
    assert activations_of(model) == {}
    assert read(model).following == {"0": None}


def test_where_tensors_are_made_does_not_matter():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), NewGELUActivation())
        assert read(model).following == {"0": Activation("gelu_tanh")}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert read(model).following == {"0": Activation("gelu_tanh")}
