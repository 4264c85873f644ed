"""SyncBatchNorm.

It has torch.nn.SyncBatchNorm's signature, parameters, buffers and rules but is not a subclass of
it: DistributedDataParallel refuses models on a CPU in which it finds one.
"""

from typing import Any

import torch
from torch import Tensor

from fastnorm import functional
from fastnorm.distributed import group_of
from fastnorm.modules.attributes import as_node, is_symbolic, parameter
from fastnorm.modules.batch_norm import _BatchNorm
from fastnorm.modules.scripted import finished, is_scripting


class SyncBatchNorm(_BatchNorm):
    r"""`torch.nn.SyncBatchNorm` with a fused residual sum and activation, on a CPU as well.

    .. math:: y = \mathrm{act}\bigl(\mathrm{BN}(x) + r\bigr)

    In training the batch is that of all processes of `process_group` (None: of all there are), in
    evaluation or with one process it is as in BatchNorm. Input and residual (N, C) or (N, C, *); N
    and the positions may differ from process to process, and N may be 0. One collective forward,
    one backward, no wait for the device. The running statistics are the same on all processes to
    the last bit; gradients of weight and bias are those of the own part, for
    DistributedDataParallel to average. Second derivatives are right, through all processes.

    A process that dies or does not come makes the others fail as the group does, at its timeout.

    Raises:
        ValueError: an input without channels, or of fewer than two axes.
        others: as `fastnorm.functional.batch_norm`; but one value per channel is enough here, and
            the running statistics then stay as they are.

    Source: Ioffe & Szegedy 2015; merging of partial statistics, Chan et al. 1979.

    >>> import torch, fastnorm
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> fastnorm.SyncBatchNorm.convert_sync_batchnorm(model)[1](torch.randn(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "identity",
        **kwargs: Any,  # what a newer torch's constructor accepts besides (2.13: bias)
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            activation=activation, **kwargs,
        )  # fmt: skip
        self.process_group = process_group

    def group(self) -> Any:
        return group_of(self.process_group) if self.training else None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_scripting():
            if self.training:
                raise RuntimeError("a SyncBatchNorm in TorchScript has no processes: call eval()")
            y = finished(self.forward_of_torch(input), residual, self.activation)
        elif is_symbolic(self, input):
            y = as_node(self, input, residual)
        else:
            self._check_input_dim(input)
            mean, var, training, momentum, count = self.statistics()
            weight, bias = parameter(self, "weight"), parameter(self, "bias")
            y = functional.batch_norm(
                input, mean, var, weight, bias, training, momentum, self.eps,
                residual=residual, activation=self.activation, num_batches_tracked=count,
                process_group=self.group(),
            )  # fmt: skip
        return y

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    @classmethod
    def convert_sync_batchnorm(
        cls, module: torch.nn.Module, process_group: Any = None
    ) -> torch.nn.Module:
        """Put a SyncBatchNorm in the place of every BatchNorm in `module`, ours or torch.nn's.

        Args:
            module: changed in place and returned; where it is a BatchNorm itself, what is returned
                takes its place. Parameters and buffers stay the same objects; activations, training
                mode, dtypes and devices are kept.
            process_group: of the new layers; None is all processes.

        >>> import torch, fastnorm
        >>> layer = fastnorm.LinearBatchNorm(4, 8, activation="silu")
        >>> fastnorm.SyncBatchNorm.convert_sync_batchnorm(layer).norm.activation
        'silu'
        """
        made = module
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            activation = module.activation if isinstance(module, _BatchNorm) else "identity"
            made = cls(
                module.num_features, module.eps, module.momentum, module.affine,
                module.track_running_stats, process_group, device="meta", activation=activation,
            )  # fmt: skip
            made.weight, made.bias = module.weight, module.bias
            made.running_mean, made.running_var = module.running_mean, module.running_var
            made.num_batches_tracked = module.num_batches_tracked
            made.training = module.training
            if hasattr(module, "qconfig"):
                made.qconfig = module.qconfig
        for name, child in module.named_children():
            made.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return made
