"""Launches as Triton makes them for a GPU, bound, compiled and started, on an idle driver."""

import json

import pytest
from test_codegen import run

from fastnorm.kernels import launch, row_plans
from fastnorm.kernels.channel_plans import channel_plan
from fastnorm.kernels.devices import Device
from fastnorm.kernels.group_norm_whole import whole_backward, whole_forward
from fastnorm.kernels.launch import ChannelView

together = pytest.mark.xdist_group("codegen sm_90")  # which has compiled them all


@pytest.mark.parametrize(
    "options",
    [(), pytest.param(("--all",), marks=[pytest.mark.slow, together])],
    ids=["some", "all"],
)
def test_launchers_pass_what_the_kernels_take(options):
    """Each argument has the type that was compiled for it, and each grid is one that can start."""
    found = json.loads(run("idle.py", *options))
    families = ("batch_norm", "layer_norm", "group_norm", "linear_batch_norm")
    for family in families:
        assert sum(n for name, n in found.items() if name.startswith(family)) > 0, family


def test_plans_are_remembered_until_they_are_forgotten(monkeypatch):
    """Of another device or size they are made; of another constant, once someone says so."""
    device = Device(132)
    plan = row_plans.row_plan(64, 512, 2, 8, 2, device)
    assert row_plans.row_plan(64, 512, 2, 8, 2, Device(132)) is plan  # one that is equal
    assert row_plans.row_plan(64, 512, 2, 8, 2, Device(1)).programs < plan.programs
    assert row_plans.row_plan(64, 256, 2, 8, 2, device).block_n == 256
    monkeypatch.setattr(row_plans, "WIDEST_ROW", 256)
    assert row_plans.row_plan(64, 512, 2, 8, 2, device) is plan
    launch.forget()
    assert not row_plans.row_plan(64, 512, 2, 8, 2, device).whole


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("N", "S"), [(256, 12544), (4096, 784), (100000, 49)])
@pytest.mark.parametrize("C", [1, 3, 64, 96, 256])
def test_few_channels_fill_a_device(C, N, S, columns):
    """Programs share a channel's elements, each once; few processors wait for the last of them."""
    processors = 132
    plan = channel_plan(N, C, S, columns, 2, Device(processors))
    assert plan.programs * plan.tiles_per_program >= plan.tiles
    assert (plan.programs - 1) * plan.tiles_per_program < plan.tiles
    rounds = -(-plan.grid[0] // processors)
    assert plan.grid[0] >= 0.85 * rounds * processors


@pytest.mark.parametrize(
    ("tiles", "others", "share"),
    [
        (8, 320, 8),  # 2.4 programs a processor, one round: three of a third of that are no faster
        (32, 160, 8),  # 4.8 instead of 1.2, of which some processors would have twice as many
        (1000, 1, 3),
        (1, 10_000, 1),
        (2, 10_000, 2),  # nobody waits for a part of what all have
    ],
)
def test_shares_leave_the_busiest_processor_least(tiles, others, share):
    assert launch.split(tiles, others, 3, Device(132)) == share


@pytest.mark.parametrize(
    ("N", "C", "S", "itemsize", "lead"),
    [
        (256, 288, 35 * 35, 2, 8),
        (128, 64, 55 * 55, 2, 8),  # more tiles than are a program's however few rows there are
        (8, 8, 55 * 55, 2, 1),  # too few of those
        (8, 8, 33 * 33, 2, 8),
        (256, 289, 35 * 35, 2, 1),  # a sample ends within a vector
        (256, 288, 2045, 2, 1),  # with what lies before it, a tile more
        (256, 288, 35 * 34, 2, 1),  # loads of 4 bytes are asynchronous
        (256, 288, 35 * 35, 4, 1),
        (256, 768, 17 * 17, 2, 1),  # planes side by side
    ],
)
def test_rows_that_begin_within_vectors(N, C, S, itemsize, lead):
    """Each is one program's, whatever its lead: what programs leave of channels is of one count."""
    plan = channel_plan(N, C, S, False, itemsize, Device(132))
    assert plan.lead == lead
    if lead > 1:
        across = -(-S // plan.block_s)
        assert plan.block_s * across >= S + lead - 1
        assert plan.tiles == N * across
        assert plan.tiles_per_program % across == 0
        assert (plan.programs - 1) * plan.tiles_per_program < plan.tiles
        assert plan.programs * plan.tiles_per_program >= plan.tiles


@pytest.mark.parametrize(
    ("batch", "channels", "side", "ways"),
    [
        (16, 320, 8, ("rows", "rows")),  # in registers
        (4096, 512, 7, ("rows", "rows")),
        (2, 1280, 16, ("rows", "run")),  # few
        (16, 1280, 16, ("run", "run")),  # many, tile by tile
        (16, 640, 20, ("run", "rows")),
        (16, 640, 32, ("run", "run")),
        (16, 320, 64, ("run", "shared")),
        (2, 640, 32, ("shared", "shared")),
    ],
)
def test_who_owns_a_contiguous_group(batch, channels, side, ways):
    """All are taken once, by programs that are resident together, as is what they load ahead."""
    view = ChannelView(batch, channels, side * side, columns=False)
    device = Device(multiprocessors=132, shared=227 << 10)
    passes = (
        whole_forward(view, 32, 2, 2, device),
        whole_backward(view, 32, 2, 4, False, device),
    )
    for way, whole, loaded in zip(ways, passes, (2, 4), strict=True):
        if whole is None or way == "shared":
            assert whole is None
            assert way == "shared"
            continue
        assert f"_{way}_" in whole.kernel.__name__
        sizes = whole.constants
        together = 65536 // (32 * sizes["num_warps"] * sizes["maxnreg"])
        if way == "rows":
            programs, tiles, each = whole.shares
            tile = sizes["BLOCK_M"] * sizes["BLOCK_N"]
            assert (programs - 1) * each < tiles <= programs * each
            assert tiles * sizes["BLOCK_M"] // sizes["BLOCK_G"] >= batch
            assert whole.programs <= together * device.multiprocessors
        else:
            tile = sizes.get("BLOCK_N") or sizes["BLOCK_S"] * sizes["BLOCK_C"]
            assert whole.programs == batch * 32
            assert tile * whole.shares[-1] >= channels // 32 * side**2
        assert together * (sizes["STAGES"] - 1) * tile * loaded <= device.shared
