"""What the operations of this package are to autograd, and to who asks for no gradient."""

from typing import Any

import torch
from torch import Tensor


class _Unrecorded:
    """A context that keeps nothing."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class Function(torch.autograd.Function):
    """A differentiable operation, which is `called`."""

    @classmethod
    def called(cls, *arguments: Any) -> Any:
        """`apply`; or `forward`, which a node of autograd's takes longer to record than to run."""
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return cls.apply(*arguments)
        return cls.forward(_Unrecorded(), *arguments)
