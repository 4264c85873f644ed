"""BatchNorm over the batches of all processes; formulas and bytes are in batch_norm.py.

Each process leaves the partial statistics of its part, merged into one vector (3C + 1,), for the
others to see; what everybody has left is merged in the order of the ranks. x is read twice forward
(moments, apply) and twice backward (reduce, apply), with one collective between: one program a
channel cannot do it all. An empty part launches the merge alone, on the same vectors.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastnorm.kernels import batch_norm
from fastnorm.kernels.batch_norm_fwd import (
    batch_norm_fwd_apply_kernel,
    batch_norm_fwd_moments_kernel,
)
from fastnorm.kernels.device.activations import ACTIVATIONS
from fastnorm.kernels.launch import (
    MERGE_CHANNELS,
    MERGE_PARTIALS,
    MERGE_WARPS,
    ChannelView,
    cdiv,
)
from fastnorm.kernels.sync_batch_norm_fwd import (
    sync_batch_norm_fwd_finalize_kernel,
    sync_batch_norm_fwd_merge_kernel,
)

_MERGE = {"BLOCK_C": MERGE_CHANNELS, "BLOCK_P": MERGE_PARTIALS, "num_warps": MERGE_WARPS}


def _moments(
    x: Tensor, view: ChannelView, found: Sequence[Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """Mean, rest, std and count of this process's part: (3C + 1,)."""
    if x.numel() == 0:
        return torch.zeros(3 * view.C + 1, dtype=dtype, device=x.device)
    own = torch.empty(3 * view.C + 1, dtype=dtype, device=x.device)
    if found is None:
        plan, sizes, tile, *_ = batch_norm.launch_of(x, view)
        partial = torch.empty(3, plan.programs, view.C, dtype=dtype, device=x.device)
        count = torch.empty(plan.programs, dtype=dtype, device=x.device)
        batch_norm_fwd_moments_kernel[plan.grid](x, partial, count, None, *sizes, **tile)
        found = partial, count
    partial, count = found
    sync_batch_norm_fwd_merge_kernel[(cdiv(view.C, MERGE_CHANNELS),)](
        partial, count, own, view.C, count.numel(), **_MERGE
    )
    return own


def finalize(
    everyone: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(stats (3, C), count ()) of what each process has left, (processes, 3C + 1)."""
    processes, size = everyone.shape
    C = size // 3
    stats = torch.empty(3, C, dtype=everyone.dtype, device=everyone.device)
    count = torch.empty((), dtype=everyone.dtype, device=everyone.device)
    moving = (momentum, 0.0) if isinstance(momentum, Tensor) else (None, momentum)
    sync_batch_norm_fwd_finalize_kernel[(cdiv(C, MERGE_CHANNELS),)](
        everyone, stats, count, running_mean, running_var, *moving, eps, C, processes, **_MERGE
    )
    return stats, count


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    activation: str,
    view: ChannelView,
    gathered: Callable[[Tensor], Tensor],
    found: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, stats, count): as batch_norm.forward in training, and a channel's values, ().

    `gathered` makes (processes, n) of everybody's (n,). `found`: as there.
    """
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    everyone = gathered(_moments(x, view, found, dtype))
    stats, count = finalize(everyone, running_mean, running_var, momentum, eps)
    y_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty_like(x, dtype=y_dtype)
    if x.numel() > 0:
        plan, sizes, tile, *_ = batch_norm.launch_of(x, view)
        act, _ = ACTIVATIONS[activation]
        batch_norm_fwd_apply_kernel[plan.grid](
            x, residual, weight, bias, y, stats, None, None, eps, *sizes, ACT=act, **tile
        )
    return y, stats, count


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    count: Tensor,
    activation: str,
    view: ChannelView,
    wanted: tuple[bool, torch.dtype | None, bool, torch.dtype | None],
    summed: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As batch_norm.backward; dweight and dbias are of this process's part."""
    if x.numel() > 0:
        return batch_norm.backward(
            dy, x, y, residual, weight, bias, stats, True, activation, view, wanted, count, summed
        )
    wants_dx, _, wants_dw, db_dtype = wanted
    if wants_dx:  # the others wait for it
        summed(torch.zeros(2, view.C, dtype=stats.dtype, device=x.device))
    dw = torch.zeros_like(weight) if weight is not None and wants_dw else None
    db = None if db_dtype is None else torch.zeros(view.C, dtype=db_dtype, device=x.device)
    return (torch.empty_like(x) if wants_dx else None), None, dw, db
