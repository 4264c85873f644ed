"""Launches as Triton makes them for a GPU, bound, compiled and started, on an idle driver."""

import json

import pytest
from test_codegen import run


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
