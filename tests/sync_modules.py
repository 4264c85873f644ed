"""What processes do with modules, each with its part of a batch (see ranks.py)."""

import copy
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import ranks
import torch
import torch.distributed as dist
from sync_cases import counted
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastnorm
from fastnorm.backend import implementation
from fastnorm.functional.linear_batch_norm import LINEAR_ALGORITHMS

STEPS = 3
ACTIVATIONS = ("identity", "relu", "silu")


class Block(nn.Module):
    """A residual block with everything that normalizes over a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = fastnorm.Conv2dBatchNorm(2, 6, 3, padding=1, bias=True)
        self.point = fastnorm.Conv2dBatchNorm(6, 6, 1, activation="silu")
        self.norm = fastnorm.BatchNorm2d(6, activation="relu")
        self.theirs = nn.BatchNorm2d(6, momentum=None)
        self.linear = fastnorm.LinearBatchNorm(6, 5, bias=True, activation="tanh")
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = self.norm(self.point(h), residual=h)
        h = self.theirs(h).mean((2, 3))
        return self.head(self.linear(h))


def model() -> Block:
    torch.manual_seed(0)
    return Block().double()


def batches(parts: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(sum(parts), 2, 4, 3, generator=generator, dtype=torch.float64)
        yield x * 2 + 1, torch.randn(sum(parts), 3, generator=generator, dtype=torch.float64)


def trained(network: nn.Module, parts: tuple[int, ...], rank: int | None = None) -> list[Tensor]:
    """Outputs of each step; the loss is the mean over the whole batch, its part times processes."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    outputs = []
    for x, target in batches(parts):
        scale = 1 / target.numel()
        if rank is not None:
            start = sum(parts[:rank])
            x, target = (t[start : start + parts[rank]] for t in (x, target))
            scale *= len(parts)  # gradients are averaged over processes
        y = network(x)
        optimizer.zero_grad()
        ((y - target) ** 2).sum().mul(scale).backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def parts_of(processes: int) -> tuple[int, ...]:
    return (5, 3, 1, 4)[:processes]


def under_ddp(rank: int, processes: int) -> dict[str, Any]:
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            network = fastnorm.SyncBatchNorm.convert_sync_batchnorm(model())
            outputs = trained(DistributedDataParallel(network), parts_of(processes), rank)
            found[backend] = {"outputs": outputs, "state": network.state_dict()}
    return found


def under_fsdp(rank: int, processes: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (processes,))
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            network = fastnorm.SyncBatchNorm.convert_sync_batchnorm(model())
            fully_shard(network.linear, mesh=mesh)
            fully_shard(network, mesh=mesh)
            outputs = trained(network, parts_of(processes), rank)
            state = {
                name: t.full_tensor() if hasattr(t, "full_tensor") else t
                for name, t in network.state_dict().items()
            }
            found[backend] = {"outputs": outputs, "state": state}
    return found


def in_evaluation(rank: int, processes: int) -> dict[str, Any]:
    """No collective: in evaluation, and in a group of one."""
    alone = [dist.new_group([r]) for r in range(processes)][rank]
    plain = model()
    x = next(batches((3,)))[0] + rank
    synced = fastnorm.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)).eval()
    single = fastnorm.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), alone)
    with counted() as collectives:
        found = {"eval": synced(x), "alone": single(x)}
    want = {"alone": plain(x), "state": plain.state_dict()}
    want["eval"] = model().eval()(x)
    return {
        "same": all(torch.equal(found[n], want[n]) for n in found)
        and all(torch.equal(t, want["state"][n]) for n, t in single.state_dict().items()),
        "collectives": list(collectives),
    }


def in_subgroups(rank: int, processes: int) -> dict[str, Any]:
    """Pairs of neighbours share their batches, and nobody else's."""
    pairs = [dist.new_group([r, r + 1]) for r in range(0, processes, 2)]
    norm = fastnorm.SyncBatchNorm(3, process_group=pairs[rank // 2], dtype=torch.float64)
    x = pair_of_rank(rank)[rank % 2]
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            found[backend] = norm(x).detach()
    return found


def pair_of_rank(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank // 2)
    x = torch.randn(7, 3, 4, generator=generator, dtype=torch.float64) * 2 + rank // 2
    return list(x.split([3, 4]))


def derivatives_input() -> tuple[Tensor, ...]:
    """x, residual, dy, v (N, C, L), weight, bias, all of the batch."""
    generator = torch.Generator().manual_seed(2)
    large = torch.randn(4, 5, 3, 2, generator=generator, dtype=torch.float64)
    small = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    return *large, *small


def second_derivatives(rank: int, processes: int) -> dict[Any, list[Tensor]]:
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            for activation in ACTIVATIONS:
                *large, weight, bias = derivatives_input()
                x, residual, dy, v = (t.tensor_split(processes)[rank].clone() for t in large)
                leaves = (x, residual, weight, bias, dy)
                found[backend, activation] = twice(
                    *(t.requires_grad_() for t in leaves), v, activation, dist.group.WORLD
                )
    return found


def linear_twice(rank: int, processes: int) -> dict[Any, list[Tensor]]:
    """Second derivatives of each algorithm of the linear layer; the last part is empty."""
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            for algorithm in LINEAR_ALGORITHMS:
                *leaves, v = linear_leaves(rank, processes)
                found[backend, algorithm] = of_linear(*leaves, v, algorithm, dist.group.WORLD)
    return found


def linear_leaves(rank: int, processes: int) -> list[Tensor]:
    """x, weight, bias, norm_weight, norm_bias, dy and v; x, dy and v of this rank's part."""
    generator = torch.Generator().manual_seed(4)
    x, dy, v = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    small = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    own = [t[9 * rank : 9 * (rank + 1)] if processes > 1 else t for t in (x, dy, v)]
    leaves = [own[0], weight, *small, own[1]]
    return [*(t.clone().requires_grad_() for t in leaves), own[2]]


def linear_alone(rank: int, processes: int) -> dict[Any, bool]:
    """Each gradient alone is the same as with all others, and takes a collective where it must."""
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            for algorithm in LINEAR_ALGORITHMS:
                whole = _linear_gradients(rank, processes, algorithm, range(5))
                for i in range(5):
                    (alone,) = _linear_gradients(rank, processes, algorithm, [i])
                    found[backend, algorithm, i] = torch.allclose(alone, whole[i], rtol=1e-12)
    return found


def pointwise(rank: int, processes: int) -> dict[Any, list[Tensor]]:
    """1×1 convolutions of both layouts by each algorithm: output and gradients of own parts."""
    found = {}
    for name in ranks.backends():
        with fastnorm.use_backend(name):
            for algorithm in LINEAR_ALGORITHMS:
                for layout in (torch.contiguous_format, torch.channels_last):
                    x, weight, gamma, beta, dy = pointwise_tensors()
                    x, dy = (t.tensor_split(processes)[rank] for t in (x, dy))
                    x = x.contiguous(memory_format=layout)
                    leaves = [t.detach().requires_grad_() for t in (x, weight, gamma, beta)]
                    x, weight, gamma, beta = leaves
                    y = implementation(x).linear_batch_norm(
                        x, weight, None, None, None, gamma, beta, True, 0.1, 1e-5, "tanh",
                        algorithm, None, dist.group.WORLD,
                    )  # fmt: skip
                    found[name, algorithm, str(layout)] = [y, *torch.autograd.grad(y, leaves, dy)]
    return {key: [t.detach() for t in tensors] for key, tensors in found.items()}


def pointwise_tensors() -> tuple[Tensor, ...]:
    """x (B, K, H, W), weight, norm_weight, norm_bias and dy of the whole batch."""
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return draw(5, 3, 4, 2), draw(6, 3), draw(6), draw(6), draw(5, 6, 4, 2)


def _linear_gradients(
    rank: int, processes: int, algorithm: str, wanted: Sequence[int]
) -> tuple[Tensor, ...]:
    *leaves, dy, _ = linear_leaves(rank, processes)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    x, weight, bias, *affine = leaves
    with counted() as collectives:
        y = fastnorm.functional.linear_batch_norm(
            x, weight, bias, None, None, *affine, training=True, algorithm=algorithm,
            process_group=dist.group.WORLD,
        )  # fmt: skip
        found = torch.autograd.grad(y, [leaves[i] for i in wanted], dy.detach())
    backward = ["all_reduce"] if {0, 1, 2} & set(wanted) else []
    assert collectives == ["all_gather", *backward], (algorithm, wanted)
    return found


def of_linear(x, weight, bias, norm_weight, norm_bias, dy, v, algorithm, group):
    y = fastnorm.functional.linear_batch_norm(
        x, weight, bias, None, None, norm_weight, norm_bias, training=True, activation="tanh",
        algorithm=algorithm, process_group=group,
    )  # fmt: skip
    leaves = (x, weight, bias, norm_weight, norm_bias)
    first = torch.autograd.grad(y, leaves, dy, create_graph=True)
    part = (first[0] * v).sum() + sum(g.sum() for g in first[1:])
    wanted = (x, weight, norm_weight, norm_bias, dy)
    return [*first, *torch.autograd.grad(part, wanted)]


def twice(x, residual, weight, bias, dy, v, activation, group):
    """Gradients of a function of the first gradients."""
    y = fastnorm.functional.batch_norm(
        x, None, None, weight, bias, training=True, residual=residual, activation=activation,
        process_group=group,
    )  # fmt: skip
    first = torch.autograd.grad(y, (x, residual, weight, bias), dy, create_graph=True)
    part = (first[0] * v).sum() + (first[1] ** 2).sum()
    # the parameters' gradients are of the own part: what is summed over processes is linear in them
    part = part + sum(g.sum() for g in first[2:])
    return list(torch.autograd.grad(part, (x, residual, weight, bias, dy), allow_unused=True))


def in_transforms(rank: int, processes: int) -> dict[str, Tensor]:
    """torch.func.vjp and jvp, and forward-mode differentiation, through all processes."""
    *large, weight, bias = derivatives_input()
    x, _, dy, v = (t.tensor_split(processes)[rank] for t in large)

    def call(x: Tensor) -> Tensor:
        return fastnorm.functional.batch_norm(
            x, None, None, weight, bias, training=True, activation="silu",
            process_group=dist.group.WORLD,
        )  # fmt: skip

    y, pull = torch.func.vjp(call, x)
    _, tangent = torch.func.jvp(call, (x,), (v,))
    return {"y": y, "vjp": pull(dy)[0], "jvp": tangent}


def compiled(rank: int, processes: int) -> dict[str, Any]:
    return _compiled(rank, processes, "aot_eager")


def compiled_by_inductor(rank: int, processes: int) -> dict[str, Any]:
    return _compiled(rank, processes, "inductor")


def _compiled(rank: int, processes: int, backend: str) -> dict[str, Any]:
    """One step of a module under torch.compile."""
    torch.manual_seed(0)
    norm = fastnorm.SyncBatchNorm(3, activation="relu", dtype=torch.float64)
    x = derivatives_input()[0].tensor_split(processes)[rank].clone().requires_grad_()
    dy = derivatives_input()[2].tensor_split(processes)[rank]
    y = torch.compile(norm, fullgraph=True, backend=backend)(x)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "mean": norm.running_mean, "var": norm.running_var}


def meets_failures(rank: int, processes: int) -> dict[str, tuple[str, float]]:
    """Rank 0 waits for the others: first they do not come, then they die before the backward."""
    impatient = dist.new_group(timeout=timedelta(seconds=2))
    norm = fastnorm.SyncBatchNorm(3, process_group=impatient)
    x = torch.randn(4, 3, requires_grad=True)
    if rank > 0:
        dist.barrier()  # for as long as rank 0 waits
        fastnorm.SyncBatchNorm(3)(x)
        os._exit(0)
    found = {"absent": _failure(lambda: norm(x))}
    dist.barrier()
    y = fastnorm.SyncBatchNorm(3)(x)
    found["dead"] = _failure(lambda: y.sum().backward())
    return found


def _failure(call: Any) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        call()
    except RuntimeError as error:
        return str(error), time.perf_counter() - start
    return "", time.perf_counter() - start
