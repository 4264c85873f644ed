"""Ways to compute BatchNorm in torch operators on a CPU, by layout: why eager/ does what it does.

    python bench/bench_eager_batch_norm.py [--only PART] [--out FILE]

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

import fastnorm.functional as FF
from fastnorm.bench.harness import GAUGE, compare, device_name, table, write_json
from fastnorm.eager import native
from fastnorm.eager.native import aten, per_channel, reduce, scale_shift

EPS = 1e-5
Group = dict[str, Callable[[], Any]]


def _parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    C = x.shape[1]
    return torch.linspace(0.5, 1.5, C), torch.linspace(-1, 1, C)


def planes_forward(x: Tensor) -> Group:
    """Training forward, NCHW float32: torch's moments run one element after the other."""
    (w, b), n = _parameters(x), x.numel() // x.shape[1]
    N, C = x.shape[:2]
    axes = [0, *range(2, x.dim())]

    def two_passes(x: Tensor = x) -> Tensor:
        output = native.empty_like(x)
        source, shift, _, var = native.moments(x, output)
        scale_shift(source, shift, var, w, b, EPS, output)
        return output

    def group_norm_moments() -> Tensor:
        """GroupNorm with one channel a group has vectorized moments; merge them over samples."""
        output, mean, rstd = torch.native_group_norm(x, None, None, N, C, n // N, C, 0.0)
        var = rstd.double().pow(-2).mean(0).float() + mean.var(0, unbiased=False)
        scale_shift(x, mean.mean(0), var, w, b, EPS, output)
        return output

    def var_mean() -> Tensor:
        var, mean = torch.var_mean(x, axes, unbiased=False)
        output = native.empty_like(x)
        scale_shift(x, mean, var, w, b, EPS, output)
        return output

    def plain_operators() -> Tensor:
        centered = x - per_channel(x.mean(axes), x)
        rstd = (centered.square().mean(axes) + EPS).rsqrt()
        return torch.addcmul(per_channel(b, x), centered, per_channel(rstd * w, x))

    far = x + 3  # standard deviations: more than native.NEAR
    return {
        "torch.batch_norm": lambda: F.batch_norm(x, None, None, w, b, True),
        "mean, reduce, apply *": two_passes,
        "the same, mean of 3 std *": lambda: two_passes(far),
        "group_norm's moments": group_norm_moments,
        "var_mean": var_mean,
        "plain operators": plain_operators,
    }


def column_forward(x: Tensor) -> Group:
    """Training forward of one channel, (N, 1): torch takes a column of vectors of one element."""
    w, b = _parameters(x)
    return {
        "torch.batch_norm": lambda: F.batch_norm(x, None, None, w, b, True),
        "as one plane *": lambda: FF.batch_norm(x, None, None, w, b, True),
    }


def columns_forward(x: Tensor) -> Group:
    """Training forward, channels innermost: torch's kernel is vectorized already."""
    (w, b), rows = _parameters(x), x.permute(0, *range(2, x.dim()), 1).reshape(-1, x.shape[1])

    def as_channels_last() -> Tensor:
        y = F.batch_norm(rows.t()[None, :, :, None], None, None, w, b, True)
        return y[0, :, :, 0].t().view_as(x.movedim(1, -1)).movedim(-1, 1)

    def own_output() -> Tensor:
        output = native.empty_like(x)
        unused = torch.empty(0), torch.empty(0)
        return torch.native_batch_norm(x, w, b, None, None, True, 0.1, EPS, out=(output, *unused))[
            0
        ]

    def plain_operators() -> Tensor:
        var, mean = torch.var_mean(rows, 0, unbiased=False)
        y = torch.addcmul(b, rows - mean, (var + EPS).rsqrt() * w)
        return y.view_as(x.movedim(1, -1)).movedim(-1, 1)

    return {
        "torch.batch_norm * (below 32 MB)": lambda: F.batch_norm(x, None, None, w, b, True),
        "viewed as channels_last": as_channels_last,
        "own output * (huge pages from 32 MB)": own_output,
        "plain operators": plain_operators,
    }


def strided_forward(x: Tensor) -> Group:
    """Training forward of an NCL tensor stored as (N, L, C): torch loops over strides."""
    w, b = _parameters(x)
    return {
        "torch.batch_norm": lambda: F.batch_norm(x, None, None, w, b, True),
        "copied first *": lambda: F.batch_norm(x.contiguous(), None, None, w, b, True),
        "viewed as channels_last": lambda: F.batch_norm(
            x.unsqueeze(-1), None, None, w, b, True
        ).squeeze(-1),
    }


def evaluation(x: Tensor) -> Group:
    """Evaluation: one pass, bound by the memory of its output."""
    (w, b), C = _parameters(x), x.shape[1]
    mean, var = torch.zeros(C), torch.ones(C)

    def own_output() -> Tensor:
        output = native.empty_like(x)
        scale_shift(x, mean, var, w, b, EPS, output)
        return output

    scale = (var + EPS).rsqrt() * w
    shift = b - mean * scale
    return {
        "torch.batch_norm * (below 32 MB)": lambda: F.batch_norm(x, mean, var, w, b),
        "own output * (huge pages from 32 MB)": own_output,
        "addcmul": lambda: torch.addcmul(
            per_channel(shift, x).to(x.dtype), x, per_channel(scale, x).to(x.dtype)
        ),
    }


def backward(x: Tensor) -> Group:
    """Training backward: torch's kernel cannot write to a tensor of ours."""
    (w, _), n, dy = _parameters(x), x.numel() // x.shape[1], torch.randn_like(x)
    axes = [0, *range(2, x.dim())]
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    rstd = (var + EPS).rsqrt()
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)

    def kernel() -> tuple[Tensor, ...]:
        return aten.native_batch_norm_backward.default(
            dy, x, w, None, None, mean, rstd, True, EPS, [True, True, True]
        )

    def two_passes(allocate: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        dw, db = reduce(dy, x, mean, rstd)
        scale = rstd * w
        slope = dw * rstd * scale / -n
        shift = db * scale / -n - slope * mean
        dx = allocate(x)
        scale_shift(dy, zero, one, scale, shift, 0.0, dx)
        return dx.addcmul_(x, per_channel(slope, x)), dw, db

    return {
        "torch's kernel * (below 32 MB)": kernel,
        "reduce, two passes": lambda: two_passes(torch.empty_like),
        "reduce, two passes, huge pages *": lambda: two_passes(native.empty_like),
    }


CL, CL3 = torch.channels_last, torch.channels_last_3d
BF16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(**options)


GROUPS: dict[str, tuple[Callable[[Tensor], Group], Callable[[], Tensor]]] = {
    "train (8, 64, 56, 56)": (planes_forward, lambda: draw(8, 64, 56, 56)),
    "train (16, 2048, 7, 7)": (planes_forward, lambda: draw(16, 2048, 7, 7)),
    "train (256, 64, 4, 4)": (planes_forward, lambda: draw(256, 64, 4, 4)),
    "train (32, 64, 112, 112)": (planes_forward, lambda: draw(32, 64, 112, 112)),
    "train (2, 32, 32, 64, 64)": (planes_forward, lambda: draw(2, 32, 32, 64, 64)),
    "train (284057, 1)": (column_forward, lambda: draw(284057, 1)),
    "train (1024, 512)": (columns_forward, lambda: draw(1024, 512)),
    "train (8192, 1024)": (columns_forward, lambda: draw(8192, 1024)),
    "train (8, 64, 56, 56) cl": (columns_forward, lambda: draw(8, 64, 56, 56, memory_format=CL)),
    "train (32, 64, 112, 112) cl": (
        columns_forward,
        lambda: draw(32, 64, 112, 112, memory_format=CL),
    ),
    "train (64, 128, 100) as (N, L, C)": (
        strided_forward,
        lambda: draw(64, 100, 128).transpose(1, 2),
    ),
    "eval (8, 64, 56, 56)": (evaluation, lambda: draw(8, 64, 56, 56)),
    "eval (8, 64, 56, 56) bf16": (evaluation, lambda: draw(8, 64, 56, 56, dtype=BF16)),
    "eval (32, 64, 112, 112)": (evaluation, lambda: draw(32, 64, 112, 112)),
    "backward (8, 64, 56, 56)": (backward, lambda: draw(8, 64, 56, 56)),
    "backward (8, 64, 56, 56) cl": (backward, lambda: draw(8, 64, 56, 56, memory_format=CL)),
    "backward (16, 2048, 7, 7)": (backward, lambda: draw(16, 2048, 7, 7)),
    "backward (8192, 1024)": (backward, lambda: draw(8192, 1024)),
    "backward (32, 64, 112, 112)": (backward, lambda: draw(32, 64, 112, 112)),
    "backward (32, 64, 112, 112) cl": (backward, lambda: draw(32, 64, 112, 112, memory_format=CL)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="part of a group's name")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()

    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    results = []
    for name, (make, values) in GROUPS.items():
        if options.only not in name:
            continue
        with torch.no_grad():
            group = make(values())
            baseline, *others = group
            for other in others:
                torch.testing.assert_close(
                    group[other](), group[baseline](), atol=2e-2, rtol=2e-2, msg=f"{name}: {other}"
                )
            result = compare(group, baseline, rounds=options.rounds)
        rows = [
            (way, timing.best * 1e3, timing.ratio, timing.median_ratio)
            for way, timing in result.timings.items()
        ]
        print(f"\n{table((name, 'ms', 'ratio', 'median'), rows)}", flush=True)
        results += [
            {"group": name, "candidate": way, **result.extra_info(way)}
            for way in result.timings
            if way != GAUGE
        ]
    if options.out:
        write_json(options.out, "cpu", results)


if __name__ == "__main__":
    main()
