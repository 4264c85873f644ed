"""Short calls on a CPU reach torch's operator before anything is checked, and to the same end.

A Parameter as input takes the long way, which checks first.
"""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from torch import nn

import fastnorm
import fastnorm.functional as FF
from fastnorm import checks

CASES = {
    "BatchNorm1d": (lambda **kw: fastnorm.BatchNorm1d(6, **kw), (4, 6)),
    "BatchNorm2d": (lambda **kw: fastnorm.BatchNorm2d(6, **kw), (4, 6, 3, 3)),
    "BatchNorm2d without buffers": (
        lambda **kw: fastnorm.BatchNorm2d(6, track_running_stats=False, **kw),
        (4, 6, 3, 3),
    ),
    "GroupNorm": (lambda **kw: fastnorm.GroupNorm(2, 6, **kw), (4, 6, 3, 3)),
    "GroupNorm without parameters": (
        lambda **kw: fastnorm.GroupNorm(2, 6, affine=False, **kw),
        (4, 6, 3),
    ),
    "InstanceNorm1d": (lambda **kw: fastnorm.InstanceNorm1d(6, affine=True, **kw), (4, 6, 5)),
    "InstanceNorm2d with buffers": (
        lambda **kw: fastnorm.InstanceNorm2d(6, track_running_stats=True, **kw),
        (4, 6, 3, 3),
    ),
    "LayerNorm": (lambda **kw: fastnorm.LayerNorm(6, **kw), (4, 6)),
    "LayerNorm of two axes": (lambda **kw: fastnorm.LayerNorm((6, 3), bias=False, **kw), (4, 6, 3)),
    "RMSNorm": (lambda **kw: fastnorm.RMSNorm(6, **kw), (4, 6)),
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 of float32 parameters": (torch.bfloat16, torch.float32),
    "float32 of float64 parameters": (torch.float32, torch.float64),
}


def made(name: str, dtype: torch.dtype, **options) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = CASES[name]
    module = make(**options).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module, shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_short_call_is_not_checked(name, training):
    module, shape = made(name, torch.float32)
    module.train(training)
    looked = AssertionError("the arguments were checked")
    named = ("batch_statistics", "group_statistics", "instance_statistics", "row_statistics")
    with mock.patch.multiple(checks, **{check: mock.Mock(side_effect=looked) for check in named}):
        if name == "InstanceNorm2d with buffers" and training:  # which no operator of torch moves
            with pytest.raises(AssertionError):
                module(torch.randn(shape))
        else:
            module(torch.randn(shape))
        with pytest.raises(AssertionError):
            module(nn.Parameter(torch.randn(shape)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_both_ways_end_alike(name, dtypes, activation, training):
    dtype, of_parameters = DTYPES[dtypes]
    found = []
    for kind in (lambda x: x.requires_grad_(), nn.Parameter):
        torch.manual_seed(0)
        module, shape = made(name, of_parameters, activation=activation)
        module.train(training)
        x, dy = (torch.randn(shape).to(dtype) for _ in range(2))
        leaves = [kind(x), *module.parameters()]
        y = module(leaves[0])
        found.append([y, *torch.autograd.grad(y, leaves, dy), *module.buffers()])
        with torch.no_grad():
            found[-1].append(module(leaves[0]))
    for ours, checked in zip(*found, strict=True):
        torch.testing.assert_close(ours, checked, rtol=0, atol=0)


LONG = {
    "BatchNorm2d": ((4, 6, 96, 96), torch.contiguous_format, False),
    "BatchNorm2d of columns": ((4, 6, 96, 96), torch.channels_last, True),
    "GroupNorm of columns": ((4, 6, 8, 8), torch.channels_last, True),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_call_is_not_checked_where_torchs_operator_is_as_fast(name):
    """And without gradients of the input: that ends torch's process in channels_last."""
    shape, layout, training = LONG[name]
    module, _ = made(name.removesuffix(" of columns"), torch.float32)
    module.train(training)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = []
    for input in (x, nn.Parameter(x, requires_grad=False)):
        refused = mock.Mock(side_effect=AssertionError("checked"))
        unchecked = (
            mock.patch.multiple(checks, batch_statistics=refused, group_statistics=refused)
            if input is x
            else contextlib.nullcontext()
        )
        with unchecked:
            norm = copy.deepcopy(module)
            y = norm(input)
        y.backward(dy)
        found.append((y.detach(), *(p.grad for p in norm.parameters())))
    for ours, checked in zip(*found, strict=True):
        torch.testing.assert_close(ours, checked)


@pytest.mark.parametrize("name", CASES)
def test_what_a_hook_raises_is_passed_on(name):
    class Stop(Exception):  # noqa: N818  as a checkpoint ends its second forward
        pass

    def stop(tensor):  # the first of them; a second way would find no more
        if not stopped:
            stopped.append(tensor)
            raise Stop
        return tensor

    stopped = []
    module, shape = made(name, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(stop, stop), pytest.raises(Stop):
        module(torch.randn(shape, requires_grad=True))


@pytest.mark.parametrize("wrong", ["weight", "bias", "running_mean"])
def test_a_refused_batch_is_not_counted(wrong):
    count = torch.tensor(3)
    tensors = {name: torch.ones(6) for name in ("running_mean", "running_var", "weight", "bias")}
    tensors[wrong] = torch.ones(5)
    before = {name: t.clone() for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match="5"):
        FF.batch_norm(torch.randn(4, 6), **tensors, training=True, num_batches_tracked=count)
    assert count == 3
    for name, t in tensors.items():
        torch.testing.assert_close(t, before[name], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_halves_are_refused():
    """As torch's RMS norm does, which takes other complex numbers: test_layer_norm.py."""
    with pytest.raises(NotImplementedError):
        FF.rms_norm(torch.randn(4, 6, dtype=torch.complex64).to(torch.complex32), (6,))
