"""Batches that processes share, and what each of them does with its part (see ranks.py)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import ranks
import reference
import torch
import torch.distributed as dist
from torch import Tensor

import fastnorm
import fastnorm.functional as FF
from fastnorm.functional.linear_batch_norm import LINEAR_ALGORITHMS
from fastnorm.kernels import cost

Result = dict[str, Any]


@dataclass(frozen=True)
class Shared:
    """A batch, and the samples of it that each rank has."""

    parts: tuple[int, ...]
    shape: tuple[int, ...]  # (C, *)
    dtype: torch.dtype = torch.float32
    activation: str = "identity"
    residual: bool = False
    affine: str = "wb"
    parameters: torch.dtype | None = None
    channels_last: bool = False
    mean: float = 0.5
    std: float = 1.5
    momentum: float | None = 0.1
    tracked: bool = True
    only: str = ""  # which of the gradients; all of them

    def tensors(self) -> dict[str, Tensor]:
        """The whole batch, parameters and buffers, the same in every process."""
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        whole = (sum(self.parts), *self.shape)
        channels = self.shape[0]
        small = self.parameters or self.dtype
        found = {
            "x": (draw(*whole) * self.std + self.mean).to(self.dtype),
            "residual": draw(*whole).to(self.dtype),
            "weight": (draw(channels) * 0.3 + 1).to(small),
            "bias": draw(channels).mul(0.5).to(small),
            "dy": draw(*whole).to(self.dtype),
            "running_mean": draw(channels).to(small),
            "running_var": (draw(channels).abs() + 0.5).to(small),
        }
        for name, there in (
            ("residual", self.residual), ("weight", "w" in self.affine),
            ("bias", "b" in self.affine),
            ("running_mean", self.tracked), ("running_var", self.tracked),
        ):  # fmt: skip
            if not there:
                del found[name]
        return found

    def part(self, t: Tensor, rank: int) -> Tensor:
        """What rank `rank` has of (N, *)."""
        start = sum(self.parts[:rank])
        own = t[start : start + self.parts[rank]]
        if self.channels_last:
            return own.contiguous(memory_format=torch.channels_last)
        return own.contiguous()


LARGE = ("x", "residual", "dy")


def shared_cases(processes: int) -> dict[str, Shared]:
    """Parts are for two processes; more of them share what the second one has."""
    cases = {
        "rows": Shared((5, 3), (6,)),
        "planes, residual, relu": Shared((2, 3), (4, 5, 3), residual=True, activation="relu"),
        "residual, silu": Shared((3, 2), (3, 7), residual=True, activation="silu"),
        "gelu, only x": Shared((3, 2), (3, 7), activation="gelu", only="x"),
        "only the weight": Shared((3, 2), (3, 7), activation="tanh", only="weight"),
        "first part empty": Shared((0, 4), (3, 6), residual=True, activation="leaky_relu"),
        "last part empty": Shared((4, 0), (3,), mean=1e4, std=1.0),
        "first part empty, far from 0": Shared((0, 6), (5, 2), mean=1e4, std=1.0),
        "one value each": Shared((1, 1), (5,)),
        "one value in all": Shared((1, 0), (4,), residual=True, activation="silu"),
        "nothing at all": Shared((0, 0), (4,)),
        "split over programs": Shared((1500, 700), (9,)),
        "long planes": Shared((1, 2), (2, 95, 97), activation="relu"),
        "bfloat16, channels_last": Shared(
            (2, 3), (10, 5, 4), torch.bfloat16, parameters=torch.float32, channels_last=True,
            activation="relu", residual=True,
        ),
        "float16": Shared(
            (3, 4), (5, 3), torch.float16, parameters=torch.float32, activation="silu"
        ),
        "float64": Shared((2, 3), (3, 4), torch.float64, activation="sigmoid", residual=True),
        "far from 0": Shared((40, 3), (4, 6), mean=1e4, std=0.1),
        "near the largest": Shared((4, 3), (3,), std=1e37, tracked=False),
        "no parameters": Shared((4, 3), (3,), affine="", tracked=False),
        "bias alone": Shared((4, 3), (3,), affine="b", activation="elu"),
        "cumulative average": Shared((4, 3), (3, 2), momentum=None),
    }  # fmt: skip
    if processes == 2:
        return cases
    spread = {}
    for name, case in cases.items():
        first, second = case.parts
        # some of the second part for the third, all but that for the last; others are empty
        more = (first, second // 2, *[0] * (processes - 3), second - second // 2)
        spread[name] = replace(case, parts=more)
    return spread


def results_of_cases(rank: int, processes: int) -> dict[tuple[str, str], Result]:
    """For each backend and case: output, gradients and buffers of this rank's part."""
    found = {}
    for backend in ranks.backends():
        with fastnorm.use_backend(backend):
            for name, case in shared_cases(processes).items():
                found[backend, name] = _run(case, rank)
    return found


def _run(case: Shared, rank: int) -> Result:
    given = case.tensors()
    given = {n: case.part(t, rank) if n in LARGE else t for n, t in given.items()}
    leaves = {n: given[n] for n in ("x", "residual", "weight", "bias") if n in given}
    for name, leaf in leaves.items():
        leaf.requires_grad_(case.only in ("", name))
    count = torch.tensor(4)
    mean, var = given.get("running_mean"), given.get("running_var")
    with counted() as collectives:
        y = FF.batch_norm(
            leaves["x"], mean, var, leaves.get("weight"), leaves.get("bias"), True, case.momentum,
            residual=leaves.get("residual"), activation=case.activation,
            num_batches_tracked=count, process_group=dist.group.WORLD,
        )  # fmt: skip
        wanted = {n: t for n, t in leaves.items() if t.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), given["dy"].to(y.dtype))
    assert y.stride() == given["x"].stride() or y.numel() == 0
    found: Result = {"y": y.detach(), "count": count, "collectives": list(collectives)}
    found |= {f"d{n}": g for n, g in zip(wanted, gradients, strict=True)}
    return found | {
        n: t for n, t in (("running_mean", mean), ("running_var", var)) if t is not None
    }


LINEAR_PARTS = {
    "two parts": (40, 29),
    "first part empty": (0, 33),
}
MORE = {"far from 0": (17, 30), "bfloat16": (37, 20)}


def linear_parts(processes: int) -> dict[str, tuple[int, ...]]:
    """More processes than two have nothing."""
    if processes == 2:
        return LINEAR_PARTS
    empty = (0,) * (processes - 2)
    return {name: (*parts, *empty) for name, parts in (LINEAR_PARTS | MORE).items()}


def linear_tensors(name: str) -> tuple[Tensor, ...]:
    """x, weight, bias, norm_weight, norm_bias, running_mean, running_var, dy."""
    generator = torch.Generator().manual_seed(3)
    M, K, N = sum((LINEAR_PARTS | MORE)[name]), 5, 18

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    x = draw(M, K) + (50.0 if name == "far from 0" else 0.5)
    small = draw(N) * 0.3 + 1, draw(N), draw(N), draw(N).abs() + 0.5
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    x, weight, bias, dy = (t.to(dtype) for t in (x, draw(N, K), draw(N), draw(M, N)))
    return x, weight, bias, *small, dy


def linear_activation(name: str) -> str:
    """The sign of Z depends on how that was rounded to 16 bits, where it was."""
    return "tanh" if name == "bfloat16" else "relu"


LEAVES = ("x", "weight", "bias", "norm_weight", "norm_bias")


def linear_ways(backend: str) -> tuple[str, ...]:
    """The algorithms, and on kernels gram with dX as a library's product."""
    return LINEAR_ALGORITHMS + (("joined",) if backend == "triton" else ())


@contextmanager
def _form(way: str) -> Iterator[tuple[str, list[bool]]]:
    """The algorithm of a way, and whether dX was a library's product, each time it was made."""
    taken: list[bool] = []

    def joins(problem: cost.Problem) -> bool:
        taken.append(problem.joins)
        return problem.joins

    with mock.patch.object(cost, "joins", joins) if way == "joined" else nullcontext():
        yield "gram" if way == "joined" else way, taken


def results_of_linear(rank: int, processes: int) -> dict[tuple[str, ...], Result]:
    """For each backend, algorithm and case: output, gradients and buffers of this rank's part."""
    found = {}
    for backend in ranks.backends():
        for way in linear_ways(backend):
            with fastnorm.use_backend(backend), _form(way) as (algorithm, taken):
                for name, parts in linear_parts(processes).items():
                    x, *small, dy = linear_tensors(name)
                    x, dy = (t.split(list(parts))[rank].contiguous() for t in (x, dy))
                    *leaves, mean, var = x, *small
                    for leaf in leaves:
                        leaf.requires_grad_()
                    taken.clear()
                    with counted() as collectives:
                        y = FF.linear_batch_norm(
                            *leaves[:3], mean, var, *leaves[3:], training=True,
                            algorithm=algorithm, activation=linear_activation(name),
                            process_group=dist.group.WORLD,
                        )  # fmt: skip
                        gradients = torch.autograd.grad(y, leaves, dy)
                    found[backend, way, name] = {
                        "y": y.detach(), "by": type(y.grad_fn).__name__,
                        "running_mean": mean, "running_var": var,
                        "collectives": list(collectives), "joined": any(taken),
                    } | {f"d{n}": g for n, g in zip(LEAVES, gradients, strict=True)}  # fmt: skip
    return found


def expected_linear(name: str) -> dict[str, Tensor]:
    x, *small, dy = (t.double() for t in linear_tensors(name))
    *leaves, mean, var = x, *small
    for leaf in leaves:
        leaf.requires_grad_()
    y, mean, var = reference.linear_batch_norm(
        *leaves[:3], mean, var, *leaves[3:], True, 0.1, 1e-5, linear_activation(name)
    )
    gradients = torch.autograd.grad(y, leaves, dy)
    found = {"y": y.detach(), "running_mean": mean, "running_var": var}
    return found | {f"d{n}": g for n, g in zip(LEAVES, gradients, strict=True)}


class counted:  # noqa: N801  a context manager
    """The names of the collectives of a block."""

    names = ("all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce")

    def __enter__(self) -> list[str]:
        seen: list[str] = []
        self.originals = {n: getattr(dist, n) for n in self.names if hasattr(dist, n)}

        def counting(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                seen.append(name.split("_into")[0].split("_single")[0])
                return self.originals[name](*args, **kwargs)

            return call

        for name in self.originals:
            setattr(dist, name, counting(name))
        return seen

    def __exit__(self, *error: object) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def expected(case: Shared) -> dict[str, Tensor]:
    """What one process with the whole batch has, in float64."""
    given = case.tensors()
    leaves = {
        n: given[n].double().requires_grad_()
        for n in ("x", "residual", "weight", "bias")
        if n in given
    }
    mean, var = (given[n].double() if n in given else None for n in ("running_mean", "running_var"))
    momentum = 1 / 5 if case.momentum is None else case.momentum
    still = mean, var
    if leaves["x"].numel() <= case.shape[0]:  # no unbiased variance: nothing moves
        mean = var = None
    y, mean, var = reference.batch_norm(
        leaves["x"], mean, var, leaves.get("weight"), leaves.get("bias"), True, momentum, 1e-5,
        leaves.get("residual"), case.activation,
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(leaves.values()), given["dy"].double())
    found = {"y": y.detach()} | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}
    mean, var = (a if b is None else b for a, b in zip(still, (mean, var), strict=True))
    return found | {
        n: t for n, t in (("running_mean", mean), ("running_var", var)) if t is not None
    }


def whole(found: list[Result], name: str) -> Tensor:
    """All ranks' parts of the output or of one gradient, put together."""
    parts = [result[name] for result in found]
    if name in ("y", "dx", "dresidual"):
        return torch.cat(parts)
    return torch.stack(parts).double().sum(0).to(parts[0].dtype)


def names_of_gradients(found: Result) -> Iterator[str]:
    return (name for name in found if name.startswith("d"))
