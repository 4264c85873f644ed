"""Send short rows the ways of long ones: looped, split over programs, backward by columns."""

import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

SMALL = {
    "row_plans": {
        "WIDEST_ROW": 32,
        "WIDEST_ROW_BACKWARD": 16,
        "LOOP_TILE": 32,
        "COLUMN_TILE": (4, 16),
        "TILE_BYTES": 512,
        "ROW_PARTIALS": 16,
    },
    "layer_norm": {"ROW_PARTIALS": 16},
    "sums": {"MERGE_PARTIALS": 4},
}
WAYS = {"shipped": None, "one program": 1, "few programs": 3, "many programs": 64}
"""The multiprocessors for which launches are planned, with the small constants."""


@contextlib.contextmanager
def taking(way: str, kernels: bool) -> Iterator[None]:
    """Make small rows take the ways of long ones."""
    with contextlib.ExitStack() as stack:
        if kernels and WAYS[way] is not None:
            devices = importlib.import_module("fastnorm.kernels.devices")
            for module, constants in SMALL.items():
                owner = importlib.import_module(f"fastnorm.kernels.{module}")
                for name, value in constants.items():
                    stack.enter_context(mock.patch.object(owner, name, value))
            stack.enter_context(devices.assume(devices.Device(WAYS[way])))
            forget = importlib.import_module("fastnorm.kernels.launch").forget
            stack.callback(forget)
            forget()
        yield
