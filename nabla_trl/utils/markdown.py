"""Tables and lists as GitHub reads them, and the little Markdown that reports use as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def format_bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def format_table(headers: Sequence[str], rows: Iterable[Sequence]) -> str:
    def line(cells: Iterable) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return "\n".join([line(headers), line(["---"] * len(headers)), *map(line, rows)])


def markdown_to_html(text: str) -> str:
    """Blocks as a report writes them (headings, tables, lists, paragraphs; or one fence) as HTML, texts escaped."""
    return "\n".join(map(_block_to_html, [text] if text.startswith("```") else text.split("\n\n")))


def _block_to_html(block: str) -> str:
    if block.startswith("#"):
        marks, _, text = block.partition(" ")
        return f"<h{len(marks)}>{_inline_to_html(text)}</h{len(marks)}>"
    if block.startswith("```"):
        return f"<pre>{html.escape(block.strip('`').strip())}</pre>"
    if block.startswith("|"):
        return _markdown_table_to_html(block.splitlines())
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline_to_html(line[2:])}</li>" for line in block.splitlines()) + "</ul>"
    return f"<p>{_inline_to_html(block)}</p>"


def format_html_table(headers: Sequence[str], rows: Iterable[Sequence[str]], css_class: str = "") -> str:
    """A table of cells that are HTML already, in a box that scrolls; numbers stand to the right."""
    head = "".join(f'<th scope="col">{one}</th>' for one in headers)
    body = "".join(f"<tr>{''.join(map(_format_cell, line))}</tr>" for line in rows)
    tag = f'<table class="{css_class}">' if css_class else "<table>"
    return f'<div class="scroll" tabindex="0">{tag}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown_table_to_html(lines: Sequence[str]) -> str:
    heads, _, *body = [[_inline_to_html(cell.strip()) for cell in line.strip("|").split(" | ")] for line in lines]
    return format_html_table(heads, body)


def _format_cell(text: str) -> str:
    return f'<td class="n">{text}</td>' if re.match(r"[≤<+\-−]?\s*\d|–$", text) else f"<td>{text}</td>"


def _inline_to_html(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
