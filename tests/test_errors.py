"""A bad call raises what torch.nn raises, names the offending values, and changes no buffer.

Each case makes the same bad call to torch, on the CPU, and to ours. Where torch accepts it, or has
no such argument, `kind` says what ours raises.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_calls import CPU, META, Bad, bits, check_error, raised_by, tensors_of, to
from torch import Tensor, nn

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS


# ---- functional.batch_norm -----------------------------------------------------------------------
def batch_norm_arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(4, 3, 5),
        "running_mean": torch.tensor([0.1, 0.2, 0.3]),
        "running_var": torch.tensor([1.0, 2.0, 3.0]),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }


EVAL = {"training": False}
BARE = dict.fromkeys(("running_mean", "running_var", "weight", "bias"))
BATCH_NORM = {
    "one value per channel": Bad({"input": torch.ones(1, 3)}, ValueError, ("[1, 3]",)),
    "one value per channel, 4-D": Bad(
        {"input": torch.ones(1, 3, 1, 1)}, ValueError, ("[1, 3, 1, 1]",)
    ),
    "one value, one axis": Bad({"input": torch.ones(1), **BARE}, ValueError, ("[1]",)),
    "one axis": Bad({"input": torch.ones(3), **BARE}, IndexError, ()),  # torch's, as it happens
    "no axis": Bad({"input": torch.ones(()), **BARE}, IndexError, ()),
    "one axis in evaluation": Bad(
        {"input": torch.ones(3), **EVAL}, RuntimeError, ("running_mean", "3")
    ),
    "channels": Bad({"input": torch.ones(4, 7, 5)}, RuntimeError, ("running_mean", "7", "3")),
    "channels in evaluation": Bad(
        {"input": torch.ones(4, 7, 5), **EVAL}, RuntimeError, ("running_mean", "7", "3")
    ),
    "running_mean's size": Bad(
        {"running_mean": torch.zeros(4)}, RuntimeError, ("running_mean", "4", "3")
    ),
    "running_var's size": Bad(
        {"running_var": torch.ones(2)}, RuntimeError, ("running_var", "2", "3")
    ),
    "weight's size": Bad({"weight": torch.ones(4)}, RuntimeError, ("weight", "4", "3")),
    "bias's size": Bad({"bias": torch.ones(1)}, RuntimeError, ("bias", "1", "3")),
    "running_mean alone": Bad(
        {"running_var": None}, ValueError, ("running_mean", "running_var", "None")
    ),
    "running_var alone": Bad(
        {"running_mean": None}, ValueError, ("running_mean", "running_var", "None")
    ),
    "running_mean alone in evaluation": Bad(
        {"running_var": None, **EVAL}, RuntimeError, ("running_var", "evaluation")
    ),
    "running_var alone in evaluation": Bad(
        {"running_mean": None, **EVAL}, RuntimeError, ("running_mean", "evaluation")
    ),
    "no buffers in evaluation": Bad(
        {"running_mean": None, "running_var": None, **EVAL},
        RuntimeError,
        ("running_mean", "evaluation"),
    ),
    "eps 0 in training": Bad({"eps": 0.0}, ValueError, ("eps", "0.0")),
    "eps negative in training": Bad({"eps": -0.25}, ValueError, ("eps", "-0.25")),
    "eps negative in evaluation": Bad({"eps": -0.25, **EVAL}, ValueError, ("eps", "-0.25")),
    "eps a string": Bad({"eps": "1e-5"}, TypeError, ("str",)),
    "eps of one element": Bad({"eps": torch.ones(1)}, TypeError, ("eps", "Tensor")),
    "eps that requires a gradient": Bad(
        {"eps": torch.tensor(1.0, requires_grad=True)}, TypeError, ("eps",)
    ),
    "momentum None": Bad({"momentum": None}, TypeError, ("momentum",)),
    "momentum None in evaluation": Bad({"momentum": None, **EVAL}, TypeError, ("momentum",)),
    "momentum of several elements": Bad(
        {"momentum": torch.tensor([0.1, 0.2, 0.3])}, TypeError, ("momentum",)
    ),
    "momentum that requires a gradient": Bad(
        {"momentum": torch.tensor(0.1, requires_grad=True)}, TypeError, ("momentum",)
    ),
    "momentum complex": Bad({"momentum": 0.1j}, TypeError, ("momentum", "complex")),
    "momentum elsewhere": Bad(
        {"momentum": torch.tensor(0.1, device=META)}, RuntimeError, ("meta", "cpu", "momentum")
    ),
    "momentum a string": Bad({"momentum": "x"}, TypeError, ("momentum", "str")),
    "integers": Bad({"input": torch.ones(4, 3, 5).long()}, RuntimeError, ("Long", "batch_norm")),
    "integers in evaluation": Bad(
        {"input": torch.ones(4, 3, 5).long(), **EVAL}, RuntimeError, ("Long",)
    ),
    "booleans": Bad({"input": torch.ones(4, 3, 5).bool()}, RuntimeError, ("Bool",)),
    "complex numbers": Bad({"input": torch.ones(4, 3, 5) * 1j}, RuntimeError, ("ComplexFloat",)),
    "float8": Bad({"input": torch.ones(4, 3, 5).to(torch.float8_e5m2)}, RuntimeError, ("Float8",)),
    "integer weight": Bad({"weight": torch.ones(3).long()}, RuntimeError, ()),
    "complex weight": Bad({"weight": torch.ones(3) * 1j}, RuntimeError, ()),
    "complex bias": Bad({"bias": torch.ones(3) * 1j}, RuntimeError, ()),
    "integer buffers": Bad(
        {"running_mean": torch.zeros(3).long(), "running_var": torch.ones(3).long()},
        RuntimeError,
        (),
    ),
    "an array": Bad({"input": np.ones((4, 3, 5), np.float32)}, TypeError, ("ndarray",)),
    "running_mean that requires a gradient": Bad(
        {"running_mean": torch.zeros(3, requires_grad=True)}, RuntimeError, ("running_mean",)
    ),
    "running_var that requires a gradient, in evaluation": Bad(
        {"running_var": torch.ones(3, requires_grad=True), **EVAL}, RuntimeError, ("running_var",)
    ),
    "input elsewhere": Bad({"input": torch.ones(4, 3, 5, device=META)}, RuntimeError, ("meta",)),
    "weight elsewhere": Bad({"weight": torch.ones(3, device=META)}, RuntimeError, ("meta", "cpu")),
    "bias elsewhere": Bad({"bias": torch.ones(3, device=META)}, RuntimeError, ("meta", "cpu")),
    "running_mean elsewhere": Bad(
        {"running_mean": torch.ones(3, device=META)}, RuntimeError, ("meta", "cpu")
    ),
    "running_var elsewhere": Bad(
        {"running_var": torch.ones(3, device=META)}, RuntimeError, ("meta", "cpu")
    ),
    "running_var elsewhere in evaluation": Bad(
        {"running_var": torch.ones(3, device=META), **EVAL}, RuntimeError, ("meta", "cpu")
    ),
    "no tensor": Bad({"input": [[1.0, 2.0, 3.0]] * 2}, AttributeError, ("list",)),
    # what torch's function does not have
    "residual's shape": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[4, 3, 6]"), {"residual": torch.ones(4, 3, 6)}
    ),
    "residual that would broadcast": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[3, 1]"), {"residual": torch.ones(3, 1)}
    ),
    "residual that is larger": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[2, 4, 3, 5]"), {"residual": torch.ones(2, 4, 3, 5)}
    ),
    "residual's shape in evaluation": Bad(
        EVAL, RuntimeError, ("[4, 3, 5]", "[4, 3]"), {"residual": torch.ones(4, 3)}
    ),
    "residual elsewhere": Bad(
        {}, RuntimeError, ("meta", "cpu"), {"residual": torch.ones(4, 3, 5, device=META)}
    ),
    "activation": Bad({}, ValueError, ("'swish'", *ACTIVATIONS), {"activation": "swish"}),
    "activation None": Bad({}, ValueError, ("None", *ACTIVATIONS), {"activation": None}),
    "activation a function": Bad({}, ValueError, ("relu",), {"activation": torch.relu}),
    "activation in capitals": Bad({}, ValueError, ("'ReLU'",), {"activation": "ReLU"}),
    "activation in evaluation": Bad(EVAL, ValueError, ("'swish'",), {"activation": "swish"}),
}  # fmt: skip


@pytest.mark.parametrize("counted", [False, True], ids=["", "counted"])
@pytest.mark.parametrize("name", BATCH_NORM)
def test_batch_norm(backend, name, counted):
    bad = BATCH_NORM[name]
    if counted and bad.arguments.get("momentum", 0.1) is None:
        pytest.skip("None is allowed where the batches are counted")
    given = batch_norm_arguments() | bad.arguments
    want = None
    if not bad.ours_only:
        want = raised_by(lambda: F.batch_norm(**{k: to(CPU, v) for k, v in given.items()}))
    arguments = {k: to(backend, v) for k, v in (given | bad.ours_only).items()}
    count = torch.tensor(7, device=backend) if counted else None
    before = {name: bits(arguments[name]) for name in ("running_mean", "running_var")}
    error = raised_by(lambda: FF.batch_norm(**arguments, num_batches_tracked=count))
    check_error(error, want, bad, backend)
    assert before == {name: bits(arguments[name]) for name in before}
    assert count is None or count.item() == 7


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_buffers_that_require_a_gradient_where_there_is_none(backend, training):
    x = torch.randn(4, 3, 5, device=backend)
    want = torch.zeros(3, device=backend), torch.ones(3, device=backend)
    found = [b.clone().requires_grad_() for b in want]
    with torch.no_grad():
        y = FF.batch_norm(x, *found, training=training)
    torch.testing.assert_close(y, F.batch_norm(x, *want, training=training))
    torch.testing.assert_close([b.detach() for b in found], list(want))


# ---- modules -------------------------------------------------------------------------------------
MODULES = {
    "1d, 1 axis": ("BatchNorm1d", torch.ones(3)),
    "1d, 4 axes": ("BatchNorm1d", torch.ones(2, 3, 4, 5)),
    "2d, 3 axes": ("BatchNorm2d", torch.ones(2, 3, 4)),
    "2d, 5 axes": ("BatchNorm2d", torch.ones(2, 3, 4, 5, 6)),
    "3d, 4 axes": ("BatchNorm3d", torch.ones(2, 3, 4, 5)),
    "1d, channels": ("BatchNorm1d", torch.ones(2, 4)),
    "2d, channels": ("BatchNorm2d", torch.ones(2, 4, 5, 5)),
    "1d, one value per channel": ("BatchNorm1d", torch.ones(1, 3)),
    "3d, one value per channel": ("BatchNorm3d", torch.ones(1, 3, 1, 1, 1)),
    "2d, integers": ("BatchNorm2d", torch.ones(2, 3, 4, 5).int()),
    "2d, elsewhere": ("BatchNorm2d", torch.ones(2, 3, 4, 5, device=META)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(backend, name, training):
    kind, x = MODULES[name]
    want = raised_by(lambda: getattr(nn, kind)(3).train(training)(x))
    if want is None:
        pytest.skip("not wrong in evaluation")
    ours = getattr(fastnorm, kind)(3, device=backend).train(training)
    before = tensors_of(ours)
    error = raised_by(lambda: ours(to(backend, x)))
    if isinstance(want, ValueError):
        assert str(error) == str(want)
    check_error(error, want, Bad({}, type(want), ()), backend)
    assert tensors_of(ours) == before


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_module_that_has_lost_a_buffer(backend, name):
    norms = fastnorm.BatchNorm1d(3, device=backend).eval(), nn.BatchNorm1d(3).eval()
    for norm in norms:
        setattr(norm, name, None)
    error, want = (
        raised_by(lambda norm=norm, x=x: norm(x))
        for norm, x in zip(norms, (torch.ones(4, 3, device=backend), torch.ones(4, 3)), strict=True)
    )
    check_error(error, want, Bad({}, RuntimeError, (name,)), backend)


@pytest.mark.parametrize("residual", [torch.ones(4, 3), torch.ones(4, 3, 5, device=META)], ids=str)
def test_module_residual(backend, residual):
    ours = fastnorm.BatchNorm1d(3, device=backend)
    before = tensors_of(ours)
    with pytest.raises(RuntimeError):
        ours(torch.ones(4, 3, 5, device=backend), residual)
    assert tensors_of(ours) == before


def test_backward_of_a_wrong_gradient(backend):
    ours = fastnorm.BatchNorm1d(3, device=backend, activation="relu")
    y = ours(torch.randn(4, 3, device=backend))
    with pytest.raises(RuntimeError, match="shape"):
        y.backward(torch.ones(4, 4, device=backend))


# ---- constructors --------------------------------------------------------------------------------
CONSTRUCTORS = {
    "BatchNorm1d": (3,),
    "BatchNorm2d": (3,),
    "BatchNorm3d": (3,),
    "LinearBatchNorm": (4, 3),
    "Conv1dBatchNorm": (4, 3, 1),
    "Conv2dBatchNorm": (4, 3, 1),
    "Conv3dBatchNorm": (4, 3, 1),
}


@pytest.mark.parametrize("activation", ["swish", "", "RELU", None])
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_unknown_activation(name, activation):
    with pytest.raises(ValueError, match="activation must be one of") as caught:
        getattr(fastnorm, name)(*CONSTRUCTORS[name], activation=activation)
    for known in ACTIVATIONS:
        assert known in str(caught.value)
    assert repr(activation) in str(caught.value)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_unknown_constructor_argument(name):
    with pytest.raises(TypeError, match="nonsense"):
        getattr(fastnorm, name)(*CONSTRUCTORS[name], nonsense=1)


# ---- linear --------------------------------------------------------------------------------------
def linear_arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(6, 4),
        "weight": torch.randn(3, 4),
        "bias": torch.randn(3),
        "running_mean": torch.tensor([0.1, 0.2, 0.3]),
        "running_var": torch.tensor([1.0, 2.0, 3.0]),
        "norm_weight": torch.ones(3),
        "norm_bias": torch.zeros(3),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }


def torchs_composition(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(
        input, weight, bias, running_mean, running_var, norm_weight, norm_bias, training, momentum,
        eps, **options,
    ):  # fmt: skip
        z = product(input, weight, bias, **options)
        return F.batch_norm(
            z, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps
        )

    return call


NO_TENSORS = {
    f"{name} {value!r}": Bad({name: value}, TypeError, (name, type(value).__name__))
    for name, value in (("input", [1.0]), ("weight", 2.0), ("bias", [1.0, 2.0, 3.0]))
}
NO_TENSORS |= {
    f"no {name}": Bad({name: None}, TypeError, (name, "None")) for name in ("input", "weight")
}


LINEAR = {
    "in_features": Bad({"input": torch.ones(6, 5)}, RuntimeError, ("[6, 5]", "[3, 4]")),
    "one axis": Bad({"input": torch.ones(4)}, RuntimeError, ("[4]", "[3, 4]")),
    "no axis": Bad({"input": torch.ones(())}, RuntimeError, ("[]", "[3, 4]")),
    "weight's rank": Bad({"weight": torch.ones(3, 4, 1)}, RuntimeError, ("[3, 4, 1]",)),
    "bias's size": Bad({"bias": torch.ones(2)}, RuntimeError, ("[3]", "[2]")),
    "bias's rank": Bad({"bias": torch.ones(2, 3)}, RuntimeError, ("[3]", "[2, 3]")),
    "one value per channel": Bad({"input": torch.ones(1, 4)}, ValueError, ("[1, 3]",)),
    "norm_weight's size": Bad({"norm_weight": torch.ones(4)}, RuntimeError, ("weight", "4", "3")),
    "norm_bias's size": Bad({"norm_bias": torch.ones(4)}, RuntimeError, ("bias", "4", "3")),
    "running_var's size": Bad({"running_var": torch.ones(4)}, RuntimeError, ("running_var", "4")),
    "running_mean alone": Bad({"running_var": None}, ValueError, ("running_var",)),
    "no buffers in evaluation": Bad(
        {"running_mean": None, "running_var": None, **EVAL}, RuntimeError, ("running_mean",)
    ),
    "eps that requires a gradient": Bad(
        {"eps": torch.tensor(1.0, requires_grad=True)}, TypeError, ("eps",)
    ),
    "eps 0 in training": Bad({"eps": 0.0}, ValueError, ("0.0",)),
    "eps negative in evaluation": Bad({"eps": -0.5, **EVAL}, ValueError, ("-0.5",)),
    "momentum None": Bad({"momentum": None}, TypeError, ("momentum",)),
    "integers": Bad({"input": torch.ones(6, 4).long()}, RuntimeError, ("Long",)),
    "integers all": Bad(
        {"input": torch.ones(6, 4).long(), "weight": torch.ones(3, 4).long(), "bias": None},
        RuntimeError,
        (),
    ),
    "integer weight": Bad({"weight": torch.ones(3, 4).long()}, RuntimeError, ("weight", "Long")),
    "complex bias": Bad({"bias": torch.ones(3) * 1j}, RuntimeError, ("bias", "Complex")),
    "weight elsewhere": Bad(
        {"weight": torch.ones(3, 4, device=META)}, RuntimeError, ("meta", "cpu", "weight")
    ),
    "bias elsewhere": Bad({"bias": torch.ones(3, device=META)}, RuntimeError, ("meta", "cpu")),
    "norm_weight elsewhere": Bad({"norm_weight": torch.ones(3, device=META)}, RuntimeError, ()),
    **NO_TENSORS,
    "activation": Bad({}, ValueError, ("'swish'", *ACTIVATIONS), {"activation": "swish"}),
    "algorithm": Bad({}, ValueError, ("'magic'", "auto", "unfused"), {"algorithm": "magic"}),
}  # fmt: skip


CONV = {
    "input's rank": Bad({"input": torch.ones(6, 4)}, RuntimeError, ("[6, 4]",)),
    "weight's rank": Bad({"weight": torch.ones(3, 4)}, RuntimeError, ("[3, 4]",)),
    "too many axes": Bad({"weight": torch.ones(3, 4, 1, 1, 1, 1)}, RuntimeError, ("1, 1, 1, 1]",)),
    "in_channels": Bad({"input": torch.ones(6, 5, 4, 4)}, RuntimeError, ("5", "4")),
    "kernel larger than input": Bad({"weight": torch.ones(3, 4, 9, 9)}, RuntimeError, ("9",)),
    "bias's size": Bad({"bias": torch.ones(2)}, RuntimeError, ("2", "3")),
    "groups": Bad({"groups": 2}, RuntimeError, ("groups",)),
    "padding": Bad({"padding": "nonsense"}, RuntimeError, ()),
    "one value per channel": Bad({"input": torch.ones(1, 4, 1, 1)}, ValueError, ("[1, 3, 1, 1]",)),
    "norm_weight's size": Bad({"norm_weight": torch.ones(4)}, RuntimeError, ("weight", "4", "3")),
    "running_mean alone": Bad({"running_var": None}, ValueError, ("running_var",)),
    "eps that requires a gradient": Bad(
        {"eps": torch.tensor(1.0, requires_grad=True)}, TypeError, ("eps",)
    ),
    "eps 0 in training": Bad({"eps": 0.0}, ValueError, ("0.0",)),
    "momentum None": Bad({"momentum": None}, TypeError, ("momentum",)),
    "integers all": Bad(
        {"input": torch.ones(6, 4, 4, 4).long(), "weight": torch.ones(3, 4, 1, 1).long()},
        RuntimeError,
        (),
    ),
    "integer weight": Bad(
        {"weight": torch.ones(3, 4, 1, 1).long()}, RuntimeError, ("weight", "Long")
    ),
    "norm_bias elsewhere": Bad({"norm_bias": torch.ones(3, device=META)}, RuntimeError, ()),
    **NO_TENSORS,
    "activation": Bad({}, ValueError, ("'swish'", *ACTIVATIONS), {"activation": "swish"}),
}  # fmt: skip


def check_composition(
    bad: Bad,
    given: dict[str, Any],
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    device: torch.device,
) -> None:
    given = given | bad.arguments
    want = None
    if not bad.ours_only:
        want = raised_by(lambda: theirs(**{k: to(CPU, v) for k, v in given.items()}))
    if not isinstance(want, bad.kind):
        want = None  # torch's two functions complain of one another's sizes
    arguments = {k: to(device, v) for k, v in given.items()}
    buffers = ("running_mean", "running_var")
    before = {name: bits(arguments[name]) for name in buffers}
    count = None if arguments["momentum"] is None else torch.tensor(7, device=device)
    error = raised_by(lambda: ours(**arguments, **bad.ours_only, num_batches_tracked=count))
    check_error(error, want, bad, device)
    assert before == {name: bits(arguments[name]) for name in buffers}
    assert count is None or count.item() == 7


@pytest.mark.parametrize("name", LINEAR)
def test_linear_batch_norm(backend, name):
    check_composition(
        LINEAR[name],
        linear_arguments(),
        torchs_composition(F.linear),
        FF.linear_batch_norm,
        backend,
    )


@pytest.mark.parametrize("name", CONV)
def test_conv_batch_norm(backend, name):
    arguments = linear_arguments() | {
        "input": torch.randn(6, 4, 5, 5),
        "weight": torch.randn(3, 4, 1, 1),
    }
    check_composition(
        CONV[name], arguments, torchs_composition(F.conv2d), FF.conv_batch_norm, backend
    )


COMPOUND = {
    "linear, in_features": ("linear", torch.ones(6, 5)),
    "linear, one axis": ("linear", torch.ones(4)),
    "linear, one value per channel": ("linear", torch.ones(1, 4)),
    "linear, integers": ("linear", torch.ones(6, 4).long()),
    "linear, nothing": ("linear", None),
    "linear, a list": ("linear", [[1.0] * 4] * 6),
    "linear, elsewhere": ("linear", torch.ones(6, 4, device=META)),
    "conv, in_channels": ("conv", torch.ones(2, 5, 6, 6)),
    "conv, without a batch": ("conv", torch.ones(4, 6, 6)),
    "conv, two axes": ("conv", torch.ones(4, 6)),
    "conv, five axes": ("conv", torch.ones(2, 4, 6, 6, 6)),
    "conv, one value per channel": ("conv", torch.ones(1, 4, 3, 3)),
    "conv, smaller than the kernel": ("conv", torch.ones(2, 4, 2, 2)),
    "conv, nothing": ("conv", None),
    "conv, a list": ("conv", [1.0]),
    "conv, elsewhere": ("conv", torch.ones(2, 4, 6, 6, device=META)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOUND)
def test_compound_modules(backend, name):
    kind, x = COMPOUND[name]
    if kind == "linear":
        ours = fastnorm.LinearBatchNorm(4, 3, device=backend)
        theirs = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    else:
        ours = fastnorm.Conv2dBatchNorm(4, 3, 3, device=backend)
        theirs = nn.Sequential(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    want = raised_by(lambda: theirs(x))
    assert want is not None
    kind = type(want)
    if name in ("conv, two axes", "conv, five axes"):
        kind = Exception  # torch's convolution complains before its batch norm can
    before = tensors_of(ours)
    error = raised_by(lambda: ours(to(backend, x)))
    assert isinstance(error, kind), f"{error!r}; torch: {want!r}"
    assert isinstance(error, RuntimeError | ValueError | TypeError)
    assert tensors_of(ours) == before


def test_a_momentum_tensor_is_floating_point():
    with pytest.raises(TypeError, match="momentum tensor must be 0-dimensional, floating-point"):
        FF.batch_norm(torch.ones(4, 2), None, None, training=True, momentum=torch.tensor(1))
