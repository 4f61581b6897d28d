"""Markdown tables and lists, and HTML of the little Markdown that reports use.

A full parser such as markdown-it-py would read more into a report's texts than they mean. It makes a list of a line
that begins with "2024." and two table cells of `a|b`. It would also need a rule of its own for most of the tags below.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"[≤<>+\-−$]?\s*\d")


def format_bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def format_table(headers: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a Markdown table. Columns of numbers are aligned to the right."""
    lines = [[str(cell) for cell in row] for row in rows]
    rules = ["---:" if is_number else "---" for is_number in _find_number_columns(len(headers), lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [[*map(str, headers)], rules, *lines])


def _find_number_columns(num_columns: int, rows: Sequence[Sequence[str]]) -> list[bool]:
    """Return for each column whether most of its cells are numbers. A dash stands for a number that is not known."""
    columns = [[row[at] for row in rows if at < len(row) and row[at]] for at in range(num_columns)]
    return [2 * sum(cell == "–" or bool(_NUMBER.match(cell)) for cell in cells) > len(cells) for cells in columns]


def markdown_to_html(text: str) -> str:
    """Return a report's Markdown as HTML in which all texts are escaped.

    Args:
        text: one fence, or headings, tables, lists and paragraphs with blank lines between them. The only inline mark
            is the backtick.
    """
    return "\n".join(map(_block_to_html, [text] if text.startswith("```") else text.split("\n\n")))


def _block_to_html(block: str) -> str:
    if block.startswith("#"):
        marks, _, title = block.partition(" ")
        return f"<h{len(marks)}>{_inline_to_html(title)}</h{len(marks)}>"
    if block.startswith("```"):
        return f"<pre>{html.escape(block.strip('`').strip())}</pre>"
    if block.startswith("|"):
        return _table_to_html(block)
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline_to_html(line[2:])}</li>" for line in block.splitlines()) + "</ul>"
    return f"<p>{_inline_to_html(block)}</p>"


def _inline_to_html(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def _table_to_html(block: str) -> str:
    """Return a table in a box that scrolls, in which columns of numbers and their headers have the class n."""
    headers, rules, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]

    def format_row(tag: str, attributes: str, cells: Sequence[str]) -> str:
        kinds = [' class="n"' if at < len(rules) and rules[at].endswith(":") else "" for at in range(len(cells))]
        texts = map(_inline_to_html, cells)
        parts = (f"<{tag}{attributes}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))
        return f"<tr>{''.join(parts)}</tr>"

    head, body = format_row("th", ' scope="col"', headers), "".join(format_row("td", "", cells) for cells in rows)
    table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'
