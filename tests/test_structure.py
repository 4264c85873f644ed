"""fastnorm.structure: what follows what, in models as people have them, and what undoes what."""

import copy
import itertools
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import init, signals
from fastnorm.structure import Activation, double_norms, read, redundant_biases
from fastnorm.structure.pairs import idle


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def problems(model, x):
    with signals.record(model) as seen:
        y = model(x)
        (y * torch.randn_like(y)).sum().backward()
    return [(finding.layer, finding.problem) for finding in seen.findings()]


class Untraceable(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return self.body(x) if x.sum() != 0 else x


# A norm after a norm.


EPS = 1e-10
ROWS = {
    "batch": lambda: nn.BatchNorm1d(12, eps=EPS),
    "layer 12": lambda: nn.LayerNorm(12, eps=EPS),
    "rms 12": lambda: nn.RMSNorm(12, eps=EPS),
}
PLANES = {
    "batch": lambda: nn.BatchNorm2d(12, eps=EPS),
    "instance": lambda: nn.InstanceNorm2d(12, eps=EPS),
    "group 1": lambda: nn.GroupNorm(1, 12, eps=EPS),
    "group 3": lambda: nn.GroupNorm(3, 12, eps=EPS),
    "group 4": lambda: nn.GroupNorm(4, 12, eps=EPS),
    "group 6": lambda: fastnorm.GroupNorm(6, 12, eps=EPS),
    "group 12": lambda: nn.GroupNorm(12, 12, eps=EPS),
}
LAST = {
    f"{name} {list(shape)}": (lambda kind=kind, shape=shape: kind(shape, eps=EPS))
    for name, kind in (("layer", nn.LayerNorm), ("rms", nn.RMSNorm))
    for shape in ((5,), (4, 5), (12, 4, 5))
}


@pytest.mark.parametrize(
    ("family", "pair"),
    [
        (family, pair)
        for family in (ROWS, PLANES, LAST)
        for pair in itertools.product(family, repeat=2)
    ],
    ids=lambda value: " → ".join(value) if isinstance(value, tuple) else "",
)
def test_the_norm_that_is_called_idle_is_and_no_other(family, pair):
    """By what they compute, with weights of 1 and biases of 0."""
    first, second = (family[name]() for name in pair)
    scale = 1 + torch.rand(12, 1, 1, dtype=torch.float64)
    x = (3 * torch.randn(6, 12, 4, 5, dtype=torch.float64) + torch.randn(6, 12, 1, 1)) * scale
    x = x[..., 0, 0] if family is ROWS else x
    first.double(), second.double()
    once, both, alone = first(x), second(first(x)), second(x)
    # as in the variance of Σ/(variance + eps), where variances are about 1
    second_idle = torch.allclose(both, once, atol=1e-8)
    first_idle = torch.allclose(both, alone, atol=1e-8)
    expected = 2 if second_idle else 1 if first_idle else 0
    assert idle(first, second) == expected


def test_norms_of_unlike_kinds_are_not_judged():
    assert idle(nn.BatchNorm2d(4), nn.LayerNorm(5)) == 0
    assert idle(nn.LayerNorm(5), nn.GroupNorm(2, 4)) == 0


class Block(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x):
        if self.order == "pre":
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))


def test_norms_around_pre_norm_blocks_are_no_finding():
    """CLIP's vision model: what its first norm gives is also the skip path of the first block."""
    clip = nn.Sequential(nn.LayerNorm(16), Block("pre"), Block("pre"), nn.LayerNorm(16))
    assert problems(clip, torch.randn(8, 5, 16)) == []


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_s_encoder_with_a_last_norm_is_no_finding(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    assert problems(model, torch.randn(8, 5, 16)) == []
    assert problems(nn.Sequential(nn.LayerNorm(16), model), torch.randn(8, 5, 16)) == []


def test_a_last_norm_after_post_norm_blocks_is_said_to_be_idle():
    model = nn.Sequential(Block("post"), Block("post"), nn.LayerNorm(16))
    x = torch.randn(8, 5, 16)
    with signals.record(model) as seen:
        y = model(x)
    (finding,) = seen.findings()
    assert (finding.layer, finding.problem) == ("2", "normalized twice")
    assert finding.evidence == (
        "No layer or activation is between it and 1.norm2, whose output is normalized over the "
        "same values or parts of them: it only removes what that one's weight and bias do to means "
        "and scales"
    )
    assert finding.remedy == "drop 2, unless both are meant or a checkpoint has both"
    # float32; each norm divides by √(1 + 1e-5)
    torch.testing.assert_close(y, model[:2](x), atol=1e-4, rtol=1e-4)


def test_the_first_of_two_norms_may_be_the_idle_one():
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8))
    with signals.record(model) as seen:
        model(torch.randn(16, 8, 4, 4))
    (finding,) = seen.findings()
    assert "that one has no effect" in finding.evidence
    assert finding.remedy.startswith("drop 0")


def test_after_a_view_nobody_is_called_idle():
    model = nn.Sequential(nn.LayerNorm(16), nn.Unflatten(-1, (2, 8)), nn.LayerNorm(8))
    assert double_norms(model) == [("0", "2", "")]
    assert double_norms(Untraceable(*model)) == [("body.0", "body.2", "")]
    with signals.record(model) as seen:
        model(torch.randn(16, 16))
    assert seen.findings()[0].remedy.startswith("drop one of the two")


def test_a_sum_within_the_norm_is_not_normalized():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.norm, self.last = fastnorm.BatchNorm1d(8), nn.LayerNorm(8)

        def forward(self, x):
            return self.last(self.norm(self.linear(x), x))

    assert double_norms(Sum()) == []
    assert redundant_biases(Sum()) == [("linear", "norm")]  # x is added after the norm


# A bias before a norm.


def effect_of_bias(model, layer, x):
    """How far the output moves when the layer's bias does."""
    y = model(x)
    with torch.no_grad():
        layer.bias += torch.randn_like(layer.bias)
    return (model(x) - y).abs().max().item()


@pytest.mark.parametrize(
    ("layers", "shape", "redundant"),
    [
        ([nn.Linear(6, 16), nn.Unflatten(1, (4, 2, 2)), nn.BatchNorm2d(4)], (6,), False),
        ([nn.Linear(6, 16), nn.Unflatten(1, (16, 1, 1)), nn.BatchNorm2d(16)], (6,), True),
        ([nn.Conv2d(6, 16, 1), nn.PixelShuffle(2), nn.BatchNorm2d(4)], (6, 2, 2), False),
        ([nn.Conv2d(6, 4, 1), nn.PixelUnshuffle(2), nn.BatchNorm2d(16)], (6, 2, 2), True),
        ([nn.Conv2d(6, 4, 1), nn.Flatten(), nn.BatchNorm1d(16)], (6, 2, 2), True),
        ([nn.Linear(2, 3), nn.BatchNorm1d(6)], (6, 2), False),
    ],
    ids=["pixels", "one pixel", "PixelShuffle", "PixelUnshuffle", "Flatten", "another axis"],
)
@pytest.mark.parametrize("traced", [True, False])
def test_a_bias_is_redundant_where_it_is_one_number_a_channel(layers, shape, redundant, traced):
    model = (nn.Sequential if traced else Untraceable)(*copy.deepcopy(layers)).double()
    body = model if traced else model.body
    moved = effect_of_bias(model, body[0], torch.randn(32, *shape, dtype=torch.float64))
    assert (moved < 1e-9) is redundant
    assert bool(redundant_biases(model)) is redundant


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.linear(self.norm(self.linear(x)).relu())


def test_a_layer_with_a_norm_after_one_of_its_calls_needs_its_bias():
    model = Twice()
    assert effect_of_bias(model, model.linear, torch.randn(32, 8)) > 0.1
    assert redundant_biases(model) == []
    linear = nn.Linear(8, 8)
    for kind in (nn.Sequential, Untraceable):
        assert redundant_biases(kind(linear, nn.BatchNorm1d(8), nn.ReLU(), linear)) == []


@pytest.mark.parametrize(("affine", "words"), [(True, "the norm has one"), (False, "nothing is")])
def test_the_remedy_knows_whether_the_norm_has_a_bias(affine, words):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=affine))
    with signals.record(model) as seen:
        model(torch.randn(32, 8))
    assert f"bias=False: {words}" in seen.findings()[0].remedy


def test_a_lazy_bias_is_not_asked_for_its_length():
    model = nn.Sequential(nn.LazyLinear(8), nn.BatchNorm1d(8))
    assert redundant_biases(model) == []
    assert "BatchNorm1d" in fastnorm.summary(model)
    model(torch.randn(4, 3))
    assert redundant_biases(model) == [("0", "1")]


# Models as people have them.


def test_one_activation_in_several_places():
    act = nn.ReLU()
    layers = [nn.Linear(8, 8), act, nn.Linear(8, 8), act, nn.BatchNorm1d(8), nn.Linear(8, 8)]
    model = Untraceable(*layers)
    assert read(model).following == {
        "body.0": Activation("relu"), "body.2": Activation("relu"), "body.5": None,
    }  # fmt: skip
    assert redundant_biases(model) == []
    assert init.initialize(model)["body.2"].scheme == "he normal"


def test_a_module_that_holds_itself_is_read():
    model = Untraceable(nn.Linear(8, 8), nn.ReLU())
    model.part = nn.Module()
    model.part.owner = model.owner = model
    assert read(model).following == {"body.0": Activation("relu")}


@pytest.mark.parametrize("parameters", [1, 8])
def test_a_model_with_prelu_is_traced(parameters):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.linear = nn.PReLU(parameters, init=0.5), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.act(self.linear(x))

    assert read(Model()).untraced == ""
    assert read(Model()).following == {"linear": Activation("prelu", 0.5)}


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.last(F.relu(self.first(x)))


WRAPPED = {
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),
    "parallel": (nn.DataParallel, "module."),
    "both": (
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        "_orig_mod.module.",
    ),
    "within": (lambda model: nn.Sequential(torch.compile(model, backend="eager")), "0._orig_mod."),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_wrapped_model_is_read_as_the_model(how):
    wrap, prefix = WRAPPED[how]
    model = nn.Sequential(Branch(), Branch(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    wrapped = wrap(model)
    plain, structure = read(model), read(wrapped)
    assert structure.untraced == ""
    assert structure.following == {prefix + k: a for k, a in plain.following.items()}
    assert structure.straight == {f"{prefix}2": f"{prefix}3"}
    assert [branch.end for branch in structure.branches] == [f"{prefix}0.last", f"{prefix}1.last"]
    assert structure.blocks == plain.blocks == 2
    report = init.initialize(wrapped, residual="zero")
    assert report[f"{prefix}1.last"].std == 0
    assert redundant_biases(wrapped) == [(f"{prefix}2", f"{prefix}3")]


def test_a_wrapped_layer_has_its_name():
    assert read(torch.compile(nn.Linear(3, 3), backend="eager")).following == {"_orig_mod": None}


@pytest.mark.parametrize("times", [1, 3, 5])
def test_a_block_in_several_places_counts_at_each(times):
    """Its weights are there once; what they add to the sum is there at each."""
    block = Branch()
    assert read(nn.Sequential(*[block] * times)).blocks == times
    one = Block("pre")
    assert read(nn.Sequential(*[one] * times)).blocks == times


class Counting(nn.Module):
    """All that a forward may leave in its module."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0
        self.losses, self.last, self.seen, self.named = [], deque(maxlen=2), set(), {}
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        h = self.layer(x)
        self.calls += 1
        self.losses.append(h.square().mean())
        self.last.append(h)
        self.seen.add(self.calls)
        self.named["h"] = self.features = h
        self.steps.add_(1)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return F.relu(h - self.mean)


@pytest.mark.parametrize("fails", [False, True], ids=["", "untraced"])
def test_whoever_reads_a_model_leaves_it_as_it_was(fails):
    model = nn.Sequential(Counting(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    if fails:
        model.append(Valued())
    x = torch.randn(8, 4)
    with signals.record(model) as recorded:
        y = model(x)  # its backward asks for a buffer's version
    counting = model[0]
    held, before = dict(vars(counting)), copy.deepcopy(model.state_dict())
    buffers, version = dict(counting._buffers), counting.steps._version
    structure = read(model)
    assert bool(structure.untraced) is fails
    recorded.findings()
    assert vars(counting) == held
    assert all(counting._buffers[name] is t for name, t in buffers.items())
    assert counting.steps._version == version
    assert [counting.calls, len(counting.losses), len(counting.last)] == [1, 1, 1]
    assert (counting.seen, list(counting.named)) == ({1}, ["h"])
    assert counting.losses[0] is not None
    assert type(counting.losses[0]) is torch.Tensor
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    y.sum().backward()
    init.initialize(model)
    assert counting.calls == 1
    torch.testing.assert_close(counting.mean, before["0.mean"], rtol=0, atol=0)


class Valued(nn.Module):
    """It asks for a value, which nothing traced has."""

    def forward(self, x):
        return x if x.sum().item() > 0 else x + 0.0
