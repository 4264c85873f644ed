"""The operations of this package as torch.library operators: what Dynamo puts into its graphs.

`torch.ops.fastnorm.batch_norm` and the rest are composite. Recorded below Dynamo they run the
functions of this package again, whose kernels then are the operators of library/. So Dynamo need
not trace how a tensor is laid out, and the functions are told sizes, where they ask, that may vary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastnorm import ops
from fastnorm.ops.library.definition import composite, moving

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear_batch_norm",
    "rms_norm",
    "sync_batch_norm",
]

sync_batch_norm = ops.sync_batch_norm  # no operator: Dynamo traces what processes exchange


def _moves(momentum: Tensor | None, share: float | None) -> float | Tensor | None:
    return share if momentum is None else momentum


@composite(
    "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
    "Tensor? bias, bool training, Tensor? momentum, float? share, float eps, Tensor? residual, "
    "str activation, Tensor(c!)? num_batches_tracked) -> Tensor"
)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: Tensor | None,
    share: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    return ops.batch_norm(
        input, running_mean, running_var, weight, bias, training, _moves(momentum, share), eps,
        residual, activation, num_batches_tracked,
    )  # fmt: skip


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    y: Tensor = torch.ops.fastnorm.batch_norm(
        input, running_mean, running_var, weight, bias, training, *moving(momentum), eps,
        residual, activation, num_batches_tracked,
    )  # fmt: skip
    return y


composite(
    "group_norm(Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? residual, str activation) -> Tensor"
)(ops.group_norm)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    y: Tensor = torch.ops.fastnorm.group_norm(
        input, num_groups, weight, bias, eps, residual, activation
    )
    return y


@composite(
    "instance_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? weight, Tensor? bias, bool use_input_stats, Tensor? momentum, float share, float eps, "
    "Tensor? residual, str activation) -> Tensor"
)
def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: Tensor | None,
    share: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return ops.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats,
        share if momentum is None else momentum, eps, residual, activation,
    )  # fmt: skip


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    y: Tensor = torch.ops.fastnorm.instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, *moving(momentum), eps,
        residual, activation,
    )  # fmt: skip
    return y


composite(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "str activation) -> Tensor"
)(ops.layer_norm)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    y: Tensor = torch.ops.fastnorm.layer_norm(
        input, normalized_shape, weight, bias, eps, activation
    )
    return y


composite(
    "rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, float eps, "
    "str activation) -> Tensor"
)(ops.rms_norm)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    y: Tensor = torch.ops.fastnorm.rms_norm(input, normalized_shape, weight, eps, activation)
    return y


composite(
    "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor? bias, float eps, str activation) -> (Tensor, Tensor)"
)(ops.add_layer_norm)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = torch.ops.fastnorm.add_layer_norm(
        input, residual, normalized_shape, weight, bias, eps, activation
    )
    return both


composite(
    "add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, "
    "float eps, str activation) -> (Tensor, Tensor)"
)(ops.add_rms_norm)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    both: tuple[Tensor, Tensor] = torch.ops.fastnorm.add_rms_norm(
        input, residual, normalized_shape, weight, eps, activation
    )
    return both


@composite(
    "linear_batch_norm(Tensor input, Tensor weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? norm_weight, Tensor? norm_bias, bool training, "
    "Tensor? momentum, float? share, float eps, str activation, str algorithm, "
    "Tensor(c!)? num_batches_tracked) -> Tensor"
)
def _linear_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: Tensor | None,
    share: float | None,
    eps: float,
    activation: str,
    algorithm: str,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    return ops.linear_batch_norm(
        input, weight, bias, running_mean, running_var, norm_weight, norm_bias,
        training, _moves(momentum, share), eps, activation, algorithm, num_batches_tracked,
    )  # fmt: skip


def linear_batch_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    training: bool,
    momentum: float | Tensor | None,
    eps: float,
    activation: str,
    algorithm: str,
    num_batches_tracked: Tensor | None,
    group: Any = None,
) -> Tensor:
    if group is not None:  # Dynamo traces what processes exchange
        return ops.linear_batch_norm(
            input, weight, bias, running_mean, running_var, norm_weight, norm_bias,
            training, momentum, eps, activation, algorithm, num_batches_tracked, group,
        )  # fmt: skip
    y: Tensor = torch.ops.fastnorm.linear_batch_norm(
        input, weight, bias, running_mean, running_var, norm_weight, norm_bias,
        training, *moving(momentum), eps, activation, algorithm, num_batches_tracked,
    )  # fmt: skip
    return y
