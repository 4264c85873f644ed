"""Launches as Triton makes them for a GPU, bound, compiled and started, on an idle driver."""

import json

import pytest
from test_codegen import run

from fastnorm.kernels.channel_plans import channel_plan
from fastnorm.kernels.devices import Device


@pytest.mark.xdist_group("codegen sm_90")  # which has compiled them all
@pytest.mark.parametrize(
    "options", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_launchers_pass_what_the_kernels_take(options):
    """Each argument has the type that was compiled for it, and each grid is one that can start."""
    found = json.loads(run("idle.py", *options))
    families = ("batch_norm", "layer_norm", "group_norm", "linear_batch_norm")
    for family in families:
        assert sum(n for name, n in found.items() if name.startswith(family)) > 0, family


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
