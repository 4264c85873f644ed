"""A pytest plugin: run one share of the tests, so that processes can divide them without xdist.

    FASTNORM_SHARD=3/12 pytest -p shard        the fourth of twelve

Neighbours share what they compile, so they stay together in blocks.
"""

import os

import pytest

BLOCK = 8


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, shares = map(int, os.environ.get("FASTNORM_SHARD", "0/1").split("/"))
    kept = [item for i, item in enumerate(items) if i // BLOCK % shares == share]
    dropped = [item for i, item in enumerate(items) if i // BLOCK % shares != share]
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
