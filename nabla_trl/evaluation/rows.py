"""Result rows on disk: JSON lines, appended and synced as they are made, so that a killed run can go on.

Each process writes its own `rows-<rank>.jsonl`, and all of these files are read together. A row is identified by
(method, task, problem, seed). Every row carries the hash of the settings it was made with and the hash of its problem.
`nabla_trl.utils.locks` keeps a second launch away.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from nabla_trl.evaluation.method import Method
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.models.flops import Cost
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.files import fsync_folder, read_jsonl_file
from nabla_trl.utils.formatting import finite_or_none, format_error

MAX_TAIL_CHARS = 300

RowKey = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one method on one problem with one seed.

    Attributes:
        correct: whether the answer is right. Of several samples: the share of right ones. None: not graded.
        correct_strict: the same of `answer_strict`, the answer in the form that the task asks for.
        match_result: value of `grading.equivalence.MatchResult`.
        tail: the end of the response, at most `MAX_TAIL_CHARS` characters, if strict and lenient extraction differ.
        kl: nats per response from the base policy (`nabla_trl.evaluation.kl`). None: unknown.
        flops: FLOPs of the problem, rejected work included. `seconds`: the same in seconds.
        tokens: tokens by model and kind, as "policy/decode". `calls`: the same in calls (`models.flops`), empty where
            they were not counted.
        revisions: proposals of the chain that was kept. `accepted`: how many of them were accepted.
        proposals: proposals of all chains and starts of a search. `proposals_accepted`: how many were accepted.
        reward_by_round: reward of the incumbent before any revision and after each round.
        error: why the problem could not be run. Its row counts as wrong.
        settings_hash: hash of the settings of the run. `content_hash`: hash of the problem.
        samples: of samples_N: [answer, correct] of every sample. None for all other methods.
    """

    method: str
    task: str
    task_version: str = ""
    problem: str
    seed: int
    correct: float | None
    correct_strict: bool | None = None
    answer: str | None = None
    answer_strict: str | None = None
    gold: str | None = None
    match_result: str | None = None
    tail: str | None = None
    reward: float | None = None
    kl: float | None = None
    flops: float
    seconds: float
    tokens: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    finished: bool = True
    revisions: int = 0
    accepted: int = 0
    proposals: int = 0
    proposals_accepted: int = 0
    reward_by_round: list[float] = field(default_factory=list)
    stop_reason: str = ""
    error: str | None = None
    settings_hash: str = ""
    content_hash: str = ""
    samples: list[list[Any]] | None = None

    @property
    def key(self) -> RowKey:
        return self.method, self.task, self.problem, self.seed

    @property
    def is_right(self) -> bool:
        """Return whether the row counts as right: it has no error, and its answer is correct."""
        return bool(self.correct) and self.error is None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the row. `samples` is left out where it is None."""
        values = {name: getattr(self, name) for name in _FIELD_TYPES}
        if self.samples is None:
            del values["samples"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Row:
        """Return the row of a JSON object.

        Args:
            source: file and line, for messages.

        Raises:
            ValueError: unknown or missing keys, or values of another type. The message names all of them.
        """
        mistakes = []
        for key, value in values.items():
            if key not in _FIELD_TYPES:
                renamed = f": it is now {_RENAMED_KEYS[key]!r}" if key in _RENAMED_KEYS else ""
                mistakes.append(f"unknown key {key[:60]!r}{renamed}")
                continue
            types, description = _FIELD_TYPES[key]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and key != "correct"):
                mistakes.append(f"{key} must be {description}, not {format_error(repr(value), 60)}")
            elif is_number and not _is_finite_number(value):
                mistakes.append(f"{key} must be a finite number, not {format_error(repr(value), 60)}")
            elif key in _ITEM_CHECKS and value is not None and not _ITEM_CHECKS[key](value):
                mistakes.append(f"{key} holds values of another type or range")
        missing = [name for name in _FIELD_TYPES if name not in {*values, *_OPTIONAL_KEYS}]
        if missing:
            mistakes.append(f"it lacks {', '.join(missing)}")
        if not mistakes:
            try:
                Method.parse(values["method"])
            except ValueError as error:
                mistakes.append(str(error))
        if mistakes:
            shown = mistakes[:_MAX_MISTAKES] + ["…"] * (len(mistakes) > _MAX_MISTAKES)
            raise ValueError(f"{source} is no result row: {'; '.join(shown)}")
        return cls(**values)


# Keys of version 0.1.
_RENAMED_KEYS = {"verdict": "match_result", "run": "settings_hash", "content": "content_hash", "stop": "stop_reason"}
_JSON_TYPES: dict[type, tuple[UnionType | type, str]] = {
    str: (str, "text"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    bool: (bool, "true or false"),
    list: (list, "a list"),
    dict: (dict, "an object"),
    NoneType: (NoneType, "null"),
}


def _describe_field_types() -> dict[str, tuple[tuple[UnionType | type, ...], str]]:
    """Return, for each field of a row, the types that JSON may hold and their description."""
    described = {}
    for name, hint in get_type_hints(Row).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        types, words = zip(*(_JSON_TYPES[get_origin(option) or option] for option in options), strict=True)
        described[name] = types, " or ".join(words)
    return described


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_sample(value: Any) -> bool:
    """Return whether a value is [answer, correct]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str | NoneType)
        and (value[1] is None or _is_finite_number(float(value[1]) if isinstance(value[1], bool) else value[1]))
    )


_FIELD_TYPES = _describe_field_types()
_OPTIONAL_KEYS = ("samples", "calls")  # rows of version 0.2 and before hold no calls
_MAX_MISTAKES = 10
# Checks of what lists and objects hold.
_ITEM_CHECKS: dict[str, Callable[[Any], bool]] = {
    "correct": lambda correct: 0 <= correct <= 1,
    "tokens": lambda tokens: all(map(_is_finite_number, tokens.values())),
    "calls": lambda calls: all(map(_is_finite_number, calls.values())),
    # NaN where a method has no reward.
    "reward_by_round": lambda rewards: all(isinstance(reward, float | int) for reward in rewards),
    "samples": lambda samples: all(map(_is_sample, samples)),
}


def format_rows(rows: Iterable[Row]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows)


def read_rows(path: Path, *, complete_lines_only: bool = False) -> list[Row]:
    """Return the rows of a file of JSON lines.

    Args:
        complete_lines_only: skip a last line without its line break, which another process may be writing.

    Raises:
        ValueError: a line that is no row.
    """
    lines = read_jsonl_file(path, complete_lines_only=complete_lines_only)
    return [Row.from_dict(values, f"{path}, line {number}") for number, values in lines]


def build_row(trace: Trace, settings_hash: str, kl: float | None = None, content_hash: str = "") -> Row:
    """Return the result row of a graded trace."""
    revisions, accepted = len(trace.revisions), sum(revision.accepted for revision in trace.revisions)
    return Row(
        method=trace.method,
        task=trace.task,
        task_version=trace.meta.get("task_version", ""),
        problem=trace.problem_id,
        seed=trace.seed,
        correct=trace.correct,
        correct_strict=trace.correct_strict,
        answer=trace.answer,
        answer_strict=trace.answer_strict,
        gold=trace.gold,
        match_result=trace.match_result,
        tail=trace.response[-MAX_TAIL_CHARS:] if has_differing_extractions(trace) else None,
        reward=finite_or_none(trace.reward),
        kl=kl,
        flops=trace.cost.flops,
        seconds=trace.cost.seconds,
        tokens=trace.cost.tokens,
        calls=trace.cost.calls,
        finished=trace.finished,
        revisions=revisions,
        accepted=accepted,
        proposals=int(trace.meta.get("proposals", revisions)),
        proposals_accepted=int(trace.meta.get("accepted", accepted)),
        reward_by_round=compute_reward_by_round(trace),
        stop_reason=trace.stop_reason,
        error=trace.error,
        settings_hash=settings_hash,
        content_hash=content_hash,
    )


def merge_sample_rows(rows: Sequence[Row]) -> list[Row]:
    """Merge the rows of samples_N, one per sample, into one row per problem and seed. Other rows stay as they are.

    `correct` becomes the share of right samples (None where none could be graded), `reward` their mean, and costs
    their sums.
    """
    groups: dict[RowKey, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    return [
        _merge_samples(group) if Method.parse(group[0].method).num_samples else group[0] for group in groups.values()
    ]


def _merge_samples(rows: Sequence[Row]) -> Row:
    graded = [row.correct for row in rows if row.correct is not None]
    rewards = [row.reward for row in rows if row.reward is not None]
    failures = [row.match_result for row in rows if row.match_result in ("timeout", "error")]
    cost = sum((Cost(row.flops, row.seconds, row.tokens, row.calls) for row in rows), Cost())
    return replace(
        rows[0],
        correct=sum(graded) / len(graded) if graded else None,
        correct_strict=None,
        answer=None,
        answer_strict=None,
        match_result=failures[0] if failures else None,
        tail=None,
        reward=sum(rewards) / len(rewards) if rewards else None,
        flops=cost.flops,
        seconds=cost.seconds,
        tokens=cost.tokens,
        calls=cost.calls,
        finished=all(row.finished for row in rows),
        reward_by_round=[],
        samples=[] if rows[0].error else [[row.answer, row.correct] for row in rows],
    )


def has_differing_extractions(trace: Trace) -> bool:
    """Return whether the task asks for a form of answer, and strict and lenient extraction differ."""
    if "form" not in trace.meta or trace.error is not None:
        return False
    lenient, strict = (
        None if answer is None else normalize_answer(answer) for answer in (trace.answer, trace.answer_strict)
    )
    return lenient != strict


def compute_reward_by_round(trace: Trace) -> list[float]:
    """Return the reward of the incumbent before any revision and after each round."""
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
    """What the store remembers of a row on disk."""

    content_hash: str
    correct: float | None
    flops: float


class RowStore:
    """Append-only rows of one run.

    Args:
        folder: holds rows-*.jsonl.
        settings_hash: hash of the settings. Rows of another hash are refused.
        rank: number of this process.

    Attributes:
        stored_rows: the rows of all processes that existed at the start, and those that this process added.

    Raises:
        ValueError: a line that is no row (other than a torn last one, which is dropped), or rows of other settings.
    """

    def __init__(self, folder: str | Path, settings_hash: str, rank: int = 0):
        self.folder, self.settings_hash, self.rank = Path(folder), settings_hash, rank
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"rows-{rank:05d}.jsonl"
        self.stored_rows: dict[RowKey, StoredRow] = {}
        self._remember(self.read())
        if self.path.exists():
            _drop_torn_line(self.path)

    def read(self) -> list[Row]:
        """Return the rows of all processes, in a fixed order."""
        paths = sorted(self.folder.glob("rows-*.jsonl"))
        rows = [row for path in paths for row in read_rows(path, complete_lines_only=True)]
        other = next((row for row in rows if row.settings_hash != self.settings_hash), None)
        if other is not None:
            raise ValueError(
                f"{self.folder} holds rows of other settings (settings hash {other.settings_hash}, now "
                f"{self.settings_hash}): use another --output_dir, or delete them"
            )
        return sorted({row.key: row for row in rows}.values(), key=lambda row: row.key)

    def find_missing(self, methods: Sequence[str], problems: Sequence[Problem], seed: int) -> list[Problem]:
        """Return the problems that lack a row of one of these methods.

        Raises:
            ValueError: a row was made from another problem of the same id.
        """
        missing = []
        for problem in problems:
            rows = [self.stored_rows.get((method, problem.task, problem.id, seed)) for method in methods]
            content_hash = compute_content_hash(problem)
            if any(row and row.content_hash != content_hash for row in rows):
                raise ValueError(
                    f"{self.folder} holds rows of another problem {problem.id!r}: its text or answer has changed "
                    "since, so use another --output_dir"
                )
            if not all(rows):
                missing.append(problem)
        return missing

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows and sync them to the disk. Rows that exist are skipped.

        Raises:
            OSError: the rows cannot be written (disk full, …). None of them is on disk then, all earlier ones are.
        """
        new_rows = [row for row in rows if row.key not in self.stored_rows]
        if not new_rows:
            return
        try:
            _append_or_restore(self.path, format_rows(new_rows).encode())
        except OSError as error:
            advice = f"{error.strerror or error}; the rows until here are kept, free disk space and run again"
            raise OSError(error.errno, advice, str(self.path)) from error
        self._remember(new_rows)

    def _remember(self, rows: Iterable[Row]) -> None:
        self.stored_rows |= {row.key: StoredRow(row.content_hash, row.correct, row.flops) for row in rows}


def select_complete_rows(rows: Iterable[Row], problems: Sequence[Problem]) -> tuple[list[Row], str]:
    """Return the rows of the methods and seeds that cover these problems, and a sentence on those that do not.

    A folder may hold rows of more problems, from before a limit was lowered, and of fewer, from before the limit was
    raised. The sentence is empty where nothing is left out.
    """
    selected = {(problem.task, problem.id) for problem in problems}
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if (row.task, row.problem) in selected:
            groups.setdefault((row.method, row.seed), []).append(row)
    complete = [row for group in groups.values() if len(group) == len(selected) for row in group]
    incomplete = [
        f"{method}, seed {seed} ({len(group)} of {len(selected)} problems)"
        for (method, seed), group in sorted(groups.items())
        if len(group) < len(selected)
    ]
    more = f" and {len(incomplete) - 3} more" if len(incomplete) > 3 else ""
    left_out = f"left out, as their rows are not complete: {', '.join(incomplete[:3])}{more}" if incomplete else ""
    return sorted(complete, key=lambda row: row.key), left_out


def _append_or_restore(path: Path, data: bytes) -> None:
    """Append all of the data and sync it, or restore the file."""
    is_new = not path.exists()
    with path.open("ab", buffering=0) as file:
        size_before = file.tell()
        try:
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size_before)
            raise
    if is_new:
        fsync_folder(path.parent)


def _drop_torn_line(path: Path) -> None:
    """Cut a last line that a killed process left without its line break."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
