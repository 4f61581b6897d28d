"""Prices: what training costs, in FLOPs, seconds and dollars, and after how many queries it has paid for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from nabla_trl.evaluation.grids import ResultGrid
from nabla_trl.evaluation.method import POLICY_LABELS
from nabla_trl.utils.formatting import format_count
from nabla_trl.utils.statistics import Interval

UNIT_WORDS = {"flops": "FLOPs", "seconds": "seconds", "dollars": "dollars"}
UNITS = tuple(UNIT_WORDS)
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class TrainingCost:
    """How one checkpoint was trained, and the total FLOPs and seconds of its training (None: not known).

    Attributes:
        processes: processes that worked side by side for those seconds, each with a device of its own.
    """

    label: str
    method: str
    beta: float | None
    tuning: str
    train_flops: float | None
    train_seconds: float | None
    processes: int = 1

    @property
    def price(self) -> Price:
        seconds = self.train_seconds
        return Price(self.train_flops, seconds, None if seconds is None else seconds * (self.processes or 1))


@dataclass(frozen=True)
class Price:
    """FLOPs, wall seconds, and seconds of devices, which are what is paid for. None: not known.

    Raises:
        ValueError: an amount that is negative or not finite.
    """

    flops: float | None = None
    seconds: float | None = None
    device_seconds: float | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            amount = getattr(self, item.name)
            if amount is not None and not 0 <= amount < math.inf:
                raise ValueError(f"a price must be a finite number of at least 0, not {amount} {item.name}")

    def __add__(self, other: Price) -> Price:
        names = [field.name for field in fields(self)]
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return Price(*(None if None in pair else sum(pair) for pair in pairs))

    def fill_unknown(self, other: Price | None) -> Price:
        """Return this price, with the other one's amounts where this one's are not known."""
        if other is None:
            return self
        names = [field.name for field in fields(self)]
        return Price(*(getattr(other if getattr(self, name) is None else self, name) for name in names))

    def get_amount(self, unit: str, dollars_per_gpu_hour: float | None = None) -> float | None:
        """Return the price in "flops", "seconds" or "dollars". None: it is not known, or a GPU hour has no price."""
        if unit != "dollars":
            amount: float | None = getattr(self, unit)
            return amount
        if self.device_seconds is None or dollars_per_gpu_hour is None:
            return None
        return self.device_seconds * dollars_per_gpu_hour / SECONDS_PER_HOUR


def read_training_costs(facts: Mapping[str, Any]) -> dict[str, TrainingCost]:
    """Return the checkpoints that the facts of a run describe, by label.

    Raises:
        ValueError: An entry of `trained` lacks a field, or its label is unknown or repeated.
    """
    costs: dict[str, TrainingCost] = {}
    for entry in facts.get("trained") or ():
        missing = [field.name for field in fields(TrainingCost) if field.default is MISSING if field.name not in entry]
        if missing:
            raise ValueError(f"the facts of a trained policy lack {', '.join(missing)}: {dict(entry)}")
        cost = TrainingCost(**{field.name: entry[field.name] for field in fields(TrainingCost) if field.name in entry})
        if cost.label not in POLICY_LABELS or cost.label in costs:
            problem = "twice" if cost.label in costs else f"which is none of {', '.join(POLICY_LABELS)}"
            raise ValueError(f"the facts name a trained policy {cost.label!r}, {problem}")
        costs[cost.label] = cost
    return costs


def read_reward_price(facts: Mapping[str, Any]) -> Price:
    """Return what the training of the reward cost, as far as the facts of a run say. It is taken to use one device."""
    flops, seconds = (facts.get(f"reward_train_{unit}") or None for unit in ("flops", "seconds"))
    return Price(flops, seconds, seconds)


@dataclass(frozen=True)
class BreakEven:
    """After how many queries one method has cost less in total than another, which needs no training.

    Attributes:
        outcome: "pays", "at once" (the first query pays already), "never" (a query costs no less), "unsure" (the
            saving per query may be zero), or "not known" (a cost is missing).
        queries: with the interval that follows from the one of the saving. None unless it pays.
    """

    outcome: str
    queries: Interval | None = None


def compute_break_even(
    trained: ResultGrid, baseline: ResultGrid, unit: str, train_cost: float | None, rate: float | None = None
) -> BreakEven:
    """Return after how many queries training has paid for itself, in one unit.

    The number is the cost of training divided by what each query saves.

    Args:
        trained, baseline: results on the same problems.
        unit: "flops", "seconds" or "dollars".
        train_cost: cost of training, in the unit.
        rate: dollars per GPU hour, for dollars.
    """
    column = "seconds" if unit == "dollars" else unit
    is_known = all(_has_costs(grid, column) for grid in (trained, baseline))
    if not is_known or train_cost is None or (unit == "dollars" and rate is None):
        return BreakEven("not known")
    saving = baseline.compute_difference(column, trained)
    scale = (rate or 0.0) / SECONDS_PER_HOUR if unit == "dollars" else 1.0
    if saving.value <= 0:
        return BreakEven("never")
    if saving.low <= 0 or scale <= 0:
        return BreakEven("unsure")
    value, low, high = (train_cost / (scale * amount) for amount in (saving.value, saving.high, saving.low))
    queries = Interval(value, low, high, saving.num_seeds, saving.num_problems)
    return BreakEven("at once" if high <= 1 else "pays", queries)


def _has_costs(grid: ResultGrid, column: str) -> bool:
    """Return whether every row has a cost. Costs that are all zero were not measured."""
    values = grid.columns[column]
    return bool(math.isfinite(values.sum()) and values.sum() > 0)


def format_queries(result: BreakEven) -> str:
    """Return the number of queries with its interval, such as "718 [707, 729]", or why there is none.

    An end that is not known is written "?".
    """
    if result.queries is None or result.outcome == "at once":
        return result.outcome
    entry = result.queries.to_dict()
    value, low, high = ("?" if entry[key] is None else format_count(entry[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def format_break_even(result: BreakEven, side: str) -> str:
    """Return `format_queries`, marked by how the accuracies compare.

    Args:
        side: the trained policy's side in accuracy, as of `PairedDifference.side`.
    """
    marks = {"ahead": "", "behind": " †", "": " ≈"}
    return format_queries(result) + (marks[side] if result.queries is not None else "")
