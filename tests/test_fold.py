"""fold: equal outputs in evaluation from fewer layers; a new model; refused in training."""

import copy
import types

import pytest
import torch
from architectures import SMALL
from side_by_side import near
from torch import nn

import fastnorm

PAIRS = {
    "Linear": (lambda: nn.Linear(4, 6), nn.BatchNorm1d, (5, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, bias=False), nn.BatchNorm1d, (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (2, 4, 5, 5)),
    "reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d, (2, 4, 5, 5),
    ),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d, (2, 4, 5)),
    "ConvTranspose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2), nn.BatchNorm2d, (2, 4, 3, 3),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), nn.BatchNorm3d, (2, 4, 2, 2, 2)),
}  # fmt: skip


def trained(model, shape):
    """With statistics and parameters that are no defaults, in evaluation."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, tensor in module.state_dict().items():
                if tensor.is_floating_point():
                    values = torch.rand(tensor.shape, generator=generator)
                    tensor.copy_(values + (0.5 if "var" in name else -0.3))
    return model.eval(), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, affine):
    layer, norm, shape = PAIRS[name]
    torch.manual_seed(0)
    model = nn.Sequential(layer(), norm(6, eps=0.1, affine=affine), nn.ReLU())
    model, x = trained(model, shape)
    state = copy.deepcopy(model.state_dict())
    for source in (model, fastnorm.convert(copy.deepcopy(model))):
        folded = fastnorm.fold(source)
        near(folded(x), model(x))
        assert not any(one.training for one in folded.modules())
        assert not [one for one in folded.modules() if isinstance(one, norm)]
        assert isinstance(source[1], norm)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    assert all(one.requires_grad for one in folded.parameters())
    model.requires_grad_(False)
    half = fastnorm.fold(model.bfloat16())
    assert not any(one.requires_grad for one in half.parameters())
    assert half[0].weight.dtype == half[0].bias.dtype == torch.bfloat16
    near(half(x.bfloat16()), model(x.bfloat16()), steps=8)


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"Sequential is in training mode: call model.eval\(\)"):
        fastnorm.fold(model)
    model.eval()
    model[1].train()
    with pytest.raises(ValueError, match="but 1 is in training mode"):
        fastnorm.fold(model)
    assert type(model[1]) is nn.BatchNorm1d


def test_linear_on_three_axes_is_refused_when_it_comes():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    folded = fastnorm.fold(model)
    x = torch.randn(3, 5, 4)
    model(x)  # normalizes axis 1
    with pytest.raises(ValueError, match=r"folded for 2 axes, but got \[3, 5, 5\]"):
        folded(x)


def test_linear_before_a_norm_of_another_axis_stays():
    """Over (N, C, L) a Linear computes the last axis, and BatchNorm1d normalizes the other one."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.ReLU())
    x = torch.randn(6, 4, 3)
    model(x)
    model.eval()
    folded = fastnorm.fold(model)
    assert type(folded[1]) is nn.BatchNorm1d
    assert torch.equal(folded(x), model(x))


class Shared(nn.Module):
    """Two norms after one layer, a norm after two layers, an output that is used twice."""

    def __init__(self):
        super().__init__()
        self.layer, self.first, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.one, self.two, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.seen, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.read, self.plain = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.untracked_layer = nn.Linear(4, 4)
        self.untracked = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        x = self.first(self.layer(x)) + self.second(self.layer(x))
        x = self.norm(self.one(x)) + self.norm(self.two(x))
        z = self.seen(x)
        x = self.last(z) + z
        x = self.plain(self.read(x)) + self.read.weight.mean()
        return self.untracked(self.untracked_layer(x))


def test_what_serves_two_is_not_folded():
    torch.manual_seed(0)
    model, x = trained(Shared(), (6, 4))
    folded = fastnorm.fold(model)
    near(folded(x), model(x))
    assert sum(isinstance(one, nn.BatchNorm1d) for one in folded.modules()) == 6
    tied = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential())
    tied[2].append(tied[0])
    tied, x = trained(tied, (6, 4))
    near(fastnorm.fold(tied)(x), tied(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), fastnorm.BatchNorm1d(4, activation="relu")

    def forward(self, x):
        return self.norm(self.linear(x), x)


def replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.forward = types.MethodType(lambda self, x: self[1](self[0](x)) + self[0](x), model)
    return model


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(Doubled(4, 4), nn.BatchNorm1d(4)), Residual, replaced],
    ids=["own forward", "residual", "replaced"],
)  # fmt: skip
def test_what_does_more_is_not_folded(make):
    torch.manual_seed(0)
    model, x = trained(make(), (6, 4))
    folded = fastnorm.fold(model)
    near(folded(x), model(x))
    assert any(isinstance(one, nn.BatchNorm1d) for one in folded.modules())


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.other, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x, residual=None, act=True):
        x = self.norm(self.layer(x))
        x = x if residual is None else x + residual
        return x.relu() if act else x


class Raw(Step):
    def forward(self, x, raw=False):
        x = self.layer(x)
        return x if raw else self.norm(x)


class Either(Step):
    def forward(self, x, which="layer"):
        return self.norm(self.layer(x) if which == "layer" else self.other(x))


class Masked(Step):
    def forward(self, x, mask=None):
        x = self.layer(x)
        return self.norm(x if mask is None else x * mask)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.step = Step()


class Reaching(Around):
    def forward(self, x):
        return self.step.layer(x) + self.step(x)


class Reading(Around):
    def forward(self, x):
        return self.step(x) + self.step.layer.weight.sum()


class Tapped(nn.Module):
    def __init__(self, taps):
        super().__init__()
        self.steps = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        self.taps = taps

    def forward(self, x):
        seen = []
        for i, step in enumerate(self.steps):
            x = step(x)
            if i in self.taps:
                seen.append(x)
        return torch.stack(seen)


X = torch.linspace(-1, 2, 24).view(6, 4).cos()


@pytest.mark.parametrize(
    ("make", "calls", "left"),
    [
        (Step, [{}, {"residual": X}, {"residual": X, "act": False}], 0),
        (Raw, [{}, {"raw": True}], 1),
        (Either, [{}, {"which": "other"}], 1),
        (Masked, [{}, {"mask": X}], 1),
        (Reaching, [{}], 1),
        (Reading, [{}], 1),
        (lambda: Tapped((2,)), [{}], 0),
        (lambda: Tapped((0, 2)), [{}], 1),
        (lambda: Tapped([0, 2]), [{}], 1),  # a list may change, so the forward is not read
    ],
    ids=["step", "raw", "either", "masked", "reaching", "reading", "end", "tapped", "unread"],
)
def test_what_is_sometimes_apart_is_not_folded(make, calls, left):
    torch.manual_seed(0)
    model, x = trained(make(), (6, 4))
    for source in (model, fastnorm.convert(copy.deepcopy(model))):
        folded = fastnorm.fold(source)
        for options in calls:
            near(folded(x, **options), model(x, **options))
        assert sum(isinstance(one, nn.BatchNorm1d) for one in folded.modules()) == left


def test_tied_weights_are_untied():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model, x = trained(model, (6, 4))
    folded = fastnorm.fold(model)
    near(folded(x), model(x))
    assert torch.equal(folded[2].weight, model[0].weight)


def test_hooks_stay():
    model, x = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (6, 4))
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    folded = fastnorm.fold(model)
    assert isinstance(folded[1], nn.BatchNorm1d)
    near(folded(x), model(x))
    assert len(seen) == 2


@pytest.mark.parametrize("part", ["", "linear", "norm", "untracked"])
def test_our_layers_stay_where_they_are_heard_or_have_no_statistics(part):
    model = fastnorm.LinearBatchNorm(4, 4, track_running_stats=part != "untracked").eval()
    if part != "untracked":
        model.get_submodule(part).register_forward_hook(lambda *_: None)
    folded = fastnorm.fold(model)
    assert type(folded) is fastnorm.LinearBatchNorm
    x = torch.randn(6, 4)
    near(folded(x), model(x))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: fastnorm.LinearBatchNorm(4, 6, activation="silu"), (2, 3, 4)),
        (lambda: fastnorm.Conv2dBatchNorm(4, 6, 3, bias=True), (2, 4, 5, 5)),
        (
            lambda: nn.Sequential(nn.Linear(4, 6), fastnorm.BatchNorm1d(6, activation="tanh")),
            (3, 4),
        ),
    ],
)
def test_our_layers(make, shape):
    torch.manual_seed(0)
    model, x = trained(make(), shape)
    near(fastnorm.fold(model)(x), model(x))
    wrapped = nn.Sequential(model).eval()
    folded = fastnorm.fold(wrapped)
    near(folded(x), model(x))
    assert not any(one.training for one in folded.modules())
    assert not [one for one in folded.modules() if isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d)]


class Inside(nn.Module):
    """Calls a part of our layer by itself."""

    def __init__(self):
        super().__init__()
        self.block = fastnorm.LinearBatchNorm(4, 4)

    def forward(self, x):
        return self.block(x) + self.block.linear(x)


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), fastnorm.BatchNorm1d(4, activation="relu")

    def forward(self, x):
        return self.norm(self.linear(x), residual=x)


def twice():
    layer = fastnorm.LinearBatchNorm(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def one_linear():
    layers = [fastnorm.LinearBatchNorm(4, 4) for _ in range(2)]
    layers[1].linear = layers[0].linear
    return nn.Sequential(*layers)


def parametrized():
    layer = fastnorm.LinearBatchNorm(4, 4)
    nn.utils.parametrizations.weight_norm(layer.linear)
    return layer


@pytest.mark.parametrize("make", [Inside, Summed, twice, one_linear, parametrized])
def test_our_layers_that_are_not_folded(make):
    torch.manual_seed(0)
    model, x = trained(make(), (6, 4))
    folded = fastnorm.fold(model)
    near(folded(x), model(x))
    norms = [[m for m in one.modules() if isinstance(m, nn.BatchNorm1d)] for one in (model, folded)]
    assert len(norms[0]) == len(norms[1])


@pytest.mark.parametrize("name", SMALL)
def test_architectures(name):
    torch.manual_seed(0)
    model, x = trained(SMALL[name](), (2, 3, 32, 32))
    for source in (model, fastnorm.convert(copy.deepcopy(model))):
        folded = fastnorm.fold(source)
        near(folded(x), model(x))
        left = [one for one in folded.modules() if isinstance(one, nn.BatchNorm2d)]
        before = 6 if name == "DenseNet" else 0  # those have no layer before them
        assert len(left) == before
