"""fastnorm.signals: what is recorded is what went through; each finding where it is due, only."""

import gc
import math
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.overrides import BaseTorchFunctionMode

import fastnorm
from fastnorm import init, signals
from fastnorm.cli.models import FASTNORM, MODELS
from fastnorm.signals import moments, samples, watch
from fastnorm.signals.moments import First, Moments, moments_of
from fastnorm.signals.samples import Samples, units_axis
from fastnorm.signals.weights import alike


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def recorded(model, x, *, loss=None, steps=1, **options):
    """The signals of `steps` forward and backward passes."""
    with signals.record(model, **options) as seen:
        for _ in range(steps):
            y = model(x)
            if y.requires_grad:
                (y.square().mean() if loss is None else loss(y)).backward()
    return seen


def by_name(seen):
    return {layer.name: layer for layer in seen.layers}


def problems(seen):
    return [(finding.layer, finding.problem) for finding in seen.findings()]


def found(seen, problem):
    return [finding.layer for finding in seen.findings() if finding.problem == problem]


# The numbers.


def test_numbers_are_those_of_the_tensors():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    x, dy = torch.randn(6, 2, 6, 6) + 1, torch.randn(6, 5)
    outputs = [x]
    for module in model:
        outputs.append(module(outputs[-1]))
        outputs[-1].retain_grad()
    outputs[-1].backward(dy)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    with signals.record(model) as seen:
        model(x).backward(dy)
    layers = by_name(seen)
    assert list(layers) == ["0", "1", "3"]
    for name, layer in layers.items():
        y = outputs[int(name) + 1].detach().double()
        # float32 inputs, float64 sums; the gradient's norm is summed in float32
        assert layer.mean == pytest.approx(y.mean().item(), rel=1e-10, abs=1e-12)
        assert layer.std == pytest.approx(y.std(correction=0).item(), rel=1e-10)
        assert layer.zeros == pytest.approx((y == 0).double().mean().item(), abs=1e-12)
        gradient = outputs[int(name) + 1].grad.double().norm().item()
        assert layer.gradient_norm == pytest.approx(gradient, rel=1e-5)
        assert layer.calls == 1
    assert layers["1"].values == 6 * 16
    for name, index in (("0", 0), ("3", 2)):
        weight = model[int(name)].weight.detach().double()
        assert layers[name].weight_norm == pytest.approx(weight.norm().item(), rel=1e-5)
        want = gradients[index].double().norm().item()
        assert layers[name].weight_gradient_norm == pytest.approx(want, rel=1e-5)
    assert math.isnan(layers["1"].weight_norm)
    assert math.isnan(layers["0"].saturated)
    assert math.isnan(layers["0"].dead)
    for parameter, want in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, want)  # the same bits as without the recorder


def test_calls_are_merged():
    batches = [torch.randn(5, 4) * 10**k + k for k in range(3)]
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with signals.record(model) as seen:
        for x in batches:
            model(x).sum().backward()
    y = model(torch.cat(batches)).detach().double()
    layer = by_name(seen)["1"]
    assert (layer.calls, layer.values) == (3, 15)
    assert layer.mean == pytest.approx(y.mean().item(), rel=1e-6)
    assert layer.std == pytest.approx(y.std(correction=0).item(), rel=1e-6)
    assert layer.zeros == pytest.approx((y == 0).double().mean().item())
    assert layer.gradient_norm == pytest.approx(math.sqrt(15))


def test_moments_far_from_zero_are_exact():
    """E[x²] − E[x]² of these would be off by more than the variance itself, in float32 at least."""
    parts = [1e8 + torch.randn(50, 2, dtype=torch.float64) for _ in range(3)]
    found = Moments()
    for one in moments_of(torch.stack(parts).flatten(1), ()):
        found.add(100, *one)
    numbers = found.read(float)
    want = torch.cat(parts)
    assert numbers["mean"] == pytest.approx(want.mean().item(), rel=1e-14)
    assert numbers["std"] == pytest.approx(want.std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(7,), (300, 40), (16, 8, 50), (8, 16, 30, 30), (2, 3, 9, 9, 9)])
@pytest.mark.parametrize("last", [False, True])
def test_a_sample_is_small_and_has_all_units(shape, last):
    x = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    axis = units_axis(x, last)
    picked = Samples(500).take(x, axis)
    assert picked.shape[1] == shape[axis]
    assert picked.numel() <= max(600, shape[axis])
    assert picked.numel() >= min(x.numel(), 500) / 8
    assert len(picked.unique()) == picked.numel()
    units = x.movedim(axis, -1).reshape(-1, shape[axis])
    for unit in range(shape[axis]):
        assert torch.isin(picked[:, unit], units[:, unit]).all()
    assert torch.equal(Samples(x.numel()).take(x, axis), units)


def test_samples_are_stacked_in_the_buffer_s_space(monkeypatch):
    monkeypatch.setattr(samples, "SPACE", 60)
    taken = [torch.full(shape, float(n)) for n, shape in enumerate([(5, 4), (7, 10), (5, 4)] * 4)]
    places = []
    for some, stack in Samples(60).stacks([one.double() for one in taken]):
        assert stack.numel() <= 60 or len(some) == 1
        assert torch.equal(stack.float(), torch.stack([taken[place] for place in some]))
        places += some
    assert sorted(places) == list(range(12))


def test_the_sample_size_is_heeded_and_close():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.randn(20000, 8)
    exact, close = (by_name(recorded(model, x, sample=n))["1"] for n in (10**6, 2**12))
    assert close.std != exact.std
    # 4,096 values: five standard deviations of a share, and of a standard deviation
    assert close.zeros == pytest.approx(exact.zeros, abs=5 * 0.5 / 64)
    assert close.std == pytest.approx(exact.std, rel=5 / 64)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.act(self.b(x)).tanh()
        return torch.sigmoid(x)


def test_functions_are_layers_too():
    seen = recorded(Functional(), torch.randn(64, 4))
    names = ["a", "a → relu", "b", "act", "act → tanh", "act → sigmoid"]
    assert list(by_name(seen)) == names
    assert by_name(seen)["a → relu"].dead >= 0
    assert by_name(seen)["act → tanh"].gradient_norm > 0


def test_updates_are_related_to_weights():
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.weight.detach().clone()
    with signals.record(model, optimizer=optimizer) as seen:
        model(torch.randn(7, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    (layer,) = seen.layers
    want = (model.weight.detach() - before).norm() / before.norm()
    assert layer.update_ratio == pytest.approx(want.item(), rel=1e-5)
    assert layer.weight_gradient_norm * 0.5 == pytest.approx(
        (want * before.norm()).item(), rel=1e-4
    )
    assert math.isnan(recorded(model, torch.randn(7, 6)).layers[0].update_ratio)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_updates_of_large_weights_are_sampled_from_all_units(memory_format):
    """An update of one unit in eight, 100 times that of the others."""
    model = nn.Conv2d(64, 64, 3, bias=False).to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    with signals.record(model, optimizer=optimizer) as seen:
        model(torch.randn(2, 64, 5, 5)).square().mean().backward()
        model.weight.grad = torch.randn_like(before)
        model.weight.grad[3::8] *= 100
        optimizer.step()
    want = (model.weight.detach() - before).norm() / before.norm()
    # 8,192 of 36,864 values in runs of 16, an eighth of which make the sum: 1,000 independent ones
    assert seen.layers[0].update_ratio == pytest.approx(want.item(), rel=0.15)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_changes_but_time(name, inplace):
    """Outputs, gradients, buffers and the state of random numbers have the same bits."""
    shape = torch.Size([1, 8, 8])
    models = [MODELS[name].build(FASTNORM, shape, 10) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models = [nn.Sequential(m, nn.ReLU(inplace=inplace), nn.Dropout(0.5)) for m in models]
    x = torch.randn(8, *shape)
    state = torch.get_rng_state()
    plain = models[0](x)
    plain.square().sum().backward()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with signals.record(models[1]):
        y = models[1](x)
        y.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(y, plain)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(models[0].buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other)


def hooks(model):
    return [
        hook
        for module in model.modules()
        for kind in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in kind
    ] + [p for p in model.parameters() if p._post_accumulate_grad_hooks]


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_at_the_end(fails):
    model, x = Functional(), torch.randn(4, 3 if fails else 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if fails:
        with pytest.raises(RuntimeError), signals.record(model, optimizer=optimizer) as seen:
            model(x)
    else:
        with signals.record(model, optimizer=optimizer) as seen:
            loss = model(x).sum()
        loss.backward()  # after the block: not recorded
        assert all(math.isnan(layer.gradient_norm) for layer in seen.layers)
    assert hooks(model) == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    count = len(seen.layers)
    F.relu(torch.ones(2))
    assert len(seen.layers) == count


def test_a_recording_can_be_made_again():
    model = Functional()
    record = signals.record(model)
    for calls in (1, 2):
        with record as seen:
            for _ in range(calls):
                model(torch.randn(4, 4))
        assert by_name(seen)["a"].calls == calls
    with record, pytest.raises(RuntimeError, match="runs already"):
        record.__enter__()


def test_evaluation_without_gradients():
    model = Functional().eval()
    with torch.no_grad():
        seen = recorded(model, torch.randn(4, 4))
    assert len(seen.layers) == 6
    assert all(math.isnan(layer.gradient_norm) for layer in seen.layers)
    assert seen.table()


def test_modules_with_tuples_integers_and_sparse_gradients():
    model = nn.ModuleDict({
        "embedding": nn.Embedding(9, 4, sparse=True),
        "lstm": nn.LSTM(4, 4, batch_first=True),
        "attention": nn.MultiheadAttention(4, 2, batch_first=True),
    })  # fmt: skip

    def forward(x):
        h, _ = model["lstm"](model["embedding"](x))
        return model["attention"](h, h, h)[0]

    model.forward = forward
    seen = recorded(model, torch.randint(9, (3, 5)))
    layers = by_name(seen)
    assert list(layers) == ["embedding", "lstm", "attention"]
    assert all(layer.gradient_norm > 0 for layer in seen.layers)
    assert all(layer.weight_gradient_norm > 0 for layer in seen.layers)
    assert seen.findings() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(dtype)
    x = torch.randn(50, 4, dtype=dtype) * 1000  # its squares' sum overflows float16
    layer = by_name(recorded(model, x, loss=lambda y: y.float().sum()))["0"]
    y = model[0](x).detach().double()
    assert layer.std == pytest.approx(y.std(correction=0).item(), rel=1e-10)
    assert layer.failed == math.inf


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: signals.record(3), TypeError, "model must be .* got int"),
        (lambda: signals.record(nn.ReLU(), optimizer=3), TypeError, "optimizer must be .* got int"),
        (lambda: signals.record(nn.ReLU(), sample=0), ValueError, "sample must be 1 or more"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


# Findings. Each with a model that has the problem, and one that has not.


def deep(activation=nn.Tanh, depth=12, width=64, norm=None, scale=1.0):
    layers = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), norm(width) if norm else nn.Identity()]
        layers.append(activation())
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    init.initialize(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= scale
    return model


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("steps", [1, 3])
def test_a_sound_model_has_none(name, steps):
    model = MODELS[name].build(FASTNORM, torch.Size([1, 8, 8]), 10)
    assert recorded(model, torch.randn(64, 1, 8, 8), steps=steps).findings() == []
    assert recorded(deep(nn.Tanh), torch.randn(256, 64)).findings() == []


@pytest.mark.parametrize(
    ("scale", "forward", "backward"),
    [(0.5, "vanishing", "vanishing"), (2, "exploding", "exploding")],
)
def test_vanishing_and_exploding(scale, forward, backward):
    seen = recorded(deep(nn.ReLU, scale=scale), torch.randn(256, 64))
    first, second = seen.findings()[:2]
    assert first.problem == f"{forward} signal"
    assert second.problem == f"{backward} gradient"
    # half of the weight is half of the signal a layer: 1 % after 7 of them
    assert first.layer in ("21", "24", "27")
    assert int(second.layer) <= 18
    rate = float(re.search(r"factor of ([\d.]+) a layer", first.evidence)[1])
    assert rate == pytest.approx(scale, rel=0.1)
    assert "initialize" in first.remedy


def test_a_norm_cures_the_signal():
    seen = recorded(deep(nn.Tanh, norm=nn.LayerNorm, scale=0.1), torch.randn(256, 64))
    assert seen.findings() == []
    assert recorded(deep(nn.Tanh, scale=0.1), torch.randn(256, 64)).findings() != []


def test_queries_with_small_gradients_are_no_trend():
    """As in BERT: the first two Linear layers of each block hardly matter to the loss."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.out, self.up, self.down = (
                nn.Linear(32, 32) for _ in range(6)
            )
            self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

        def forward(self, x):
            scores = 1e-4 * self.query(x) @ self.key(x).mT
            x = self.norms[0](x + self.out(scores.softmax(-1) @ self.value(x)))
            return self.norms[1](x + self.down(F.gelu(self.up(x))))

    seen = recorded(nn.Sequential(*(Block() for _ in range(4))), torch.randn(8, 6, 32))
    gradients = {layer.name: layer.gradient_norm for layer in seen.layers}
    assert gradients["0.query"] < gradients["3.down"] / 1000
    assert seen.findings() == []


@pytest.mark.parametrize("jump", [3, 6, 9])
def test_a_jump_is_a_trend(jump):
    model = deep(nn.ReLU)
    model[3 * jump].weight.data *= 1e4
    assert found(recorded(model, torch.randn(256, 64)), "exploding signal")


def test_gradients_alone_may_vanish():
    """Biases keep the signal alive where its weights do not: the default of torch.nn.Linear."""
    layers = [m for _ in range(12) for m in (nn.Linear(64, 64), nn.ReLU())]
    seen = recorded(nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(64, 64))
    assert found(seen, "vanishing gradient")
    assert not found(seen, "vanishing signal")


def test_a_head_or_a_branch_at_zero_is_no_vanishing():
    model = MODELS["resnet"].build(FASTNORM, torch.Size([1, 8, 8]), 10)
    init.initialize(model, residual="zero")
    assert recorded(model, torch.randn(64, 1, 8, 8)).findings() == []
    model = deep(nn.ReLU)
    nn.init.zeros_(model[-1].weight)
    assert not found(recorded(model, torch.randn(256, 64)), "vanishing signal")


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("bias", [0.0, -100.0])
def test_dead_units(functional, bias):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 2)
            self.relu = nn.ReLU(inplace=True)
            nn.init.zeros_(self.a.bias)
            nn.init.constant_(self.a.bias[:5], bias)

        def forward(self, x):
            h = self.a(x)
            return self.b(F.relu(h) if functional else self.relu(h))

    seen = recorded(Model(), torch.randn(256, 8))
    if bias:
        name = "a → relu" if functional else "relu"
        assert problems(seen) == [(name, "dead units")]
        assert by_name(seen)[name].dead == 0.25
        assert "25% of the units were 0 for all of their 256 values" in str(seen.findings()[0])
    else:
        assert seen.findings() == []


def test_few_values_call_no_unit_dead():
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 2))
    seen = recorded(model, torch.randn(2, 8))
    assert by_name(seen)["1"].dead > 0.1
    assert seen.findings() == []


def test_dead_units_of_convolutions_and_of_fused_norms():
    """By channel, every position of every sample; the norm's own activation counts."""
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 1))
    nn.init.constant_(conv[0].bias[:1], -100.0)
    assert by_name(recorded(conv, torch.randn(4, 1, 8, 8)))["1"].dead == 0.25
    norm = fastnorm.BatchNorm2d(4, activation="relu")
    nn.init.constant_(norm.bias[:2], -100.0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), norm, nn.Conv2d(4, 1, 1))
    assert found(recorded(model, torch.randn(16, 1, 8, 8)), "dead units") == ["1"]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.Hardtanh])
@pytest.mark.parametrize("scale", [1, 50])
def test_saturated_units(activation, scale):
    model = nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 2), nn.Sigmoid())
    init.initialize(model)
    if activation is nn.Hardtanh:  # of unit normal numbers a third is beyond 1
        scale = scale / 2
    x = torch.randn(256, 64) * scale
    seen = recorded(model, x, sample=10**6)
    low = 0 if activation is nn.Sigmoid else -1
    margin = 0.01 * (1 - low)
    y = model[1](model[0](x)).double()
    share = ((y <= low + margin) | (y >= 1 - margin)).double().mean().item()
    assert by_name(seen)["1"].saturated == pytest.approx(share, abs=1e-12)
    assert found(seen, "saturated units") == (["1"] if scale > 1 else [])


def test_zeros_of_a_relu6_are_not_saturated():
    seen = recorded(nn.Sequential(nn.Linear(8, 16), nn.ReLU6()), torch.randn(64, 8))
    assert math.isnan(by_name(seen)["1"].saturated)
    assert found(seen, "saturated units") == []


@pytest.mark.parametrize(
    ("how", "names"),
    [("random", []), ("constant", ["0", "2"]), ("zero", ["0", "2", "4"]), ("one layer", ["2"])],
)
def test_identical_units(how, names):
    model = nn.Sequential(
        nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )
    init.initialize(model)
    for index in (0, 2, 4) if how in ("constant", "zero") else ():
        nn.init.constant_(model[index].weight, 0.1 if how == "constant" else 0.0)
    if how == "one layer":
        nn.init.constant_(model[2].weight, 0.1)
        nn.init.constant_(model[4].weight, 0.1)
    targets = torch.randn(32, 4)
    seen = recorded(model, torch.randn(32, 8), loss=lambda y: F.mse_loss(y, targets))
    # the last layer's units have gradients of their own, unless nothing reaches it
    assert found(seen, "identical units") == names


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_identical_channels(memory_format, constant, kind):
    model = nn.Sequential(kind(70, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
    if constant:
        nn.init.constant_(model[0].weight, 0.1)
        nn.init.constant_(model[2].weight, 0.1)
    model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    with signals.record(model, optimizer=optimizer) as seen:
        model(torch.randn(8, 70, 5, 5)).square().mean().backward()
        optimizer.step()
    # the last layer's biases tell its units apart
    assert found(seen, "identical units") == (["0"] if constant else [])
    want = (model[0].weight.detach() - before).norm() / before.norm()
    assert by_name(seen)["0"].update_ratio == pytest.approx(want.item(), rel=1e-4)


def test_zero_weights_with_gradients_of_their_own_are_not_identical():
    """A head that starts at zero: each class gets another gradient."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    nn.init.zeros_(model[2].weight)
    labels = torch.randint(4, (32,))
    seen = recorded(model, torch.randn(32, 8), loss=lambda y: F.cross_entropy(y, labels))
    assert found(seen, "identical units") == []


@pytest.mark.parametrize("border", ["first", "last"])
def test_a_dark_border_does_not_make_units_alike(border):
    """Of zero weights only the gradients differ, and those of inputs that are 0 are 0."""
    model, x, labels = nn.Linear(784, 10), torch.rand(64, 784), torch.randint(10, (64,))
    nn.init.zeros_(model.weight)
    x[:, slice(0, 300) if border == "first" else slice(-300, None)] = 0
    seen = recorded(model, x, loss=lambda y: F.cross_entropy(y, labels))
    assert found(seen, "identical units") == []


def test_units_that_an_update_told_apart_are_not_identical():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for noise in (0.0, 1.0):
        with signals.record(model) as seen:
            model(torch.randn(64, 8)).square().mean().backward()
            model[0].weight.grad += noise * torch.randn(16, 8)
            optimizer.step()
        assert ("0" in found(seen, "identical units")) == (noise == 0)


def test_alike_counts_pairs_in_both():
    weights = torch.tensor([1.0, 1.0 + 1e-7, 2.0, 3.0, 3.0])
    pairs = [
        (weights, torch.tensor([5.0, 5.0, 6.0, 7.0, 8.0])),
        (torch.ones(3), torch.tensor([1.0, 2.0, 1.0])),
        (weights, torch.arange(5.0)),
        (torch.full((3,), math.nan), torch.ones(3)),
        (torch.zeros(1), torch.zeros(1)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.zeros(3), torch.zeros(3)),
    ]
    assert alike(pairs) == pytest.approx([0.4, 2 / 3, 0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("shape", "few"),
    [((4, 3), True), ((7, 3, 9, 9), True), ((16, 3), False), ((8, 3, 4, 4), False)],
)
def test_too_few_samples(shape, few):
    norm = fastnorm.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    model = nn.Sequential(norm(3))
    seen = recorded(model, torch.randn(shape))
    assert found(seen, "too few samples") == (["0"] if few else [])
    if few:
        values = shape[0] * math.prod(shape[2:])
        assert f"{shape[0]} samples, {values} values" in seen.findings()[0].evidence
    model.eval()
    assert found(recorded(model, torch.randn(shape)), "too few samples") == []


def test_too_few_samples_of_the_smallest_batch():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with signals.record(model) as seen:
        for batch, side in ((32, 4), (4, 2), (16, 1)):
            model(torch.randn(batch, 3, side, side))
    (few,) = seen.findings()
    assert (few.problem, "4 samples, 16 values" in few.evidence) == ("too few samples", True)


def test_too_few_samples_of_a_fused_layer():
    model = fastnorm.LinearBatchNorm(3, 4)
    assert found(recorded(model, torch.randn(4, 3)), "too few samples") == [""]
    assert found(recorded(model, torch.randn(32, 3)), "too few samples") == []


@pytest.mark.parametrize(
    ("momentum", "steps", "mean", "gap"),
    [
        (0.1, 60, 3.0, False),  # settled
        (0.1, 5, 3.0, False),  # too early to say
        (0.001, 60, 3.0, True),  # still at the start
        (0.001, 60, 0.0, False),  # the start is right
        (None, 25, 3.0, False),  # cumulative
    ],
)
def test_running_statistics(momentum, steps, mean, gap):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=momentum))
    with torch.no_grad():
        for _ in range(steps):
            model(torch.randn(16, 3, 4, 4) + mean)
    seen = recorded(model, torch.randn(16, 3, 4, 4) + mean)
    assert found(seen, "running statistics differ") == (["0"] if gap else [])
    assert by_name(seen)["0"].mean_gap == pytest.approx(
        abs(mean - model[0].running_mean.mean().item())
        / model[0].running_var.mean().sqrt().item(), abs=0.15)  # fmt: skip
    if gap:
        assert f"{steps + 1} batches with momentum {momentum}" in seen.findings()[0].evidence


@pytest.mark.parametrize(("mean", "std", "gap"), [(0, 1, False), (2, 1, True), (0, 4, True)])
def test_evaluation_on_other_data(mean, std, gap):
    model = nn.Sequential(nn.BatchNorm1d(5)).eval()
    seen = recorded(model, torch.randn(64, 5) * std + mean)
    assert found(seen, "running statistics differ") == (["0"] if gap else [])


def test_one_value_has_no_statistics():
    seen = recorded(nn.Sequential(nn.BatchNorm1d(5)).eval(), torch.randn(1, 5) + 9)
    assert math.isnan(by_name(seen)["0"].mean_gap)
    assert seen.findings() == []


def test_running_statistics_after_a_layer_of_other_units():
    """A linear layer's units are on the last axis, the norm's channels on axis 1."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(3)).eval()
    x = torch.randn(8, 3, 4)
    seen = recorded(model, x)
    z = model[0](x).double()
    gap = (z.mean((0, 2)).square() / (1 + 1e-5)).mean().sqrt()
    assert by_name(seen)["1"].mean_gap == pytest.approx(gap.item(), rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_redundant_bias(bias):
    model = nn.Sequential(nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU())
    seen = recorded(model, torch.randn(64, 4))
    assert found(seen, "redundant bias") == (["0"] if bias else [])


def test_a_bias_before_fixed_statistics_is_not_redundant():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    model[1].eval()
    assert found(recorded(model, torch.randn(64, 4)), "redundant bias") == []
    model[1] = nn.BatchNorm1d(8, track_running_stats=False).eval()  # has none: the batch's
    assert found(recorded(model, torch.randn(64, 4)), "redundant bias") == ["0"]


@pytest.mark.parametrize("between", [nn.Identity, nn.ReLU])
def test_normalized_twice(between):
    model = nn.Sequential(nn.BatchNorm1d(8), between(), nn.LayerNorm(8))
    seen = recorded(model, torch.randn(64, 8))
    assert found(seen, "normalized twice") == (["2"] if between is nn.Identity else [])


class Broken(nn.Module):
    """Gives `value` at one place, forward or backward."""

    def __init__(self, value, backward=False, index=(3, 2)):
        super().__init__()
        self.linear, self.value, self.backward, self.index = nn.Linear(8, 8), value, backward, index

    def forward(self, x):
        x = self.linear(x)
        mark = torch.zeros(64, 8)
        mark[self.index] = self.value
        if self.backward:
            x.register_hook(lambda gradient: gradient + mark)
            return x
        return x + mark


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backward", [False, True])
def test_not_finite(value, backward):
    """One element of 512, so that no sample need hit it; the first layer after, alone."""
    layers = [nn.Linear(8, 8), Broken(value, backward), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    model = nn.Sequential(*layers)
    seen = recorded(model, torch.randn(64, 8), sample=64)
    (first,) = [f for f in seen.findings() if f.problem == "NaN or infinity"]
    if backward:
        assert first.layer == "0"
        assert "gradient" in first.evidence
        assert "GradScaler" in first.remedy  # whose first steps are meant to overflow
    else:
        assert first.layer == "2"
        assert "output" in first.evidence
    sound = recorded(nn.Sequential(*layers[:1], *layers[2:]), torch.randn(64, 8))
    assert found(sound, "NaN or infinity") == []


def test_not_finite_input_and_weight():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(64, 8)
    x[5, 5] = math.nan
    (first,) = [f for f in recorded(model, x).findings() if f.problem == "NaN or infinity"]
    assert (first.layer, first.remedy) == ("", "clean the data")
    model[2].weight.data[0, 0] = math.nan
    seen = recorded(model, torch.randn(64, 8))
    (first,) = [f for f in seen.findings() if f.problem == "NaN or infinity"]
    assert first.layer == "2"
    assert "its weight holds NaN" in first.evidence


def test_not_finite_after_many_calls(monkeypatch):
    """Results of old calls are merged, and the first is still known."""
    monkeypatch.setattr(moments, "MANY", 4)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    with signals.record(model) as seen:
        for call in range(11):
            x = torch.randn(4, 8)
            x[0, 0] = math.nan if call in (5, 9) else 0.0
            model(x)
    # an event for the input and one for each layer in each call
    assert by_name(seen)["0"].failed == 5 * 3 + 2
    assert seen.input_failed == 5 * 3 + 1
    first = First()
    for event, value in enumerate([1.0, 2.0, math.inf, math.nan, 1.0, math.nan, 1.0, 1.0], 1):
        first.add(torch.tensor(value), event)  # merged twice
    assert first.read(float) == 3


# What is shown.


def test_table_plot_and_page(tmp_path):
    seen = recorded(Functional(), torch.randn(64, 4))
    lines = seen.table().splitlines()
    assert len(lines) == 2 + len(seen.layers)
    assert lines[0].split()[:4] == ["layer", "kind", "mean", "std"]
    assert lines[3].startswith("a → relu")
    seen.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    seen.html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert re.findall(r'src="([^"]{15})', page) == ["data:image/png;"]
    text = re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    assert not re.search(r"https?:|href|<script|@import|url\(", text)
    assert "<p>None.</p>" in page
    assert all(layer.name in page for layer in seen.layers)


def test_zeros_and_what_is_not_finite_are_shown(tmp_path, monkeypatch):
    """On a logarithmic axis they have no place: crosses at its edges, each at its layer."""
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())))
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    nn.init.constant_(model[4].weight[0, 0].detach(), math.inf)
    seen = recorded(model, torch.randn(64, 8), loss=lambda y: y.nan_to_num(0, 0, 0).sum())
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
    seen.plot(tmp_path / "a.png")
    panels = [
        {line.get_label(): line.get_xdata().tolist() for line in panel.lines[1:]}
        for panel in drawn[0].axes
    ]
    assert panels[0] == {"0": [1], "not finite": [2, 3]}
    assert 0 in panels[1]["0"]
    curve = drawn[0].axes[0].lines[0].get_ydata()
    assert math.isfinite(curve[0])
    assert all(math.isnan(value) for value in curve[1:])
    lines = {line.split()[0]: line.split() for line in seen.table().splitlines()[2:]}
    assert lines["2"][2:4] == ["0", "0"]
    assert lines["4"][2:4] == ["nan", "nan"]


def test_what_was_not_seen_is_left_out(tmp_path, monkeypatch):
    with torch.no_grad():
        seen = recorded(nn.Linear(3, 3), torch.randn(4, 3))
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: drawn.append(f) or save(f, *a, **k))
    seen.plot(tmp_path / "a.png")
    assert [len(panel.lines) for panel in drawn[0].axes] == [1, 1]
    assert "nan" not in seen.table()


def test_the_page_s_words_are_to_the_left(tmp_path):
    seen = recorded(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.randn(64, 4))
    seen.html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert '<td class="words">redundant bias</td>' in page
    assert '<td class="words">Linear</td>' in page
    assert "td.words { text-align: left;" in page
    assert re.search(r"<td>[\d.]+</td>", page)


def test_the_page_shows_findings(tmp_path):
    seen = recorded(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), torch.randn(64, 4))
    seen.html(tmp_path / "a.html")
    assert "redundant bias" in (tmp_path / "a.html").read_text("utf-8")


def test_nothing_seen_is_shown_too(tmp_path):
    with signals.record(nn.Linear(3, 3)) as seen:
        pass
    assert seen.layers == []
    assert seen.findings() == []
    seen.plot(tmp_path / "a.png")
    seen.html(tmp_path / "a.html")
    assert seen.table()


def test_one_transfer_for_all(monkeypatch):
    """No number leaves a device other than the CPU before the end."""
    calls = []
    monkeypatch.setattr(moments, "keeps_floats", lambda tensor: False)
    kept = watch.OnCpu
    monkeypatch.setattr(watch, "OnCpu", lambda found: calls.append(1) or kept(found))
    refused = ("item", "tolist", "cpu", "__float__", "__bool__", "__int__")
    model = MODELS["resnet"].build(FASTNORM, torch.Size([1, 8, 8]), 10)
    x = torch.randn(16, 1, 8, 8)
    with signals.record(model) as seen, pytest.MonkeyPatch.context() as patch:
        for name in refused:
            patch.setattr(torch.Tensor, name, lambda *a: pytest.fail("a synchronization"))
        model(x).sum().backward()
    assert calls == [1]
    assert len(seen.layers) > 20
    assert seen.findings() is not None
    assert calls == [1]


def test_the_report_is_of_the_end_of_the_block():
    """What changes since does not change it."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()), torch.randn(40, 6)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    reports = []
    for later in (False, True):
        model.load_state_dict(start)
        with signals.record(model) as seen:
            (model(x) ** 2).sum().backward()
        if later:
            model.eval()
            with torch.no_grad():
                for value in model.state_dict().values():
                    value.fill_(0)
        reports.append(seen.layers)
        assert seen.layers is reports[-1]
        model.train()
        model.zero_grad()
    assert repr(reports[0]) == repr(reports[1])


def test_a_recording_is_freed_with_its_last_reference():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with signals.record(model) as seen:
        model(torch.randn(4, 6)).sum().backward()
    kept = weakref.ref(seen)
    gc.disable()
    try:
        del seen
        assert kept() is None
    finally:
        gc.enable()


def test_functions_are_not_watched_within_layers():
    """Each costs 2 µs while they are."""
    on = []

    class Asks(nn.Linear):
        def forward(self, input):
            on.append(len(torch.overrides._get_current_function_mode_stack()))
            return super().forward(input)

    class Model(nn.Sequential):
        def forward(self, input):
            input = super().forward(input)
            on.append(len(torch.overrides._get_current_function_mode_stack()))
            with BaseTorchFunctionMode():  # nor is it taken from below another
                return F.relu(super().forward(input))

    model = Model(Asks(4, 4))
    with signals.record(model) as seen:
        model(torch.randn(3, 4))
    assert on == [0, 1, 2]
    assert [layer.name for layer in seen.layers] == ["0", "0 → relu"]
    assert torch.overrides._get_current_function_mode_stack() == []
