"""Progress of long work: a bar on a terminal, a plain line at every tenth elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


class Progress(Protocol):
    """Counts finished steps of a known number; `note` says what is seen at this step."""

    def advance(self, note: str = "") -> None: ...


def console() -> Console | None:
    """Of the standard error stream; None where rich is not installed."""
    if importlib.util.find_spec("rich") is None:
        return None
    from rich.console import Console

    return Console(stderr=True)


def is_over(limit: int | None, start: float) -> bool:
    """Whether as many seconds have passed since `start`, on the monotonic clock; None: never."""
    return limit is not None and time.monotonic() - start >= limit


@contextmanager
def progress(title: str, total: int, console: Console | None) -> Iterator[Progress]:
    """Shows `total` steps of work under `title` while the block runs; without a console, lines."""
    if console is None or not console.is_interactive:
        yield _Lines(title, total, console)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    with Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        # In a narrow terminal it is the note that is cut.
        TextColumn("{task.fields[note]}", table_column=Column(ratio=1, no_wrap=True)),
        console=console,
        expand=True,
    ) as bar:
        yield _Terminal(bar, title, total)


class _Terminal:
    def __init__(self, bar: Bar, title: str, total: int) -> None:
        self._bar = bar
        self._task = bar.add_task(title, total=total, note="")

    def advance(self, note: str = "") -> None:
        self._bar.update(self._task, advance=1, note=note)


class _Lines:
    def __init__(self, title: str, total: int, console: Console | None) -> None:
        self._title, self._total, self._console = title, total, console
        self._done = 0
        self._start = time.perf_counter()

    def advance(self, note: str = "") -> None:
        tenths = 10 * self._done // self._total
        self._done += 1
        if 10 * self._done // self._total == tenths:
            return
        share, seconds = self._done / self._total, time.perf_counter() - self._start
        line = f"{self._title} {share:4.0%}  {self._done}/{self._total}  {seconds:.0f} s  {note}"
        if self._console is None:
            print(line.rstrip(), file=sys.stderr)
        else:
            self._console.print(line.rstrip(), soft_wrap=True, highlight=False, markup=False)
