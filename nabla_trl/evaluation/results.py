"""An evaluation on disk, as its report needs it: rows.jsonl and facts.json. No models, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nabla_trl.evaluation.method import Method
from nabla_trl.evaluation.rows import Row, format_rows, read_rows, select_complete_rows
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.shards import ShardPlan, check_same_settings, list_run_folders, read_shard_plan
from nabla_trl.utils.files import read_json_file, write_atomic

EXTRACTION_FILE = "extraction.jsonl"
SHARD_PLAN_FILE = "shards.json"  # in rows/, if shards make the rows


def store_results(folder: Path, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Write rows.jsonl, facts.json (see `nabla_trl.report.text`) and extraction.jsonl, each whole or not at all."""
    write_atomic(folder / "rows.jsonl", format_rows(rows))
    store_facts(folder, facts)
    differences = list_extraction_differences(rows)
    if differences:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in differences)
        write_atomic(folder / EXTRACTION_FILE, lines)
    else:
        (folder / EXTRACTION_FILE).unlink(missing_ok=True)


def store_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write facts.json, whole or not at all."""
    write_atomic(folder / "facts.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def load_results(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Return the rows and the facts of an evaluation. If shards made the rows, merge them into rows.jsonl first.

    Raises:
        ValueError: the folder holds no results, a file of them cannot be read, or shards lack rows.
    """
    merge_shards(folder)
    for name in ("rows.jsonl", "facts.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: run nabla-trl eval or recipes/distill.py there first")
    return read_rows(folder / "rows.jsonl"), read_json_file(folder / "facts.json")


def merge_shards(folder: Path) -> None:
    """Write the results of an evaluation by shards, which share the folder or have folders of their own inside it.

    Raises:
        ValueError: shards of different plans or settings, shards that lack rows, or a file that cannot be read.
    """
    run_folders = [folder] if (folder / "rows").is_dir() else list_run_folders(folder)[1:]
    plan = read_shard_plan(run_folder / "rows" / SHARD_PLAN_FILE for run_folder in run_folders)
    if plan is None:
        return
    check_same_settings(run_folders, "*.settings.json")
    paths = [path for run_folder in run_folders for path in sorted(run_folder.glob("rows/rows-*.jsonl"))]
    rows = list({row.key: row for path in paths for row in read_rows(path, complete_lines_only=True)}.values())
    if missing := describe_missing_rows(plan, rows):
        raise ValueError(f"{folder} lacks rows of {missing}: run these values of --shard first")
    facts_files = [path for run_folder in run_folders if (path := run_folder / "facts.json").exists()]
    if not facts_files:
        raise ValueError(f"{folder} holds no facts.json: run one of its shards again")
    problems = [Problem(id=problem_id, question="", task=task) for task, problem_id in plan.problems]
    store_results(folder, select_complete_rows(rows, problems)[0], read_json_file(facts_files[-1]))


def describe_missing_rows(plan: ShardPlan, rows: Iterable[Row]) -> str:
    """Return which shards lack rows of the plan's methods and seeds. Empty if none does."""
    cells = {row.key for row in rows}
    runs = [
        (method, seed)
        for method in plan.methods
        for seed in (plan.seeds[:1] if Method.parse(method).name == "greedy" else plan.seeds)
    ]
    return plan.describe_missing(
        {
            (task, problem_id)
            for task, problem_id in plan.problems
            if all((method, task, problem_id, seed) in cells for method, seed in runs)
        }
    )


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
