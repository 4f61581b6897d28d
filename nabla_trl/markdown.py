"""Tables and lists as GitHub reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def table(heads: Sequence[str], lines: Iterable[Sequence]) -> str:
    def line(cells: Iterable) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, lines)])
