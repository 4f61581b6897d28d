"""Result rows on disk: JSON lines, appended and synced as they are made, so that a killed run can go on.

Each process writes its own `rows-<rank>.jsonl`; all of them are read back. A row is identified by
(method, task, problem, seed); every row carries the hash of the settings it was made with, and that of its problem.
`nabla_trl.utils.locks` keeps a second launch away.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nabla_trl.evaluation.method import get_num_samples
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.files import fsync_folder, read_jsonl_file
from nabla_trl.utils.formatting import finite_or_none

MAX_TAIL_CHARS = 300  # characters of a response that a row keeps where its answer may be read in two ways

Row = dict[str, Any]
_REQUIRED_ROW_FIELDS = ("method", "task", "problem", "seed", "correct", "flops", "run")
RowKey = tuple[str, str, str, int]


def get_row_key(row: Row) -> RowKey:
    return row["method"], row["task"], row["problem"], row["seed"]


def build_row(trace: Trace, settings_hash: str, kl: float | None = None) -> Row:
    """The result row of a graded trace; `method` is the trace's, `kl` as `nabla_trl.evaluation.kl` measures it.

    `revisions` and `accepted` are of the chain that was kept, `proposals` and `proposals_accepted` of all chains and
    starts of a search. `tail` is the end of the response where strict and lenient extraction differ.
    """
    own = len(trace.revisions), sum(revision.accepted for revision in trace.revisions)
    return {
        "method": trace.method,
        "task": trace.task,
        "task_version": trace.meta.get("task_version", ""),
        "problem": trace.problem_id,
        "seed": trace.seed,
        "correct": trace.correct,
        "correct_strict": trace.correct_strict,
        "answer": trace.answer,
        "answer_strict": trace.answer_strict,
        "gold": trace.gold,
        "verdict": trace.match_result,
        "tail": trace.response[-MAX_TAIL_CHARS:] if has_differing_extractions(trace) else None,
        "reward": finite_or_none(trace.reward),
        "kl": kl,
        "flops": trace.cost.flops,
        "seconds": trace.cost.seconds,
        "tokens": trace.cost.tokens,
        "finished": trace.finished,
        "revisions": own[0],
        "accepted": own[1],
        "proposals": int(trace.meta.get("proposals", own[0])),
        "proposals_accepted": int(trace.meta.get("accepted", own[1])),
        "reward_by_round": compute_reward_by_round(trace),
        "stop": trace.stop_reason,
        "error": trace.error,
        "run": settings_hash,
    }


def merge_sample_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows of samples_N, one per sample, as one per problem and seed: its `samples` are [answer, correct] pairs,
    `correct` the share of right ones (None where none could be graded), `reward` their mean, costs their sums. Other
    rows stay as they are."""
    groups: dict[RowKey, list[Row]] = {}
    for row in rows:
        groups.setdefault(get_row_key(row), []).append(row)
    return [_merge_samples(own) if get_num_samples(own[0]["method"]) else own[0] for own in groups.values()]


def _merge_samples(rows: Sequence[Row]) -> Row:
    first = rows[0]
    graded = [row["correct"] for row in rows if row["correct"] is not None]
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    lost = [row["verdict"] for row in rows if row["verdict"] in ("timeout", "error")]
    tokens: Counter[str] = sum((Counter(row["tokens"]) for row in rows), Counter())
    return first | {
        "correct": sum(graded) / len(graded) if graded else None,
        "correct_strict": None,
        "answer": None,
        "answer_strict": None,
        "verdict": lost[0] if lost else None,
        "tail": None,
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "flops": sum(row["flops"] for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "tokens": dict(tokens),
        "finished": all(row["finished"] for row in rows),
        "reward_by_round": [],
        "samples": [] if first["error"] else [[row["answer"], row["correct"]] for row in rows],
    }


def has_differing_extractions(trace: Trace) -> bool:
    """Whether the strict answer is another than the one found wherever it may stand (and a form is asked for)."""
    asked = "form" in trace.meta and trace.error is None
    read = [None if one is None else normalize_answer(one) for one in (trace.answer, trace.answer_strict)]
    return asked and read[0] != read[1]


def compute_reward_by_round(trace: Trace) -> list[float]:
    """Reward of the incumbent before any revision and after each round."""
    if trace.error is not None:
        return []
    curve = [trace.reward_initial]
    for revision in trace.revisions:
        if len(curve) < revision.round + 2:
            curve.append(curve[-1])
        if revision.accepted:
            curve[-1] = revision.reward_after
    return curve


class StoredRow(NamedTuple):
    """What is remembered of a row on disk."""

    content_hash: str | None  # hash of its problem
    correct: bool | None
    flops: float


class RowStore:
    """Append-only rows of one run.

    Args:
        folder: holds rows-*.jsonl.
        run: hash of the settings; rows of another hash are refused.
        rank: this process.

    Attributes:
        done: the rows that were there, of all processes, and those added since.

    Raises:
        ValueError: a line that is no row (other than a torn last one, which is dropped), or rows of other settings.
    """

    def __init__(self, folder: str | Path, settings_hash: str, rank: int = 0):
        self.folder, self.settings_hash, self.rank = Path(folder), settings_hash, rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"rows-{rank:05d}.jsonl"
        if self.path.exists():
            _drop_torn_line(self.path)
        self.stored_rows = {get_row_key(row): _to_stored_row(row) for row in self.read()}

    def read(self) -> list[Row]:
        """Rows of all processes, in a fixed order."""
        rows = [row for path in sorted(self.folder.glob("rows-*.jsonl")) for row in _read_row_file(path)]
        other = next((row for row in rows if row["run"] != self.settings_hash), None)
        if other is not None:
            raise ValueError(
                f"{self.folder} holds rows of other settings (run {other['run']}, now {self.settings_hash}): "
                "use another --output_dir, or delete them"
            )
        return sorted({get_row_key(row): row for row in rows}.values(), key=get_row_key)

    def find_missing(self, methods: Sequence[str], problems: Sequence[Problem], seed: int) -> list[Problem]:
        """The problems that lack a row of one of these methods.

        Raises:
            ValueError: a row that is there was made from another problem of the same id.
        """
        found = []
        for problem in problems:
            known = [self.stored_rows.get((method, problem.task, problem.id, seed)) for method in methods]
            content = compute_content_hash(problem)
            if any(one and one.content_hash != content for one in known):
                raise ValueError(
                    f"{self.folder} holds rows of another problem {problem.id!r}: its text or answer has changed "
                    "since, so use another --output_dir"
                )
            if not all(known):
                found.append(problem)
        return found

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and sync them to the disk; rows that are there already are skipped.

        Raises:
            OSError: they cannot be written (disk full, ...); none of these rows is there then, all earlier ones are.
        """
        fresh = [row for row in rows if get_row_key(row) not in self.stored_rows]
        if not fresh:
            return
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh).encode()
        try:
            _append_or_restore(self.path, lines)
        except OSError as error:
            advice = f"{error.strerror or error}; the rows until here are kept, make room and run again"
            raise OSError(error.errno, advice, str(self.path)) from error
        self.stored_rows |= {get_row_key(row): _to_stored_row(row) for row in fresh}


def select_complete_rows(rows: Iterable[Row], problems: Sequence[Problem]) -> tuple[list[Row], str]:
    """The rows that cover these problems, and a sentence on what is not there in full (empty where all is).

    A folder may hold rows of more problems, from before a limit was lowered, and of fewer, from before it was raised.
    """
    asked = {(problem.task, problem.id) for problem in problems}
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if (row["task"], row["problem"]) in asked:
            groups.setdefault((row["method"], row["seed"]), []).append(row)
    whole = [row for group in groups.values() if len(group) == len(asked) for row in group]
    parts = [
        f"{method}, seed {seed} ({len(group)} of {len(asked)} problems)"
        for (method, seed), group in sorted(groups.items())
        if len(group) < len(asked)
    ]
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    left_out = f"left out, as their rows are not all there: {', '.join(parts[:3])}{more}" if parts else ""
    return sorted(whole, key=get_row_key), left_out


def _to_stored_row(row: Mapping[str, Any]) -> StoredRow:
    return StoredRow(row.get("content"), row["correct"], row["flops"])


def _append_or_restore(path: Path, data: bytes) -> None:
    """All of it, on the disk, or nothing."""
    new = not path.exists()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
    if new:
        fsync_folder(path.parent)


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed process left without its newline."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _read_row_file(path: Path) -> list[Row]:
    rows = []
    for number, row in read_jsonl_file(path, complete_lines_only=True):
        if lacking := [name for name in _REQUIRED_ROW_FIELDS if name not in row]:
            raise ValueError(f"{path}, line {number} is no row of a run: it lacks {', '.join(lacking)}")
        rows.append(row)
    return rows
