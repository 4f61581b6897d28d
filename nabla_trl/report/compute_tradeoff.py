"""Training, paid once, against search, paid with every query: kinds of methods, what was trained, who overtakes whom
after how many queries, and which method is best under a total of compute. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nabla_trl.evaluation.grids import Grid
from nabla_trl.evaluation.method import LABELS, RIVAL, methods, split
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Interval

QUERIES = (1, 10**2, 10**4, 10**6)
BASE, SEARCH, OTHER, TRAINED, BOTH = KINDS = ("base", "test-time", "other model", "trained", "trained + test-time")
_PLAIN = ("greedy", "best_of_1")  # one response to a query, nothing searched
_FIELDS = ("label", "method", "beta", "tuning", "train_flops", "train_seconds")

Summary = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Training:
    """One checkpoint: how it was made, at which β, and what that took in all (FLOPs, seconds); None: not known."""

    label: str
    method: str
    beta: float | None
    tuning: str
    train_flops: float | None
    train_seconds: float | None


def trainings(facts: Mapping[str, Any]) -> dict[str, Training]:
    """The checkpoints that the facts of a run tell of, by label.

    Raises:
        ValueError: an entry of `trained` lacks a field, or its label is unknown or taken.
    """
    found: dict[str, Training] = {}
    for entry in facts.get("trained") or ():
        missing = [name for name in _FIELDS if name not in entry]
        if missing:
            raise ValueError(f"the facts of a trained policy lack {', '.join(missing)}: {dict(entry)}")
        one = Training(**{name: entry[name] for name in _FIELDS})
        if one.label not in LABELS or one.label in found:
            trouble = "twice" if one.label in found else f"which is none of {', '.join(LABELS)}"
            raise ValueError(f"the facts name a trained policy {one.label!r}, {trouble}")
        found[one.label] = one
    return found


def kind(method: str) -> str:
    """Which of `KINDS` a method is."""
    label, rest = split(method)
    if label:
        return TRAINED if rest in _PLAIN else BOTH
    return OTHER if method == RIVAL else BASE if method in _PLAIN else SEARCH


def of_kind(summary: Summary, *kinds: str) -> list[str]:
    """The methods of a summary of some kinds, in the order of the report."""
    return [method for method in methods(summary) if kind(method) in kinds]


def best_test_time(summary: Summary) -> str | None:
    """The base policy's search or sampling with the highest mean accuracy, the cheapest among equals."""
    return _best(summary, of_kind(summary, SEARCH))


def best_trained(summary: Summary) -> str | None:
    """The trained policy whose greedy decode has the highest mean accuracy; the method, <label>_greedy."""
    return _best(summary, [method for method in of_kind(summary, TRAINED) if split(method)[1] == "greedy"])


def _best(summary: Summary, methods: Iterable[str]) -> str | None:
    def worth(method: str) -> tuple[float, float]:
        return summary[f"accuracy.{method}"]["value"], -summary[f"flops.{method}"]["value"]

    return max(methods, key=worth, default=None)


# --- totals -------------------------------------------------------------------------------------------


def total_flops(summary: Summary, method: str, queries: float) -> float | None:
    """FLOPs of training, if the method needs any, and of so many queries; None where the training's are not known."""
    label = split(method)[0]
    training = summary.get(f"flops.training.{label}", {"value": None})["value"] if label else 0.0
    return None if training is None else training + queries * summary[f"flops.{method}"]["value"]


@dataclass(frozen=True)
class Best:
    """The method with the highest mean accuracy for so many queries, from a total of FLOPs up to the next one's."""

    queries: int
    total: float
    method: str


def best_under(summary: Summary, queries: int) -> list[Best]:
    """What is best under every total of compute, cheapest first: each is more accurate than all that cost less."""
    totals = {method: total_flops(summary, method, queries) for method in of_kind(summary, *KINDS)}
    known = [Best(queries, total, method) for method, total in totals.items() if total is not None]

    def accuracy(one: Best) -> float:
        return summary[f"accuracy.{one.method}"]["value"]

    steps: list[Best] = []
    for one in sorted(known, key=lambda one: (one.total, -accuracy(one))):
        if not steps or accuracy(one) > accuracy(steps[-1]):
            steps.append(one)
    return steps


def best_for(summary: Summary, queries: int, setter: str) -> str | None:
    """The most accurate method for no more than the total FLOPs of `setter`; None where that was not measured."""
    limit = total_flops(summary, setter, queries) if f"flops.{setter}" in summary else None
    afforded = [one.method for one in best_under(summary, queries) if limit is not None and one.total <= limit]
    return afforded[-1] if afforded else None


# --- break-even ---------------------------------------------------------------------------------------


def break_even(grids: Mapping[str, Grid], trained: Mapping[str, Training]) -> dict[tuple[str, str], Interval]:
    """(method of a trained policy, method without training) -> queries after which the first has cost less in all.

    Training FLOPs over the FLOPs that a query saves, with the interval of the saving. A pair is left out where the
    saving is not surely above zero, or the cost of training not known.
    """
    costs = {method: grid.columns["flops"].mean() for method, grid in grids.items()}
    found = {}
    for own in grids:
        spent = trained[split(own)[0]].train_flops if split(own)[0] in trained else None
        if spent is None:
            continue
        for rival in [method for method in grids if not split(method)[0] and costs[method] > costs[own]]:
            saved = statistics.paired_difference(grids[rival].scores("flops"), grids[own].scores("flops"))
            if saved.low > 0:
                queries = (spent / saved.value, spent / saved.high, spent / saved.low)
                found[own, rival] = Interval(*queries, saved.seeds, saved.problems)
    return found


def shares(grids: Mapping[str, Grid], goal: str | None) -> dict[str, Interval]:
    """Label -> the share of the way from base greedy to the accuracy of `goal` that the trained greedy decode makes.

    Empty without the rows, and where the goal may be no better than greedy.
    """
    if goal is None or not grids.keys() >= {"greedy", goal}:
        return {}
    found: dict[str, Interval] = {}
    for own in grids:
        label, rest = split(own)
        if label and rest == "greedy":
            share = statistics.share_of_gain(*(grids[name].scores("accuracy") for name in (own, goal, "greedy")))
            found |= {} if share is None else {label: share}
    return found
