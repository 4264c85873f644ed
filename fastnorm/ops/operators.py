"""The operations of this package as torch.library operators: what Dynamo puts into its graphs.

`torch.ops.fastnorm.batch_norm` and the rest are composite. Recorded below Dynamo they run the
functions of this package again, whose kernels then are the operators of library/. So Dynamo need
not trace how a tensor is laid out, and the functions are told sizes, where they ask, that may vary.
"""

from typing import Any

from torch import Tensor

from fastnorm import ops
from fastnorm.ops.library.definition import composite

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


batch_norm = composite(
    "batch_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor? weight, "
    "Tensor? bias, bool training, Tensor? momentum, float? share, float eps, Tensor? residual, "
    "str activation, Tensor(c!)? num_batches_tracked) -> Tensor",
    ops.batch_norm,
)
group_norm = composite(
    "group_norm(Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? residual, str activation) -> Tensor",
    ops.group_norm,
)
instance_norm = composite(
    "instance_norm(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? weight, Tensor? bias, bool use_input_stats, Tensor? momentum, float share, float eps, "
    "Tensor? residual, str activation) -> Tensor",
    ops.instance_norm,
)
layer_norm = composite(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "str activation) -> Tensor",
    ops.layer_norm,
)
rms_norm = composite(
    "rms_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight, float eps, "
    "str activation) -> Tensor",
    ops.rms_norm,
)
add_layer_norm = composite(
    "add_layer_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor? bias, float eps, str activation) -> (Tensor, Tensor)",
    ops.add_layer_norm,
)
add_rms_norm = composite(
    "add_rms_norm(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight, "
    "float eps, str activation) -> (Tensor, Tensor)",
    ops.add_rms_norm,
)
_linear_batch_norm = composite(
    "linear_batch_norm(Tensor input, Tensor weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? norm_weight, Tensor? norm_bias, bool training, "
    "Tensor? momentum, float? share, float eps, str activation, str algorithm, "
    "Tensor(c!)? num_batches_tracked) -> Tensor",
    ops.linear_batch_norm,
)


def linear_batch_norm(*arguments: Any) -> Tensor:
    """`ops.linear_batch_norm`; with a group Dynamo traces it, and what its processes exchange."""
    *others, group = arguments
    return ops.linear_batch_norm(*arguments) if group is not None else _linear_batch_norm(*others)
