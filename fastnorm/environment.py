"""What the choice of a backend depends on, as attributes of this module: so Dynamo can guard them.

    name           what this thread asked `use_backend` for
    has_triton     whether Triton can be imported
    interpreting   whether Triton's kernels run in its interpreter
    ops, operators the modules of the Triton backend, imported when they are first asked for

Of a module Dynamo asks for an attribute, whatever finds it, and compares it before each call. A
function it would trace, which ends inside Triton; an attribute of a `threading.local` it looks up
in the object's own dictionary, where there is nothing.
"""

import importlib
import importlib.util
import threading
from collections.abc import Callable


class Thread(threading.local):
    """.name: of the innermost block, before any `default`; .outer: those of the blocks around."""

    default = "auto"

    def __init__(self) -> None:  # once in each thread
        self.name = self.default
        self.outer: list[str] = []


thread = Thread()
traced: list[str] = []
"""Names of the blocks inside a function that is being traced, which enters none in truth."""


def __getattr__(attribute: str) -> object:
    if attribute == "name":  # half a microsecond: whoever is not traced asks `thread`
        return thread.name
    if attribute not in _FOUND:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    globals()[attribute] = found = _FOUND[attribute]()
    return found


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    """Whether Triton, and what it decorates from now on, are interpreted: asked of functions."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def probe() -> None:
        pass

    return type(probe).__name__ == type(tl.cdiv).__name__ == "InterpretedFunction"


_FOUND: dict[str, Callable[[], object]] = {
    "has_triton": _has_triton,
    "interpreting": _interpreting,
    "ops": lambda: importlib.import_module("fastnorm.ops"),
    "operators": lambda: importlib.import_module("fastnorm.ops.operators"),
}
