"""fuse: the same results, buffers and state from fewer operations; where not sure, as written."""

import copy
import functools
import gc
import pickle
import random
import threading
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from architectures import SMALL, Bottleneck, RootMeanSquare
from side_by_side import (
    assert_loads_both_ways,
    assert_same_tensors,
    assert_same_training,
    near,
    tensors_of,
    twin,
)
from torch import nn

import fastnorm
from fastnorm.existing import calls
from fastnorm.existing.classes import PLANS
from fastnorm.existing.fuse import FusedForward, Plan, candidate, first_plans
from fastnorm.kernels import cost


def runs(model):
    """What is fused, by module and call: each run in words."""
    return {
        name: sorted({str(run) for plan in module.__dict__.get(PLANS, {}).values()
                      if isinstance(plan, Plan) for run in plan.found.fusions})
        for name, module in model.named_modules() if isinstance(module, FusedForward)
    }  # fmt: skip


def reasons(module):
    """Why a module's forward is left as it is."""
    assert candidate(module)
    return " ".join(f"{plan}" for plan in first_plans(module).values())


@pytest.fixture
def fused_calls(monkeypatch):
    """The names of the fused operations that run."""
    seen = []
    for name in ("layer_norm_activation", "norm_activation", "add_norm"):
        original = getattr(calls, name)

        def counted(*args, _name=name, _original=original):
            seen.append(_name)
            return _original(*args)

        counted.__name__, counted.__module__, counted.__qualname__ = name, calls.__name__, name
        monkeypatch.setattr(calls, name, counted)
    return seen


SEQUENCES = {
    "linear, relu": (lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True)], (6, 3)),
    "linear, no act": (lambda: [nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)], (6, 3)),
    "linear 3-D": (lambda: [nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Tanh()], (2, 4, 3)),
    "linear 3-D square": (lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()], (2, 4, 3)),
    "conv1d": (
        lambda: [nn.Conv1d(3, 4, 3, dilation=2), nn.BatchNorm1d(4), nn.SiLU()], (2, 3, 8),
    ),
    "conv2d": (
        lambda: [nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.BatchNorm2d(4), nn.LeakyReLU()],
        (2, 4, 5, 5),
    ),
    "conv 1x1": (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6()], (2, 3, 4, 4)),
    "conv3d": (lambda: [nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3), nn.ELU()], (2, 2, 3, 3, 3)),
    "norm, act": (
        lambda: [nn.BatchNorm2d(3, momentum=None), nn.GELU(approximate="tanh")], (2, 3, 4, 4),
    ),
    "not affine": (lambda: [nn.BatchNorm2d(3, affine=False), nn.Sigmoid()], (2, 3, 4, 4)),
    "untracked": (
        lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.GELU()],
        (2, 3, 4, 4),
    ),
    "group norm": (lambda: [nn.GroupNorm(2, 4), nn.SiLU()], (2, 4, 3, 3)),
    "layer norm": (lambda: [nn.LayerNorm(4), nn.Hardswish()], (3, 4)),
    "two": (
        lambda: [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 5),
                 nn.BatchNorm1d(5), nn.ReLU()], (6, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences(name, backend, fused_calls):
    make, shape = SEQUENCES[name]
    torch.manual_seed(0)
    theirs = nn.Sequential(*make()).to(backend)
    ours = copy.deepcopy(theirs)
    before, shown = tensors_of(ours), repr(ours)
    assert fastnorm.fuse(ours) is ours
    assert repr(ours) == shown
    assert_same_tensors(before, ours)
    x = torch.randn(shape, device=backend)
    if list(theirs.parameters()):
        assert_same_training(ours, theirs, lambda model: model(x))
        assert_loads_both_ways(ours, theirs, lambda model: model(x))
    else:
        near(ours(x), theirs(x))
    assert fused_calls
    for model in (ours, theirs):
        model.train()
    dx = [torch.autograd.functional.vjp(model, x, torch.ones_like(model(x)))[1]
          for model in (ours, theirs)] if name != "two" else [x, x]  # fmt: skip
    near(dx[0] + x, dx[1] + x)


def test_linear_on_three_axes_is_no_linear_batch_norm(monkeypatch):
    """torch's BatchNorm1d normalizes axis 1 of (N, C, L), not the layer's features."""
    model = fastnorm.fuse(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    taken = []
    original = fastnorm.functional.linear_batch_norm
    monkeypatch.setattr(
        fastnorm.functional, "linear_batch_norm",
        lambda *args, **kwargs: taken.append(1) or original(*args, **kwargs),
    )  # fmt: skip
    model(torch.randn(2, 4, 3))
    assert not taken
    model(torch.randn(2, 3))
    assert taken


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (lambda: [nn.Linear(3, 4), nn.BatchNorm2d(4)], (6, 3)),
        (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4)], (2, 3, 4, 4)),
        (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)], (3, 4, 4)),
        (lambda: [nn.BatchNorm2d(3), nn.ReLU()], (6, 3)),
    ],
    ids=["linear", "conv", "unbatched conv", "norm"],
)
def test_ranks_are_refused_as_by_the_norm(layers, shape, fused_calls):
    theirs = nn.Sequential(*layers())
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    for model in (theirs, ours):
        with pytest.raises(ValueError, match=rf"expected .* \(got {len(shape)}D input\)"):
            model(torch.randn(shape))
    assert fused_calls


class Residuals(nn.Module):
    """Every way to write a sum and an activation."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        z = self.conv(x)
        out = self.norm(z)
        if self.way == "in place":
            out += x
            return self.relu(out)
        if self.way == "swapped":
            return F.relu(x + out)
        if self.way == "method":
            return out.add(x).relu()
        if self.way == "method in place":
            return out.add_(x).relu_()
        if self.way == "torch":
            return torch.add(out, x)
        if self.way == "broadcast":
            return F.relu(out + x.mean(0, keepdim=True), inplace=True)
        if self.way == "promoted":
            return torch.relu(out + x.double())
        if self.way == "double":
            return torch.relu(out + out)
        if self.way == "alpha":
            return torch.relu(torch.add(out, x, alpha=2))
        if self.way == "used twice":
            return torch.relu(out) + out
        if self.way == "layer used twice":
            return torch.relu(out) + z
        if self.way == "other in place":
            z2 = x * 1
            z2 += out
            return torch.relu(z2) + z2.mean()
        if self.way == "slope":
            return F.leaky_relu(out, 0.3)
        if self.way == "changed between":
            x = x * 1
            y = x + 1
            out = self.norm(y)
            y.mul_(3)
            return torch.relu(out) + y
        assert self.way == "again between"
        again = self.norm(2 * x)
        return torch.relu(out) + again


@pytest.mark.parametrize(
    ("way", "want"),
    [
        ("in place", ["norm → + → relu"]),
        ("swapped", ["norm → + → relu()"]),
        ("method", ["norm → + → relu()"]),
        ("method in place", ["norm → + → relu_()"]),
        ("torch", ["norm → +"]),
        ("broadcast", ["norm → + → relu()"]),
        ("promoted", ["norm → + → relu()"]),
        ("double", ["conv → norm"]),
        ("alpha", ["conv → norm"]),
        ("used twice", ["conv → norm"]),
        ("layer used twice", ["norm → relu()"]),
        ("other in place", ["conv → norm"]),
        ("slope", ["conv → norm"]),
        ("changed between", ["conv → norm"]),
        ("again between", ["conv → norm", "norm → +"]),
    ],
)
def test_sums_and_activations(way, want):
    torch.manual_seed(0)
    theirs = Residuals(way)
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    assert runs(ours) == {"": want}
    x = torch.randn(3, 4, 2, 2)
    for model in (ours, theirs):
        model.norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    if way == "changed between":  # autograd refuses it
        near(ours.eval()(x), theirs.eval()(x))
    else:
        assert_same_training(ours, theirs, lambda model: model(x))


class Overwritten(nn.Module):
    """What an activation returns is changed in place, in several ways."""

    def __init__(self, act, way):
        super().__init__()
        self.lin, self.norm, self.act, self.way = nn.Linear(4, 4), nn.BatchNorm1d(4), act, way

    def forward(self, x):
        y = self.act(self.norm(self.lin(x)))
        if self.way == "sum":
            y += x
        elif self.way == "view":
            y.flatten().mul_(2)
        elif self.way == "function":
            y = F.dropout(y, 0.0, inplace=True)
        elif self.way == "last":
            y = x * y
            y += x
        return y


@pytest.mark.parametrize("way", ["sum", "view", "function", "last"])
@pytest.mark.parametrize("act", [nn.LeakyReLU(), nn.ReLU6(), nn.ELU(), nn.SiLU()], ids=str)
def test_an_activation_whose_output_is_changed_in_place(act, way, backend, monkeypatch):
    """torch takes these derivatives from the input; ours, of many rows, from the output."""
    torch.manual_seed(0)
    theirs = Overwritten(act, way).to(backend)
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    stays = way != "last" and not isinstance(act, nn.SiLU)
    assert runs(ours) == {"": ["lin → norm" if stays else "lin → norm → act"]}
    x = torch.randn(64, 4, device=backend)
    monkeypatch.setattr(cost, "SMALL", 0)
    algorithm = "unfused" if isinstance(act, nn.SiLU) else "gram"
    monkeypatch.setattr(cost, "choose", lambda *_, **__: algorithm)
    assert_same_training(ours, theirs, lambda model: model(x))


class PreNorm(nn.Module):
    """The step of a transformer; `keep`: whether the sum is used again."""

    def __init__(self, norm, keep, in_place=False):
        super().__init__()
        self.norm, self.lin = norm, nn.Linear(8, 8)
        self.keep, self.in_place = keep, in_place

    def forward(self, x, y):
        h = self.lin(x)
        if self.in_place:
            h += y
        else:
            h = y + h
        out = self.norm(h)
        return out + h if self.keep else out


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        nn.LayerNorm,
        nn.RMSNorm,
        RootMeanSquare,
        functools.partial(RootMeanSquare, offset=1.0),
        functools.partial(fastnorm.LayerNorm, activation="silu"),
    ],
    ids=["layer", "rms", "llama", "gemma", "ours"],
)
def test_sum_before_a_norm(make, keep, in_place, backend, fused_calls):
    torch.manual_seed(0)
    theirs = PreNorm(make(8), keep, in_place).to(backend)
    ours = fastnorm.convert(copy.deepcopy(theirs))
    assert runs(ours) == {"": ["+ → norm"]}
    x, y = torch.randn(2, 3, 8, device=backend), torch.randn(2, 3, 8, device=backend)
    assert_same_training(ours, theirs, lambda model: model(x, y=y))
    assert set(fused_calls) == {"add_norm"}
    near(ours(x, y[:1]), theirs(x, y[:1]))  # broadcast: not one operation
    near(ours(x, y=0.5), theirs(x, y=0.5))
    if in_place:  # of another dtype, which the sum does not get
        near(ours(x, y.double()), theirs(x, y.double()))
    with torch.autocast(backend.type, torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own slow path
        got, want = ours(x, y), theirs(x, y)
    assert got.dtype == want.dtype
    near(got.bfloat16(), want.bfloat16(), steps=4)


@pytest.mark.parametrize("in_place", [False, True])
def test_complex_sum_before_a_norm(in_place):
    """torch's RMSNorm takes it, ours does not; nor has a number a shape."""
    theirs = PreNorm(nn.RMSNorm(8, elementwise_affine=False), True, in_place)
    theirs.lin = nn.Linear(8, 8, dtype=torch.complex64)
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    assert runs(ours) == {"": ["+ → norm"]}
    x = torch.randn(2, 8, dtype=torch.complex64)
    for y in (x, 1j):
        near(ours(x, y), theirs(x, y))


def test_sum_in_place_of_an_input_stays():
    class Owned(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x, y):
            x += y
            return self.norm(x)

    model = fastnorm.fuse(Owned())
    assert runs(model) == {}
    assert "the sum before it is in place" in fastnorm.summary(fastnorm.convert(model))
    x = torch.zeros(2, 4)
    model(x, torch.ones(2, 4))
    assert x.eq(1).all()


@pytest.mark.parametrize("name", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_hooks_run_as_if_nothing_was_fused(part, name, fused_calls):
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    x = torch.randn(5, 3, requires_grad=True)
    heard = ([], [])
    handles = [
        getattr(model[part], f"register_{name}_hook")(
            lambda _, *tensors, to=to: to.append([t.detach().clone() for t in _flat(tensors)])
        )
        for model, to in zip((ours, theirs), heard, strict=True)
    ]
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert not fused_calls
    assert len(heard[0]) == 1
    for got, want in zip(heard[0][0], heard[1][0], strict=True):
        near(got, want)
    assert "while a part has hooks" in fastnorm.summary(fastnorm.convert(ours))
    handles[0].remove()
    ours(x)
    assert fused_calls


def _flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        elif value is not None:
            yield value


def test_hooks_before_fusing_are_a_reason():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)
    fastnorm.convert(model)
    assert runs(model) == {}
    assert "it has hooks" in fastnorm.summary(model)


def test_global_hooks_see_every_module(fused_calls):
    model = fastnorm.fuse(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        model(torch.randn(5, 3))
    finally:
        handle.remove()
    assert seen[:3] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert not fused_calls


def test_norm_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm, self.act = nn.BatchNorm1d(4), nn.ReLU()

        def forward(self, x):
            return self.act(self.norm(self.two(self.act(self.norm(self.one(x))))))

    torch.manual_seed(0)
    theirs = Twice()
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    assert runs(ours) == {"": ["one → norm → act", "two → norm → act"]}
    x = torch.randn(6, 4)
    assert_same_training(ours, theirs, lambda model: model(x), steps=1)
    assert ours.norm.num_batches_tracked == 2


def test_parts_still_work_alone():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    x = torch.randn(5, 3)
    near(ours[1](ours[0](x)), theirs[:2](x))
    near(ours[:2](x), theirs[:2](x))
    assert isinstance(ours[:2], nn.Sequential)
    near(ours[1:](ours[0](x)), theirs(x))


def test_changed_model_is_as_written(fused_calls):
    torch.manual_seed(0)
    ours = fastnorm.fuse(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval())
    x = torch.randn(5, 3)
    ours[1] = nn.Identity()
    near(ours(x), torch.relu(ours[0](x)))
    ours[1] = nn.BatchNorm1d(4).eval()
    ours.append(nn.Sigmoid())
    near(ours(x), torch.sigmoid(torch.relu(ours[1](ours[0](x)))))
    replaced = fastnorm.fuse(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()).eval())
    replaced[1].forward = torch.neg
    near(replaced(x), -replaced[0](x))
    assert not fused_calls
    slope = fastnorm.fuse(nn.Sequential(nn.BatchNorm1d(3), nn.LeakyReLU()).eval())
    slope[1].negative_slope = 0.5
    near(slope(x), F.leaky_relu(slope[0](x), 0.5))


class Flags(nn.Module):
    """A forward that depends on attributes, on its mode and on arguments."""

    scale_of_class = 1.0

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.scale, self.skip = 1.0, None

    def forward(self, x, extra=None, *, double=False):
        x = F.relu(self.norm(self.linear(x))) * self.scale * self.scale_of_class
        for layer in self.layers:
            x = layer(x)
        if self.skip is not None:
            x = self.skip(x)
        if extra is not None:
            x = x + extra
        if double:
            x = 2 * x
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", 2.0),
        lambda m: setattr(m, "scale_of_class", 3.0),
        lambda m: m.layers.append(nn.Tanh()),
        lambda m: setattr(m, "skip", nn.Tanh()),
        lambda m: m.eval(),
        lambda m: m.norm.eval(),
        lambda m: setattr(m.linear, "bias", None),
        lambda m: m.double(),
    ],
    ids=["attribute", "of class", "list", "none", "eval", "norm", "bias", "dtype"],
)
def test_what_a_forward_read_is_watched(change):
    torch.manual_seed(0)
    theirs = Flags()
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    assert runs(ours) == {"": ["linear → norm → relu()"]}
    for model in (ours, theirs):
        change(model)
    x = torch.randn(6, 4, dtype=ours.linear.weight.dtype)
    for arguments in ({}, {"extra": x}, {"double": True}, {"extra": x, "double": True}):
        got, want = (_seeded(model, x, **arguments) for model in (ours, theirs))
        near(got, want)


def _seeded(model, *args, **kwargs):
    torch.manual_seed(3)
    return model(*args, **kwargs)


class Untraceable(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.config = way, {"a": 1}
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def helper(self, y):
        return y if y is not None else 0

    def forward(self, x):
        x = F.relu(self.norm(self.linear(x)))
        if self.way == "value" and x.sum() > 0:
            x = 2 * x
        if self.way == "type" and isinstance(x, torch.Tensor):
            x = 2 * x
        if self.way == "tensor":
            x = x + torch.randn(4)
        if self.way == "random" and random.random() < 0.5:
            x = 2 * x
        if self.way == "sets":
            self.last = x
        if self.way == "config":
            x = x * self.config["a"]
        if self.way == "grad" and torch.is_grad_enabled():
            x = 2 * x
        if self.way == "helper":
            x = self.helper(x)
        return x


class InContext(Untraceable):
    def forward(self, x):
        with torch.no_grad():
            return F.relu(self.norm(self.linear(x)))


class Decorated(Untraceable):
    @torch.no_grad()
    def forward(self, x):
        return F.relu(self.norm(self.linear(x)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Untraceable("value"), "control flow"),
        (lambda: Untraceable("type"), "asks for the type"),
        (lambda: Untraceable("tensor"), "computes with tensors that are not its input"),
        (lambda: Untraceable("random"), r"calls random\(\)"),
        (lambda: Untraceable("sets"), "sets last"),
        (lambda: Untraceable("config"), "reads config, a dict"),
        (lambda: Untraceable("grad"), r"calls is_grad_enabled\(\)"),
        (lambda: Untraceable("helper"), "helper asks whether a value is None"),
        (lambda: InContext(""), "in a context"),
        (lambda: Decorated(""), "context"),
    ],
)
def test_untraceable_forwards_are_left_alone(make, reason):
    torch.manual_seed(0)
    theirs = nn.Sequential(make())
    ours = fastnorm.convert(copy.deepcopy(theirs))
    assert runs(ours) == {}
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(fastnorm.summary(ours))
    x = torch.randn(6, 4)
    random.seed(0)
    got = _seeded(ours, x)
    random.seed(0)
    want = _seeded(theirs, x)
    near(got, want)
    assert got.requires_grad == want.requires_grad


def test_who_listens_to_collections_is_not_heard():
    """Hypothesis takes the time of each; that is no call of the forward's."""

    def listen(phase, information):
        time.perf_counter()

    gc.callbacks.append(listen)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        model = fastnorm.convert(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()))
        assert "perf_counter" not in fastnorm.summary(fastnorm.convert(Untraceable("")))
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(listen)
    assert "fused" in fastnorm.summary(model)


def test_calls_by_keyword_and_with_objects():
    """Each way to call is traced when it first comes; what is no tensor is passed on."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = Inner(), nn.LayerNorm(4)

        def forward(self, hidden, mask=None, cache=None, **kwargs):
            out, _ = self.inner(hidden, mask=mask, cache=cache, **kwargs)
            hidden = hidden + out
            return self.norm(hidden), hidden

    class Inner(nn.Module):
        def forward(self, x, mask=None, cache=None, flag=False):
            if cache is not None:
                cache.append(x)
            return (x * 2 if mask is None else x * mask) + flag, None

    theirs = Layer()
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    x, mask, caches = torch.randn(3, 4), torch.rand(3, 4), ([], [])
    for given in ({}, {"mask": mask}, {"mask": None, "flag": True}, {"hidden": x}):
        args = () if "hidden" in given else (x,)
        for got, want in zip(ours(*args, **given), theirs(*args, **given), strict=True):
            near(got, want)
    for model, cache in zip((ours, theirs), caches, strict=True):
        model(x, cache=cache)
    assert [len(cache) for cache in caches] == [1, 1]
    plans = list(ours.__dict__[PLANS].values())
    assert sum(isinstance(plan, Plan) for plan in plans) == len(plans) == 6


def test_copies_pickles_and_devices():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), Bottleneck(4, 1))[:3]
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    x = torch.randn(6, 3)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        other[1].weight.data.mul_(2)
        assert not torch.equal(other[1].weight, ours[1].weight)
        mine = twin(theirs)
        mine[1].weight.data.mul_(2)
        assert_same_training(other, mine, lambda model: model(x))
        assert runs(other) == {"": ["0 → 1 → 2"]}
    doubled = copy.deepcopy(ours).double()
    near(doubled(x.double()).float(), theirs(x))


def test_threads_do_not_see_a_trace():
    """torch.fx replaces methods of nn.Module while it traces."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    x, want, errors, stop = torch.randn(2, 4), None, [], threading.Event()
    want = model(x)

    def work():
        while not stop.is_set():
            if not torch.equal(model(x), want):
                errors.append("another result")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            fastnorm.fuse(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()))
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert "__getattribute__" not in vars(nn.Module)


def test_compile_export_and_functional_call():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), Flags()).eval()
    ours = fastnorm.fuse(copy.deepcopy(theirs))
    x = torch.randn(6, 4)
    torch._dynamo.reset()
    near(torch.compile(ours, fullgraph=True, backend="eager")(x), theirs(x))
    near(torch.export.export(ours, (x,)).module()(x), theirs(x))
    weights = {name: 2 * p for name, p in theirs.named_parameters()}
    got, want = (torch.func.functional_call(model, weights, (x,)) for model in (ours, theirs))
    near(got, want)
    near(torch.fx.symbolic_trace(ours[:3])(x), theirs[:3](x))


def test_signature_stays():
    """Trainers ask for it."""
    import inspect

    fused = fastnorm.fuse(Flags())
    assert isinstance(fused, FusedForward)
    assert inspect.signature(fused.forward) == inspect.signature(Flags().forward)


@pytest.mark.parametrize("name", SMALL)
def test_architectures(name, fused_calls):
    torch.manual_seed(0)
    theirs = SMALL[name]()
    ours = copy.deepcopy(theirs)
    before = tensors_of(ours)
    fastnorm.convert(ours)
    assert_same_tensors(before, ours)
    x = torch.randn(2, 3, 32, 32)
    assert_same_training(ours, theirs, lambda model: model(x), steps=1)
    assert_loads_both_ways(ours, theirs, lambda model: model(x))
    assert fused_calls
    table = fastnorm.summary(ours)
    norms = sum(isinstance(one, nn.modules.batchnorm._BatchNorm | nn.GroupNorm)
                for one in ours.modules())  # fmt: skip
    assert table.count("fastnorm, fused") == norms, table


def test_summary_of_a_copy():
    """A copy makes its plans at its first call, and is asked before."""
    model = fastnorm.fuse(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()))
    assert fastnorm.summary(copy.deepcopy(model)) == fastnorm.summary(model)
