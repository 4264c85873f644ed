"""Ways to compute GroupNorm and InstanceNorm in torch operators on a CPU, by layout.

    python bench/bench_eager_group_norm.py [--only PART] [--out FILE]

Each group is one job in one layout, with torch's way first, and every candidate of a group is
checked against it before it is timed. Ratios are torch's time over the candidate's. Candidates
marked * are what fastnorm/eager takes from its size on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm.bench.harness import GAUGE, compare, device_name, table, write_json
from fastnorm.eager import native
from fastnorm.eager.batch_norm import batch_norm
from fastnorm.eager.group_norm import group_norm
from fastnorm.eager.instance_norm import instance_norm

EPS = 1e-5
Group = dict[str, Callable[[], Any]]


def _parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    C = x.shape[1]
    return torch.linspace(0.5, 1.5, C), torch.linspace(-1, 1, C)


def group_forward(x: Tensor, num_groups: int) -> Group:
    """torch's forward is near memory speed, but for page faults."""
    w, b = _parameters(x)
    kept = native.memory_format(x)

    def by_samples() -> Tensor:
        """Each sample's moments by batch norm's reduction, merged over groups, then applied."""
        y = native.empty_like(x)
        for n, part in enumerate(x.split(1)):
            _, mean, rstd = torch.native_batch_norm(part, None, None, None, None, True, 0.0, EPS)
            mean, var = (t.float().view(num_groups, -1) for t in (mean, rstd.pow(-2) - EPS))
            center = mean.mean(1, keepdim=True)
            spread = (var + (mean - center) ** 2).mean(1, keepdim=True)
            center, spread = (t.expand(mean.shape).flatten() for t in (center, spread))
            native.scale_shift(part, center, spread, w, b, EPS, y[n : n + 1])
        return y

    def copied() -> Tensor:
        return F.group_norm(x.contiguous(), num_groups, w, b, EPS).contiguous(memory_format=kept)

    return {
        "torch.group_norm": lambda: F.group_norm(x, num_groups, w, b, EPS),
        "fastnorm *": lambda: group_norm(x, num_groups, w, b, EPS, None, "identity"),
        "copied to planes and back": copied,
        "batch norm's moments by sample": by_samples,
    }


def group_backward(x: Tensor, num_groups: int) -> Group:
    """channels_last: torch walks each group's channels by themselves."""
    w, b = (t.requires_grad_() for t in _parameters(x))
    x = x.detach().requires_grad_()
    dy, kept = torch.randn_like(x), native.memory_format(x)

    def graph(normalize: Callable[[], Tensor]) -> Callable[[], Any]:
        y = normalize()
        return lambda: torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)

    def copied() -> Tensor:
        return F.group_norm(x.contiguous(), num_groups, w, b, EPS).contiguous(memory_format=kept)

    return {
        "torch.group_norm": graph(lambda: F.group_norm(x, num_groups, w, b, EPS)),
        "fastnorm *": graph(lambda: group_norm(x, num_groups, w, b, EPS, None, "identity")),
        "copied to planes and back": graph(copied),
    }


def instance_forward(x: Tensor) -> Group:
    """torch takes batch norm's slow moments, after a copy to planes."""
    w, b = _parameters(x)
    N, C = x.shape[:2]
    kept = native.memory_format(x)

    def as_channels() -> Tensor:
        planes = x.contiguous().view(1, N * C, -1)
        y = batch_norm(
            planes, None, None, w.repeat(N), b.repeat(N), True, 0.0, EPS, None, "identity", None
        )
        return y.view(x.shape).contiguous(memory_format=kept)

    return {
        "torch.instance_norm": lambda: F.instance_norm(x, weight=w, bias=b, eps=EPS),
        "fastnorm *": lambda: instance_norm(x, None, None, w, b, True, 0.1, EPS, None, "identity"),
        "group_norm, a channel a group": lambda: F.group_norm(x, C, w, b, EPS),
        "batch_norm of (1, N·C, S)": as_channels,
    }


def instance_backward(x: Tensor) -> Group:
    w, b = (t.requires_grad_() for t in _parameters(x))
    x = x.detach().requires_grad_()
    dy, C = torch.randn_like(x), x.shape[1]

    def graph(normalize: Callable[[], Tensor]) -> Callable[[], Any]:
        y = normalize()
        return lambda: torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)

    return {
        "torch.instance_norm": graph(lambda: F.instance_norm(x, weight=w, bias=b, eps=EPS)),
        "fastnorm *": graph(
            lambda: instance_norm(x, None, None, w, b, True, 0.1, EPS, None, "identity")
        ),
        "group_norm, a channel a group": graph(lambda: F.group_norm(x, C, w, b, EPS)),
    }


def jobs() -> dict[str, Callable[[], Group]]:
    """Name -> what makes its candidates; the tensors are made when their turn comes."""
    found: dict[str, Callable[[], Group]] = {}
    shapes = [((2, 320, 64, 64), 32), ((16, 1280, 16, 16), 32), ((4, 64, 128, 128), 8)]
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (torch.contiguous_format, torch.channels_last):
            tag = f"{str(dtype)[6:]}, {str(kind)[6:]}"

            def draw(shape: tuple[int, ...], dtype: Any = dtype, kind: Any = kind) -> Tensor:
                return torch.randn(shape).to(dtype).contiguous(memory_format=kind)

            for shape, groups in [*shapes, ((4, 64, 128, 128), 64)]:
                for half in (group_forward, group_backward):
                    name = f"{half.__name__} {list(shape)} G={groups}, {tag}"
                    found[name] = lambda h=half, s=shape, g=groups, d=draw: h(d(s), g)
            for shape in [(4, 64, 64, 64), (16, 64, 28, 28), (4, 64, 256, 256)]:
                for other in (instance_forward, instance_backward):
                    name = f"{other.__name__} {list(shape)}, {tag}"
                    found[name] = lambda h=other, s=shape, d=draw: h(d(s))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of a job's name")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = []
    for name, make in jobs().items():
        if options.only not in name:
            continue
        group = make()
        first = next(iter(group))
        want = group[first]()
        for call in group.values():
            torch.testing.assert_close(call(), want, atol=5e-2, rtol=5e-2)
        result = compare(group, first, rounds=options.rounds)
        rows = [
            [n, t.best * 1e3, t.ratio, t.median_ratio]
            for n, t in result.timings.items()
            if n != GAUGE
        ]
        print(f"\n{name}; gauge {result[GAUGE].ratio:.3f}")
        print(table(("candidate", "ms", "ratio", "median"), rows), flush=True)
        results.append({"job": name, **{n: result.extra_info(n) for n in result.timings}})
    if options.out:
        write_json(options.out, "cpu", results)


if __name__ == "__main__":
    main()
