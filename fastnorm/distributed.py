"""Statistics across the processes of a torch.distributed group: one collective each way.

What a process tells the others of its part of a batch is one vector (3C + 1,) of what is computed
in: mean, rest (of the mean's rounding) and standard deviation of each of the C channels, then how
many values of a channel it has, 0 where its part is empty. Everybody merges the same vectors in the
order of the ranks, and so gets the same statistics, to the last bit.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def group_of(process_group: Any) -> Any:
    """`process_group`, or the whole world where it is None; None where nobody else is in it."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def gathered(vector: Tensor, group: Any) -> Tensor:
    """The vectors (n,) of all processes in the order of their ranks: (ranks, n)."""
    processes = dist.get_world_size(group)
    everyone = torch.empty(processes * vector.numel(), dtype=vector.dtype, device=vector.device)
    # the older name, deprecated in torch 2.13
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, vector, group=group)
    return everyone.view(processes, -1)


def summed(values: Tensor, group: Any) -> Tensor:
    """`values`, in place of which is now their sum over all processes."""
    dist.all_reduce(values, group=group)
    return values


class SumOverProcesses(torch.autograd.Function):
    """The sum over all processes, to be differentiated any number of times.

    What is differentiated is the sum of everybody's losses, so the gradient is a sum as well.
    """

    @staticmethod
    def forward(values: Tensor, group: Any) -> Tensor:
        total = summed(values.clone(), group)
        # a view: compiled by torch 2.11, what was written in place would have no gradient
        return total.view_as(total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return sum_over(grads[0], ctx.group), None


class _SumInTransforms(SumOverProcesses):
    """With what forward-mode AD and vmap ask for, and torch.compile cannot read."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return sum_over(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], values: Tensor, group: Any) -> Any:
        return sum_over(values, group), in_dims[0]


def sum_over(values: Tensor, group: Any) -> Tensor:
    """`SumOverProcesses`, as a function."""
    function = SumOverProcesses if torch.compiler.is_compiling() else _SumInTransforms
    total: Tensor = function.apply(values, group)  # type: ignore[no-untyped-call]
    return total
