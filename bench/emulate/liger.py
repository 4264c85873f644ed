"""liger-kernel's norms at the place of ours, so that verify judges them as it judges ours.

Of rows alone: its GroupNorm adds up gradients by atomics, which the emulator does not know.
"""

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastnorm.functional as FF
from fastnorm.verify.case import Case

RMS_OPTIONS = (0.0, "llama", False)  # no offset; how it casts, its default; not in place


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor, bias: Tensor, eps: float, **options: str
) -> Any:
    function = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return function.apply(x, weight, bias, eps)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float, **options: str) -> Any:
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return function.apply(x, weight, eps, *RMS_OPTIONS)


def add_rms_norm(
    x: Tensor, residual: Tensor, shape: Sequence[int], weight: Tensor, eps: float, **options: str
) -> Any:
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return function.apply(x, residual, weight, eps, *RMS_OPTIONS)


NORMS = {function.__name__: function for function in (layer_norm, rms_norm, add_rms_norm)}


def version() -> str:
    return metadata.version("liger-kernel")


def takes(case: Case) -> bool:
    """Whether it has the operation, which has no activation, and the dtype."""
    plain = case.operation in NORMS and case.activation == "identity"
    return plain and case.dtype is not torch.float64


@contextlib.contextmanager
def in_our_place() -> Iterator[None]:
    """Within the block `fastnorm.functional` has its norms."""
    with contextlib.ExitStack() as stack:
        for name, function in NORMS.items():
            stack.enter_context(mock.patch.object(FF, name, function))
        yield
