"""convert: the same modules, tensors and results, computed by fastnorm; what is not equal stays."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from architectures import (
    ByHandLayerNorm2d,
    LayerNorm2d,
    RootMeanSquare,
    UnbiasedLayerNorm,
    UnbiasedVarianceLayerNorm,
)
from side_by_side import assert_same_tensors, assert_same_training, near, tensors_of
from torch import nn

import fastnorm
from fastnorm.existing import foreign, recognise
from fastnorm.existing.foreign import ChannelLayerNorm, ForeignLayerNorm, ForeignRMSNorm
from fastnorm.existing.proof import Proofs

TORCH = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4, eps=0.1, momentum=None), (5, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 2, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4, track_running_stats=False), (2, 4, 2, 3, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (2, 4, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (2, 4, 2, 3)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4), (2, 4, 2, 3, 2)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4, eps=0.1), (3, 4, 5)),
    "LayerNorm": (lambda: nn.LayerNorm((3, 4), bias=False), (2, 3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (2, 3, 4)),
}
ROWS, IMAGE = (3, 2, 16), (2, 16, 3, 5)


class OwnBatchNorm(nn.BatchNorm2d):
    """A subclass with methods of its own, and torch's forward."""

    def _check_input_dim(self, input):
        if input.dim() not in (3, 4):
            raise ValueError(f"own check: {input.dim()}")

    def answer(self):
        return 42


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class OwnInside(nn.InstanceNorm2d):
    def _apply_instance_norm(self, input):
        return 2 * super()._apply_instance_norm(input)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-5

    def forward(self, x, gate):
        return torch.rms_norm(x, (4,), self.weight, self.eps) * gate


class ScaleNorm(nn.Module):
    """Its parameter has another name."""

    def __init__(self):
        super().__init__()
        self.gamma, self.eps = nn.Parameter(torch.ones(4)), 1e-5

    def forward(self, x):
        return torch.rms_norm(x, (4,), self.gamma, self.eps)


class NoisyNorm(nn.LayerNorm):
    """LayerNorm in evaluation only."""

    def forward(self, x):
        return super().forward(x * 1.5 + 1e-3 if self.training else x).mul(1.0 + self.training)


class FinalNorm(nn.LayerNorm):
    """No class may derive from it."""

    def __init_subclass__(cls):
        raise TypeError("final")


def replaced_inside():
    module = nn.InstanceNorm2d(4)
    module._apply_instance_norm = lambda input: input
    return module


def verdict(module, verify=True):
    return recognise.verdict(module, verify, Proofs())


@pytest.mark.parametrize("name", TORCH)
def test_torch_norms(name, backend):
    make, shape = TORCH[name]
    torch.manual_seed(0)
    theirs = nn.Sequential(make()).to(backend)
    ours = copy.deepcopy(theirs)
    before, shown = tensors_of(ours), repr(ours)
    assert fastnorm.convert(ours) is ours
    assert type(ours[0]) is getattr(fastnorm, name)
    assert_same_tensors(before, ours)
    assert repr(ours) == shown
    x = torch.randn(shape, device=backend)
    if list(ours.parameters()):
        assert_same_training(ours, theirs, lambda model: model(x))
    near(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("module", "shape", "kind", "attributes"),
    [
        (lambda: RootMeanSquare(16), ROWS, ForeignRMSNorm, {"offset": 0.0, "result": "promoted"}),
        (lambda: RootMeanSquare(16, 1e-3, 1.0), ROWS, ForeignRMSNorm, {"offset": 1.0}),
        (lambda: LayerNorm2d(16), IMAGE, ChannelLayerNorm, {"contiguous": False}),
        (lambda: LayerNorm2d(16, affine=False), IMAGE, ChannelLayerNorm, {}),
        (lambda: ByHandLayerNorm2d(16), IMAGE, ChannelLayerNorm, {"contiguous": True}),
    ],
    ids=["llama", "gemma", "timm", "timm, not affine", "by hand"],
)
def test_foreign_norms(module, shape, kind, attributes, backend):
    torch.manual_seed(0)
    theirs = nn.Sequential(module()).to(backend)
    ours = copy.deepcopy(theirs)
    before = tensors_of(ours)
    fastnorm.convert(ours)
    assert isinstance(ours[0], kind)
    assert isinstance(ours[0], type(theirs[0]))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(ours[0]), name) == getattr(type(theirs[0]), name)
    assert {name: getattr(ours[0], name) for name in attributes} == attributes
    assert_same_tensors(before, ours)
    x = torch.randn(shape, device=backend)
    if list(ours.parameters()):
        assert_same_training(ours, theirs, lambda model: model(x))
    assert ours(x).stride() == theirs(x).stride()
    for dtype in (torch.bfloat16, torch.float64):
        ours.to(dtype), theirs.to(dtype)
        # float64: these compute in float32 all the same
        near(ours(x.to(dtype)).float(), theirs(x.to(dtype)).float(), steps=2e5)
        if not isinstance(theirs[0], nn.LayerNorm):  # torch refuses a float64 weight there
            assert ours(x.float()).dtype == theirs(x.float()).dtype


@pytest.mark.parametrize(
    ("offset", "input", "weight", "wider"),
    [
        (0.0, torch.bfloat16, torch.float32, torch.float32),
        (1.0, torch.float32, torch.bfloat16, torch.float32),
        (1.0, torch.float64, torch.float64, torch.float64),
    ],
    ids=["llama", "gemma", "gemma, float64"],
)
def test_foreign_norms_round_once(offset, input, weight, wider):
    ours = fastnorm.convert(RootMeanSquare(16, 1e-3, offset).to(weight))
    x = torch.randn(ROWS, generator=torch.Generator().manual_seed(0)).to(input)
    y, double = ours(x), copy.deepcopy(ours).double()
    assert y.dtype is wider
    want = torch.rms_norm(x.double(), (16,), offset + double.weight, 1e-3)
    torch.testing.assert_close(y.double(), want, rtol=8 * torch.finfo(wider).eps, atol=0)


@pytest.mark.parametrize(
    ("rule", "input", "weight", "want"),
    [
        ("input", torch.bfloat16, torch.float32, torch.bfloat16),
        ("promoted", torch.bfloat16, torch.float32, torch.float32),
        ("weight", torch.float32, torch.bfloat16, torch.bfloat16),
        ("weight", torch.float64, torch.float32, torch.float64),
    ],
)
def test_dtypes_of_results(rule, input, weight, want):
    x, w = (torch.empty(1, dtype=dtype) for dtype in (input, weight))
    assert foreign.result_dtype(rule, x, w) is want
    assert foreign.result_dtype(rule, x, None) is input


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: UnbiasedLayerNorm(2048), "computes another function"),
        (lambda: UnbiasedVarianceLayerNorm(2048), "computes another function"),
        (lambda: NoisyNorm(8), "computes another function"),
        (Gated, r"its forward takes 2 inputs \(x, gate\)"),
        (ScaleNorm, "its parameters are gamma"),
        (lambda: OwnForward(4), "OwnForward overrides forward"),
        (lambda: OwnInside(4), "OwnInside overrides _apply_instance_norm"),
        (replaced_inside, "overrides _apply_instance_norm"),
        (lambda: nn.LazyBatchNorm2d(), "lazy"),
        (lambda: nn.LocalResponseNorm(2), "fastnorm has no LocalResponseNorm"),
    ],
    ids=[
        "std", "unbiased", "mode", "gated", "gamma", "forward", "inside", "instance", "lazy",
        "unknown",
    ],
)  # fmt: skip
def test_what_is_not_equal_stays(module, reason, dtype):
    theirs = nn.Sequential(module()).to(dtype)
    kind = type(theirs[0])
    fastnorm.convert(theirs)
    assert type(theirs[0]) is kind
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LazyModules warn when their tensors are looked at
        table = fastnorm.summary(theirs)
    assert "its own forward" in table
    assert re.search(reason, table), table


def test_without_verification_only_names_that_are_known():
    class MistralRMSNorm(RootMeanSquare):
        pass

    class GemmaRMSNorm(RootMeanSquare):
        pass

    assert verdict(RootMeanSquare(8), verify=False).swap is None
    assert verdict(MistralRMSNorm(8), verify=False) == verdict(MistralRMSNorm(8))
    gemma = verdict(GemmaRMSNorm(8, offset=1.0), verify=False)
    assert gemma == verdict(GemmaRMSNorm(8, offset=1.0))
    # on trust: here the name lies, and verify=True sees it
    liar = UnbiasedLayerNorm(8)
    type(liar).__name__ = "LayerNorm2d"
    try:
        assert verdict(liar, verify=False).swap is not None
        assert verdict(liar).swap is None
    finally:
        type(liar).__name__ = "UnbiasedLayerNorm"


def test_proof_leaves_model_and_generator_alone():
    model = RootMeanSquare(8).requires_grad_(False)
    model.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
    state, weight = torch.random.get_rng_state(), model.weight.clone()
    assert verdict(model).swap is not None
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model.weight, weight)
    assert model.weight.grad is None


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.LayerNorm(8), RootMeanSquare(8))
    fastnorm.convert(model)
    assert isinstance(model[1], ForeignRMSNorm)
    assert model[1].weight.is_meta


def test_a_default_device_that_is_not_the_models():
    model = nn.Sequential(nn.LayerNorm(8), RootMeanSquare(8))
    with torch.device("meta"):
        fastnorm.convert(model)
    assert isinstance(model[1], ForeignRMSNorm)
    assert not model[1].weight.is_meta


def test_a_shape_that_is_a_size():
    """Equal to a tuple, and of another type."""

    class Sized(RootMeanSquare):
        def __init__(self):
            super().__init__(16)
            self.normalized_shape = self.weight.shape

    theirs = nn.Sequential(Sized())
    ours = fastnorm.convert(copy.deepcopy(theirs))
    assert isinstance(ours[0], ForeignRMSNorm)
    x = torch.randn(ROWS)
    near(ours(x), theirs(x))


def test_subclass_keeps_its_own():
    model = fastnorm.convert(nn.Sequential(OwnBatchNorm(4)))
    assert isinstance(model[0], fastnorm.BatchNorm2d)
    assert isinstance(model[0], OwnBatchNorm)
    assert model[0].answer() == 42
    with pytest.raises(ValueError, match="own check: 2"):
        model(torch.randn(3, 4))


@pytest.mark.parametrize("make", [lambda: OwnBatchNorm(4), lambda: LayerNorm2d(4)])
def test_copies(make):
    model = fastnorm.convert(nn.Sequential(make()))
    x = torch.randn(2, 4, 3, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert other[0].weight is not model[0].weight
        assert torch.equal(other(x), model(x))


class Tied(nn.Module):
    """A norm in two places, a weight of two norms, one frozen parameter, one in evaluation."""

    def __init__(self):
        super().__init__()
        self.first = nn.LayerNorm(4)
        self.again = self.first
        self.other = nn.LayerNorm(4)
        self.other.weight = self.first.weight
        self.frozen = nn.BatchNorm1d(4).eval()
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.other(self.again(self.first(x))))


def test_identity_ties_modes_hooks_and_optimizer():
    torch.manual_seed(0)
    theirs = Tied()
    ours = copy.deepcopy(theirs)
    modules = dict(ours.named_modules(remove_duplicate=False))
    calls = []
    handles = [
        ours.first.register_forward_hook(lambda *_: calls.append("forward")),
        ours.other.register_full_backward_hook(lambda *_: calls.append("backward")),
        ours.frozen.register_forward_pre_hook(lambda *_: calls.append("before")),
    ]
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.1)
    x = torch.randn(6, 4)
    ours(x).square().sum().backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    theirs.load_state_dict(ours.state_dict())
    calls.clear()

    fastnorm.convert(ours)
    assert dict(ours.named_modules(remove_duplicate=False)) == modules
    assert ours.first is ours.again
    assert ours.other.weight is ours.first.weight
    assert not ours.frozen.training
    assert ours.training
    assert not ours.frozen.weight.requires_grad
    ours(x).square().sum().backward()
    assert calls == ["forward", "forward", "before", "backward"]
    for handle in handles:
        handle.remove()
    ours(x)
    assert len(calls) == 4

    follower = torch.optim.Adam(theirs.parameters(), lr=0.1)
    follower.load_state_dict(state)
    theirs(x).square().sum().backward()
    optimizer.zero_grad()
    ours(x).square().sum().backward()
    optimizer.step(), follower.step()
    near(ours.first.weight, theirs.first.weight)


def test_parametrized_norm():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    theirs = nn.LayerNorm(4)
    torch.nn.utils.parametrize.register_parametrization(theirs, "weight", Double())
    ours = fastnorm.convert(copy.deepcopy(nn.Sequential(theirs)))
    x = torch.randn(3, 4)
    assert isinstance(ours[0], fastnorm.LayerNorm)
    near(ours(x), theirs(x))


def test_sync_batch_norm():
    theirs = nn.SyncBatchNorm(4).eval()
    ours = fastnorm.convert(nn.Sequential(copy.deepcopy(theirs)))
    assert isinstance(ours[0], fastnorm.SyncBatchNorm)
    assert isinstance(ours[0], nn.SyncBatchNorm)
    x = torch.randn(3, 4, 2)
    near(ours(x), theirs(x))
    ours.train()(x)  # of one process, also on a CPU
    assert ours[0].num_batches_tracked == 1


def test_a_norm_alone_and_twice():
    norm = nn.LayerNorm(4)
    assert fastnorm.convert(norm) is norm
    assert type(norm) is fastnorm.LayerNorm
    assert type(fastnorm.convert(norm)) is fastnorm.LayerNorm
    foreign = fastnorm.convert(RootMeanSquare(4))
    kind = type(foreign)
    assert type(fastnorm.convert(foreign)) is kind


def test_replaced_forward_and_final_class_stay():
    model = nn.Sequential(nn.LayerNorm(4), FinalNorm(4))
    model[0].forward = lambda x: x
    fastnorm.convert(model)
    x = torch.randn(2, 4)
    assert model[0](x) is x
    assert "replaced on the instance" in fastnorm.summary(model)
    assert type(model[1]) is FinalNorm


@pytest.mark.parametrize("call", [fastnorm.convert, fastnorm.fuse, fastnorm.fold])
def test_compiled_and_scripted_models_are_refused(call):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(TypeError, match="it is compiled"):
        call(torch.compile(model, backend="eager"))
    compiled = copy.deepcopy(model)
    compiled.compile(backend="eager")
    with pytest.raises(TypeError, match="it is compiled"):
        call(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(model)
    with pytest.raises(TypeError, match="it is scripted"):
        call(scripted)
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module, but got list"):
        call([model])
    assert type(model[1]) is nn.BatchNorm1d


def test_compiled_and_scripted_parts_stay():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.LayerNorm(4))
    inner = nn.Sequential(nn.LayerNorm(4))
    model = nn.ModuleList([scripted, torch.compile(inner, backend="eager"), nn.LayerNorm(4)])
    fastnorm.convert(model)
    assert type(inner[0]) is nn.LayerNorm
    assert type(model[2]) is fastnorm.LayerNorm
    table = fastnorm.summary(model)
    assert "it is compiled, and compiled code may have been made already" in table


def test_distributed_data_parallel(tmp_path):
    """Its buckets and hooks hang on parameters, which stay; so it is converted as it is."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        theirs = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8))
        ours = nn.parallel.DistributedDataParallel(copy.deepcopy(theirs))
        before = tensors_of(ours)
        fastnorm.convert(ours)
        assert type(ours.module[3]) is fastnorm.LayerNorm
        assert "fused" in fastnorm.summary(ours)
        assert_same_tensors(before, ours)
        x = torch.randn(6, 4)
        assert_same_training(ours.module, theirs, lambda model: model(x))
        ours(x).square().sum().backward()
        assert ours.module[1].weight.grad.abs().sum() > 0
    finally:
        dist.destroy_process_group()


def test_autocast_keeps_the_foreign_norms_dtype():
    theirs = nn.Sequential(nn.Linear(8, 8), RootMeanSquare(8))
    ours = fastnorm.convert(copy.deepcopy(theirs))
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.float32
        near(ours(x).bfloat16(), theirs(x).bfloat16(), steps=4)


def test_foreign_layer_norm_in_float32():
    """FP32LayerNorm, and what else casts around torch's function."""

    class InFloat(nn.LayerNorm):
        def forward(self, x):
            weight, bias = self.weight.float(), self.bias.float()
            return torch.layer_norm(x.float(), (8,), weight, bias, self.eps).to(x.dtype)

    model = InFloat(8)
    assert verdict(model).swap.ours is ForeignLayerNorm
    assert verdict(model).swap.attributes["result"] == "input"
    assert type(fastnorm.convert(model)).__qualname__ == InFloat.__qualname__


def test_compile_and_export_after_convert():
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), RootMeanSquare(8))
    ours = fastnorm.convert(copy.deepcopy(theirs)).eval()
    theirs.eval()
    x = torch.randn(4, 8)
    torch._dynamo.reset()
    near(torch.compile(ours, fullgraph=True, backend="eager")(x), theirs(x))
    near(torch.export.export(ours, (x,)).module()(x), theirs(x))
    near(torch.func.functional_call(ours, dict(ours.named_parameters()), (x,)), theirs(x))
