"""Argument checks: torch's exception types, and messages with the values and the rule.

They run before anything is allocated or changed, so a call that raises leaves its buffers as they
were.
"""

from collections.abc import Sequence

from torch import Tensor

from fastnorm.eager.activations import ACTIVATIONS


def activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but got {name!r}")


def residual(residual: Tensor, shape: Sequence[int]) -> None:
    if residual.shape != shape:
        raise RuntimeError(
            f"residual must have the shape of the normalized tensor, {list(shape)}, "
            f"but got {list(residual.shape)}"
        )


def batch_statistics(
    shape: Sequence[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """What batch norm asks of an input of `shape`, its buffers and its parameters."""
    channels = shape[1] if len(shape) > 1 else 0
    if training:
        if len(shape) > 1 and _per_channel(shape) == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape}"
            )
        if (running_mean is None) != (running_var is None):
            raise ValueError(
                "running_mean and running_var must either both be None or neither be None"
            )
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    else:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise RuntimeError(f"{missing} must be defined in evaluation mode")
        if eps < 0.0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is not None and tensor.numel() != channels:
            raise RuntimeError(
                f"{name} should contain {channels} elements not {tensor.numel()}: "
                f"one for each channel of an input of shape {list(shape)}"
            )


def _per_channel(shape: Sequence[int]) -> int:
    count = shape[0]
    for size in shape[2:]:
        count *= size
    return count
