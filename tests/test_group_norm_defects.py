"""The GroupNorm defects found in other libraries, one test each: ours must not have them.

The docstrings name the defect. General checks of the same things are in test_group_norm.py; here
each defect is set up as it bites a user.
"""

import contextlib

import pytest
import reference
import torch
from cases import assert_close, memory_formats
from test_group_norm import problem

import fastnorm
import fastnorm.functional as FF
from fastnorm.kernels import devices, group_norm, group_norm_whole, group_plans
from fastnorm.kernels.launch import ChannelView

checked = contextlib.nullcontext
if not torch.cuda.is_available():
    from checker import checked


def kernels_run(device: torch.device) -> bool:
    return fastnorm.backend_for(torch.ones(2, 3, device=device)) == "triton"


def test_the_variance_is_of_differences(backend):
    """Variance by E[x²] − E[x]²: at a mean of 3000 standard deviations nothing is left of it."""
    for memory_format in memory_formats(4):
        if memory_format is not torch.contiguous_format and not kernels_run(backend):
            continue  # torch's own operator has this defect there
        case = problem((2, 6, 9, 10), 2, backend, mean=4500.0, memory_format=memory_format)
        want = case.reference()["y"].detach()
        assert_close(case.run()["y"], want, terms=3000**2)
        assert (case.run()["y"].double() - want).abs().max() < 0.01


@pytest.mark.parametrize("positions", [(), (5,), (5, 3), (2, 5, 3), (2, 2, 3, 2)], ids=str)
def test_any_rank(backend, positions):
    """Only inputs of three axes right."""
    problem((3, 12, *positions), 3, backend).check()


@pytest.mark.parametrize("shape", [(1, 4, 128, 129), (1, 2, 33000)], ids=str)
def test_large_images(backend, shape):
    """The whole group in one tile, so that large images fail."""
    for memory_format in memory_formats(len(shape)):
        problem(shape, 2, backend, memory_format=memory_format).check()


@pytest.mark.parametrize("per_group", [1, 3, 7, 10, 30, 40, 47, 60])
@pytest.mark.parametrize("num_groups", [1, 5, 32])
def test_any_number_of_channels(backend, num_groups, per_group):
    """Whitelists of channel counts; channels_last wrong where C is not a power of two."""
    for memory_format in memory_formats(4):
        shape = (2, num_groups * per_group, 2, 3) if num_groups < 32 else (1, 32 * per_group, 2, 2)
        problem(shape, num_groups, backend, memory_format=memory_format).check()


def test_the_format_is_kept(backend):
    """channels_last dropped on output, or on the gradient."""
    for shape, kind in (
        ((2, 6, 5, 7), torch.channels_last),
        ((2, 6, 3, 5, 7), torch.channels_last_3d),
    ):
        x = torch.randn(shape, device=backend).to(memory_format=kind).requires_grad_()
        for y in (FF.group_norm(x, 3), FF.instance_norm(x)):
            assert y.is_contiguous(memory_format=kind)
            (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
            if kernels_run(backend):
                assert dx.is_contiguous(memory_format=kind)


def test_instance_norm_keeps_its_buffers_from_nothing(backend):
    """An empty batch putting NaN into running_mean; statistics saved in bf16."""
    norm = fastnorm.InstanceNorm1d(3, track_running_stats=True, device=backend)
    norm(torch.zeros(0, 3, 4, device=backend))
    assert torch.equal(norm.running_mean, torch.zeros(3, device=backend))
    x = (torch.randn(4, 3, 50, device=backend) + 100).bfloat16()
    norm(x)
    want = 0.1 * x.double().mean((0, 2))
    torch.testing.assert_close(norm.running_mean.double(), want, rtol=1e-5, atol=1e-5)


class FirstPrograms:
    """A kernel of which only the first programs are launched."""

    def __init__(self, kernel, programs: int) -> None:
        self.kernel, self.programs = kernel, programs

    def __getitem__(self, grid: tuple[int]):
        return self.kernel[(min(grid[0], self.programs),)]


VIEWS = {
    "one program": (ChannelView(1, 2**29 + 8, 5, columns=True), 8, 4),
    "split": (ChannelView(1, 2**17, 2**14 + 1, columns=True), 16, 10**7),
}


@pytest.mark.unchecked  # the usual checker fills what is allocated: many gigabytes
@pytest.mark.skipif(torch.cuda.is_available(), reason="memory is not lazy on a GPU")
@pytest.mark.parametrize("name", VIEWS)
def test_beyond_2_to_the_31_elements(monkeypatch, name):
    """32-bit offsets, on memory that is reserved but hardly touched: a block of the channels."""
    view, K, multiprocessors = VIEWS[name]
    assert view.C * view.S > 2**31
    generator = torch.Generator().manual_seed(0)

    def reserved() -> tuple[torch.Tensor, torch.Tensor]:
        """A huge (S, C) tensor, and its first group as (1, K, S), filled."""
        whole = torch.empty(view.S, view.C, dtype=torch.bfloat16)
        values = torch.randn(view.S, 2 * max(K, 32), generator=generator)
        whole[:, : values.shape[1]] = values
        return whole, whole[:, :K].t()[None]

    x, x_part = reserved()
    dy, dy_part = reserved()
    with devices.assume(devices.Device(multiprocessors)), checked(modules=()):
        plan = group_plans.group_plan(*view, K, 2, devices.device_of(x.device))
        assert plan.whole == (name == "one program")
        for module in (group_norm, group_norm_whole):
            for kernel in [n for n in vars(module) if n.endswith("_kernel")]:
                programs = 1 if "finalize" in kernel else plan.programs
                limited = FirstPrograms(getattr(module, kernel), programs)
                monkeypatch.setattr(module, kernel, limited)
        G = view.C // K
        y, stats = group_norm.forward(x, None, None, None, None, None, 0.0, 1e-5, "relu", view, G)
        wanted = (True, None, False, None)
        dx, *_ = group_norm.backward(dy, x, None, None, None, None, stats, "relu", view, G, wanted)
    leaf = x_part.double().requires_grad_()
    want = reference.group_norm(leaf, 1, None, None, 1e-5, None, "relu")
    (want_dx,) = torch.autograd.grad(want, leaf, dy_part.double())
    assert_close(y[:, :K].t()[None], want.detach(), 16)
    assert_close(dx[:, :K].t()[None], want_dx, 16)
