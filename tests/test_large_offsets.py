"""Offsets beyond 2³¹ elements, on memory that is reserved but hardly touched.

The launchers run on tensors of many gigabytes of which the test touches one channel: only the
programs of the first block of channels are launched, and its elements lie further apart than 2³¹.
"""

import contextlib

import pytest
import reference
import torch
from cases import assert_close

import fastnorm.functional as FF
from fastnorm.kernels import batch_norm, launch
from fastnorm.kernels.launch import ChannelView

checked = contextlib.nullcontext
if not torch.cuda.is_available():
    from checker import checked

pytestmark = pytest.mark.unchecked  # the usual checker fills what is allocated: many gigabytes


@pytest.fixture
def first_channels_only(monkeypatch):
    """Launch the programs of the first block of channels."""
    original = batch_norm._launch
    monkeypatch.setattr(launch.ChannelPlan, "grid", property(lambda plan: (plan.programs,)))
    monkeypatch.setattr(
        batch_norm, "_launch", lambda x, view: original(x, view)._replace(merge_grid=(1,))
    )


VIEWS = {
    "rows, one program": (ChannelView(2, 2**27 + 1, 16, columns=False), 4),
    "rows, split": (ChannelView(2, 2**17 + 1, 2**14, columns=False), 10**6),
    "columns, one program": (ChannelView(1, 2**29 + 8, 5, columns=True), 4),
    "columns, split": (ChannelView(1, 2**17, 2**14 + 1, columns=True), 10**7),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is not lazy on a GPU")
@pytest.mark.parametrize("name", VIEWS)
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
    with launch.assume(launch.Device(multiprocessors)), checked(modules=()):
        plan = launch.channel_plan(*view, 2, launch.device_of(x.device))
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
