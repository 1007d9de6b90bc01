"""Tables and lists as HTML made of text alone, for notebooks and reports; and text cut to a length."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence

__all__ = ["html_list", "html_table", "shortened"]


def html_table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    row_class: Callable[[Sequence[str]], str] | None = None,
    cell_class: Callable[[str], str] | None = None,
) -> str:
    """Write a table of text as HTML.

    Every cell is escaped. There is no style, script or link in it, so a page or notebook shows it in its own colours.

    Args:
        headers: one for each column.
        rows: their cells; the first one names the row.
        caption: what stands above the table.
        row_class: gives the CSS class of a row, "" for none.
        cell_class: gives the CSS class of a cell, "" for none; not asked for the first cell of a row.

    Example:
        >>> print(html_table(["MLP", "hidden"], [["blocks.0.mlp", "3,072"]]))
        <table>
        <thead><tr><th scope="col">MLP</th><th scope="col">hidden</th></tr></thead>
        <tbody>
        <tr><th scope="row">blocks.0.mlp</th><td>3,072</td></tr>
        </tbody></table>
    """
    heads = "".join(f'<th scope="col">{html.escape(header)}</th>' for header in headers)
    lines = []
    for row in rows:
        first, *rest = row
        cells = "".join(f"<td{_mark(cell_class, cell)}>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr{_mark(row_class, row)}><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    above = f"<caption>{html.escape(caption)}</caption>\n" if caption else ""
    return "\n".join([f"<table>\n{above}<thead><tr>{heads}</tr></thead>\n<tbody>", *lines, "</tbody></table>"])


def html_list(sentences: Iterable[str]) -> str:
    """Write sentences as an HTML list; nothing for none.

    Example:
        >>> html_list(["1 < 2"]), html_list([])
        ('<ul>\\n<li>1 &lt; 2</li>\\n</ul>', '')
    """
    items = [f"<li>{html.escape(sentence)}</li>" for sentence in sentences]
    return "\n".join(["<ul>", *items, "</ul>"]) if items else ""


def shortened(text: str, most: int) -> str:
    """Cut a text to at most so many characters; an ellipsis stands for the rest.

    Example:
        >>> shortened("grouped(group=2)", 11), shortened("grouped", 11)
        ('grouped(gr…', 'grouped')
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _mark(chosen: Callable[..., str] | None, value: Sequence[str] | str) -> str:
    name = chosen(value) if chosen else ""
    return f' class="{html.escape(name)}"' if name else ""
