"""Command line arguments whose every error is one line with the argument and its allowed values."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import torch


class UsageError(Exception):
    """What the user asked for cannot be done; `main` prints it as one line and exits with 2."""


class Value(Protocol):
    """The type of an argument: reads a text, and says in words what it accepts."""

    @property
    def allowed(self) -> str: ...

    def __call__(self, text: str) -> object: ...


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    words: tuple[str, ...]
    note: str = ""

    @property
    def allowed(self) -> str:
        return ", ".join(self.words) + self.note

    def __call__(self, text: str) -> str:
        if text not in self.words:
            raise _invalid(text)
        return text


@dataclass(frozen=True)
class Several:
    """Some of several words, separated by commas, or `none`."""

    words: tuple[str, ...]

    @property
    def allowed(self) -> str:
        return f"none, or some of {', '.join(self.words)}, separated by commas"

    def __call__(self, text: str) -> tuple[str, ...]:
        chosen = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
        if not set(chosen) <= set(self.words):
            raise _invalid(text)
        return chosen


@dataclass(frozen=True)
class Text:
    """Anything but nothing."""

    allowed: str

    def __call__(self, text: str) -> str:
        if not text.strip():
            raise _invalid(text)
        return text


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int | None = None

    @property
    def allowed(self) -> str:
        upper = "or more" if self.high is None else f"to {self.high}"
        return f"a whole number, {self.low} {upper}"

    def __call__(self, text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise _invalid(text) from None
        if number < self.low or (self.high is not None and number > self.high):
            raise _invalid(text)
        return number


@dataclass(frozen=True)
class Positive:
    """A finite number above zero."""

    allowed: str = "a number above 0"

    def __call__(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise _invalid(text) from None
        if not (math.isfinite(number) and number > 0):
            raise _invalid(text)
        return number


@dataclass(frozen=True)
class Folder:
    """Where results go; `output.results_folder` checks and makes it."""

    allowed: str = "a new or an empty folder, where you may write"

    def __call__(self, text: str) -> Path:
        if not text:
            raise _invalid(text)
        return Path(text)


def device_choice() -> Choice:
    """The devices of this machine, by the names torch gives them, and `auto`."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return Choice(("auto", "cpu"), note="; no CUDA device found")
    return Choice(("auto", "cpu", "cuda", *(f"cuda:{index}" for index in range(count))))


def resolve_device(name: str) -> torch.device:
    """The device of a `--device` argument; `auto` is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, with the allowed values, instead of exiting."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._values: dict[str, Value] = {}
        self._flags: list[str] = []

    def option(
        self, name: str, value: Value, *, help: str, default: object = None, otherwise: str = ""
    ) -> None:
        """Adds `name`; its help ends with the allowed values and the default, or `otherwise`."""
        self._values[name] = value
        shown = otherwise or default
        self.add_argument(
            name,
            type=value,
            default=default,
            metavar=name.lstrip("-").upper(),
            help=f"{help} ({value.allowed}; default: {shown})".replace("%", "%%"),
        )

    def word(self, name: str, value: Value, *, help: str) -> None:
        """Adds an argument without dashes, which must be there."""
        self._values[name.upper()] = value
        text = f"{help} ({value.allowed})".replace("%", "%%")
        self.add_argument(name, nargs="?", type=value, metavar=name.upper(), help=text)

    def flag(self, name: str, *, help: str) -> None:
        """Adds an option that takes no value."""
        self._flags.append(name)
        self.add_argument(name, action="store_true", help=help)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            allowed = ", ".join((*self._values, *self._flags)) or "none"
            raise UsageError(f"argument {unknown[0]}: unknown (allowed: {allowed})")
        for name, value in self._values.items():
            if not name.startswith("-") and getattr(known, name.lower()) is None:
                raise UsageError(f"argument {name}: missing (allowed: {value.allowed})")
        return known

    def error(self, message: str) -> NoReturn:
        named = re.match(r"argument ([^:\s]+)", message)
        value = self._values.get(named[1]) if named else None
        raise UsageError(f"{message} (allowed: {value.allowed})" if value else message)


def _invalid(text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"invalid value {text!r}")
