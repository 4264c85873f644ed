"""PyTorch's own test inputs: samples and errors of its databases of operators and of modules."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from cases import FLOATS, tolerance
from torch import Tensor, nn
from twins import randomize

import fastnorm
import fastnorm.functional as FF

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

FUNCTIONS = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")
MODULES = (
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
)
TORCHS_OWN = 2
"""How many times torch's own error in the dtype is allowed: another order is another rounding."""

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_module = pytest.mark.parametrize("name", MODULES)


def each_dtype(*fast: torch.dtype) -> pytest.MarkDecorator:
    """A few of them, and all with the slow tests."""
    return pytest.mark.parametrize(
        "dtype",
        [
            pytest.param(d, id=str(d)[6:], marks=[] if d in fast else pytest.mark.slow)
            for d in FLOATS
        ],
    )


@functools.cache
def databases() -> tuple[dict[str, Any], dict[str, Any]]:
    """torch's lists of operators and of modules. Their import changes settings: not for us."""
    profile = hypothesis.settings.get_current_profile_name()
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    hypothesis.settings.load_profile(profile)
    torch.backends.__allow_nonbracketed_mutation_flag = True
    prefix = "nn.functional."
    operators = {op.name.removeprefix(prefix): op for op in op_db if not op.variant_test_name}
    return operators, {info.module_cls.__name__: info for info in module_db}


def samples(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[Any]:
    """torch's samples, and the same with strides."""
    torch.manual_seed(0)
    op = databases()[0][name]
    for sample in op.sample_inputs(device, dtype, requires_grad=True):
        yield sample
        yield sample.noncontiguous()


def fresh(value: Any, dtype: torch.dtype) -> Any:
    """A leaf, or buffer, of the same layout; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    leaf = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=value.device)
    return leaf.copy_(value.detach()).requires_grad_(value.requires_grad)


def results(
    call: Callable[[], Tensor], tensors: list[Tensor], second: bool
) -> dict[str, Tensor | None]:
    """The output, and what it makes of `tensors`: gradients, second gradients, moved buffers."""
    generator = torch.Generator().manual_seed(1)

    def draw(like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return values.to(like.device, torch.bfloat16).to(like.dtype)  # the same in every dtype

    y = call()
    leaves = [t for t in tensors if t.requires_grad]
    gradients = torch.autograd.grad(y, leaves, draw(y), create_graph=second, allow_unused=True)
    found = {"y": y} | {f"gradient {i}": g for i, g in enumerate(gradients)}
    if second:
        smooth = [g for g in gradients if g is not None and g.requires_grad]
        twice = torch.autograd.grad(smooth, leaves, [draw(g) for g in smooth], allow_unused=True)
        found |= {f"second gradient {i}": g for i, g in enumerate(twice)}
    return found | {f"buffer {i}": t for i, t in enumerate(tensors) if not t.requires_grad}


def judge(runs: list[dict[str, Tensor | None]], what: str) -> None:
    """Ours, torch's in the same dtype and torch's in float64: we may err as the second does."""
    got, own, want = runs
    assert got.keys() == want.keys()
    for name, value in got.items():
        theirs, exact = own[name], want[name]
        assert (value is None) == (theirs is None), f"{what}: {name}"
        if value is None or theirs is None or exact is None:
            continue
        assert (value.dtype, value.shape) == (theirs.dtype, theirs.shape), f"{what}: {name}"
        if not value.is_floating_point():
            assert torch.equal(value, theirs), f"{what}: {name}"
        elif value.numel() > 0:
            options = tolerance(value.dtype, exact.detach(), exact.numel())
            error = (theirs.double() - exact.double()).abs()
            options["atol"] += TORCHS_OWN * error.nan_to_num(0.0, 0.0).max().item()
            torch.testing.assert_close(
                value.double(), exact.double(), **options, equal_nan=True,
                msg=lambda text, name=name: f"{what}: {name}: {text}",
            )  # fmt: skip


@each_dtype(torch.bfloat16, torch.float64)
@each_function
def test_functions(backend, name, dtype):
    """Output, gradients and buffers, and second gradients, are torch's of the same numbers."""
    ours, theirs = getattr(FF, name), getattr(F, name)
    for sample in samples(name, backend, dtype):
        runs = []
        for function, kind in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
            arguments = [fresh(a, kind) for a in (sample.input, *sample.args)]
            options = {k: fresh(v, kind) for k, v in sample.kwargs.items()}
            tensors = [t for t in (*arguments, *options.values()) if isinstance(t, Tensor)]
            call = functools.partial(function, *arguments, **options)
            runs.append(results(call, tensors, second=dtype is torch.float64))
        judge(runs, str(sample.summary()))


@each_dtype(*FLOATS)
def test_an_empty_vector(backend, dtype):
    """Among torch's samples of batch norm: no channels, and nothing to refuse."""
    x = torch.empty(0, dtype=dtype, device=backend, requires_grad=True)
    residual = torch.empty(0, device=backend, requires_grad=True)
    y = FF.batch_norm(x, None, None, training=True, residual=residual, activation="silu")
    assert (y.shape, y.dtype) == (x.shape, torch.promote_types(dtype, torch.float32))
    assert all(g.shape == (0,) for g in torch.autograd.grad(y, (x, residual), y))


@each_function
def test_functions_refuse_what_torchs_refuse(backend, name):
    op = databases()[0][name]
    if op.error_inputs_func is None:
        assert name in ("batch_norm", "instance_norm", "layer_norm"), "torch has no errors for it"
        return
    for case in op.error_inputs(backend):
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            getattr(FF, name)(sample.input, *sample.args, **sample.kwargs)


def module_samples(
    name: str, device: torch.device, dtype: torch.dtype, training: bool
) -> Iterator[tuple[list[nn.Module], Tensor, str]]:
    """Ours, torch's, torch's in float64, all of the same numbers; an input; what it is."""
    info = databases()[1][name]
    from torch.testing._internal.common_utils import noncontiguous_like

    torch.manual_seed(0)
    for case in info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    ):
        made, (x,) = case.constructor_input, case.forward_input.args
        ours, theirs = (
            kind(*made.args, **made.kwargs, device=device, dtype=dtype).train(training)
            for kind in (getattr(fastnorm, name), info.module_cls)
        )
        randomize(theirs)
        ours.load_state_dict(theirs.state_dict())
        for like in (x, noncontiguous_like(x)):
            modules = [copy.deepcopy(ours), copy.deepcopy(theirs), copy.deepcopy(theirs).double()]
            yield modules, like, f"{name} {case.desc} {like.stride()}"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_dtype(torch.float64)
@each_module
def test_modules(backend, name, dtype, training):
    """The same of modules, with the gradients of their parameters and their buffers."""
    for modules, x, what in module_samples(name, backend, dtype, training):
        runs = []
        for module, kind in zip(modules, (dtype, dtype, torch.float64), strict=True):
            leaf = fresh(x, kind)
            tensors = [leaf, *module.parameters(), *module.buffers()]
            call = functools.partial(module, leaf)
            runs.append(results(call, tensors, second=dtype is torch.float64))
        judge(runs, what)


@each_module
def test_modules_refuse_what_torchs_refuse(backend, name):
    from torch.testing._internal.common_modules import ModuleErrorEnum

    info = databases()[1][name]
    if info.module_error_inputs_func is None:
        assert name.startswith("Instance") or name in ("LayerNorm", "RMSNorm")
        return
    for case in info.module_error_inputs_func(
        info, device=backend, dtype=torch.float32, requires_grad=False, training=True
    ):
        made, given = case.module_error_input.constructor_input, case.module_error_input
        make = functools.partial(getattr(fastnorm, name), *made.args, **made.kwargs)
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            refused: Callable[[], Any] = make
        else:
            refused = functools.partial(make(device=backend), *given.forward_input.args)
        with pytest.raises(case.error_type, match=case.error_regex):
            refused()
