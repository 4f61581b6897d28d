"""Result rows on disk: JSON lines, appended and synced as they are made, so that a killed run can go on.

Each process writes its own `rows-<rank>.jsonl`; all of them are read back. A row is identified by
(method, task, problem, seed); every row carries the hash of the settings it was made with.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nabla_trl.answers import normalize_answer
from nabla_trl.traces import Trace

TAIL = 300  # characters of a response that a row keeps where its answer may be read in two ways

Row = dict[str, Any]
Key = tuple[str, str, str, int]


def row_key(row: Row) -> Key:
    return row["method"], row["task"], row["problem"], row["seed"]


def trace_row(trace: Trace, run: str, kl: float | None = None) -> Row:
    """The result row of a graded trace; `method` is the trace's, `kl` as `nabla_trl.divergence` measures it.

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
        "verdict": trace.verdict,
        "tail": trace.response[-TAIL:] if extractions_differ(trace) else None,
        "reward": _finite(trace.reward),
        "kl": kl,
        "flops": trace.cost.flops,
        "seconds": trace.cost.seconds,
        "tokens": trace.cost.tokens,
        "finished": trace.finished,
        "revisions": own[0],
        "accepted": own[1],
        "proposals": int(trace.meta.get("proposals", own[0])),
        "proposals_accepted": int(trace.meta.get("accepted", own[1])),
        "reward_by_round": reward_by_round(trace),
        "stop": trace.stop,
        "error": trace.error,
        "run": run,
    }


def extractions_differ(trace: Trace) -> bool:
    """Whether the strict answer is another than the one found wherever it may stand (and a form is asked for)."""
    asked = "form" in trace.meta and trace.error is None
    read = [None if one is None else normalize_answer(one) for one in (trace.answer, trace.answer_strict)]
    return asked and read[0] != read[1]


def reward_by_round(trace: Trace) -> list[float]:
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class RowStore:
    """Append-only rows of one run.

    Args:
        folder: holds rows-*.jsonl.
        run: hash of the settings; rows of another hash are refused.
        rank: this process.

    Raises:
        ValueError: a line that is not JSON (other than a torn last one, which is dropped), or rows of other
            settings.
    """

    def __init__(self, folder: str | Path, run: str, rank: int = 0):
        self.folder, self.run = Path(folder), run
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"rows-{rank:05d}.jsonl"
        if self.path.exists():
            _drop_torn_line(self.path)
        self.done = {row_key(row) for row in self.read()}

    def read(self) -> list[Row]:
        """Rows of all processes, in a fixed order."""
        rows = [row for path in sorted(self.folder.glob("rows-*.jsonl")) for row in _read(path)]
        other = next((row for row in rows if row.get("run") != self.run), None)
        if other is not None:
            raise ValueError(
                f"{self.folder} holds rows of other settings (run {other.get('run')}, now {self.run}): "
                "use another --output_dir, or delete them"
            )
        return sorted({row_key(row): row for row in rows}.values(), key=row_key)

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and sync them to the disk; rows that are there already are skipped."""
        fresh = [row for row in rows if row_key(row) not in self.done]
        if not fresh:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in fresh))
            file.flush()
            os.fsync(file.fileno())
        self.done |= {row_key(row) for row in fresh}


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed process left without its newline."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)


def _read(path: Path) -> list[Row]:
    rows = []
    text = path.read_text(encoding="utf-8")
    # Another process may be in the middle of its last line: only whole lines count.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
    return rows
