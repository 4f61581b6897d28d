"""Result rows as problem × seed grids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nabla_trl.evaluation.method import get_num_samples, sort_methods
from nabla_trl.utils.formatting import format_names
from nabla_trl.utils.statistics import Interval, mean_interval

METRICS = ("accuracy", "accuracy_strict", "flops", "seconds", "tokens", "reward", "kl")


_STORED_METRICS = ("flops", "seconds", "reward", "kl")  # as they are in a row


_KEY_FIELDS = ("method", "task", "problem", "seed")


_FIELD_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("method", "task", "problem"), (str, "text")),
    **dict.fromkeys(("seed", "flops", "seconds"), (int | float, "a number")),
    **dict.fromkeys(("correct", "reward"), (int | float | None, "a number or null")),  # true and false are numbers
    "reward_by_round": (list | tuple | None, "a list or null"),
    "error": (str | None, "text or null"),
}


# kl and tokens may be missing
_REQUIRED_FIELDS = (*_KEY_FIELDS, "correct", "reward", "flops", "seconds", "reward_by_round", "error")


@dataclass(frozen=True)
class ResultGrid:
    """One method's rows: `columns[metric]` is problems × seeds, NaN where a row has no such number."""

    problems: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: dict[str, np.ndarray]
    reward_by_round: tuple[tuple[float, ...] | None, ...]  # reward by round, problem-major like columns.ravel()
    num_errors: int
    num_ungraded: int

    def get_problem_values(self, metric: str) -> dict[str, np.ndarray]:
        """Problem id -> its values by seed."""
        return dict(zip(self.problems, self.columns[metric], strict=True))


def build_grids(rows: Sequence[Mapping]) -> dict[str, ResultGrid]:
    """Result rows -> one complete grid per method, all over the same problems.

    A row with an error counts as wrong, and so does one that could not be graded (`correct` is None). Rows of several
    samples give no answer, so that they have no grid (`nabla_trl.evaluation.metrics` reads them).
    Raises ValueError on no rows, a missing field, several tasks, a repeated row or a missing one.
    """
    check_rows(rows)
    cells: dict[str, dict[tuple[str, int], Mapping]] = {}
    for row in rows:
        if not get_num_samples(row["method"]):
            cells.setdefault(row["method"], {})[row["problem"], row["seed"]] = row
    problems = tuple(dict.fromkeys(row["problem"] for row in rows))
    return {method: _build_grid(method, cells[method], problems) for method in sort_methods(cells)}


def compute_mean_reward_by_round(grid: ResultGrid) -> list[Interval]:
    """Mean incumbent reward by round; a list that ended early is carried forward. Empty without records."""
    longest = max((len(one) for one in grid.reward_by_round if one), default=0)
    filled = [
        [*one, *[one[-1]] * (longest - len(one))] if one else [math.nan] * longest for one in grid.reward_by_round
    ]
    cube = np.array(filled, dtype=np.float64).reshape(len(grid.problems), len(grid.seeds), longest)
    return [mean_interval(cube[:, :, step]) for step in range(longest) if np.isfinite(cube[:, :, step]).any()]


def check_rows(rows: Sequence[Mapping]) -> None:
    """Raises ValueError on no rows, a field that is missing or of another kind, several tasks or a repeated row."""
    if not rows:
        raise ValueError("no result rows: run the evaluate stage first")
    for number, row in enumerate(rows):
        missing = [field for field in _REQUIRED_FIELDS if field not in row]
        if missing:
            raise ValueError(f"result row {number} lacks {format_names(missing)}")
        odd = next((name for name, (kind, _) in _FIELD_TYPES.items() if not isinstance(row[name], kind)), None)
        if odd is not None:
            raise ValueError(f"result row {number}: {odd} must be {_FIELD_TYPES[odd][1]}, not {row[odd]!r}")
    tasks = sorted({row["task"] for row in rows})
    if len(tasks) > 1:
        raise ValueError(f"rows of {len(tasks)} tasks ({format_names(tasks)}): report one task at a time")
    places = [(row["method"], row["problem"], row["seed"]) for row in rows]
    if len(set(places)) < len(places):
        twice = next(place for place, count in Counter(places).items() if count > 1)
        raise ValueError(f"two rows for {_describe_cell(*twice)}: remove one")


def arrange_by_problem(
    method: str, cells: Mapping[tuple[str, int], Mapping], problems: Sequence[str]
) -> tuple[tuple[int, ...], list[Mapping]]:
    """A method's seeds, and its rows problem by problem; ValueError where one is missing."""
    seeds = tuple(sorted({seed for _, seed in cells}))
    keys = [(problem, seed) for problem in problems for seed in seeds]
    holes = [key for key in keys if key not in cells]
    if holes:
        more = f" and {len(holes) - 1} more" if len(holes) > 1 else ""
        raise ValueError(
            f"no row for {_describe_cell(method, *holes[0])}{more}: finish the evaluation before the report"
        )
    return seeds, [cells[key] for key in keys]


def _build_grid(method: str, cells: Mapping[tuple[str, int], Mapping], problems: tuple[str, ...]) -> ResultGrid:
    seeds, rows = arrange_by_problem(method, cells, problems)
    shape = (len(problems), len(seeds))
    numbers = {"tokens": [_count_generated_tokens(row.get("tokens")) for row in rows]}
    numbers |= {metric: [_to_float(row.get(metric)) for row in rows] for metric in _STORED_METRICS}
    columns = {metric: np.array(own).reshape(shape) for metric, own in numbers.items()}
    right = [bool(row["correct"]) and row["error"] is None for row in rows]
    columns["accuracy"] = np.array(right, dtype=np.float64).reshape(shape)
    asked = any(row.get("correct_strict") is not None for row in rows)
    strict = [bool(row.get("correct_strict")) and row["error"] is None if asked else math.nan for row in rows]
    columns["accuracy_strict"] = np.array(strict, dtype=np.float64).reshape(shape)
    errors = sum(row["error"] is not None for row in rows)
    ungraded = sum(row["correct"] is None and row["error"] is None for row in rows)
    rounds = tuple(tuple(map(_to_float, row["reward_by_round"] or ())) or None for row in rows)
    return ResultGrid(problems, seeds, columns, rounds, errors, ungraded)


def _to_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _count_generated_tokens(tokens: Mapping[str, float] | None) -> float:
    """Tokens that models drew, of a row's counts by model and kind: neither prompts nor what was scored."""
    return math.nan if not tokens else float(sum(n for name, n in tokens.items() if name.endswith("/decode")))


def _describe_cell(method: str, problem: str, seed: int) -> str:
    return f"method {method!r}, problem {problem!r}, seed {seed}"
