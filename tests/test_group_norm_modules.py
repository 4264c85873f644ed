"""GroupNorm and InstanceNorm modules are torch.nn's with another forward."""

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as FF

KINDS = {
    "GroupNorm, (N, C)": ("GroupNorm", (4, 6)),
    "GroupNorm, (N, C, L)": ("GroupNorm", (4, 6, 5)),
    "GroupNorm, (N, C, H, W)": ("GroupNorm", (2, 6, 5, 3)),
    "InstanceNorm1d": ("InstanceNorm1d", (4, 6, 5)),
    "InstanceNorm1d, unbatched": ("InstanceNorm1d", (6, 5)),
    "InstanceNorm2d": ("InstanceNorm2d", (2, 6, 5, 3)),
    "InstanceNorm2d, unbatched": ("InstanceNorm2d", (6, 5, 3)),
    "InstanceNorm3d": ("InstanceNorm3d", (2, 6, 2, 3, 4)),
    "InstanceNorm3d, unbatched": ("InstanceNorm3d", (6, 2, 3, 4)),
}
CLASSES = ("GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d")
INSTANCE_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "affine": {"affine": True},
    "tracked": {"track_running_stats": True},
    "tracked and affine": {"track_running_stats": True, "affine": True, "momentum": 0.7},
    "no momentum": {"track_running_stats": True, "momentum": None},
}
GROUP_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "not affine": {"affine": False},
    "eps": {"eps": 0.1},
}


def cases() -> list[Any]:
    found = []
    for name, (kind, shape) in KINDS.items():
        options = GROUP_OPTIONS if kind == "GroupNorm" else INSTANCE_OPTIONS
        found += [pytest.param(kind, shape, o, id=f"{name}, {n}") for n, o in options.items()]
    return found


each = pytest.mark.parametrize(("kind", "shape", "options"), cases())


def make(library: Any, kind: str, **options: Any) -> nn.Module:
    sizes = (3, 6) if kind == "GroupNorm" else (6,)
    return getattr(library, kind)(*sizes, **options)


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if "var" in name else values)
        else:
            tensor.fill_(5)


def both(kind: str, options: dict[str, Any], device: Any = "cpu", dtype: Any = torch.float64):
    ours, theirs = (make(library, kind, **options).to(device, dtype) for library in (fastnorm, nn))
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + seed


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, want = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)


@each
def test_state_dict_both_ways(kind, shape, options):
    ours, theirs = both(kind, options)
    back = make(nn, kind, **options).double()
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(back, theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]


@each
def test_results_buffers_and_gradients_are_torchs(backend, kind, shape, options):
    """Three steps of training, then evaluation."""
    ours, theirs = both(kind, options, backend)
    for step in range(4):
        if step == 3:
            ours.eval()
            theirs.eval()
        x = draw(*shape, seed=step).to(backend)
        results = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            dy = draw(*shape, seed=9).to(backend)
            results.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("kind", CLASSES)
def test_residual_and_activation(backend, kind):
    shape = {"GroupNorm": (2, 6, 5), "InstanceNorm1d": (2, 6, 5), "InstanceNorm2d": (2, 6, 5, 3)}
    shape = shape.get(kind, (2, 6, 2, 3, 4))
    ours, theirs = both(kind, {"affine": True}, backend)
    ours.activation = "silu"
    x, r = draw(*shape).to(backend), draw(*shape, seed=2).to(backend)
    want = nn.functional.silu(theirs(x) + r)
    assert_close(ours(x, residual=r), want.detach())
    if kind != "GroupNorm":
        assert_close(ours(x[0], r[0]), want[0].detach())
    options = {"activation": "silu", "affine": True}
    made = make(fastnorm, kind, **options).to(backend).double()
    made.load_state_dict(theirs.state_dict())
    assert_close(made(x, r), want.detach())


def copies(module: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return {
        "pickle": pickle.loads(pickle.dumps(module)),
        "copy.deepcopy": copy.deepcopy(module),
        "torch.load": torch.load(file, weights_only=False),
    }


@each
def test_copies_are_the_same_and_apart(kind, shape, options):
    ours = make(fastnorm, kind, activation="elu", **options).double()
    randomize(ours)
    x = draw(*shape)
    for way, twin in copies(ours).items():
        assert type(twin) is type(ours)
        assert repr(twin) == repr(ours)
        assert_same_state(twin, ours)
        before = {k: v.clone() for k, v in ours.state_dict().items()}
        want = copy.deepcopy(ours)(x)
        assert torch.equal(twin(x), want), way
        assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items()), way


@pytest.mark.parametrize("kind", CLASSES)
def test_is_torchs_class(kind):
    ours, torchs = getattr(fastnorm, kind), getattr(nn, kind)
    assert issubclass(ours, torchs)
    assert ours.__name__ == kind
    assert repr(make(fastnorm, kind)) == repr(make(nn, kind))
    assert "activation='silu'" in repr(make(fastnorm, kind, activation="silu"))
    known = inspect.signature(torchs.__init__).parameters
    if "bias" in known:
        assert make(fastnorm, kind, affine=True, bias=False).bias is None
    with pytest.raises(ValueError, match="'swish'"):
        make(fastnorm, kind, activation="swish")


def test_channels_must_be_divisible():
    with pytest.raises(ValueError, match=r"num_channels \(6\).*num_groups \(4\)"):
        fastnorm.GroupNorm(4, 6)


@pytest.mark.parametrize("kind", CLASSES[1:])
def test_wrong_inputs_raise_torchs_errors(backend, kind):
    ours, theirs = both(kind, {"affine": True}, backend)
    for shape in ((6,), (2, 6, 1, 1, 1, 1), (2, 5, 3), (2, 5, 3, 3), (2, 5, 2, 2, 2), (2, 6)):
        x = torch.ones(shape, device=backend, dtype=torch.float64)
        errors = []
        for layer in (ours, theirs):
            try:
                layer(x)
            except Exception as error:
                errors.append(error)
        assert len(errors) in (0, 2), (shape, errors)
        if errors:
            assert isinstance(errors[0], type(errors[1])), (shape, errors)


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 3), 1), ((5, 3), 0)])
def test_the_axis_of_wrong_features_is_named(backend, shape, axis):
    norm = fastnorm.InstanceNorm1d(6, affine=True, device=backend)
    with pytest.raises(ValueError, match=f"at dim={axis} to match num_features"):
        norm(torch.ones(shape, device=backend))


def test_wrong_features_warn_where_they_do_not_matter(backend):
    with pytest.warns(UserWarning, match="does not match num_features"):
        fastnorm.InstanceNorm1d(6)(torch.ones(2, 5, 3, device=backend))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastnorm.InstanceNorm1d(5)(torch.ones(2, 5, 3, device=backend))


def test_batches_are_not_counted(backend):
    """As torch's instance norm, whose counter stays 0."""
    norm = fastnorm.InstanceNorm1d(6, track_running_stats=True, device=backend)
    norm(torch.randn(2, 6, 5, device=backend))
    assert norm.num_batches_tracked.item() == 0
    assert norm.running_mean.any()


@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm2d"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole(kind):
    """torch.compile(fullgraph=True) on the eager path: operators that Inductor can fuse."""
    torch._dynamo.reset()
    layer = make(fastnorm, kind, activation="silu", affine=True)
    x = draw(2, 6, 5, 3).float().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(got, want)
    torch._dynamo.reset()


def test_functions_are_exported():
    assert {"group_norm", "instance_norm"} <= set(FF.__all__)
