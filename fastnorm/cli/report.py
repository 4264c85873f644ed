"""Results as a user meets them: a table on the terminal, JSON, PNG, and one HTML file."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastnorm import tables
from fastnorm.tables import page, picture

if TYPE_CHECKING:  # a command that draws nothing does without the `cli` extra
    import rich.table
    from matplotlib.figure import Figure

__all__ = ["Table", "page", "picture", "png", "write_json"]


@dataclass(frozen=True)
class Table:
    """Columns of text, the first one naming the row; shown on a terminal and in HTML alike."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def on_terminal(self) -> rich.table.Table:
        import rich.table

        table = rich.table.Table(title=self.title, caption=self.note, caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def as_text(self) -> str:
        """The same without rich, as wide as it needs."""
        parts = [self.title, tables.text(self.columns, self.rows), self.note]
        return "\n".join(part for part in parts if part)

    def in_html(self) -> str:
        note = tables.paragraph(self.note, "note") if self.note else ""
        return tables.heading(self.title) + tables.table(self.columns, self.rows) + note


def png(figure: Figure) -> bytes:
    """The figure as PNG; one that no pyplot made is drawn by Agg, without a window."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def write_json(path: Path, result: Mapping[str, object], indent: int | None = 2) -> None:
    """Strict JSON: NaN and infinities, which it has no words for, become null."""
    path.write_text(json.dumps(_finite(result), indent=indent, allow_nan=False) + "\n", "utf-8")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
