"""Paragraphs and tables of the Markdown that is generated."""

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 100


def paragraph(text: str, first: str = "") -> str:
    """The words in lines of WIDTH, behind `first`, a list's mark."""
    words = " ".join(text.split())
    return textwrap.fill(
        words, WIDTH, initial_indent=first, subsequent_indent=" " * len(first),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The first `left` columns flush left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(columns) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows))
