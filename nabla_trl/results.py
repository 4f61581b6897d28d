"""An evaluation on disk, as its report needs it: rows.jsonl and facts.json. No models, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_trl.files import write_whole


def store_results(folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """Write rows.jsonl and facts.json (see `nabla_trl.report`), each whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, text in (("rows.jsonl", lines), ("facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")):
        write_whole(folder / name, text)


def load_results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and facts of an evaluation.

    Raises:
        ValueError: there is none in this folder, or a file of it is not JSON.
    """
    texts = {}
    for name in ("rows.jsonl", "facts.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: run nabla-trl eval or recipes/distill.py there first")
        texts[name] = (folder / name).read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in texts["rows.jsonl"].split("\n") if line]
        return rows, json.loads(texts["facts.json"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder} holds a rows.jsonl or facts.json that is not JSON: {error}") from error
