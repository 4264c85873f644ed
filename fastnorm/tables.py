"""A table as plain text, and one self-contained HTML page: what reports are made of."""

import base64
import html
from collections.abc import Iterable, Sequence

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
th.words, td.words { text-align: left; vertical-align: top; }
img { width: 100%; background: #ffffff; border-radius: 8px; }
"""


def text(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """Aligned columns: the first and those named in `left` to the left, the others to the right."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    to_left = [not index or name in left for index, name in enumerate(columns)]
    lines = [
        "  ".join(
            cell.ljust(width) if flush else cell.rjust(width)
            for cell, width, flush in zip(row, widths, to_left, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """The same in HTML."""
    words = [name in left for name in columns]
    head = _row(columns, "th", words)
    body = "".join(_row(row, "td", words) for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def heading(words: str) -> str:
    return f"<h2>{html.escape(words)}</h2>"


def paragraph(words: str, kind: str = "") -> str:
    """HTML of one paragraph; `kind` "note" is set small."""
    shown = f' class="{kind}"' if kind else ""
    return f"<p{shown}>{html.escape(words)}</p>"


def folded(words: str, inner: str) -> str:
    """HTML that is opened by a click; `inner` is HTML."""
    return f"<details><summary>{html.escape(words)}</summary>{inner}</details>"


def picture(title: str, png: bytes) -> str:
    """HTML of an image that lies within the page."""
    data = base64.b64encode(png).decode()
    alt = html.escape(title, quote=True)
    return f'{heading(title)}<img alt="{alt}" src="data:image/png;base64,{data}">'


def page(title: str, lead: str, parts: Iterable[str]) -> str:
    """A whole HTML document that needs no other file; `parts` are HTML, the rest is text."""
    title, lead = html.escape(title), html.escape(lead)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f'<h1>{title}</h1><p class="lead">{lead}</p>{"".join(parts)}</body></html>\n'
    )


def _row(cells: Sequence[str], tag: str, words: Sequence[bool]) -> str:
    kinds = [' class="words"' if flush else "" for flush in words]
    return (
        "<tr>"
        + "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
            for cell, kind in zip(cells, kinds, strict=True)
        )
        + "</tr>"
    )
