"""A report as markdown and as one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

from mlpreduce.report.figure import CAPTION
from mlpreduce.report.published import SOURCE
from mlpreduce.report.tables import Content, Table

__all__ = ["as_html", "as_markdown"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 90em; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .8em; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
td.long { white-space: normal; min-width: 20em; }
tbody th { font-weight: 600; }
tr.paper td, tr.paper th { color: GrayText; }
img { max-width: 100%; height: auto; background: white; }
.remark { border-left: 4px solid #c60; padding: .2em .8em; }
"""
_LONG = 50  # characters of a cell that may be broken into lines


def as_markdown(content: Content) -> str:
    """The report; its figure is `curves.png` beside it."""
    lines = [f"# {_cell(content.title)}", ""]
    for remark in content.remarks:
        lines += [f"**{_cell(remark)}**", ""]
    for table in content.tables:
        lines += [f"## {table.title}", "", _row(table.headers), f"|{'---|' * len(table.headers)}"]
        lines += [*(_row(row) for row in table.rows), ""]
    lines += ["## Curves", "", f"![{CAPTION}](curves.png)", "", "## Notes", ""]
    return "\n".join([*lines, *(f"- {_cell(note)}" for note in content.notes), ""])


def as_html(content: Content, figure: bytes) -> str:
    """The report in one file, with a PNG figure in it; it refers to nothing outside and runs no script."""
    image = base64.b64encode(figure).decode("ascii")
    title = html.escape(content.title)
    body = [f"<h1>{title}</h1>"]
    body += [f'<p class="remark">{html.escape(remark)}</p>' for remark in content.remarks]
    body += [_section(table) for table in content.tables]
    body += [
        f'<section><h2>Curves</h2><figure><img alt="{html.escape(CAPTION)}" src="data:image/png;base64,{image}">',
        f"<figcaption>{html.escape(CAPTION)}.</figcaption></figure></section>",
        "<section><h2>Notes</h2><ul>",
        *(f"<li>{html.escape(note)}</li>" for note in content.notes),
        "</ul></section>",
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    )
    return "\n".join([head, *body, "</body>\n</html>\n"])


def _section(table: Table) -> str:
    heads = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in table.headers)
    rows = []
    for first, *rest in table.rows:
        kind = ' class="paper"' if rest[:1] == [SOURCE] else ""
        classes = [' class="long"' if len(cell) > _LONG else "" for cell in rest]
        cells = "".join(f"<td{mark}>{html.escape(cell)}</td>" for mark, cell in zip(classes, rest, strict=True))
        rows.append(f'<tr{kind}><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    return (
        f'<section><h2>{html.escape(table.title)}</h2><div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div></section>"
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """Text that markdown takes as text."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
