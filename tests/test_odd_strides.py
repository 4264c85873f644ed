"""Channels innermost, where an axis of one element has a stride that does not say so.

`image.permute(2, 0, 1)[None]` is such a tensor. On a CPU torch's operator of group norm refuses it,
and its batch norm's gradient in evaluation is wrong.
"""

import copy
import itertools

import pytest
import torch
from cases import assert_close

import fastnorm

INPUTS = {
    "an image": lambda: torch.randn(8, 9, 6).permute(2, 0, 1)[None],
    "tokens": lambda: torch.randn(72, 1, 6).permute(1, 2, 0).view(1, 6, 8, 9),
    "a large image": lambda: torch.randn(128, 96, 6).permute(2, 0, 1)[None],
    "columns": lambda: torch.randn(3, 1, 5, 6).permute(0, 3, 2, 1),
    "a volume": lambda: torch.randn(4, 3, 5, 6).permute(3, 0, 1, 2)[None],
}
NORMS = {
    "GroupNorm": lambda axes, **options: fastnorm.GroupNorm(2, 6, **options),
    "InstanceNorm": lambda axes, **options: getattr(fastnorm, f"InstanceNorm{axes}d")(
        6, affine=True, track_running_stats=True, **options
    ),
    "BatchNorm": lambda axes, **options: getattr(fastnorm, f"BatchNorm{axes}d")(6, **options),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", INPUTS)
def test_matches_the_same_numbers_in_order(backend, name, norm, activation, training):
    x = INPUTS[name]().to(backend)
    assert not x.is_contiguous()
    module = NORMS[norm](x.dim() - 2, activation=activation, device=backend).train(training)
    for t in (module.weight, module.bias):
        torch.nn.init.normal_(t)
    if norm != "GroupNorm":
        module.running_var.fill_(0.5)
    dy = torch.randn(x.shape, device=backend)

    def run(x, module):
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        y = module(leaves[0])
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    buffers = {name: t.clone() for name, t in module.state_dict().items()}
    found = run(x, module)
    module.load_state_dict(buffers)
    wanted = run(x.double().contiguous(), module.double())
    for got, want in zip(found, wanted, strict=True):
        assert_close(got, want, x.numel(), roundings=4)


def laid_out(t, order):
    """The same numbers, its axes in memory in this order."""
    return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 6, 8, 9), (3, 6, 1, 5), (3, 6, 5, 1), (1, 6, 1, 5)])
def test_gradients_of_any_layout_meet_inputs_of_any(shape, norm, training):
    """As from a transpose behind the norm: torch's batch norm reads dy as its strides suggest."""
    module = NORMS[norm](2).train(training)
    for t in module.parameters():
        torch.nn.init.normal_(t)
    x, dy = torch.randn(2, *shape)

    def run(x, module, dy):
        leaves = [x.detach().requires_grad_(), *module.parameters()]
        return torch.autograd.grad(module(leaves[0]), leaves, dy)

    wanted = run(x.double(), copy.deepcopy(module).double(), dy.double())
    orders = list(itertools.permutations(range(4)))
    for order, of_dy in itertools.product(orders[::3], orders):
        found = run(laid_out(x, order), module, laid_out(dy, of_dy))
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want, x.numel(), roundings=4)
