"""A bad call of a layer norm raises what torch raises, names the values, and changes nothing.

As in test_errors.py. The residual-add forms are held to torch's norm of the sum.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_calls import CPU, META, Bad, bits, check_error, raised_by, tensors_of, to
from torch import nn

import fastnorm
import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS

KINDS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
CLASSES = ("LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm")


def arguments(kind: str) -> dict[str, Any]:
    """Of a good call."""
    found = {
        "input": torch.randn(4, 3, 5),
        "residual": torch.randn(4, 3, 5),
        "normalized_shape": (3, 5),
        "weight": torch.ones(3, 5),
        "bias": torch.zeros(3, 5),
        "eps": 1e-5,
    }
    absent = {"residual"} if "add" not in kind else set()
    return {
        k: v for k, v in found.items() if k not in absent | ({"bias"} if "rms" in kind else set())
    }


BARE = {"weight": None, "bias": None}
SHAPES = {
    "no axes": Bad({"normalized_shape": ()}, RuntimeError, ("at least 1-dimensional", "[]")),
    "another size": Bad({"normalized_shape": (3, 6)}, RuntimeError, ("[3, 6]",)),
    "another size, bare": Bad(
        {"normalized_shape": (3, 6), **BARE}, RuntimeError, ("[*, 3, 6]", "[4, 3, 5]")
    ),
    "leading axes": Bad({"normalized_shape": (4, 3), **BARE}, RuntimeError, ("[4, 3]",)),
    "a size of -1": Bad({"normalized_shape": (3, -1), **BARE}, RuntimeError, ("[3, -1]",)),
    "one axis more": Bad({"normalized_shape": (2, 4, 3, 5)}, RuntimeError, ("[2, 4, 3, 5]",)),
    "one axis more, bare": Bad(
        {"normalized_shape": (2, 4, 3, 5), **BARE}, Exception, ("[*, 2, 4, 3, 5]", "[4, 3, 5]")
    ),
    "a number": Bad({"normalized_shape": 5, **BARE}, TypeError, ("normalized_shape", "int")),
    "None": Bad({"normalized_shape": None, **BARE}, TypeError, ("normalized_shape", "NoneType")),
    "floats": Bad({"normalized_shape": (3.0, 5.0), **BARE}, TypeError, ("float",)),
    "a string": Bad({"normalized_shape": "35", **BARE}, TypeError, ("str",)),
    "a tensor": Bad({"normalized_shape": torch.tensor([3, 5]), **BARE}, TypeError, ("Tensor",)),
    "a set": Bad({"normalized_shape": {5}, **BARE}, TypeError, ("normalized_shape", "set")),
}  # fmt: skip
PARAMETERS = {
    "weight's size": Bad(
        {"weight": torch.ones(3, 6)}, RuntimeError, ("weight", "[3, 6]", "[3, 5]")
    ),
    "weight's rank": Bad({"weight": torch.ones(15)}, RuntimeError, ("weight", "[15]", "[3, 5]")),
    "weight that would broadcast": Bad(
        {"weight": torch.ones(5)}, RuntimeError, ("weight", "[5]", "[3, 5]")
    ),
    "weight a scalar": Bad({"weight": torch.ones(())}, RuntimeError, ("weight", "[]", "[3, 5]")),
    "weight a list": Bad({"weight": [1.0] * 5}, TypeError, ("weight", "list")),
    "weight a number": Bad({"weight": 1.0}, TypeError, ("weight", "float")),
    "float8 weight": Bad(
        {"weight": torch.ones(3, 5).to(torch.float8_e5m2)}, RuntimeError, ("Float8",)
    ),
    "weight elsewhere": Bad(
        {"weight": torch.ones(3, 5, device=META)}, RuntimeError, ("meta", "cpu")
    ),
    "bias's size": Bad({"bias": torch.zeros(3, 6)}, RuntimeError, ("bias", "[3, 6]", "[3, 5]")),
    "bias's rank": Bad({"bias": torch.zeros(1, 3, 5)}, RuntimeError, ("bias", "[1, 3, 5]")),
    "bias alone, of another size": Bad(
        {"weight": None, "bias": torch.zeros(5)}, RuntimeError, ("bias", "[5]", "[3, 5]")
    ),
    "bias a list": Bad({"bias": [0.0] * 5}, TypeError, ("bias", "list")),
    "integer bias": Bad({"bias": torch.zeros(3, 5).long()}, RuntimeError, ("Long",)),
    "complex bias": Bad({"bias": torch.zeros(3, 5) * 1j}, RuntimeError, ("ComplexFloat",)),
    "bias elsewhere": Bad({"bias": torch.zeros(3, 5, device=META)}, RuntimeError, ("meta", "cpu")),
}  # fmt: skip
INPUTS = {
    "no axis": Bad({"input": torch.ones(()), **BARE}, Exception, ("[]", "[*, 3, 5]")),
    "other sizes": Bad({"input": torch.ones(2, 5), **BARE}, RuntimeError, ("[2, 5]", "[*, 3, 5]")),
    "one axis fewer": Bad({"input": torch.ones(5), **BARE}, Exception, ("[5]", "[*, 3, 5]")),
    "integers": Bad({"input": torch.ones(4, 3, 5).long()}, NotImplementedError, ("Long",)),
    "integers, bare": Bad(
        {"input": torch.ones(4, 3, 5).int(), **BARE}, NotImplementedError, ("Int",)
    ),
    "booleans": Bad({"input": torch.ones(4, 3, 5).bool(), **BARE}, NotImplementedError, ("Bool",)),
    "float8": Bad(
        {"input": torch.ones(4, 3, 5).to(torch.float8_e5m2), **BARE}, RuntimeError, ("Float8",)
    ),
    "elsewhere": Bad({"input": torch.ones(4, 3, 5, device=META)}, RuntimeError, ("meta",)),
    "a list": Bad({"input": [[1.0, 2.0, 3.0]] * 2}, TypeError, ("input", "list")),
    "an array": Bad({"input": np.ones((4, 3, 5), np.float32)}, TypeError, ("input", "ndarray")),
    "None": Bad({"input": None}, TypeError, ("input", "None")),
}  # fmt: skip
EPS = {
    "eps a string": Bad({"eps": "1e-5"}, TypeError, ("eps", "str")),
    "eps complex": Bad({"eps": 1j}, TypeError, ("eps", "complex")),
    "eps a list": Bad({"eps": [1e-5]}, TypeError, ("eps", "list")),
    "eps of one element": Bad({"eps": torch.ones(1)}, TypeError, ("eps", "Tensor")),
    "eps of two elements": Bad({"eps": torch.ones(2)}, TypeError, ("eps", "Tensor")),
    "eps an imaginary tensor": Bad({"eps": torch.tensor(1j)}, RuntimeError, ("double",)),
    "eps that requires a gradient": Bad(
        {"eps": torch.tensor(1.0, requires_grad=True)}, TypeError, ("eps",)
    ),
    "eps None": Bad({"eps": None}, TypeError, ("eps", "NoneType")),
}  # fmt: skip
ACTIVATION = {
    "activation": Bad({}, ValueError, ("'swish'", *ACTIVATIONS), {"activation": "swish"}),
    "activation None": Bad({}, ValueError, ("None", *ACTIVATIONS), {"activation": None}),
    "activation a function": Bad({}, ValueError, ("relu",), {"activation": torch.relu}),
    "activation in capitals": Bad({}, ValueError, ("'ReLU'",), {"activation": "ReLU"}),
}
RESIDUALS = {
    "residual's shape": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[4, 3, 6]"), {"residual": torch.ones(4, 3, 6)}
    ),
    "residual that would broadcast": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[3, 5]"), {"residual": torch.ones(3, 5)}
    ),
    "residual a scalar": Bad({}, RuntimeError, ("[4, 3, 5]", "[]"), {"residual": torch.ones(())}),
    "residual larger": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[2, 4, 3, 5]"), {"residual": torch.ones(2, 4, 3, 5)}
    ),
    "residual elsewhere": Bad(
        {}, RuntimeError, ("meta", "cpu"), {"residual": torch.ones(4, 3, 5, device=META)}
    ),
    "residual of integers": Bad(
        {}, RuntimeError, ("residual", "Long"), {"residual": torch.ones(4, 3, 5).long()}
    ),
    "residual None": Bad({}, TypeError, ("residual", "NoneType"), {"residual": None}),
    "residual a number": Bad({}, TypeError, ("residual", "float"), {"residual": 1.0}),
}  # fmt: skip
CASES = {**SHAPES, **PARAMETERS, **INPUTS, **EPS, **ACTIVATION, **RESIDUALS}


def applies(kind: str, bad: Bad) -> bool:
    if "rms" in kind and bad.arguments.get("bias") is not None:
        return False
    if "rms" in kind and bad.arguments.get("eps", 0) is None:
        return False  # its default
    return "add" in kind or "residual" not in bad.ours_only


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in KINDS for n in CASES if applies(k, CASES[n])]
)
def test_functions(backend, kind, name):
    bad = CASES[name]
    given = arguments(kind)
    given |= {k: v for k, v in bad.arguments.items() if k in given}
    theirs = getattr(F, kind.removeprefix("add_"))
    want = None
    if not bad.ours_only:
        plain = {k: to(CPU, v) for k, v in given.items() if k != "residual"}
        want = raised_by(lambda: theirs(**plain))
    given = {k: to(backend, v) for k, v in (given | bad.ours_only).items()}
    before = {k: bits(v) for k, v in given.items() if isinstance(v, torch.Tensor)}
    error = raised_by(lambda: getattr(FF, kind)(**given))
    check_error(error, want, bad, backend)
    assert before == {k: bits(given[k]) for k in before}


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_torchs(kind):
    """Where torch says all there is to say."""
    for name in ("no axes", "weight's size", "weight's rank", "bias's size"):
        bad = CASES[name]
        if not applies(kind, bad):
            continue
        given = arguments(kind)
        given |= {k: v for k, v in bad.arguments.items() if k in given}
        error = raised_by(partial(getattr(FF, kind), **given))
        given.pop("residual", None)
        want = raised_by(partial(getattr(F, kind.removeprefix("add_")), **given))
        assert str(error) == str(want).split("\n")[0], name


@pytest.mark.parametrize("kind", KINDS)
def test_operation_is_named(backend, kind):
    """ "rms_norm" is not "layer_norm"."""
    x = torch.ones(2, 3, device=backend).long()
    error = raised_by(lambda: getattr(FF, kind)(*[x] * (1 + ("add" in kind)), (3,)))
    assert f"\"{kind.removeprefix('add_')}\" not implemented for 'Long'" in str(error)


# ---- modules -------------------------------------------------------------------------------------
MODULES = {
    "another size": torch.ones(2, 4),
    "no axis": torch.ones(()),
    "a trailing axis too many": torch.ones(3, 1),
    "integers": torch.ones(2, 3).int(),
    "elsewhere": torch.ones(2, 3, device=META),
}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("name", MODULES)
def test_modules(backend, kind, name):
    x = MODULES[name]
    want = raised_by(lambda: getattr(nn, kind.removeprefix("Add"))(3)(x))
    assert want is not None
    ours = getattr(fastnorm, kind)(3, device=backend)
    before = tensors_of(ours)
    error = raised_by(lambda: ours(*[to(backend, x)] * (1 + ("Add" in kind))))
    check_error(error, want, Bad({}, type(want), ()), backend)
    assert tensors_of(ours) == before


@pytest.mark.parametrize("kind", ["AddLayerNorm", "AddRMSNorm"])
def test_module_residual(backend, kind):
    ours, x = getattr(fastnorm, kind)(3, device=backend), torch.ones(2, 3, device=backend)
    with pytest.raises(TypeError):
        ours(x)
    for residual in (torch.ones(3, device=backend), torch.ones(2, 3, device=META)):
        with pytest.raises(RuntimeError):
            ours(x, residual)
    with pytest.raises(TypeError, match="residual"):
        ours(x, None)


@pytest.mark.parametrize("kind", CLASSES)
def test_backward_of_a_wrong_gradient(backend, kind):
    ours = getattr(fastnorm, kind)(3, device=backend, activation="relu")
    x = torch.randn(4, 3, device=backend)
    outputs = ours(x, x) if "Add" in kind else (ours(x),)
    for y in outputs:
        if y.requires_grad:
            with pytest.raises(RuntimeError, match="shape"):
                y.backward(torch.ones(4, 4, device=backend))


# ---- constructors --------------------------------------------------------------------------------
@pytest.mark.parametrize("activation", ["swish", "", "RELU", None])
@pytest.mark.parametrize("kind", CLASSES)
def test_unknown_activation(kind, activation):
    with pytest.raises(ValueError, match="activation must be one of") as caught:
        getattr(fastnorm, kind)(3, activation=activation)
    for known in ACTIVATIONS:
        assert known in str(caught.value)
    assert repr(activation) in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_constructor_raises_what_torchs_raises(kind):
    for given in (
        {"normalized_shape": 3, "nonsense": 1},
        {"normalized_shape": "3"},
        {"normalized_shape": 3.5},
        {"normalized_shape": None},
        {"normalized_shape": (3, -1)},
        {"normalized_shape": 3, "dtype": torch.int64},
        {},
    ):
        want = raised_by(partial(getattr(nn, kind.removeprefix("Add")), **given))
        error = raised_by(partial(getattr(fastnorm, kind), **given))
        assert type(error) is type(want), (given, error, want)
        assert want is not None, given
