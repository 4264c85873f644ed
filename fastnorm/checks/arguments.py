"""Single arguments that several operations have, and the operands of a product."""

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from fastnorm.checks.refusals import FLOATS, refuse, require_operands, scalar_type
from fastnorm.eager.activations import ACTIVATIONS, OUTPUT_GRADS


def activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but got {name!r}")


def algorithm(name: str, known: Sequence[str], activation: str) -> None:
    if name not in known:
        raise ValueError(f"algorithm must be one of {', '.join(known)}, but got {name!r}")
    if name == "gram" and activation not in OUTPUT_GRADS:
        raise ValueError(
            "algorithm 'gram' has no pre-activation, so it needs an activation whose derivative is "
            f"a function of its output: one of {', '.join(OUTPUT_GRADS)}, but got {activation!r}"
        )


def momentum(
    value: object, num_batches_tracked: Tensor | None, input: Tensor
) -> float | Tensor | None:
    """A number as float; a tensor that the buffers can be moved by; None where batches count."""
    if isinstance(value, Tensor):
        if value.ndim or value.requires_grad or not value.is_floating_point():
            raise TypeError(
                "a momentum tensor must be 0-dimensional, floating-point and without a gradient, "
                f"but got {list(value.shape)}, {value.dtype}, requires_grad={value.requires_grad}"
            )
        if value.device != input.device:
            refuse("momentum", value, input)
        return value
    if isinstance(value, Real):
        return float(value)
    if value is None and num_batches_tracked is not None:
        return None
    raise TypeError(
        "momentum must be a number or a 0-dimensional tensor, or None where "
        f"num_batches_tracked counts the batches, but got {type(value).__name__}"
    )


def fixed_momentum(value: object, input: Tensor) -> float | Tensor:
    """`momentum` where no batches are counted."""
    found = momentum(value, None, input)
    assert found is not None  # else it has raised
    return found


def residual(residual: Tensor, shape: Sequence[int], input: Tensor) -> None:
    try:
        fits = residual.shape == shape
    except AttributeError:
        raise TypeError(f"residual must be a Tensor, but got {type(residual).__name__}") from None
    if not fits:
        raise RuntimeError(
            f"residual must have the shape of the normalized tensor, {list(shape)}, "
            f"but got {list(residual.shape)}"
        )
    # that of the input itself is judged with the input
    wrong = residual.dtype not in FLOATS and residual.dtype is not input.dtype
    if wrong or residual.device != input.device:
        refuse("residual", residual, input)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    try:  # costs nothing until it fails
        if input.ndim < 2 or weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
            raise RuntimeError(
                "a linear layer with batch statistics needs an input (*, in_features) and a weight "
                f"(out_features, in_features), but got {list(input.shape)} and {list(weight.shape)}"
            )
        product(input, weight, bias)
    except AttributeError:
        require_operands(input, weight, bias)
        raise


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    try:
        if not 3 <= weight.ndim <= 5 or input.ndim != weight.ndim:
            raise RuntimeError(
                "conv_batch_norm needs an input (N, in_channels, *) and a weight (out_channels, "
                "in_channels / groups, *kernel_size) of the same rank, 3 to 5, "
                f"but got {list(input.shape)} and {list(weight.shape)}"
            )
        product(input, weight, bias)
    except AttributeError:
        require_operands(input, weight, bias)
        raise


def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What a linear layer and a convolution ask of their operands."""
    if input.dtype not in FLOATS:
        raise NotImplementedError(
            f"not implemented for '{scalar_type(input)}': the input must be floating-point"
        )
    if weight.dtype not in FLOATS or weight.device != input.device:
        refuse("weight", weight, input)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise RuntimeError(
                f"bias should have the shape {list(weight.shape[:1])}, but got {list(bias.shape)}"
            )
        if bias.dtype not in FLOATS or bias.device != input.device:
            refuse("bias", bias, input)


def epsilon(value: object) -> float:
    """What torch takes for a float, as one."""
    if type(value) is float:
        return value
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Tensor) and not (value.ndim or value.requires_grad):
        return float(value)
    raise TypeError(f"eps must be a number, but got {type(value).__name__}")
