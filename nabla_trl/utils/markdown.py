"""Markdown tables and lists, and HTML of the little Markdown that reports use.

A full parser such as markdown-it-py would read more into a report's texts than they mean. It makes a list of a line
that begins with "2024." and two table cells of `a|b`. It would also need a rule of its own for most of the tags below.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def format_bullets(lines: Iterable[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def format_table(headers: Sequence[str], rows: Iterable[Sequence]) -> str:
    """Return a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


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
        lines = [line.strip("|").split(" | ") for line in block.splitlines()]
        headers, _, *rows = [[_inline_to_html(cell.strip()) for cell in cells] for cells in lines]
        return format_html_table(headers, rows)
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline_to_html(line[2:])}</li>" for line in block.splitlines()) + "</ul>"
    return f"<p>{_inline_to_html(block)}</p>"


def _inline_to_html(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


def format_html_table(headers: Sequence[str], rows: Iterable[Sequence[str]], css_class: str = "") -> str:
    """Return a table in a box that scrolls, with numbers aligned to the right.

    Args:
        headers, rows: cells that are already HTML.
    """
    head = "".join(f'<th scope="col">{header}</th>' for header in headers)
    body = "".join(f"<tr>{''.join(map(_format_cell, row))}</tr>" for row in rows)
    tag = f'<table class="{css_class}">' if css_class else "<table>"
    return f'<div class="scroll" tabindex="0">{tag}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _format_cell(text: str) -> str:
    return f'<td class="n">{text}</td>' if re.match(r"[≤<+\-−]?\s*\d|–$", text) else f"<td>{text}</td>"
