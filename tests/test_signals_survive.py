"""fastnorm.signals on models as people have them: the numbers stay right, and nothing breaks."""

import copy
import gc
import io
import math
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm import signals
from fastnorm.signals.moments import MANY


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


def by_name(seen):
    return {layer.name: layer for layer in seen.layers}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def assert_moments(layer, tensors):
    """The layer's numbers are those of all elements of these tensors."""
    values = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    assert layer.calls == len(tensors)
    assert layer.mean == pytest.approx(values.mean().item(), rel=1e-9, abs=1e-12)
    assert layer.std == pytest.approx(values.std(correction=0).item(), rel=1e-9)


# Where a layer stands.


class Twice(nn.Module):
    """One Linear called twice, its weight shared with another layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.tied = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.a.weight
        self.same = self.b

    def forward(self, x):
        first = self.a(x)
        return {"last": self.same(self.tied(self.a(first.tanh()))), "first": (first, 3)}


def test_layers_called_twice_shared_and_tied():
    model, x = Twice(), torch.randn(7, 6)
    with signals.record(model) as seen:
        found = model(x)
        found["last"].square().sum().backward()
    layers = by_name(seen)
    assert list(layers) == ["a", "a → tanh", "tied", "b"]
    first = model.a(x)
    assert_moments(layers["a"], [first, model.a(first.tanh())])
    assert layers["a"].weight_gradient_norm == layers["tied"].weight_gradient_norm
    assert layers["a"].weight_gradient_norm == pytest.approx(
        model.a.weight.grad.double().norm().item(), rel=1e-5
    )


def test_an_activation_shared_by_layers_of_other_widths():
    act = nn.ReLU()
    model, x = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 6), act), torch.randn(9, 4)
    with torch.no_grad(), signals.record(model) as seen:
        y = model(x)
    assert by_name(seen)["1"].calls == 2
    assert by_name(seen)["1"].dead == (y <= 0).all(0).double().mean().item()  # of the last width


def test_arguments_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 5), nn.BatchNorm1d(5)

        def forward(self, batch):
            return self.norm(input=self.linear(input=batch["x"][0]))

    x = torch.randn(16, 4)
    x[3, 2] = math.inf
    with signals.record(Named()) as seen:
        Named()
        seen.model(batch={"x": [x]})
    layers = by_name(seen)
    assert layers["norm"].samples == 16
    assert math.isfinite(layers["norm"].failed)
    assert seen.input_failed == 1
    assert seen.findings()[0].layer == ""


@pytest.mark.parametrize("grad", [False, True])
def test_frozen_parameters_and_inputs_without_gradient(grad):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with signals.record(model, optimizer=optimizer) as seen:
        model(torch.randn(9, 4, requires_grad=grad)).sum().backward()
        optimizer.step()
    layers = by_name(seen)
    assert (layers["0"].gradient_norm > 0) is grad
    assert math.isnan(layers["0"].weight_gradient_norm)
    assert layers["0"].update_ratio == 0
    assert layers["2"].weight_gradient_norm > 0
    assert layers["2"].update_ratio > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_is_seen_once(reentrant):
    """The forward pass that recomputes what was not kept is no call of the model."""
    layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6))
    plain = copy.deepcopy(layers)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            y = checkpoint(self.layers, x, use_reentrant=reentrant)
            return torch.sigmoid(y)

    x = torch.randn(32, 6, requires_grad=True)
    with signals.record(Model()) as seen:
        seen.model(x).square().sum().backward()
    with signals.record(plain) as want:
        torch.sigmoid(plain(x)).square().sum().backward()
    layers = by_name(seen)
    assert list(layers)[:4] == [f"layers.{index}" for index in range(4)]
    for other in want.layers:
        if "→" not in other.name:
            layer = layers[f"layers.{other.name}"]
            assert (layer.calls, layer.values) == (1, other.values)
            assert layer.std == other.std
            assert layer.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    assert [finding.problem for finding in seen.findings()] == ["redundant bias"]


def test_a_function_outside_of_the_model_s_layers_is_seen():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with signals.record(model) as seen:
        F.relu(model["b"](F.gelu(model["a"](torch.randn(8, 4)))))
    assert list(by_name(seen)) == ["a", "a → gelu", "b", "b → relu"]


def test_other_models_are_not_seen():
    model, other = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Sequential(nn.ReLU(), nn.GELU())
    with signals.record(model) as seen:
        other(torch.randn(8, 4))
        other(model(torch.randn(8, 4)) + 1).sum().backward()
    assert list(by_name(seen)) == ["0", "1"]


def test_layers_that_someone_has_written():
    """As transformers' Conv1D and LlamaRMSNorm: parameters of their own, and no parts."""

    class Dense(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs) * inputs**-0.5)

        def forward(self, x):
            return F.gelu(x @ self.weight)

    class Norm(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(size))

        def forward(self, x):
            return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()

    model, x = nn.Sequential(Dense(4, 6), Norm(6), Dense(6, 2)), torch.randn(8, 4)
    with signals.record(model) as seen:
        model(x).square().sum().backward()
    layers = by_name(seen)
    assert [layer.kind for layer in seen.layers] == ["gelu", "Dense", "Norm", "gelu", "Dense"]
    assert [layers[name].weighted for name in "012"] == [True, False, True]
    assert_moments(layers["1"], [model[:2](x)])
    assert layers["0"].gradient_norm > 0
    assert layers["0"].weight_gradient_norm == pytest.approx(
        model[0].weight.grad.double().norm().item(), rel=1e-5
    )
    assert seen.findings() == []


# Kinds of tensors.


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside):
    """In 16 bits units are not alike because their projections are rounded."""
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())
    x = torch.randn(128, 64)
    with signals.record(model) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            if inside:
                y.float().square().mean().backward()
        if not inside:
            y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    assert [finding.problem for finding in seen.findings()] == []
    assert all(layer.gradient_norm > 0 for layer in seen.layers)
    assert seen.layers[0].identical == 0


@pytest.mark.parametrize("shape", [(0, 3), (0,), (2, 0, 3)])
def test_empty_tensors(shape):
    model = nn.Sequential(nn.Linear(shape[-1] or 3, 4), nn.ReLU(), nn.Tanh())
    x = torch.randn(*shape[:-1], model[0].in_features)
    with signals.record(model) as seen:
        model(x).sum().backward()
    assert all(math.isnan(layer.std) for layer in seen.layers) or x.numel()
    assert all(layer.failed == math.inf for layer in seen.layers)
    assert seen.findings() == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_units_and_no_positions():
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.ReLU(), nn.Linear(0, 2))
    none = nn.Linear(5, 0)
    with signals.record(nn.ModuleList([model, none])) as seen:
        model(torch.randn(4, 2, 0)).sum().backward()
        none(torch.randn(3, 5)).sum().backward()
    assert len(seen.layers) == 4
    assert seen.findings() == []


def test_complex_and_integer_tensors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.wave = nn.Linear(4, 4, dtype=torch.complex64)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.wave(x).abs()), torch.arange(3)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with signals.record(model, optimizer=optimizer) as seen:
        model(torch.randn(8, 4, dtype=torch.complex64))[0].square().sum().backward()
        optimizer.step()
    layers = by_name(seen)
    assert layers["last"].gradient_norm > 0
    assert seen.findings() == []


class Wrapped(torch.Tensor):
    """A subclass as people have them: data with a name."""


def test_tensors_that_are_no_plain_ones():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with signals.record(model) as seen:
        torch.func.vmap(model)(torch.randn(4, 3))
        torch.func.vmap(torch.func.grad(lambda x: model(x).sum()))(torch.randn(4, 3))
    assert seen.table()
    with signals.record(model.to("meta")) as seen:
        model(torch.randn(4, 3, device="meta")).sum().backward()
    assert seen.table()
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with signals.record(model) as seen:
        model(torch.randn(4, 3).as_subclass(Wrapped)).sum().backward()
    assert by_name(seen)["1"].gradient_norm == pytest.approx(math.sqrt(12))


def test_a_default_device_that_is_not_the_models():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    x, seen = torch.randn(16, 8), []
    for device in ("cpu", "meta"):
        with torch.device(device), signals.record(model) as recorded:
            for _ in range(MANY + 1):
                model.zero_grad()
                model(x).sum().backward()
        seen.append(recorded)
    assert seen[0].table() == seen[1].table()
    assert [str(one) for one in seen[0].findings()] == [str(one) for one in seen[1].findings()]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_in_evaluation_with_padding():
    """torch's fast path has no submodules to look at, and nested tensors."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        want = model(torch.ones(2, 5, 8), src_key_padding_mask=padding)
        with signals.record(model) as seen:
            found = model(torch.ones(2, 5, 8), src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], want[~padding])
    assert "layers.1.linear1" in by_name(seen)


@pytest.mark.parametrize("value", [1e-25, 1e25])
def test_gradients_beyond_float32_s_squares(value):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with signals.record(model) as seen:
        (model(torch.randn(4, 3)) * value).sum().backward()
    assert by_name(seen)["1"].gradient_norm == pytest.approx(value * math.sqrt(12), rel=1e-5, abs=0)
    assert [f.problem for f in seen.findings()] == []


def test_an_input_that_was_changed_in_place():
    """What is known of a tensor is forgotten when it is written to."""
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval()
    x = torch.randn(8, 3, 5, 5)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x):
            y = self.conv(x)
            y += 100
            return self.norm(y)

    with torch.no_grad(), signals.record(Model()) as seen:
        seen.model(x)
    assert by_name(seen)["norm"].mean_gap == pytest.approx(100, rel=0.05)


def test_packed_sequences():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.linear = nn.LSTM(4, 6), nn.Linear(6, 2)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
            output, _ = self.lstm(packed)
            return self.linear(nn.utils.rnn.pad_packed_sequence(output)[0])

    model, x, lengths = Model(), torch.randn(5, 2, 4), torch.tensor([5, 3])
    with signals.record(model) as seen:
        model(x, lengths).square().sum().backward()
    layers = by_name(seen)
    assert list(layers) == ["lstm", "linear"]
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    assert_moments(layers["lstm"], [model.lstm(packed)[0].data])
    assert layers["lstm"].gradient_norm > 0
    assert seen.findings() == []


# Around the recording.


@pytest.mark.parametrize("how", ["torch.compile", "compile", "a function", "inside"])
def test_a_compiled_model_is_recorded(how):
    """It runs module by module while it is recorded, and compiled again afterwards."""
    torch._dynamo.reset()
    runs = []

    def backend(graph, inputs):
        runs.append(1)
        return graph.forward

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x).relu())

    model, x = Model(), torch.randn(6, 4)
    call = model
    if how == "torch.compile":
        call = model = torch.compile(model, backend=backend)
    elif how == "compile":
        model.compile(backend=backend)
    else:
        call = torch.compile(lambda x: model(x), backend=backend)
    if how != "inside":
        call(x)
    before = len(runs)
    with signals.record(model) as seen:
        call(x).sum().backward()
    assert len(runs) == before
    assert [(layer.name, layer.kind) for layer in seen.layers] == [
        ("a", "Linear"), ("a → relu", "relu"), ("b", "Linear")
    ]  # fmt: skip
    assert all(layer.gradient_norm > 0 for layer in seen.layers)
    assert seen.findings() == []
    call(x)
    assert len(runs) > 0
    torch._dynamo.reset()


def test_a_model_compiled_in_parts_and_as_a_whole_is_recorded():
    part = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), backend="eager")
    model = torch.compile(nn.Sequential(part, nn.ReLU()), backend="eager")
    with signals.record(model) as seen:
        model(torch.randn(32, 4)).sum().backward()
    assert list(by_name(seen)) == ["0._orig_mod.0", "0._orig_mod.1", "1"]
    assert [f.problem for f in seen.findings()] == ["redundant bias"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_a_scripted_model_is_refused(how):
    """Its modules run where no hook is called: a recording would be empty."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(4))
    with pytest.raises(TypeError, match=r"torch\.jit.*record it as it was before"):
        signals.record(scripted)


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_forward_that_fails_and_is_caught(where):
    """What runs afterwards is seen as ever."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            return F.tanh(self.b(self.a(x)))

    model = Model()

    def refuse(*_):
        raise ValueError("no")

    with signals.record(model) as seen:
        handle = model.a.register_forward_pre_hook(refuse, prepend=where == "before")
        with pytest.raises(ValueError, match="no"):
            model(torch.randn(3, 4))
        handle.remove()
        model(torch.randn(3, 4))
    assert [(layer.name, layer.calls) for layer in seen.layers] == [
        ("a", 1), ("b", 1), ("b → tanh", 1)
    ]  # fmt: skip
    assert hooks(model) == []


def test_recordings_within_recordings():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(8, 4)
    with signals.record(model) as outer:
        model(x).sum().backward()
        with signals.record(model[0]) as inner:
            model(2 * x).sum().backward()
        model(x)
    with signals.record(model[0]) as alone:
        model(2 * x)
    assert by_name(outer)["0"].calls == 3
    assert list(by_name(inner)) == list(by_name(alone)) == [""]
    assert by_name(inner)[""].calls == 1
    assert_moments(by_name(inner)[""], [model[0](2 * x)])
    assert hooks(model) == []


def test_other_threads_are_left_alone():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()), torch.randn(8, 4)
    want, failed = model(x).detach(), []

    def work():
        try:
            for _ in range(20):
                torch.testing.assert_close(F.relu(model(x)), F.relu(want))
        except BaseException as error:
            failed.append(error)

    with signals.record(model) as seen:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            model(x).sum().backward()
        for thread in threads:
            thread.join()
        F.relu(x)  # nor is the model running
    assert failed == []
    assert [(layer.name, layer.calls) for layer in seen.layers] == [("0", 20), ("1", 20), ("2", 20)]


def test_a_copy_made_meanwhile_is_another_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with signals.record(model) as seen:
        other = copy.deepcopy(model)
        model(torch.randn(3, 4)).sum().backward()
        other(torch.randn(3, 4)).sum().backward()
    assert [layer.calls for layer in seen.layers] == [1, 1]
    other(torch.randn(3, 4)).sum().backward()
    assert len(seen.layers) == 2


def test_lazy_and_parametrized_layers():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), normed, nn.Softplus())
    with signals.record(model) as seen:
        model(torch.randn(32, 5)).sum().backward()
    assert len(seen.layers) == 4
    assert by_name(seen)["1"].samples == 32
    assert all(layer.gradient_norm > 0 for layer in seen.layers)


def test_optimizers_with_a_closure():
    model, x = nn.Linear(4, 1), torch.randn(16, 4)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    with signals.record(model, optimizer=optimizer) as seen:
        optimizer.step(closure)
        optimizer.step(closure)
    assert seen.layers[0].calls >= 2
    assert seen.layers[0].update_ratio > 0


def test_inference_mode_and_fused_layers():
    model = nn.Sequential(
        fastnorm.LinearBatchNorm(4, 6), fastnorm.LayerNorm(6), fastnorm.Conv1dBatchNorm(3, 3, 1)
    ).eval()
    with torch.inference_mode(), signals.record(model) as seen:
        model(torch.randn(5, 3, 4))
    assert [layer.calls for layer in seen.layers] == [1, 1, 1]
    assert all(math.isnan(layer.gradient_norm) for layer in seen.layers)


def test_a_recording_that_cannot_start_leaves_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.register_post_accumulate_grad_hook = None
    with pytest.raises(TypeError, match="not callable"):
        signals.record(model).__enter__()
    assert hooks(model) == []
    assert not model[0].weight._post_accumulate_grad_hooks


def test_copies_and_pickles_leave_the_hooks_behind():
    """An average of weights, or the best model so far, is taken where a recording runs."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    x = torch.randn(8, 4)
    with signals.record(model) as recorded:
        model(x).sum().backward()
        copied = copy.deepcopy(model)
        torch.save(model, saved := io.BytesIO())
        copied.eval()(x)
    alive = weakref.ref(recorded)
    del recorded, model
    gc.collect()
    assert alive() is None
    torch.save(copied, again := io.BytesIO())
    for file in (saved, again):
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        torch.testing.assert_close(loaded.eval()(x), copied.eval()(x), rtol=0, atol=0)


class Given(nn.Module):
    """A positional embedding: it returns its parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self):
        return self.weight


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.given, self.layer = Given(), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x + self.given())


def test_no_hook_stays_on_a_parameter_that_is_an_output():
    model = Positions()
    for _ in range(2):
        with signals.record(model) as recorded:
            model(torch.randn(8, 4)).sum().backward()
    (given,) = (layer for layer in recorded.layers if layer.name == "given")
    assert given.gradient_norm > 0
    assert not model.given.weight._backward_hooks


def masked(model, **options):
    size = 5
    mask = nn.Transformer.generate_square_subsequent_mask(size)
    with signals.record(model) as recorded:
        model(torch.randn(2, size, 16), mask=mask, **options).sum().backward()
    return [finding for finding in recorded.findings() if finding.problem == "NaN or infinity"]


def test_a_mask_of_infinities_is_no_fault_of_the_data():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert masked(model) == []
    nn.init.constant_(model.layers[1].linear1.weight, math.nan)
    (found,) = masked(model)
    assert found.layer == "layers.1.linear1"


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (x * self.scale).to(torch.float8_e4m3fn)


class OfNarrow(nn.Linear):
    def forward(self, x):
        return x @ self.weight.to(x.dtype).T + self.bias


def test_float8_goes_by():
    layer = OfNarrow(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.Sequential(layer, nn.ReLU(), Narrow())
    with signals.record(model) as recorded:
        model(torch.randn(8, 4))
    assert [layer.name for layer in recorded.layers] == ["0", "1"]
    assert recorded.findings() == []
