"""Offsets beyond 2³¹ elements, on memory that is reserved but hardly touched.

The launchers run on tensors of many gigabytes of which the test touches a part. For batch norm that
is one channel: only the programs of the first block of channels are launched, and its elements lie
further apart than 2³¹. For layer norm it is the end: of each grid the first and the last program
run, and the first finds zeros.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
import triton
import triton.language as tl
from cases import assert_close
from probes import committed, draw, reserved

import fastnorm.functional as FF
from fastnorm.kernels import (
    batch_norm,
    channel_plans,
    devices,
    group_norm,
    layer_norm,
    row_plans,
    run_plans,
)
from fastnorm.kernels.device.matmul import upper_pair
from fastnorm.kernels.launch import ChannelView

checked = contextlib.nullcontext
if not torch.cuda.is_available():
    import interpreter
    from checker import checked

pytestmark = pytest.mark.unchecked  # the usual checker fills what is allocated: many gigabytes


@pytest.fixture
def first_channels_only(monkeypatch):
    """Launch the programs of the first block of channels."""
    original = batch_norm.launch_of
    monkeypatch.setattr(channel_plans.ChannelPlan, "grid", property(lambda plan: (plan.programs,)))
    monkeypatch.setattr(
        batch_norm, "launch_of", lambda x, view: original(x, view)._replace(merge_grid=(1,))
    )


VIEWS = {
    "rows, one program": (ChannelView(2, 2**27 + 1, 16, columns=False), 4),
    "rows, split": (ChannelView(2, 2**17 + 1, 2**14, columns=False), 10**6),
    "planes, one program": (ChannelView(3, 2**27, 9, columns=False), 4),
    "planes, split": (ChannelView(320, 2**15 + 8, 225, columns=False), 10**6),
    "columns, one program": (ChannelView(1, 2**29 + 8, 5, columns=True), 4),
    "columns, split": (ChannelView(1, 2**17, 2**14 + 1, columns=True), 10**7),
}


SHARED = ("rows, split", "columns, split")  # by many programs, all of which run
lazy = pytest.mark.skipif(torch.cuda.is_available(), reason="memory is not lazy on a GPU")


@lazy
@pytest.mark.parametrize(
    "name", [pytest.param(v, marks=pytest.mark.slow) if v in SHARED else v for v in VIEWS]
)
def test_beyond_2_to_the_31_elements(first_channels_only, name):
    view, multiprocessors = VIEWS[name]
    assert view.N * view.C * view.S > 2**31
    shape = (view.S, view.C) if view.columns else (view.N, view.C, view.S)
    generator = torch.Generator().manual_seed(0)

    def reserved() -> tuple[torch.Tensor, torch.Tensor]:
        """A huge tensor, and its first channel as (N, 1, S), filled."""
        whole = torch.empty(shape, dtype=torch.bfloat16)
        part = whole[:, 0].view(1, 1, -1) if view.columns else whole[:, :1]
        return whole, part.copy_(torch.randn(part.shape, generator=generator))

    x, x_part = reserved()
    dy, dy_part = reserved()
    with devices.assume(devices.Device(multiprocessors)), checked(modules=()):
        plan = channel_plans.channel_plan(*view, 2, devices.device_of(x.device))
        assert plan.whole == ("one program" in name)
        y, stats = batch_norm.forward(
            x, None, None, None, None, None, None, True, 0.1, 1e-5, "relu", view
        )
        dx, *_ = batch_norm.backward(
            dy, x, None, None, None, None, stats, True, "relu", view, (True, None, False, None)
        )
    leaf = x_part.double().requires_grad_()
    want, _, _ = reference.batch_norm(leaf, None, None, None, None, True, 0.1, 1e-5, None, "relu")
    (want_dx,) = torch.autograd.grad(want, leaf, dy_part.double())

    def first(whole: torch.Tensor) -> torch.Tensor:
        return whole[:, 0].view(1, 1, -1) if view.columns else whole[:, :1]

    assert_close(first(y), want.detach())
    assert_close(first(dx), want_dx, 16)


ROWS = {
    "registers": (2**18 + 1, 8192, 2**18),
    "looped": (2**15 + 1, 2**16, 2**13),
    "split": (1, 2**31 + 4096, 2**11),
}
"""M, N, and the multiprocessors to plan for: one program sums a row, but for the split one."""


def lazily(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.empty`, with zeros where other programs would have written partial statistics."""

    def empty(*size: Any, **options: Any) -> torch.Tensor:
        made = original(*size, **options)
        return made.zero_() if made.numel() < 2**24 else made

    return empty


@lazy
@pytest.mark.parametrize("kept", [True, False], ids=["in registers", "in tiles"])
def test_contiguous_groups_beyond_2_to_the_31_elements(monkeypatch, kept):
    """The last groups of the last sample, as rows; all else takes no memory."""
    if not kept:
        for name in ("KEPT_RUN", "WIDEST_ROW", "WIDEST_ROW_BACKWARD"):
            monkeypatch.setattr(run_plans, name, 0)
    N, C, G = 2**21 + 8, 1024, 8
    K = C // G
    assert N * C > 2**31
    monkeypatch.setattr(interpreter, "programs_of", lambda sizes: [tuple(n - 1 for n in sizes)])
    x = reserved(N * C, torch.bfloat16).view(N, C)
    dy = reserved(N * C, torch.bfloat16).view(N, C)
    x[-1] = draw(C, device=x.device, dtype=x.dtype, seed=0)
    dy[-1] = draw(C, device=x.device, dtype=x.dtype, seed=1)
    view = ChannelView(N, C, 1, columns=True)
    with devices.assume(devices.Device(10**6)), checked(modules=()):
        device = devices.device_of(x.device)
        plan = run_plans.kept_run_plan(N, G, K, 2, 8, 1, 2, device)
        assert (plan is not None) == kept
        y, stats = group_norm.forward(x, None, None, None, None, None, 0.0, 1e-5, "relu", view, G)
        wanted = (True, None, False, None)
        dx, *_ = group_norm.backward(dy, x, None, None, None, None, stats, "relu", view, G, wanted)
    groups = 1
    if kept:
        gradient = run_plans.kept_run_gradient_plan(N, G, K, 2, 8, 1, 4, False, device)
        assert plan.tiles_per_program == gradient.tiles_per_program == 1
        groups = min(plan.beside, gradient.beside)
    own = slice(C - groups * K, C)
    leaf = x[-1:, own].double().requires_grad_()
    want = reference.group_norm(leaf, groups, None, None, 1e-5, None, "relu")
    (want_dx,) = torch.autograd.grad(want, leaf, dy[-1:, own].double())
    assert_close(y[-1:, own], want.detach())
    assert_close(stats[0, -1], x[-1, -K:].double().mean())
    assert_close(dx[-1:, own], want_dx)


@lazy
@pytest.mark.parametrize("center", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("way", ROWS)
def test_rows_beyond_2_to_the_31_elements(monkeypatch, way, center):
    """The last row, or the last share of the only one; all else is 0 and takes no memory."""
    M, N, multiprocessors = ROWS[way]
    assert M * N > 2**31
    monkeypatch.setattr(
        interpreter,
        "programs_of",
        lambda sizes: sorted({(0,) * len(sizes), tuple(n - 1 for n in sizes)}),
    )
    monkeypatch.setattr(torch, "empty", lazily(torch.empty))
    for module in (row_plans, layer_norm):
        monkeypatch.setattr(module, "ROW_PARTIALS", 2**13)  # shorter shares
    x, residual, dy = (reserved(M * N, torch.bfloat16).view(M, N) for _ in range(3))
    weight = reserved(N, torch.bfloat16)
    before = committed()
    with devices.assume(devices.Device(multiprocessors)), checked(modules=()):
        plan = row_plans.row_plan(M, N, 2, 8, 4, devices.device_of(x.device))
        assert plan.whole == (way == "registers")
        assert plan.whole or (plan.programs > 1) == (way == "split")
        share = plan.tiles_per_program * plan.block_n
        first = 0 if way == "registers" else (plan.programs - 1) * share
        last = (slice(M - 1, M), slice(first, N))
        for seed, t in enumerate((x, residual, dy)):
            t[last] = draw(1, N - first, device=x.device, dtype=t.dtype, seed=seed)
        weight[first:] = draw(N - first, device=x.device, dtype=weight.dtype, seed=3)
        y, total, stats = layer_norm.forward(
            x, residual, weight, None, 1e-5, "relu", center, N, (M, N)
        )
        dx, dw, _ = layer_norm.backward(
            dy, total, weight, None, stats, None, "relu", N, (M, N), (True, True, None)
        )
    assert committed() - before < 2**31
    leaf, gamma = (t.double().requires_grad_() for t in (total[last], weight[first:]))
    zeros = leaf.new_zeros(1, share if way == "split" else 0)  # what the first program reads
    ones = gamma.new_ones(zeros.shape[1])
    want = reference.layer_norm(
        torch.cat([zeros, leaf], 1), 1, torch.cat([ones, gamma]), None, 1e-5, "relu", center
    )[:, zeros.shape[1] :]
    want_dx, want_dw = torch.autograd.grad(want, (leaf, gamma), dy[last].double())
    assert torch.equal(total[last], x[last] + residual[last])
    assert_close(y[last], want.detach(), 8)
    ends = (slice(M - 1, M), slice(N - 8, N))  # what the last program of columns owns
    assert_close(dw[-8:], want_dw[-8:], 8)
    if (
        way == "split"
    ):  # c1 and c2, the sums of two shares over the whole length, are nearly nothing
        rstd = stats[0, -1].double()
        want_dx = dy[last].double() * (want > 0) * gamma * rstd
        torch.testing.assert_close(dx[ends].double(), want_dx[:, -8:], rtol=2**-8, atol=1e-4)
    else:
        assert_close(dx[ends], want_dx[:, -8:].detach(), 64)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "rows"])
def test_full_size_on_a_gpu(columns):
    """2³¹ + 2²¹ elements, compiled, against float64 in slices."""
    rows, channels = 2**11 + 2, 2**20
    shape = (rows, channels) if columns else (2, channels, rows // 2)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    y = FF.batch_norm(x, None, None, training=True)
    dy = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    (dx,) = torch.autograd.grad(y, x, dy)
    for part in (slice(0, 64), slice(channels - 64, channels)):
        leaf = x.detach()[:, part].double().requires_grad_()
        want, _, _ = reference.batch_norm(
            leaf, None, None, None, None, True, 0.1, 1e-5, None, "identity"
        )
        (want_dx,) = torch.autograd.grad(want, leaf, dy[:, part].double())
        assert_close(y[:, part], want.detach(), rows)
        assert_close(dx[:, part], want_dx, rows)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(2**21 + 2, 1024), (2**10 + 2, 2**21), (1, 2**31 + 4096)], ids=str
)
def test_rows_at_full_size_on_a_gpu(shape):
    """More than 2³¹ elements, compiled: first and last rows against float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    y = FF.layer_norm(x.requires_grad_(), shape[1:])
    (dx,) = torch.autograd.grad(y, x, dy)
    for row in {0, shape[0] - 1}:
        # a whole row of 2³¹ in float64, ten times over, is more than a GPU's memory: ends of it
        parts = [t.detach()[row].split(2**24) for t in (x, dy)]
        mean = sum(t.double().sum() for t in parts[0]) / shape[1]
        var = sum((t.double() - mean).square().sum() for t in parts[0]) / shape[1]
        rstd = (var + 1e-5).rsqrt()
        c1 = sum(g.double().sum() for g in parts[1]) / shape[1]
        pairs = zip(*parts, strict=True)
        c2 = sum(((t.double() - mean) * g.double()).sum() for t, g in pairs) * rstd / shape[1]
        for end in (slice(0, 512), slice(shape[1] - 512, shape[1])):
            want = (x.detach()[row, end].double() - mean) * rstd
            assert_close(y[row, end], want, 64)
            assert_close(dx[row, end], rstd * (dy[row, end].double() - c1 - want * c2), 64)


@triton.jit
def upper_pairs_kernel(p_ptr, i_ptr, j_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = upper_pair(tl.load(p_ptr + at))
    tl.store(i_ptr + at, i)
    tl.store(j_ptr + at, j)


def test_programs_of_a_triangle():
    """Where a column of a large one ends, the root in float32 is off."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    j = torch.arange(1, 16385, dtype=torch.int32, device=device)
    first = j * (j + 1) // 2
    p = torch.stack([first - 1, first, first + 1, first + j])
    want_j = torch.stack([j - 1, j, j, j])
    want_i = torch.stack([j - 1, torch.zeros_like(j), torch.ones_like(j), j])
    i, j = torch.full_like(p, -1), torch.full_like(p, -1)
    upper_pairs_kernel[(p.numel() // 1024,)](p, i, j, BLOCK=1024)
    assert torch.equal(j, want_j)
    assert torch.equal(i, want_i)
