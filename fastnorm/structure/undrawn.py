"""A user's code is run in passing, and random numbers go on as if it had not been."""

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def undrawn() -> Iterator[Callable[[], bool]]:
    """Python's and NumPy's random numbers go on as if none had been drawn; asks whether one was."""
    numpy = getattr(sys.modules.get("numpy"), "random", None)

    def state() -> tuple[Any, bytes]:
        of_numpy = None if numpy is None else numpy.get_state(legacy=False)
        return random.getstate(), pickle.dumps(of_numpy)

    then = state()
    try:
        yield lambda: state() != then
    finally:
        random.setstate(then[0])
        if numpy is not None:
            numpy.set_state(pickle.loads(then[1]))
