"""Result rows as problem × seed grids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nabla_trl.evaluation.method import Method, sort_methods
from nabla_trl.evaluation.rows import Row
from nabla_trl.models.flops import count_model_calls
from nabla_trl.utils.statistics import (
    Interval,
    PairedDifference,
    mean_interval,
    paired_difference,
    paired_mean_difference,
    proportion_interval,
)

PROPORTIONS = ("accuracy", "accuracy_strict")  # metrics with values from 0 to 1
METRICS = (*PROPORTIONS, "flops", "seconds", "tokens", "calls", "reward", "kl")


@dataclass(frozen=True)
class ResultGrid:
    """The rows of one method.

    Attributes:
        columns: metric -> [problems, seeds], NaN where a row has no such number.
        reward_by_round: reward by round of every row, in the order of `columns[metric].ravel()`. None: no record.
        num_errors: rows that could not be run.
        num_ungraded: rows that were run, but could not be graded.
    """

    problems: tuple[str, ...]
    seeds: tuple[int, ...]
    columns: dict[str, np.ndarray]
    reward_by_round: tuple[tuple[float, ...] | None, ...]
    num_errors: int
    num_ungraded: int

    def get_problem_values(self, metric: str) -> dict[str, np.ndarray]:
        """Return problem id -> its values by seed."""
        return dict(zip(self.problems, self.columns[metric], strict=True))

    def compute_mean(self, metric: str) -> Interval | None:
        """Return the mean of a metric with its interval, None if no row has such a number."""
        column = self.columns[metric]
        if not np.isfinite(column).any():
            return None
        return proportion_interval(column) if metric in PROPORTIONS else mean_interval(column)

    def compute_difference(self, metric: str, other: ResultGrid) -> PairedDifference:
        """Return the paired difference of a metric, this method minus the other."""
        compare = paired_difference if metric in PROPORTIONS else paired_mean_difference
        return compare(self.get_problem_values(metric), other.get_problem_values(metric))


def build_grids(rows: Sequence[Row]) -> dict[str, ResultGrid]:
    """Return one complete grid per method, all over the same problems.

    A row with an error counts as wrong, and so does one that could not be graded. Rows of several samples hold no
    single answer, so they have no grid (`nabla_trl.evaluation.metrics` reads them).

    Raises:
        ValueError: no rows, rows of several tasks, a repeated row or a missing one.
    """
    check_rows(rows)
    cells: dict[str, dict[tuple[str, int], Row]] = {}
    for row in rows:
        if not Method.parse(row.method).num_samples:
            cells.setdefault(row.method, {})[row.problem, row.seed] = row
    problems = tuple(dict.fromkeys(row.problem for row in rows))
    return {method: _build_grid(method, cells[method], problems) for method in sort_methods(cells)}


def compute_mean_reward_by_round(grid: ResultGrid) -> list[Interval]:
    """Return the mean reward of the incumbent by round. Empty without records.

    The last reward of a search that ended early counts for the rounds after its end.
    """
    num_rounds = max((len(curve) for curve in grid.reward_by_round if curve), default=0)
    filled = [
        [*curve, *[curve[-1]] * (num_rounds - len(curve))] if curve else [math.nan] * num_rounds
        for curve in grid.reward_by_round
    ]
    cube = np.array(filled, dtype=np.float64).reshape(len(grid.problems), len(grid.seeds), num_rounds)
    return [mean_interval(cube[:, :, index]) for index in range(num_rounds) if np.isfinite(cube[:, :, index]).any()]


def check_rows(rows: Sequence[Row]) -> None:
    """Refuse rows that do not belong together.

    Raises:
        ValueError: no rows, rows of several tasks, or a repeated row.
    """
    if not rows:
        raise ValueError("no result rows: run the evaluate stage first")
    tasks = sorted({row.task for row in rows})
    if len(tasks) > 1:
        raise ValueError(f"rows of {len(tasks)} tasks ({', '.join(map(repr, tasks))}): report one task at a time")
    counts = Counter((row.method, row.problem, row.seed) for row in rows)
    repeated = next((cell for cell, count in counts.items() if count > 1), None)
    if repeated is not None:
        raise ValueError(f"two rows for {_describe_cell(*repeated)}: remove one")


def arrange_by_problem(
    method: str, cells: Mapping[tuple[str, int], Row], problems: Sequence[str]
) -> tuple[tuple[int, ...], list[Row]]:
    """Return the seeds of a method, and its rows problem by problem.

    Args:
        cells: (problem, seed) -> row.

    Raises:
        ValueError: a row is missing.
    """
    seeds = tuple(sorted({seed for _, seed in cells}))
    keys = [(problem, seed) for problem in problems for seed in seeds]
    missing = [key for key in keys if key not in cells]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"no row for {_describe_cell(method, *missing[0])}{more}: finish the evaluation before the report"
        )
    return seeds, [cells[key] for key in keys]


def _build_grid(method: str, cells: Mapping[tuple[str, int], Row], problems: tuple[str, ...]) -> ResultGrid:
    seeds, rows = arrange_by_problem(method, cells, problems)
    has_strict = any(row.correct_strict is not None for row in rows)
    numbers = {
        "tokens": [
            sum(count for name, count in row.tokens.items() if name.endswith("/decode")) if row.tokens else None
            for row in rows
        ],
        "calls": [count_model_calls(row.calls) for row in rows],
        "flops": [row.flops for row in rows],
        "seconds": [row.seconds for row in rows],
        "reward": [row.reward for row in rows],
        "kl": [row.kl for row in rows],
        "accuracy": [row.is_right for row in rows],
        "accuracy_strict": [bool(row.correct_strict) and row.error is None if has_strict else None for row in rows],
    }
    return ResultGrid(
        problems,
        seeds,
        # None becomes NaN
        {name: np.array(column, dtype=np.float64).reshape(len(problems), -1) for name, column in numbers.items()},
        tuple(tuple(row.reward_by_round) or None for row in rows),
        num_errors=sum(row.error is not None for row in rows),
        num_ungraded=sum(row.correct is None and row.error is None for row in rows),
    )


def _describe_cell(method: str, problem: str, seed: int) -> str:
    return f"method {method!r}, problem {problem!r}, seed {seed}"
