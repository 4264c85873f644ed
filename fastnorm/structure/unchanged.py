"""A user's forward is run in passing, and the model is as if it had not been."""

import operator
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

CONTAINERS = (list, dict, set, deque)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What modules hold is as it was: attributes, buffers, and lists and dicts of anything.

    Within the block buffers are copies, so that neither their values move nor their versions, which
    autograd counts.
    """
    modules = [vars(module) for module in model.modules()]
    inner = [value for own in modules for value in own.values() if isinstance(value, CONTAINERS)]
    before = [(container, container.copy()) for container in (*modules, *inner)]
    for own in modules:
        buffers = own.get("_buffers", {})  # TorchScript has them elsewhere
        for name, buffer in buffers.items():
            if buffer is not None and not is_lazy(buffer):
                buffers[name] = buffer.clone()
    try:
        yield
    finally:
        for container, contents in before:
            if not _is_same(container, contents):
                container.clear()
                add = container.extend if isinstance(container, list | deque) else container.update
                add(contents)


def _is_same(container: Any, contents: Any) -> bool:
    """Whether a container holds the very same objects, in the same order."""
    if isinstance(container, dict):
        return _is_same([*container], [*contents]) and _is_same(
            [*container.values()], [*contents.values()]
        )
    return len(container) == len(contents) and all(map(operator.is_, container, contents))
