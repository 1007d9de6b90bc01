"""A report as markdown, as one HTML file, and its tables for a console."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

from mlpreduce.report.content import Content, Listing, Picture, Table
from mlpreduce.report.published import SOURCE
from mlpreduce.words.console import Column, Grid
from mlpreduce.words.markup import html_list, html_table

__all__ = ["as_html", "as_markdown", "for_console", "markdown_table"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 90em; margin: 2em auto; padding: 0 1em; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em .6em; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
td.long { white-space: normal; min-width: 15em; }
tbody th { font-weight: 600; }
tr.paper td, tr.paper th { color: GrayText; }
img { max-width: 100%; height: auto; background: white; }
.remark { border-left: 4px solid #c60; padding: .2em .8em; }
"""
_LONG = 38  # characters of a cell that may be broken into lines


def as_markdown(content: Content) -> str:
    """The report; its pictures lie beside it."""
    lines = [f"# {_cell(content.title)}", ""]
    for remark in content.remarks:
        lines += [f"**{_cell(remark)}**", ""]
    for section in content.sections:
        lines += [f"## {_cell(section.title)}", ""]
        match section:
            case Table():
                lines.append(markdown_table(section))
            case Picture(title, file, caption):
                lines += [f"![{_cell(title)}]({file})", "", f"{_cell(caption)}."]
            case Listing(_, sentences):
                lines += [f"- {_cell(sentence)}" for sentence in sentences]
        lines.append("")
    return "\n".join(lines)


def markdown_table(table: Table) -> str:
    """The lines of a table, without its title."""
    headers = table.headers
    return "\n".join([_row(headers), f"|{'---|' * len(headers)}", *(_row(row) for row in table.rows)])


def as_html(content: Content) -> str:
    """The report in one file, with its pictures in it; it refers to nothing outside and runs no script."""
    title = html.escape(content.title)
    body = [f"<h1>{title}</h1>"]
    body += [f'<p class="remark">{html.escape(remark)}</p>' for remark in content.remarks]
    for section in content.sections:
        match section:
            case Table():
                inside = _table(section)
            case Picture():
                inside = _figure(section)
            case Listing(_, sentences):
                inside = html_list(sentences)
        body.append(f"<section><h2>{html.escape(section.title)}</h2>{inside}</section>")
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    )
    return "\n".join([head, *body, "</body>\n</html>\n"])


def for_console(table: Table, remark: str = "", words: int = 1) -> Grid:
    """A table for the console, and a remark below; of the first `words` columns those after the first are text."""
    columns = [
        Column(header, [row[number] for row in table.rows], left=number == 0, text=0 < number < words)
        for number, header in enumerate(table.headers)
    ]
    return Grid(table.title, columns, remark)


def _table(table: Table) -> str:
    drawn = html_table(
        table.headers,
        table.rows,
        row_class=lambda row: "paper" if row[1:2] == [SOURCE] else "",
        cell_class=lambda cell: "long" if len(cell) > _LONG else "",
    )
    return f'<div class="wide">{drawn}</div>'


def _figure(picture: Picture) -> str:
    image = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{html.escape(picture.title)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{html.escape(picture.caption)}.</figcaption></figure>"
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """Text that markdown takes as text."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
