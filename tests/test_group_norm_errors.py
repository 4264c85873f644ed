"""A bad call of group norm or instance norm raises what torch raises, and changes no buffer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_errors import BARE, CPU, META, Bad, bits, check_error, raised_by, to

import fastnorm.functional as FF
from fastnorm.eager.activations import ACTIVATIONS


def group_norm_arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(4, 6, 5),
        "num_groups": 3,
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "eps": 1e-5,
    }


PLAIN = {"weight": None, "bias": None}
BAD_EPS = {
    "eps a string": Bad({"eps": "1e-5"}, TypeError, ("eps", "str")),
    "eps of one element": Bad({"eps": torch.ones(1)}, TypeError, ("eps", "Tensor")),
    "eps that requires a gradient": Bad(
        {"eps": torch.tensor(1.0, requires_grad=True)}, TypeError, ("eps",)
    ),
}
GROUP_NORM = {
    "not divisible": Bad({"num_groups": 4}, RuntimeError, ("[4, 6, 5]", "num_groups=4")),
    "more groups than channels": Bad({"num_groups": 12}, RuntimeError, ("num_groups=12",)),
    "no groups": Bad({"num_groups": 0}, ZeroDivisionError, ("0",)),
    "negative groups": Bad({"num_groups": -2}, RuntimeError, ("-2",)),
    "groups a string": Bad({"num_groups": "3"}, TypeError, ("str",)),
    "groups a float": Bad({"num_groups": 3.0}, TypeError, ("float",)),
    "groups a truth value": Bad({"num_groups": True}, TypeError, ("bool",)),
    "one axis": Bad({"input": torch.ones(6), **PLAIN}, RuntimeError, ("2 dimensions", "1")),
    "no axis": Bad({"input": torch.ones(()), **PLAIN}, RuntimeError, ("2 dimensions", "0")),
    "one value": Bad({"input": torch.ones(1, 3), **PLAIN}, ValueError, ("[1, 3]",)),
    "one value, with positions": Bad(
        {"input": torch.ones(1, 3, 1), **PLAIN}, ValueError, ("[1, 3, 1]",)
    ),
    "weight's size": Bad({"weight": torch.ones(5)}, RuntimeError, ("weight", "[5]", "[4, 6, 5]")),
    "weight's axes": Bad({"weight": torch.ones(6, 1)}, RuntimeError, ("weight", "[6, 1]")),
    "bias's size": Bad({"bias": torch.ones(3)}, RuntimeError, ("bias", "[3]")),
    **BAD_EPS,
    "integers": Bad({"input": torch.ones(4, 6, 5).long()}, RuntimeError, ("Long",)),
    "complex numbers": Bad({"input": torch.ones(4, 6, 5) * 1j}, RuntimeError, ("ComplexFloat",)),
    "integer weight": Bad({"weight": torch.ones(6).long()}, RuntimeError, ("weight",)),
    "weight elsewhere": Bad({"weight": torch.ones(6, device=META)}, RuntimeError, ("meta", "cpu")),
    "bias elsewhere": Bad({"bias": torch.ones(6, device=META)}, RuntimeError, ("meta", "cpu")),
    "residual's shape": Bad(
        {}, RuntimeError, ("[4, 6, 5]", "[4, 6, 1]"), {"residual": torch.ones(4, 6, 1)}
    ),
    "residual elsewhere": Bad(
        {}, RuntimeError, ("meta", "cpu"), {"residual": torch.ones(4, 6, 5, device=META)}
    ),
    "integer residual": Bad({}, RuntimeError, (), {"residual": torch.ones(4, 6, 5).long()}),
    "activation": Bad({}, ValueError, ("'swish'", *ACTIVATIONS), {"activation": "swish"}),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUP_NORM)
def test_group_norm(backend, name):
    bad = GROUP_NORM[name]
    given = group_norm_arguments() | bad.arguments
    want = None
    if not bad.ours_only:
        want = raised_by(lambda: F.group_norm(**{k: to(CPU, v) for k, v in given.items()}))
        assert want is not None, "torch accepts it"
    arguments = {k: to(backend, v) for k, v in (given | bad.ours_only).items()}
    check_error(raised_by(lambda: FF.group_norm(**arguments)), want, bad, backend)


def instance_norm_arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(4, 3, 5),
        "running_mean": torch.tensor([0.1, 0.2, 0.3]),
        "running_var": torch.tensor([1.0, 2.0, 3.0]),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
    }


EVAL = {"use_input_stats": False}
INSTANCE_NORM = {
    **BAD_EPS,
    "one position": Bad({"input": torch.ones(4, 3, 1)}, ValueError, ("spatial", "[4, 3, 1]")),
    "no positions": Bad({"input": torch.ones(4, 3)}, ValueError, ("spatial", "[4, 3]")),
    "one axis": Bad({"input": torch.ones(3), **BARE}, ValueError, ("[3]",)),
    "one axis in evaluation": Bad({"input": torch.ones(3), **EVAL}, IndexError, ()),
    "channels": Bad({"input": torch.ones(4, 7, 5)}, RuntimeError, ("running_mean",)),
    "channels in evaluation": Bad(
        {"input": torch.ones(4, 7, 5), **EVAL}, RuntimeError, ("running_mean",)
    ),
    "running_var's size": Bad({"running_var": torch.ones(2)}, RuntimeError, ("running_var",)),
    "weight's size": Bad({"weight": torch.ones(4)}, RuntimeError, ("weight",)),
    "bias's size": Bad({"bias": torch.ones(1)}, RuntimeError, ("bias",)),
    "running_mean alone": Bad({"running_var": None}, ValueError, ("running_mean", "None")),
    "running_var alone": Bad({"running_mean": None}, ValueError, ("running_mean", "None")),
    "no buffers in evaluation": Bad(
        {"running_mean": None, "running_var": None, **EVAL}, RuntimeError, ("use_input_stats",)
    ),
    "running_mean alone in evaluation": Bad(
        {"running_var": None, **EVAL}, RuntimeError, ("running_var",)
    ),
    "momentum None": Bad({"momentum": None}, TypeError, ("momentum",)),
    "momentum of several elements": Bad({"momentum": torch.ones(3)}, TypeError, ("momentum",)),
    "integers": Bad({"input": torch.ones(4, 3, 5).long()}, RuntimeError, ("Long",)),
    "integer buffers": Bad(  # torch copies truncated statistics into them
        {}, RuntimeError, ("Long",),
        {"running_mean": torch.zeros(3).long(), "running_var": torch.ones(3).long()},
    ),
    "weight elsewhere": Bad({"weight": torch.ones(3, device=META)}, RuntimeError, ("meta", "cpu")),
    "residual's shape": Bad(
        {}, RuntimeError, ("[4, 3, 5]", "[4, 3]"), {"residual": torch.ones(4, 3)}
    ),
    "activation": Bad({}, ValueError, ("'swish'", *ACTIVATIONS), {"activation": "swish"}),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTANCE_NORM)
def test_instance_norm(backend, name):
    bad = INSTANCE_NORM[name]
    given = instance_norm_arguments() | bad.arguments
    want = None
    if not bad.ours_only:
        want = raised_by(lambda: F.instance_norm(**{k: to(CPU, v) for k, v in given.items()}))
        assert want is not None, "torch accepts it"
    arguments = {k: to(backend, v) for k, v in (given | bad.ours_only).items()}
    before = {name: bits(arguments[name]) for name in ("running_mean", "running_var")}
    check_error(raised_by(lambda: FF.instance_norm(**arguments)), want, bad, backend)
    for buffer, old in before.items():
        assert bits(arguments[buffer]) == old, f"{buffer} has changed"


def test_what_torch_accepts_is_accepted(backend):
    """An eps of 0 or below, and one value in each of several groups."""
    x = torch.randn(4, 3, 5, device=backend)
    for eps in (0.0, -1e-12):
        torch.testing.assert_close(FF.group_norm(x, 3, eps=eps), F.group_norm(x, 3, eps=eps))
        torch.testing.assert_close(FF.instance_norm(x, eps=eps), F.instance_norm(x, eps=eps))
    ones = torch.randn(2, 6, device=backend)
    bias = torch.arange(6.0, device=backend)
    got = FF.group_norm(ones, 6, None, bias)
    torch.testing.assert_close(got, bias.expand(2, 6), rtol=1e-4, atol=1e-4)
