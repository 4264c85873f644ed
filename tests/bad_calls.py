"""Wrong calls, made to torch on the CPU and to ours: what each raises, and what it has changed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

CPU, META = torch.device("cpu"), torch.device("meta")


@dataclass
class Bad:
    """One wrong thing about a good call."""

    arguments: dict[str, Any]
    kind: type[Exception]
    says: tuple[str, ...]  # each is in the message
    ours_only: dict[str, Any] = field(default_factory=dict)


def raised_by(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def bits(tensor: Tensor | None) -> Any:
    if tensor is None or tensor.device == META:
        return None
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def to(device: torch.device, value: Any) -> Any:
    """The value there, a copy; what is on no device stays so."""
    if not isinstance(value, Tensor) or value.device == META:
        return value
    return value.detach().clone().to(device).requires_grad_(value.requires_grad)


def check_error(
    error: Exception | None, theirs: Exception | None, bad: Bad, device: torch.device
) -> None:
    assert error is not None, f"accepted; torch: {theirs!r}"
    for kind in {bad.kind, type(theirs or error)}:
        assert isinstance(error, kind), f"{error!r} is no {kind.__name__}; torch: {theirs!r}"
    for part in bad.says:
        part = device.type if part == "cpu" else part
        assert part in str(error), f"{part!r} is not in {error}"


def tensors_of(module: nn.Module) -> dict[str, Any]:
    return {name: bits(t) for name, t in module.state_dict().items()}
