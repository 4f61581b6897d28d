"""An evaluation on disk, as its report needs it: rows.jsonl and facts.json. No models, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_trl.utils.files import read_json_file, read_jsonl_file, write_atomic

EXTRACTION_FILE = "extraction.jsonl"


def store_results(folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write rows.jsonl, facts.json (see `nabla_trl.report.text`) and extraction.jsonl, each whole or not at all."""
    write_atomic(folder / "rows.jsonl", _to_json_lines(rows))
    write_atomic(folder / "facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    differ = list_extraction_differences(rows)
    if differ:
        write_atomic(folder / EXTRACTION_FILE, _to_json_lines(differ))
    else:
        (folder / EXTRACTION_FILE).unlink(missing_ok=True)


def _to_json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def list_extraction_differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def describe_failed_comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the comparisons with gold answers that timed out or ended their worker; empty without any."""
    late, broken = (sum(row.get("verdict") == verdict for row in rows) for verdict in ("timeout", "error"))
    lost = [f"{late} timed out"] * bool(late) + [f"{broken} ended their worker"] * bool(broken)
    return f"Of the comparisons with gold answers {' and '.join(lost)}: they count as wrong." if lost else ""


def list_remarks(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a terminal should be told of stored rows beside their table."""
    differ = len(list_extraction_differences(rows))
    what = "1 answer differs" if differ == 1 else f"{differ} answers differ"
    told = f"{what} by strict and lenient extraction: {folder / EXTRACTION_FILE}" if differ else ""
    return [line for line in (describe_failed_comparisons(rows), told) if line]


def load_results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and facts of an evaluation.

    Raises:
        ValueError: there is none in this folder, or a file of it is not JSON, or no objects.
    """
    for name in ("rows.jsonl", "facts.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: run nabla-trl eval or recipes/distill.py there first")
    return [row for _, row in read_jsonl_file(folder / "rows.jsonl")], read_json_file(folder / "facts.json")
