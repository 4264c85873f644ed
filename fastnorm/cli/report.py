"""Results as a user meets them: a table on the terminal, JSON, PNG, and one HTML file."""

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.table
from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; }
:root { --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d8dee4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #30363d; }
}
body { max-width: 52rem; margin: 2.5rem auto; padding: 0 1.25rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { color: var(--soft); margin: 0; } p.note { color: var(--soft); font-size: .875rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
img { width: 100%; background: #ffffff; border-radius: 8px; }
"""


@dataclass(frozen=True)
class Table:
    """Columns of text, the first one naming the row; shown on a terminal and in HTML alike."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def on_terminal(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, caption=self.note, caption_justify="left")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def in_html(self) -> str:
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        head = _html_row(self.columns, "th")
        body = "".join(_html_row(row, "td") for row in self.rows)
        table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
        return f'{_heading(self.title)}<div class="wide">{table}</div>{note}'


def picture(title: str, png: bytes) -> str:
    """HTML of an image that lies within the page."""
    data = base64.b64encode(png).decode()
    alt = html.escape(title, quote=True)
    return f'{_heading(title)}<img alt="{alt}" src="data:image/png;base64,{data}">'


def page(title: str, lead: str, parts: Iterable[str]) -> str:
    """A whole HTML document that needs no other file; `parts` are HTML, the rest is text."""
    title, lead = html.escape(title), html.escape(lead)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f'<h1>{title}</h1><p class="lead">{lead}</p>{"".join(parts)}</body></html>\n'
    )


def png(figure: Figure) -> bytes:
    """The figure as PNG; one that no pyplot made is drawn by Agg, without a window."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def write_json(path: Path, result: Mapping[str, object]) -> None:
    """Strict JSON: NaN and infinities, which it has no words for, become null."""
    path.write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n", "utf-8")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
