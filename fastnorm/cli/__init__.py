"""The `fastnorm` command: finds a command's module, and turns every ending into an exit status.

A command is a module of this package with `parser() -> Parser` and `run(arguments) -> int`, and an
entry in `COMMANDS`. It is imported only when it is called, because it may need the `cli` extra.
"""

import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from fastnorm.backend import BACKENDS, DEFAULT
from fastnorm.cli.arguments import UsageError


@dataclass(frozen=True)
class Command:
    """A command's line in the help, and the packages it needs beside torch."""

    summary: str
    needs: tuple[str, ...] = ()


COMMANDS = {
    "train": Command(
        "train one network twice, with torch.nn and with fastnorm layers, and compare the two",
        needs=("rich", "matplotlib", "sklearn"),
    ),
    "study": Command(
        "see on small networks what initialization and normalization do",
        needs=("rich", "matplotlib", "sklearn"),
    ),
    "verify": Command("compare every operation with float64 on this device, and with torch.nn"),
    "doctor": Command("say what is installed, which backend serves what, and what is amiss"),
    "bench": Command(
        "time every operation against torch.nn, torch.compile and the peers that are installed",
        needs=("rich", "matplotlib"),
    ),
}


CLOSED_PIPE = 141
"""128 + SIGPIPE, as a shell says it; Windows has no such signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its status, 2 for bad arguments, 130 when interrupted.

    141 where nobody reads the output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    speaker = " ".join(["fastnorm", *(word for word in arguments[:1] if word in COMMANDS)])
    try:
        with _termination_unwinds():
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
    except UsageError as error:
        if not _speaks():
            return 2
        print(f"{speaker}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{speaker}: interrupted, nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # who reads the output, as head does, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return CLOSED_PIPE


def _speaks() -> bool:
    """Of the processes that torchrun has started, the first says what all of them would."""
    return os.environ.get("RANK", "0") == "0"


def _dispatch(arguments: Sequence[str]) -> int:
    names = ", ".join(COMMANDS)
    if not arguments:
        raise UsageError(f"argument COMMAND: missing (allowed: {names})")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        raise UsageError(f"argument COMMAND: invalid value {name!r} (allowed: {names})")
    if DEFAULT not in BACKENDS:
        allowed = ", ".join(BACKENDS)
        raise UsageError(
            f"variable FASTNORM_BACKEND: invalid value {DEFAULT!r} (allowed: {allowed})"
        )
    if any(importlib.util.find_spec(package) is None for package in COMMANDS[name].needs):
        raise UsageError('packages are missing, install them by: pip install "fastnorm[cli]"')
    command = importlib.import_module(f"fastnorm.cli.{name}")
    status: int = command.run(command.parser().parse(rest))
    return status


def _overview() -> str:
    lines = [f"  {name:<8} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastnorm COMMAND [options]",
            "",
            *lines,
            "",
            "fastnorm COMMAND --help: its options",
        ]
    )


class _Interrupt(KeyboardInterrupt):
    """Ctrl-C. After a plain one within `exec` of a string Python ends itself by the signal."""


@contextmanager
def _termination_unwinds() -> Iterator[None]:
    """Lets SIGTERM leave through every `finally`, as Ctrl-C does: nothing half-written stays.

    And SIGHUP, of a terminal that was closed, unless it is ignored, as under nohup.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Interrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, leave)}
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:
        before[hangup] = signal.signal(hangup, leave)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody's own
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
