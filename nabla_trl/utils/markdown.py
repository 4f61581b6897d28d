"""Tables and lists as GitHub reads them, and the little Markdown that reports use as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(heads: Sequence[str], lines: Iterable[Sequence]) -> str:
    def line(cells: Iterable) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, lines)])


def as_html(text: str) -> str:
    """Blocks as a report writes them (headings, tables, lists, paragraphs; or one fence) as HTML, texts escaped."""
    return "\n".join(map(_block, [text] if text.startswith("```") else text.split("\n\n")))


def _block(block: str) -> str:
    if block.startswith("#"):
        marks, _, text = block.partition(" ")
        return f"<h{len(marks)}>{_inline(text)}</h{len(marks)}>"
    if block.startswith("```"):
        return f"<pre>{html.escape(block.strip('`').strip())}</pre>"
    if block.startswith("|"):
        return _html_table(block.splitlines())
    if block.startswith("- "):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in block.splitlines()) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def html_table(heads: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already, in a box that scrolls; numbers stand to the right."""
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    tag = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="scroll" tabindex="0">{tag}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _html_table(lines: Sequence[str]) -> str:
    heads, _, *body = [[_inline(cell.strip()) for cell in line.strip("|").split(" | ")] for line in lines]
    return html_table(heads, body)


def _cell(text: str) -> str:
    return f'<td class="n">{text}</td>' if re.match(r"[≤<+\-−]?\s*\d|–$", text) else f"<td>{text}</td>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
