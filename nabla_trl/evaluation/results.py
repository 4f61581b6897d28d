"""An evaluation on disk, as its report needs it: rows.jsonl and facts.json. No models, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_trl.utils.files import read_object, read_objects, write_whole

EXTRACTION = "extraction.jsonl"


def store_results(folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write rows.jsonl, facts.json (see `nabla_trl.report.text`) and extraction.jsonl, each whole or not at all."""
    write_whole(folder / "rows.jsonl", _lines(rows))
    write_whole(folder / "facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    differ = extractions(rows)
    if differ:
        write_whole(folder / EXTRACTION, _lines(differ))
    else:
        (folder / EXTRACTION).unlink(missing_ok=True)


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def extractions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every response whose answer strict and lenient extraction read differently: what both read, to be judged."""
    return [
        {name: row[name] for name in ("method", "problem", "seed", "gold")}
        | {
            "tail": row["tail"],
            "strict": row["answer_strict"],
            "lenient": row["answer"],
            "correct_strict": row["correct_strict"],
            "correct": row["correct"],
        }
        for row in rows
        if row.get("tail") is not None
    ]


def comparisons_lost(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the comparisons with gold answers that timed out or ended their worker; empty without any."""
    late, broken = (sum(row.get("verdict") == verdict for row in rows) for verdict in ("timeout", "error"))
    lost = [f"{late} timed out"] * bool(late) + [f"{broken} ended their worker"] * bool(broken)
    return f"Of the comparisons with gold answers {' and '.join(lost)}: they count as wrong." if lost else ""


def remarks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a terminal should be told of stored rows beside their table."""
    differ = len(extractions(rows))
    what = "1 answer differs" if differ == 1 else f"{differ} answers differ"
    told = f"{what} by strict and lenient extraction: {folder / EXTRACTION}" if differ else ""
    return [line for line in (comparisons_lost(rows), told) if line]


def load_results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and facts of an evaluation.

    Raises:
        ValueError: there is none in this folder, or a file of it is not JSON, or no objects.
    """
    for name in ("rows.jsonl", "facts.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: run nabla-trl eval or recipes/distill.py there first")
    return [row for _, row in read_objects(folder / "rows.jsonl")], read_object(folder / "facts.json")
