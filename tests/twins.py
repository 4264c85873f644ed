"""A module of ours beside torch.nn's: same parameters, same batches, same results."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MODIFIED = "modified by an inplace operation"


@dataclass(frozen=True)
class Pair:
    """One of our modules, what it stands for in torch.nn, and the shape of its input."""

    ours: Callable[..., nn.Module]
    theirs: Callable[..., nn.Module]
    shape: tuple[int, ...]

    def both(self, device: torch.device, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
        """The two modules with the same random parameters and buffers."""
        torch.manual_seed(0)
        ours = self.ours(**options).to(device, dtype)
        theirs = self.theirs(**options).to(device, dtype)
        randomize(theirs)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs

    def batch(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) * 2 + seed
        return x.to(device, dtype)


def randomize(module: nn.Module) -> None:
    """Parameters and buffers such that none can be mistaken for another or for its default."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values.abs() + 0.5 if "var" in name else values)
        else:
            tensor.fill_(5)


def assert_same_state(ours: nn.Module, theirs: nn.Module, exact: bool = True) -> None:
    got, want = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        if exact or not tensor.is_floating_point():
            assert torch.equal(got[name], tensor), name
        else:
            close(got[name], tensor, name)


def close(got: Tensor, want: Tensor, name: str = "") -> None:
    """Equal up to the order of a few dozen float64 (float32, ...) operations."""
    assert got.dtype == want.dtype, name
    step = 1e4 * torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=step, atol=step, msg=lambda text: f"{name}: {text}")


def copies(module: nn.Module) -> dict[str, nn.Module]:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return {
        "pickle": pickle.loads(pickle.dumps(module)),
        "copy.deepcopy": copy.deepcopy(module),
        "torch.load": torch.load(file, weights_only=False),
    }


def train(module: nn.Module, batches: list[Tensor]) -> Iterator[Tensor]:
    """Outputs and input gradients of some steps of SGD, then of evaluation."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.5) if parameters else None
    for i, x in enumerate(batches):
        module.train(i < len(batches) - 1)
        x = x.clone().requires_grad_()
        y = module(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        yield y.detach()
        module.zero_grad()
        y.backward(dy.to(y))
        yield x.grad
        yield from (p.grad for p in module.parameters() if p.grad is not None)
        if optimizer is not None:
            optimizer.step()


def gradients_or_refusal(y: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...] | str:
    try:
        return torch.autograd.grad(y, leaves, dy)
    except RuntimeError as error:
        return str(error)


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight**2
