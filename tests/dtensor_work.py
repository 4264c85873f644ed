"""Norms of what processes share, sequences or samples, parameters replicated (see ranks.py)."""

from typing import Any

import ranks
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import fastnorm

NORMS = {
    "LayerNorm": lambda: fastnorm.LayerNorm(6, activation="gelu"),
    "RMSNorm": lambda: fastnorm.RMSNorm(6),
    "AddLayerNorm": lambda: fastnorm.AddLayerNorm(6),
    "AddRMSNorm": lambda: fastnorm.AddRMSNorm(6, activation="silu"),
    "InstanceNorm1d": lambda: fastnorm.InstanceNorm1d(7, affine=True),
}
DTYPES = (torch.float32, torch.bfloat16)


def made(name: str, dtype: torch.dtype) -> nn.Module:
    norm = NORMS[name]()
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return norm


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """input, residual, dy, dsum (batch, sequence, features)."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(4, 2, 7, 6, generator=generator).to(dtype))


def results(rank: int, processes: int) -> dict[Any, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (processes,))
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            for name in NORMS:
                for dtype in DTYPES:
                    found[backend, name, dtype] = _sequence_parallel(name, dtype, mesh)
    return found


def _sequence_parallel(name: str, dtype: torch.dtype, mesh: Any) -> dict[str, Tensor]:
    norm = made(name, dtype)
    shared = Shard(0 if name.startswith("Instance") else 1)  # samples, or the sequence
    x, residual, dy, dsum = (distribute_tensor(t, mesh, [shared]) for t in tensors(dtype))
    leaves = [x.requires_grad_()]
    if name.startswith("Add"):
        norm = distribute_module(norm, mesh)  # replicated
        leaves.append(residual.requires_grad_())
        outputs, grads = norm(x, residual), [dy, dsum]
    elif name.startswith("Instance"):
        norm = distribute_module(norm, mesh)
        outputs, grads = [norm(x)], [dy]
    else:
        norm = parallelize_module(norm, mesh, SequenceParallel())
        outputs, grads = [norm(x)], [dy]
    for output in outputs:
        assert isinstance(output, DTensor)
        assert output.placements == (shared,), "no redistribution"
    parameters = dict(norm.named_parameters())
    gradients = torch.autograd.grad(outputs, [*leaves, *parameters.values()], grads)
    names = [*("x", "residual")[: len(leaves)], *parameters]
    found = {f"output {i}": t for i, t in enumerate(outputs)}
    found |= {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
    return {n: t.redistribute(mesh, [Replicate()]).to_local().detach() for n, t in found.items()}


def want(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same by one process."""
    norm = made(name, dtype)
    x, residual, dy, dsum = tensors(dtype)
    leaves = [x.requires_grad_()]
    outputs, grads = [], [dy]
    if name.startswith("Add"):
        leaves.append(residual.requires_grad_())
        outputs, grads = norm(x, residual), [dy, dsum]
    else:
        outputs = [norm(x)]
    parameters = dict(norm.named_parameters())
    gradients = torch.autograd.grad(outputs, [*leaves, *parameters.values()], grads)
    names = [*("x", "residual")[: len(leaves)], *parameters]
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return found | {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
