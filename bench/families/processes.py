"""SyncBatchNorm's and the linear layer's cases of two processes, which one plays alone."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from case import Case
from torch import Tensor

import fastnorm.functional as FF
from families.batch_norm import BatchNormCase
from families.linear_batch_norm import LinearBatchNormCase

PROCESSES = 2


def _gather(everyone: Tensor, own: Tensor, group: object) -> None:
    everyone.view(PROCESSES, -1).copy_(own)


def _reduce(values: Tensor, group: object) -> None:
    values.mul_(PROCESSES)


@contextlib.contextmanager
def played() -> Iterator[None]:
    """Within the block this process is two, with the same batch."""
    calls: dict[str, Callable[..., Any]] = {
        "is_initialized": lambda: True,
        "get_world_size": lambda group: PROCESSES,
        "all_gather_single": _gather,
        "all_gather_into_tensor": _gather,
        "all_reduce": _reduce,
    }
    with contextlib.ExitStack() as stack:
        for name, call in calls.items():
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, call))
        yield


@dataclass(frozen=True)
class SyncBatchNormCase(BatchNormCase):
    """`functional.batch_norm` of a group of processes."""

    def words(self) -> list[str]:
        return [*super().words(), f"{PROCESSES} processes"]

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        return FF.batch_norm(
            tensors["input"],
            tensors["running_mean"],
            tensors["running_var"],
            tensors.get("weight"),
            tensors.get("bias"),
            True,
            residual=tensors.get("residual"),
            activation=self.activation,
            process_group=dist,  # any: no process is asked
        )

    def forward_and_backward(
        self, tensors: dict[str, Tensor], between: Callable[[], object] = lambda: None
    ) -> None:
        with played():
            super().forward_and_backward(tensors, between)


@dataclass(frozen=True)
class SyncLinearBatchNormCase(LinearBatchNormCase):
    """`functional.linear_batch_norm` of a group of processes, on rows."""

    def words(self) -> list[str]:
        return [*super().words(), f"{PROCESSES} processes"]

    def call(self, tensors: dict[str, Tensor]) -> Tensor:
        return FF.linear_batch_norm(
            tensors["input"], tensors["weight"], None,
            tensors["running_mean"], tensors["running_var"],
            tensors.get("norm_weight"), tensors.get("norm_bias"), True,
            activation=self.activation, algorithm=self.algorithm, process_group=dist,
        )  # fmt: skip

    def forward_and_backward(
        self, tensors: dict[str, Tensor], between: Callable[[], object] = lambda: None
    ) -> None:
        with played():
            super().forward_and_backward(tensors, between)


STAGE = (256, 512, 28, 28)  # of ResNet-50


def cases() -> Iterator[Case]:
    for layout in ("contiguous", "channels_last"):
        yield SyncBatchNormCase("resnet50 stage 2", STAGE, layout=layout, activation="relu")
    for dtype in (torch.bfloat16, torch.float32):
        for algorithm in ("gram", "epilogue"):
            yield SyncLinearBatchNormCase(
                "stage 1", (200704, 64), dtype, features=256, algorithm=algorithm
            )


def small_cases() -> Iterator[Case]:
    for name, shape, layout in (
        ("whole (N, C)", (250, 40), "contiguous"),
        ("split channels_last", (9, 40, 20, 20), "channels_last"),
    ):
        case = SyncBatchNormCase(name, shape, layout=layout)
        yield case
        yield replace(case, activation="relu", residual=True)
    for algorithm in ("gram", "epilogue"):
        yield SyncLinearBatchNormCase("rows", (4096, 16), features=64, algorithm=algorithm)


def option_cases() -> Iterator[Case]:
    case = SyncBatchNormCase("options", (64, 4, 64, 64), residual=True, activation="silu")
    for dtype in (torch.float16, torch.float32, torch.float64):
        yield replace(case, dtype=dtype)
    yield replace(case, affine=False, residual=False)
    linear = SyncLinearBatchNormCase("options", (200, 24), features=40, activation="tanh")
    for dtype in (torch.float16, torch.float32, torch.float64):
        yield replace(linear, dtype=dtype)
    yield replace(linear, affine=False)
