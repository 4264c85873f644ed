"""fastnorm.init: variances as published, fans counted right, a model walked by its structure."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import init
from fastnorm.init import Fans, fans
from fastnorm.structure import Activation, double_norms, read, redundant_biases


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Variances. The variance of n draws has a relative standard deviation of √((κ - 1)/n), κ the
# kurtosis (3 of a normal, 9/5 of a uniform distribution); five of them are one false alarm in two
# million, and the generator is fixed besides.

DRAWN = {
    "xavier_uniform": (init.xavier_uniform_, {}, 2 / (300 + 500), 1.8),
    "xavier_normal": (init.xavier_normal_, {}, 2 / (300 + 500), 3),
    "xavier_gain": (init.xavier_normal_, {"gain": 5 / 3}, 25 / 9 * 2 / (300 + 500), 3),
    "xavier_fan_in": (init.xavier_uniform_, {"mode": "fan_in"}, 1 / 300, 1.8),
    "xavier_fan_out": (init.xavier_normal_, {"mode": "fan_out"}, 1 / 500, 3),
    "he_uniform": (init.he_uniform_, {}, 2 / 300, 1.8),
    "he_normal": (init.he_normal_, {}, 2 / 300, 3),
    "he_slope": (init.he_normal_, {"slope": 0.5}, 2 / (1.25 * 300), 3),
    "he_fan_out": (init.he_uniform_, {"mode": "fan_out"}, 2 / 500, 1.8),
    "lecun_uniform": (init.lecun_uniform_, {}, 1 / 300, 1.8),
    "lecun_normal": (init.lecun_normal_, {}, 1 / 300, 3),
    "fans": (init.he_normal_, {"fans": Fans(7, 11)}, 2 / 7, 3),
}


def assert_variance(weight, variance, kurtosis):
    count = weight.numel()
    bound = 5 * math.sqrt((kurtosis - 1) / count)
    assert weight.double().var().item() == pytest.approx(variance, rel=bound)
    assert abs(weight.double().mean().item()) < 5 * math.sqrt(variance / count)


@pytest.mark.parametrize("case", DRAWN)
def test_the_variance_is_the_formula(case):
    scheme, options, variance, kurtosis = DRAWN[case]
    weight = torch.full((500, 300), math.nan)
    assert scheme(weight, **options, generator=seeded()) is weight
    assert_variance(weight, variance, kurtosis)
    if kurtosis < 2:
        assert weight.abs().max() <= math.sqrt(3 * variance)
        assert weight.abs().max() > 0.99 * math.sqrt(3 * variance)
    else:
        assert weight.abs().max() > 3 * math.sqrt(variance)


@pytest.mark.parametrize("case", DRAWN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(case, dtype):
    scheme, options, variance, kurtosis = DRAWN[case]
    weight = scheme(torch.empty(500, 300, dtype=dtype), **options, generator=seeded())
    count = weight.numel()
    # a draw rounded to 16 bits moves by half an ulp at random: far below the statistical bound
    bound = 5 * math.sqrt((kurtosis - 1) / count)
    assert weight.double().var().item() == pytest.approx(variance, rel=bound)


@pytest.mark.parametrize("case", DRAWN)
def test_the_generator_decides(case):
    scheme, options, _, _ = DRAWN[case]
    one, same, other = (
        scheme(torch.empty(30, 20), **options, generator=seeded(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_kernel_counts_in_both_fans():
    weight = init.xavier_normal_(torch.empty(64, 32, 5, 3), generator=seeded())
    assert_variance(weight, 2 / ((64 + 32) * 15), 3)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_orthogonal(shape, dtype):
    weight = init.orthogonal_(torch.empty(shape, dtype=dtype), 2.0, generator=seeded())
    matrix = weight.flatten(1).double()
    product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(product, 4 * torch.eye(len(product)).double(), atol=16 * eps, rtol=0)


def test_orthogonal_groups_are_each_orthogonal():
    weight = init.orthogonal_(torch.empty(8, 6), groups=2, generator=seeded())
    for block in weight.chunk(2):
        torch.testing.assert_close(block @ block.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: init.he_normal_(torch.empty(3)), ValueError, "at least 2 axes, but got \\[3\\]"),
        (lambda: init.orthogonal_(torch.empty(3)), ValueError, "at least 2 axes"),
        (
            lambda: init.he_normal_(torch.empty(3, 3), mode="in"),
            ValueError,
            "fan_avg, but got 'in'",
        ),
        (lambda: init.xavier_normal_(torch.empty(3, 3), -1.0), ValueError, "gain .* got -1"),
        (lambda: init.he_uniform_(torch.empty(3, 3), math.nan), ValueError, "slope .* got nan"),
        (lambda: fans(nn.ReLU()), TypeError, "got ReLU"),
    ],
)
def test_errors_of_functions(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("scheme", [init.he_normal_, init.xavier_uniform_, init.orthogonal_])
def test_empty_weights(scheme):
    assert scheme(torch.empty(0, 3)).shape == (0, 3)
    assert scheme(torch.empty(3, 0)).shape == (3, 0)


# Fans: what they are for is that the signal keeps its power, so that is what is measured.


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(64, 32),
        nn.Conv1d(16, 32, 3),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(16, 32, 3, groups=4),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.Conv2d(16, 32, 1, stride=2),
        nn.Conv3d(4, 8, 2),
        nn.ConvTranspose1d(16, 32, 4, stride=2),
        nn.ConvTranspose2d(16, 32, 3),
        nn.ConvTranspose2d(16, 32, 3, groups=4),
        nn.ConvTranspose2d(16, 32, 2, stride=2),
        nn.ConvTranspose2d(16, 32, 4, stride=2, groups=2),
    ],
    ids=str,
)
def test_fans_keep_the_power_of_the_signal(layer):
    """Var y = fan_in · Var w · E[x²] and Var dx = fan_out · Var w · E[dy²], far from borders."""
    generator = seeded()
    axes = layer.weight.dim() - 2
    size = {0: (), 1: (96,), 2: (32, 32), 3: (12, 12, 12)}[axes]
    channels = layer.weight.shape[1] if axes == 0 else layer.in_channels
    x = torch.randn(16, channels, *size, generator=generator, requires_grad=True)
    nn.init.zeros_(layer.bias)
    forward, backward = [], []
    inner = (..., *[slice(4, -4)] * axes)
    for _ in range(20):
        nn.init.normal_(layer.weight, 0.0, 1.0, generator)
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=generator))
        forward.append(y[inner].square().mean().item())
        backward.append(x.grad[inner].square().mean().item())
        x.grad = None
    # 20 weights of hundreds of elements: Σw² has a relative deviation of √(2/n); 5 of them
    bound = 5 * math.sqrt(2 / (20 * layer.weight.numel()))
    samples = 5 * math.sqrt(2 / (16 * channels * max(1, math.prod(size))))
    counted = fans(layer)
    assert sum(forward) / 20 == pytest.approx(counted.fan_in, rel=bound + samples + 0.01)
    assert sum(backward) / 20 == pytest.approx(counted.fan_out, rel=bound + samples + 0.01)


def test_fans_of_a_bilinear_layer_keep_the_power_of_the_signal():
    """Var y = fan_in · Var w · E[x₁²] E[x₂²]."""
    generator = seeded()
    layer = nn.Bilinear(5, 40, 300, bias=False)
    nn.init.normal_(layer.weight, 0.0, 1.0, generator)
    # signs: their squares are 1 exactly
    a, b = (torch.randn(64, n, generator=generator).sign() for n in (5, 40))
    power = layer(a, b).square().mean().item()
    assert power == pytest.approx(fans(layer).fan_in, rel=0.07)  # five standard deviations


# A model as a whole.


def mlp(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(300, 500), activation(), nn.Linear(500, 200))


@pytest.mark.parametrize(
    ("activation", "scheme", "variance", "kurtosis"),
    [
        (nn.ReLU, "he normal", 2 / 300, 3),
        (nn.GELU, "he normal", 2 / 300, 3),
        (lambda: nn.LeakyReLU(0.5), "he normal", 2 / (1.25 * 300), 3),
        (nn.PReLU, "he normal", 2 / (1.0625 * 300), 3),
        (lambda: nn.RReLU(0.2, 0.8), "he normal", 2 / (1.25 * 300), 3),
        (nn.SELU, "lecun normal", 1 / 300, 3),
        (nn.Tanh, "xavier uniform", 2 / 800, 1.8),
        (nn.Sigmoid, "xavier uniform", 2 / 800, 1.8),
        (nn.Identity, "xavier uniform", 2 / 800, 1.8),
    ],
)
def test_auto_goes_by_the_activation(activation, scheme, variance, kurtosis):
    model = mlp(activation)
    report = init.initialize(model, generator=seeded())
    assert report["0"].scheme == scheme
    assert report["0"].std == pytest.approx(math.sqrt(variance))
    assert_variance(model[0].weight.detach(), variance, kurtosis)
    assert not model[0].bias.any()
    assert not model[2].bias.any()
    assert report["2"].scheme == "xavier uniform"


@pytest.mark.parametrize(
    ("scheme", "variance"),
    [("he", 2 / 300), ("xavier", 2 / 800), ("lecun", 1 / 300), ("orthogonal", 2 / 500)],
)
def test_a_scheme_that_was_asked_for(scheme, variance):
    model = mlp()
    report = init.initialize(model, scheme, generator=seeded())
    assert report["0"].scheme.startswith(scheme)
    assert report["0"].std == pytest.approx(math.sqrt(variance))
    assert_variance(model[0].weight.detach(), variance, 3)
    assert_variance(model[2].weight.detach(), report["2"].std ** 2, 3)  # more columns than rows


def test_the_same_generator_gives_the_same_model():
    models = [nn.Sequential(mlp(), nn.BatchNorm1d(200), nn.LSTM(200, 3)) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        init.initialize(model, generator=seeded(seed))
    one, same, other = (nn.utils.parameters_to_vector(m.parameters()) for m in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class Functional(nn.Module):
    """Activations as functions and methods, defined in another order than they run."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)
        self.tanh = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.leaky = nn.Linear(4, 4)
        self.relu = nn.Linear(4, 4)

    def forward(self, x, scale=None):
        x = F.dropout(F.relu(self.relu(x)), 0.1, self.training)
        x = F.leaky_relu(self.norm(self.leaky(x)).reshape(x.shape), 0.3)
        x = self.tanh(x).tanh()
        if scale is not None:
            x = x * scale
        return self.last(x)


def test_activations_written_as_functions():
    following = read(Functional()).following
    assert following == {
        "relu": Activation("relu"),
        "leaky": Activation("leaky_relu", 0.3),
        "tanh": Activation("tanh"),
        "last": None,
    }


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_read_in_order():
    structure = read(Untraceable())
    assert "TraceError" in structure.untraced
    assert structure.following == {"body.0": Activation("relu"), "body.3": None}
    report = init.initialize(Untraceable())
    assert report["body.0"].scheme == "he normal"
    assert "order of the modules" in report["body.0"].reason
    assert redundant_biases(Untraceable()) == [("body.0", "body.1")]


def test_fused_activations_are_seen():
    model = nn.Sequential(
        fastnorm.LinearBatchNorm(4, 4, bias=True, activation="leaky_relu"),
        nn.Linear(4, 4),
        fastnorm.BatchNorm1d(4, activation="tanh"),
    )
    assert read(model).following == {
        "0.linear": Activation("leaky_relu", 0.01),
        "1": Activation("tanh"),
    }
    assert redundant_biases(model) == [("0.linear", "0.norm"), ("1", "2")]


def test_norms_are_reset_and_nothing_is_dropped():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.LayerNorm(16),
        nn.Embedding(3, 4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True),
        nn.Bilinear(2, 3, 4), nn.ConvTranspose1d(2, 4, 3), nn.LSTM(2, 3), nn.GRUCell(2, 3),
        nn.MultiheadAttention(4, 2),
    )  # fmt: skip
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(7)
    report = init.initialize(model, generator=seeded())
    for module in model:
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
            assert (module.weight == 1).all()
            assert getattr(module, "bias", None) is None or (module.bias == 0).all()
    assert (model[1].running_mean == 0).all()
    assert (model[1].running_var == 1).all()
    assert model[1].num_batches_tracked == 0
    kept = [name for name, tensor in model.named_parameters() if (tensor == 7).any()]
    assert kept == ["2.weight"]
    assert report["2.weight"].scheme == "kept"
    named = {row.layer for row in report}
    for name, _ in model.named_parameters():
        owner = name.rpartition(".")[0]
        is_bias = "bias" in name
        assert {name, owner} & named or is_bias, name


def test_gates_and_projections_are_drawn_apart():
    """A chunk's own fans, not those of the weight that all share."""
    lstm, attention = nn.LSTM(200, 300), nn.MultiheadAttention(200, 2)
    init.initialize(nn.ModuleList([lstm, attention]), generator=seeded())
    for gate in lstm.weight_ih_l0.detach().chunk(4):
        assert_variance(gate, 2 / 500, 1.8)
    for gate in lstm.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(300), atol=1e-4, rtol=0)
    for projection in attention.in_proj_weight.detach().chunk(3):
        assert_variance(projection, 2 / 400, 1.8)


def test_embeddings_keep_their_padding():
    model = nn.Embedding(500, 300, padding_idx=0)
    report = init.initialize(model, generator=seeded())
    assert not model.weight[0].any()
    assert_variance(model.weight[1:].detach(), 1.0, 3)
    assert report[""].std == 1.0


@pytest.mark.parametrize("first", ["embedding", "linear"])
def test_tied_weights_are_drawn_once_as_the_linear(first):
    embedding, linear = nn.Embedding(500, 300), nn.Linear(300, 500, bias=False)
    linear.weight = embedding.weight
    pair = {"embedding": embedding, "linear": linear}
    names = [first, *(name for name in pair if name != first)]
    model = nn.ModuleDict({name: pair[name] for name in names})
    report = init.initialize(model, generator=seeded())
    assert_variance(linear.weight.detach(), 2 / 800, 1.8)
    assert report["embedding"].scheme == "tied"
    assert "linear" in report["embedding"].reason


def test_frozen_parameters_are_kept():
    model = mlp()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    report = init.initialize(model)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert torch.equal(model[0].bias, before["0.bias"])
    assert not torch.equal(model[2].weight, before["2.weight"])
    assert report["0"].reason == "frozen"


def test_a_frozen_norm_keeps_the_averages_that_belong_to_its_weight():
    """Of a pretrained body whose head is new."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).requires_grad_(False)
    model = nn.Sequential(body, nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(7)
    report = init.initialize(model)
    assert all((tensor == 7).all() for tensor in body.state_dict().values())
    assert (report["0.1"].scheme, report["0.1"].reason) == ("kept", "frozen")
    assert not model[1].running_mean.any()
    assert not model[2].running_mean.any()


def test_the_report_names_what_it_left_alone():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.low = nn.Parameter(torch.full((2, 4), 7.0))

    class Scaled(nn.LSTM):
        def __init__(self):
            super().__init__(4, 4)
            self.scale = nn.Parameter(torch.full((3,), 7.0))

    class Gated(nn.MultiheadAttention):
        def __init__(self):
            super().__init__(4, 2)
            self.gate = nn.Parameter(torch.full((3,), 7.0))

    class Norm(nn.LayerNorm):
        def __init__(self):
            super().__init__(4)
            self.shift = nn.Parameter(torch.full((4,), 7.0))

    kinds = {"a": Adapted, "b": Scaled, "c": Gated, "d": Norm, "e": lambda: nn.Embedding(3, 4)}
    model = nn.ModuleDict({name: kind() for name, kind in kinds.items()})
    model["e"].extra = nn.Parameter(torch.full((2,), 7.0))
    for name in ("a.bias", "b.bias_ih_l0", "c.in_proj_bias", "d.bias"):
        nn.init.constant_(model.get_parameter(name), 7.0).requires_grad_(False)
    report = init.initialize(model)
    kept = {row.layer: row.reason for row in report if row.scheme == "kept"}
    seven = {name for name, tensor in model.named_parameters() if (tensor == 7).all()}
    assert set(kept) == seven - {"d.bias"}
    assert kept["a.low"] == "no rule for a parameter of Adapted"
    assert kept["b.bias_ih_l0"] == "frozen"
    assert report["d"].reason == "weight 1, bias frozen"


def test_an_activation_without_a_finite_slope():
    model = mlp(nn.PReLU)
    nn.init.constant_(model[1].weight, math.nan)
    assert init.initialize(model)["0"].std == pytest.approx(math.sqrt(2 / 300))


def test_frozen_parametrized_weights_and_biases():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(30, 50))
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    before = copy.deepcopy(layer.state_dict())
    report = init.initialize(nn.Sequential(layer.requires_grad_(False)))
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    assert [(row.layer, row.reason) for row in report] == [("0", "frozen"), ("0.bias", "frozen")]
    nn.utils.parametrize.remove_parametrizations(layer, "bias")
    nn.utils.parametrize.register_parametrization(layer, "bias", Doubled())
    init.initialize(nn.Sequential(layer.requires_grad_(True)))
    assert not layer.bias.any()
    assert not layer.parametrizations.bias.original.any()


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value

    def right_inverse(self, value):
        return value / 2


def test_parametrized_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(300, 500)), nn.ReLU())
    report = init.initialize(model, generator=seeded())
    assert_variance(model[0].weight.detach(), 2 / 300, 3)
    assert [row.layer for row in report] == ["0"]
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    model = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    assert init.initialize(model)["0"].scheme == "kept"


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_in_a_model(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(kind(64, 64, 3, groups=4), nn.ReLU())
    init.initialize(model, generator=seeded())
    assert_variance(model[0].weight.detach(), 2 / (16 * 9), 3)


# Residual rules.


class Block(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.skip = nn.Linear(width, width) if kind == "projected" else nn.Identity()

    def forward(self, x):
        if self.kind == "pre":
            return x + self.b(F.relu(self.a(self.norm(x))))
        return torch.add(F.dropout(self.norm(self.b(F.relu(self.a(x)))), 0.0), self.skip(x))


def residual_model(kind, blocks=3):
    return nn.Sequential(nn.Linear(6, 8), *(Block(8, kind) for _ in range(blocks)), nn.Linear(8, 2))


@pytest.mark.parametrize(("kind", "end"), [("pre", "b"), ("post", "norm"), ("projected", "norm")])
def test_zero_makes_each_block_its_skip(kind, end):
    model = residual_model(kind)
    report = init.initialize(model, residual="zero", generator=seeded())
    x = torch.randn(5, 8)
    for index in (1, 2, 3):
        assert not getattr(model[index], end).weight.any()
        assert torch.equal(model[index](x), model[index].skip(x))
        assert "ends a residual branch" in report[f"{index}.{end}"].reason
        assert model[index].a.weight.any()
    model(torch.randn(5, 6)).sum().backward()
    assert getattr(model[1], end).weight.grad.any()  # it learns


@pytest.mark.parametrize(("kind", "end"), [("pre", "b"), ("post", "norm"), ("projected", "norm")])
def test_depth_scales_the_end_of_each_branch(kind, end):
    plain, scaled = residual_model(kind), residual_model(kind)
    init.initialize(plain, generator=seeded())
    report = init.initialize(scaled, residual="depth", generator=seeded())
    for (name, one), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        ends = name.split(".")[-2] == end and name.endswith("weight")
        factor = 1 / math.sqrt(6) if ends else 1.0
        torch.testing.assert_close(other, factor * one)
    assert "1/√(2·3)" in report[f"2.{end}"].reason


def test_a_block_called_twice_is_scaled_once():
    block = Block(8, "pre")
    plain, model = nn.Sequential(block, block), nn.Sequential(block, block)
    init.initialize(plain, generator=seeded())
    want = block.b.weight / math.sqrt(2 * read(model).blocks)
    init.initialize(model, residual="depth", generator=seeded())
    torch.testing.assert_close(block.b.weight, want)


def test_a_loop_over_layers_has_a_block_at_each_sum():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    assert read(nn.Sequential(nn.Linear(4, 4), Loop())).blocks == 4


@pytest.mark.parametrize("rule", ["zero", "depth"])
def test_a_frozen_end_of_a_branch_is_kept(rule):
    model = residual_model("pre")
    model[2].b.requires_grad_(False)
    before = model[2].b.weight.clone()
    report = init.initialize(model, residual=rule)
    assert torch.equal(model[2].b.weight, before)
    assert "no weight that may change" in report["2.b"].reason


def test_our_norms_end_a_branch_with_its_sum():
    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = fastnorm.BatchNorm2d(3, activation="relu")

        def forward(self, x):
            return self.norm(self.conv(x), x)

    model = nn.Sequential(Ours(), Ours())
    init.initialize(model, residual="zero")
    assert [branch.end for branch in read(model).branches] == ["0.norm", "1.norm"]
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model(x), x.relu())


def test_our_norms_of_a_sum_end_the_branch_before():
    class Ours(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = fastnorm.AddLayerNorm(4)

        def forward(self, x):
            y, total = self.norm(self.b(self.a(x).relu()), x)
            return total + y

    model = nn.Sequential(Ours(), Ours())
    assert "0.b" in [branch.end for branch in read(model).branches]
    report = init.initialize(Ours(), residual="zero")
    assert report["b"].std == 0
    assert report["a"].std > 0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.mlp(x)


def test_a_transformer_block_counts_once():
    model = nn.Sequential(Attention(), Attention())
    structure = read(model)
    ends = ["attention.out_proj", "mlp.2"]
    assert [branch.end for branch in structure.branches] == [
        f"{block}.{end}" for block in (0, 1) for end in ends
    ]
    assert structure.blocks == 2
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    theirs = read(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    assert theirs.blocks == 3
    assert len(theirs.branches) == 6
    assert theirs.following["layers.0.linear1"] == Activation("gelu")


def test_sums_that_are_no_residual():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x, y):
            return self.a(x) + self.b(y) + self.bias, self.a(x) + self.b(x)

    assert read(Sums()).branches == []


@pytest.mark.parametrize("residual", ["zero", "depth"])
def test_a_model_without_branches_has_none_to_scale(residual):
    reports = [
        init.initialize(mlp(), residual=rule, generator=seeded()) for rule in ("none", residual)
    ]
    assert str(reports[0]) == str(reports[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_dtypes_of_which_nothing_is_drawn_are_kept(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weight = torch.ones(4, 4).to(dtype)
    model[1].weight = nn.Parameter(weight, requires_grad=dtype is not torch.int8)
    report = init.initialize(model)
    assert report["0"].scheme != report["1"].scheme == "kept"
    assert torch.equal(model[1].weight.to(torch.complex64), torch.ones(4, 4) + 0j)


def test_lsuv_scales_the_layers_within_ours():
    model = nn.Sequential(fastnorm.LinearBatchNorm(6, 8), fastnorm.LinearBatchNorm(8, 8))
    report = init.lsuv(model, torch.randn(64, 6))
    assert [report[f"{i}.linear"].scheme for i in range(2)] == ["lsuv", "lsuv"]


def test_double_norms():
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.Identity(), nn.LayerNorm(4), nn.ReLU(), nn.LayerNorm(4)
    )
    assert double_norms(model) == [("0", "2", "")]
    assert double_norms(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())) == []


def test_a_bias_before_batch_norm():
    def model(bias=True, norm=nn.BatchNorm2d, between=()):
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), *between, norm(4), nn.ReLU())

    assert redundant_biases(model()) == [("0", "1")]
    assert redundant_biases(model(norm=nn.InstanceNorm2d)) == [("0", "1")]
    assert redundant_biases(model(bias=False)) == []
    assert redundant_biases(model(norm=lambda C: nn.GroupNorm(2, C))) == []
    assert redundant_biases(model(between=[nn.ReLU()])) == []


# What is refused.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scheme": "kaiming"}, ValueError, "auto, he, xavier, lecun, orthogonal, .*'kaiming'"),
        ({"residual": "one"}, ValueError, "none, zero, depth, but got 'one'"),
    ],
)
def test_bad_options(options, error, words):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        init.initialize(model, **options)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_bad_models():
    with pytest.raises(TypeError, match="got Tensor"):
        init.initialize(torch.ones(3))
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"1\.weight is lazy"):
        init.initialize(model)
    assert torch.equal(before, model[0].weight)
    with pytest.raises(ValueError, match="cannot trace it: TraceError"):
        init.initialize(Untraceable(), residual="zero")


def test_the_report_is_a_table():
    report = init.initialize(mlp(), generator=seeded())
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "scheme", "fan", "std", "reason"]
    assert len(lines) == 2 + len(report)
    assert lines[2].split() == ["0", "he", "normal", "300", "0.08165", "relu", "follows"]
    with pytest.raises(KeyError):
        report["9"]


# From data.


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_lsuv_makes_every_output_of_variance_one(activation):
    layers = [nn.Conv2d(1, 8, 3), activation(), nn.Flatten()]
    layers += [nn.Linear(288, 40), activation()]
    for _ in range(10):
        layers += [nn.Linear(40, 40), activation(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(40, 10))
    x = torch.randn(64, 1, 8, 8, generator=seeded()) * 5 + 3
    report = init.lsuv(model, x, generator=seeded())
    assert all(module.training for module in model)
    model.eval()
    for index, module in enumerate(model):
        x = module(x)
        if isinstance(module, nn.Conv2d | nn.Linear):
            # the deviation of thousands of float32 numbers, divided out once
            assert x.std(correction=0).item() == pytest.approx(1, abs=1e-4)
            assert report[str(index)].std == pytest.approx(1, abs=1e-4)
            assert report[str(index)].scheme == "lsuv"


def test_lsuv_of_norms_shared_layers_and_parametrizations():
    shared = nn.Linear(8, 8)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(shared, nn.BatchNorm1d(8), nn.ReLU(), shared, normed, nn.Linear(8, 2))
    unused = nn.ModuleDict({"model": model, "unused": nn.Linear(2, 2)})
    unused.forward = lambda x: model(x)
    report = init.lsuv(unused, (torch.randn(50, 8, generator=seeded()),), generator=seeded())
    assert model[1].num_batches_tracked == 0
    assert not model[1].running_mean.any()
    assert report["model.4"].std == pytest.approx(1, abs=1e-4)
    assert "never called" in report["unused"].reason


def test_lsuv_says_where_a_scale_cannot_be_set():
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    report = init.lsuv(nn.Sequential(normed, nn.Linear(16, 4)), 0.1 * torch.randn(64, 16))
    assert report["0"].std < 0.5
    assert report["0"].reason == "orthogonal; its parametrization sets the scale"
    assert report["1"].std == pytest.approx(1, rel=1e-4)


def test_lsuv_under_autocast():
    """Its copies of the weights in 16 bits are those after scaling."""
    model, x = mlp(), torch.randn(64, 300, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        report = init.lsuv(model, 5 * x, generator=seeded())
    # a bfloat16 has 8 bits, and a deviation is of thousands of outputs
    assert report["0"].std == pytest.approx(1, abs=0.01)
    assert report["2"].std == pytest.approx(1, abs=0.01)
    assert model[0](5 * x).std(correction=0).item() == pytest.approx(1, abs=0.01)


def test_lsuv_scales_what_the_layer_gives_whatever_hooks_make_of_it():
    model, x = mlp(), torch.randn(64, 300, generator=seeded())
    model[0].register_forward_hook(lambda module, args, output: 100 * output)
    report = init.lsuv(model, x, generator=seeded())
    assert report["0"].std == pytest.approx(1, abs=1e-4)
    hidden = F.linear(x, model[0].weight)
    assert hidden.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert model(x).std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_lsuv_of_a_compiled_model_runs_it_layer_by_layer():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, x = torch.compile(mlp(), backend=backend), torch.randn(64, 300, generator=seeded())
    report = init.lsuv(model, x, generator=seeded())
    assert graphs == []
    assert report["_orig_mod.2"].std == pytest.approx(1, abs=1e-4)
    assert model(x).std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_lsuv_says_what_it_did_not_scale():
    model = nn.ModuleDict({"a": Attention(), "l": nn.LSTM(8, 8), "u": nn.Linear(8, 8)})
    model.forward = lambda x: model["l"](model["a"](x))[0]
    report = init.lsuv(model, torch.randn(4, 5, 8))
    part = ["a.attention.in_proj_weight", "a.attention.out_proj", "l.weight_ih_l0"]
    for name in part:
        assert report[name].reason.endswith("not scaled: a part of a larger layer")
    assert report["u"].reason.endswith("not scaled: the batch never called it")
    scaled = [row.layer for row in report if row.scheme == "lsuv"]
    assert scaled == ["a.mlp.0", "a.mlp.2"]


def test_lsuv_needs_values():
    with pytest.raises(ValueError, match="weight is on the meta device"):
        init.lsuv(nn.Sequential(nn.Linear(4, 4, device="meta")), torch.randn(8, 4, device="meta"))


def test_lsuv_takes_arguments_by_name():
    model = Functional()
    report = init.lsuv(model, {"x": torch.randn(50, 4), "scale": torch.full((4,), 3.0)})
    assert report["last"].std == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("batch", "std"), [(torch.zeros(5, 300), "0.0"), (torch.full((5, 300), math.inf), "nan")]
)
def test_lsuv_refuses_a_constant_output(batch, std):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"output of 0 has a standard deviation of {std}"):
        init.lsuv(model, batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model[0]._forward_hooks


def test_a_padding_row_stays_zero_where_a_layer_shares_the_weight():
    model = nn.ModuleDict({"in": nn.Embedding(10, 4, padding_idx=3), "out": nn.Linear(4, 10)})
    model["out"].weight = model["in"].weight
    told = {row.layer: row.reason for row in init.initialize(model).rows}
    weight = model["in"].weight
    assert weight[3].tolist() == [0.0] * 4
    assert weight.abs().sum() > 0
    assert told["out"].endswith("row 3 is padding, 0")


class GivesBias(nn.Linear):
    """As Megatron's: (output, bias)."""

    def forward(self, x):
        return F.linear(x, self.weight), self.bias


class TakesBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = GivesBias(4, 4)

    def forward(self, x):
        y, bias = self.layer(x)
        return y + bias


def test_lsuv_scales_a_layer_that_returns_its_bias_too():
    model, batch = TakesBias(), torch.randn(64, 4)
    (row,) = init.lsuv(model, batch).rows
    assert row.scheme == "lsuv"
    assert F.linear(batch, model.layer.weight).std(correction=0).item() == pytest.approx(1.0)


def test_a_lazy_buffer_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"1\.running_mean is lazy"):
        init.initialize(model)
    assert torch.equal(model[0].weight, before)


class Inserting(nn.Sequential):
    """A forward of its own, which cannot be traced: its parts are no neighbours."""

    def forward(self, x):
        first, norm = self
        return norm(first(x).relu() if x.sum().item() != 0 else first(x))


def test_parts_of_a_sequential_with_its_own_forward_are_no_neighbours():
    assert redundant_biases(Inserting(nn.Linear(4, 8), nn.BatchNorm1d(8))) == []


class Tied(nn.Module):
    """A language model's head, scaled last, is its embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)).tanh())


def test_what_lsuv_reports_is_so_where_weights_are_tied():
    model, tokens = Tied(), torch.randint(50, (8, 16))
    report = init.lsuv(model, tokens)
    found = model.layer(model.embedding(tokens))
    assert report["layer"].std == pytest.approx(found.std(correction=0).item(), rel=1e-5)
    assert report["layer"].std == pytest.approx(1.0, rel=1e-5)
    assert report["head"].reason.endswith("not scaled: its weight is another layer's, too")
