"""Hooks that copies and pickles of a model do not take along."""

from collections.abc import Callable
from typing import Any


class Hook:
    """A function as a hook of a module; in a copy of the module, or a pickle, it does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _left_behind, ()


def nothing(*args: Any) -> None:
    """What is left of a hook in a copy."""


def _left_behind() -> Callable[..., None]:
    return nothing
