"""How a differentiable operation is called: by autograd, or by itself where that has no part."""

from typing import Any

import torch
from torch import Tensor


class _Unrecorded:
    """In the place of autograd's context: it keeps nothing."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class Function(torch.autograd.Function):
    """An autograd function, which is `called` instead of applied."""

    @classmethod
    def called(cls, *arguments: Any) -> Any:
        """`apply`; or `forward` alone, which takes less time, where none can ask for a gradient."""
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return cls.apply(*arguments)
        return cls.forward(_Unrecorded(), *arguments)
