"""A model and what convert, fuse or fold made of a copy of it: same results, state and step."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[nn.Module], Tensor]


def near(got: Tensor, want: Tensor, name: str = "", steps: float = 2e4) -> None:
    """Equal up to the order of operations, of values as large as the tensor's largest."""
    assert got.dtype == want.dtype, name
    assert got.shape == want.shape, name
    scale = max(want.abs().max().item() if want.numel() else 0.0, 1e-2)
    torch.testing.assert_close(
        got, want, rtol=0, atol=steps * torch.finfo(want.dtype).eps * scale,
        msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def assert_same_training(ours: nn.Module, theirs: nn.Module, call: Call, steps: int = 2) -> None:
    """Outputs, gradients, buffers and parameters over some optimizer steps, then in evaluation."""
    optimizers = [
        torch.optim.SGD(one.parameters(), lr=1e-2, momentum=0.9) for one in (ours, theirs)
    ]
    for step in range(steps):
        results = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model.train()
            torch.manual_seed(step)
            y = call(model)
            generator = torch.Generator().manual_seed(step)
            dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
            optimizer.zero_grad()
            y.backward(dy / y.numel() ** 0.5)
            results.append((y.detach(), [p.grad for p in model.parameters()]))
        (y, got), (expected, want) = results
        near(y, expected, f"output of step {step}")
        largest = max(g.abs().max().item() for g in want if g is not None)
        for (name, _), g, h in zip(theirs.named_parameters(), got, want, strict=True):
            assert (g is None) == (h is None), name
            if h is not None:
                near(g / largest, h / largest, f"gradient of {name}")
        for optimizer in optimizers:
            optimizer.step()
    assert_same_state(ours, theirs)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        near(call(ours), call(theirs), "output in evaluation")


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, want = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(want)
    for name, tensor in want.items():
        if tensor.is_floating_point():
            near(got[name], tensor, name)
        else:
            assert torch.equal(got[name], tensor), name


def assert_loads_both_ways(ours: nn.Module, theirs: nn.Module, call: Call) -> None:
    """Each takes the other's state dict, and then computes the same."""
    for source, target in ((ours, theirs), (theirs, ours)):
        state = {
            name: tensor + 0.1 * torch.rand_like(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in source.state_dict().items()
        }
        source.load_state_dict(state, strict=True)
        target.load_state_dict(source.state_dict(), strict=True)
        source.eval(), target.eval()
        with torch.no_grad():
            near(call(target), call(source), "after loading")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_tensors(before: dict[str, Tensor], model: nn.Module) -> None:
    """The very objects."""
    after = tensors_of(model)
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
