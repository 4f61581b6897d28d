"""Training, paid once, against search, paid with every query: kinds of methods, what was trained, who overtakes whom
after how many queries, and which method is best under a total of compute. Numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nabla_trl.evaluation.grids import ResultGrid
from nabla_trl.evaluation.method import POLICY_LABELS, REWARD_MODEL_SAMPLING, list_methods, split_label
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Interval

QUERY_COUNTS = (1, 10**2, 10**4, 10**6)
KIND_BASE, KIND_TEST_TIME, KIND_OTHER_MODEL, KIND_TRAINED, KIND_TRAINED_TEST_TIME = METHOD_KINDS = (
    "base",
    "test-time",
    "other model",
    "trained",
    "trained + test-time",
)
_SINGLE_SAMPLE_METHODS = ("greedy", "best_of_1")  # one response to a query, nothing searched
_TRAINING_FIELDS = ("label", "method", "beta", "tuning", "train_flops", "train_seconds")

SummaryMapping = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class TrainingCost:
    """One checkpoint: how it was made, at which β, and what that took in all (FLOPs, seconds); None: not known."""

    label: str
    method: str
    beta: float | None
    tuning: str
    train_flops: float | None
    train_seconds: float | None


def read_training_costs(facts: Mapping[str, Any]) -> dict[str, TrainingCost]:
    """The checkpoints that the facts of a run tell of, by label.

    Raises:
        ValueError: an entry of `trained` lacks a field, or its label is unknown or taken.
    """
    found: dict[str, TrainingCost] = {}
    for entry in facts.get("trained") or ():
        missing = [name for name in _TRAINING_FIELDS if name not in entry]
        if missing:
            raise ValueError(f"the facts of a trained policy lack {', '.join(missing)}: {dict(entry)}")
        one = TrainingCost(**{name: entry[name] for name in _TRAINING_FIELDS})
        if one.label not in POLICY_LABELS or one.label in found:
            trouble = "twice" if one.label in found else f"which is none of {', '.join(POLICY_LABELS)}"
            raise ValueError(f"the facts name a trained policy {one.label!r}, {trouble}")
        found[one.label] = one
    return found


def get_method_kind(method: str) -> str:
    """Which of `KINDS` a method is."""
    label, rest = split_label(method)
    if label:
        return KIND_TRAINED if rest in _SINGLE_SAMPLE_METHODS else KIND_TRAINED_TEST_TIME
    return (
        KIND_OTHER_MODEL
        if method == REWARD_MODEL_SAMPLING
        else KIND_BASE
        if method in _SINGLE_SAMPLE_METHODS
        else KIND_TEST_TIME
    )


def select_methods_of_kind(summary: SummaryMapping, *kinds: str) -> list[str]:
    """The methods of a summary of some kinds, in the order of the report."""
    return [method for method in list_methods(summary) if get_method_kind(method) in kinds]


def find_best_test_time(summary: SummaryMapping) -> str | None:
    """The base policy's search or sampling with the highest mean accuracy, the cheapest among equals."""
    return _find_most_accurate(summary, select_methods_of_kind(summary, KIND_TEST_TIME))


def find_best_trained(summary: SummaryMapping) -> str | None:
    """The trained policy whose greedy decode has the highest mean accuracy; the method, <label>_greedy."""
    return _find_most_accurate(
        summary,
        [method for method in select_methods_of_kind(summary, KIND_TRAINED) if split_label(method)[1] == "greedy"],
    )


def _find_most_accurate(summary: SummaryMapping, methods: Iterable[str]) -> str | None:
    def worth(method: str) -> tuple[float, float]:
        return summary[f"accuracy.{method}"]["value"], -summary[f"flops.{method}"]["value"]

    return max(methods, key=worth, default=None)


# --- totals -------------------------------------------------------------------------------------------


def compute_total_flops(summary: SummaryMapping, method: str, queries: float) -> float | None:
    """FLOPs of training, if the method needs any, and of so many queries; None where the training's are not known."""
    label = split_label(method)[0]
    training = summary.get(f"flops.training.{label}", {"value": None})["value"] if label else 0.0
    return None if training is None else training + queries * summary[f"flops.{method}"]["value"]


@dataclass(frozen=True)
class BestMethod:
    """The method with the highest mean accuracy for so many queries, from a total of FLOPs up to the next one's."""

    num_queries: int
    total_flops: float
    method: str


def find_best_by_total(summary: SummaryMapping, queries: int) -> list[BestMethod]:
    """What is best under every total of compute, cheapest first: each is more accurate than all that cost less."""
    totals = {
        method: compute_total_flops(summary, method, queries)
        for method in select_methods_of_kind(summary, *METHOD_KINDS)
    }
    known = [BestMethod(queries, total, method) for method, total in totals.items() if total is not None]

    def accuracy(one: BestMethod) -> float:
        return summary[f"accuracy.{one.method}"]["value"]

    steps: list[BestMethod] = []
    for one in sorted(known, key=lambda one: (one.total_flops, -accuracy(one))):
        if not steps or accuracy(one) > accuracy(steps[-1]):
            steps.append(one)
    return steps


def find_best_at_equal_total(summary: SummaryMapping, queries: int, reference_method: str) -> str | None:
    """The most accurate method for no more than the total FLOPs of `setter`; None where that was not measured."""
    limit = compute_total_flops(summary, reference_method, queries) if f"flops.{reference_method}" in summary else None
    afforded = [
        one.method for one in find_best_by_total(summary, queries) if limit is not None and one.total_flops <= limit
    ]
    return afforded[-1] if afforded else None


# --- break-even ---------------------------------------------------------------------------------------


def compute_break_even(
    grids: Mapping[str, ResultGrid], training_costs: Mapping[str, TrainingCost]
) -> dict[tuple[str, str], Interval]:
    """(method of a trained policy, method without training) -> queries after which the first has cost less in all.

    Training FLOPs over the FLOPs that a query saves, with the interval of the saving. A pair is left out where the
    saving is not surely above zero, or the cost of training not known.
    """
    costs = {method: grid.columns["flops"].mean() for method, grid in grids.items()}
    found = {}
    for own in grids:
        spent = training_costs[split_label(own)[0]].train_flops if split_label(own)[0] in training_costs else None
        if spent is None:
            continue
        for rival in [method for method in grids if not split_label(method)[0] and costs[method] > costs[own]]:
            saved = statistics.paired_difference(
                grids[rival].get_problem_values("flops"), grids[own].get_problem_values("flops")
            )
            if saved.low > 0:
                queries = (spent / saved.value, spent / saved.high, spent / saved.low)
                found[own, rival] = Interval(*queries, saved.num_seeds, saved.num_problems)
    return found


def compute_pgr(grids: Mapping[str, ResultGrid], reference_method: str | None) -> dict[str, Interval]:
    """Label -> the share of the way from base greedy to the accuracy of `goal` that the trained greedy decode makes.

    Empty without the rows, and where the goal may be no better than greedy.
    """
    if reference_method is None or not grids.keys() >= {"greedy", reference_method}:
        return {}
    found: dict[str, Interval] = {}
    for own in grids:
        label, rest = split_label(own)
        if label and rest == "greedy":
            share = statistics.performance_gap_recovered(
                *(grids[name].get_problem_values("accuracy") for name in (own, reference_method, "greedy"))
            )
            found |= {} if share is None else {label: share}
    return found
