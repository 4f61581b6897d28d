"""An evaluation on disk, as its report needs it: rows.jsonl and facts.json. No models, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_trl.evaluation.rows import Row, format_rows, read_rows
from nabla_trl.utils.files import read_json_file, write_atomic

EXTRACTION_FILE = "extraction.jsonl"


def store_results(folder: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write rows.jsonl, facts.json (see `nabla_trl.report.text`) and extraction.jsonl, each whole or not at all."""
    write_atomic(folder / "rows.jsonl", format_rows(rows))
    write_atomic(folder / "facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    differences = list_extraction_differences(rows)
    if differences:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in differences)
        write_atomic(folder / EXTRACTION_FILE, lines)
    else:
        (folder / EXTRACTION_FILE).unlink(missing_ok=True)


def load_results(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows and the facts of an evaluation.

    Raises:
        ValueError: the folder holds no results, or a file of them cannot be read.
    """
    for name in ("rows.jsonl", "facts.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: run nabla-trl eval or recipes/distill.py there first")
    return read_rows(folder / "rows.jsonl"), read_json_file(folder / "facts.json")


def list_extraction_differences(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what strict and lenient extraction read, for every response in which the two read different answers."""
    return [
        {
            "method": row.method,
            "problem": row.problem,
            "seed": row.seed,
            "gold": row.gold,
            "tail": row.tail,
            "strict": row.answer_strict,
            "lenient": row.answer,
            "correct_strict": row.correct_strict,
            "correct": row.correct,
        }
        for row in rows
        if row.tail is not None
    ]


def describe_failed_comparisons(rows: Sequence[Row]) -> str:
    """Return a sentence on the comparisons with gold answers that failed. Empty if none failed."""
    timeouts, errors = (sum(row.match_result == result for row in rows) for result in ("timeout", "error"))
    counts = [f"{timeouts} timed out"] * bool(timeouts) + [f"{errors} ended their worker"] * bool(errors)
    return f"Of the comparisons with gold answers {' and '.join(counts)}: they count as wrong." if counts else ""


def list_remarks(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Return the lines that a terminal prints on stored rows, below their table."""
    count = len(list_extraction_differences(rows))
    subject = "1 answer differs" if count == 1 else f"{count} answers differ"
    difference = f"{subject} by strict and lenient extraction: {folder / EXTRACTION_FILE}" if count else ""
    return [line for line in (describe_failed_comparisons(rows), difference) if line]
