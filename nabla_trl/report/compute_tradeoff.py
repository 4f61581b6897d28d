"""Training is paid once and search with every query: what is best under a total of compute, and from when on.

The module computes totals and writes the section of the report. Figures: `nabla_trl.report.plots.tradeoff_figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from nabla_trl.evaluation.grids import ResultGrid
from nabla_trl.evaluation.method import Method, list_methods, list_policy_labels
from nabla_trl.models.options import Sampling
from nabla_trl.report.conclusions import format_accuracy, format_cost, format_reward
from nabla_trl.report.summary import (
    KIND_BASE,
    KIND_OTHER_MODEL,
    KIND_TEST_TIME,
    KIND_TRAINED,
    KIND_TRAINED_TEST_TIME,
    METHOD_KINDS,
    REWARD_LABEL,
    Summary,
    TrainingCost,
    compare_grids,
    get_method_kind,
    get_value,
    list_trained_greedy,
    read_training_costs,
    select_methods_of_kind,
)
from nabla_trl.utils.formatting import format_count, format_interval, format_seconds, format_si
from nabla_trl.utils.markdown import format_bullets, format_table

QUERY_COUNTS = (1, 10**2, 10**4, 10**6)
TRADEOFF_FIGURES = {
    "reward_kl": "Mean reward against KL to the base policy",
    "total_compute": "Accuracy against total compute",
    "break_even": "Break-even",
}
_KL_LEGEND = (
    "KL to the base policy, in nats per response. 0: samples of the base policy itself. ≤: the known upper bound "
    "log N − (N − 1)/N of best-of-N (Beirami et al., arXiv 2401.01879). (estimate): the mean of log π_trained(y|x) − "
    "log π_base(y|x) at temperature 1 over sampled responses y. For best-of-N of a trained policy, the bound and the "
    "estimate are added. –: not known. A greedy decode is one response and not a sample, and the density of a "
    "response that a search or a vote selects is not known."
)
_TOTAL_LEGEND = (
    "Total = training FLOPs + queries × FLOPs per query. Each row holds from its total up to the total of the next "
    "row. Of the methods that cost no more, it names the one with the highest mean accuracy (chosen on these same "
    "problems)."
)
_BREAK_EVEN_LEGEND = (
    "†: cheaper, but less accurate beyond chance. ≈: the accuracies do not differ beyond chance. No mark: also "
    "more accurate (paired, as above). never: a query costs no less. unsure: the saving per query may be zero. "
    "summary.json (break_even.) also holds sampling and search with the trained policies."
)

_REWARD_COST_LEGEND = (
    "The training of the reward counts in full in the rows that include it, although test-time methods that use the "
    "reward need it too. The other rows suppose that the reward is there already."
)


class BestMethod(NamedTuple):
    """The method with the highest mean accuracy from a total of FLOPs up to the total of the next one."""

    total_flops: float
    method: str


def compute_total_flops(summary: Summary, method: str, queries: float) -> float:
    """Return the FLOPs of training (if the method needs any) and of `queries` answers. NaN: training not known."""
    label = Method.parse(method).policy
    training = get_value(summary, "flops.training", label) if label else 0.0
    return training + queries * get_value(summary, "flops", method)


def find_best_by_total(summary: Summary, queries: int) -> list[BestMethod]:
    """Return the best methods by total FLOPs, cheapest first. Each is more accurate than all that cost less."""

    def accuracy(method: str) -> float:
        return get_value(summary, "accuracy", method)

    totals = [BestMethod(compute_total_flops(summary, m, queries), m) for m in list_methods(summary)]
    totals = [total for total in totals if not math.isnan(total.total_flops)]
    best: list[BestMethod] = []
    for candidate in sorted(totals, key=lambda total: (total.total_flops, -accuracy(total.method))):
        if not best or accuracy(candidate.method) > accuracy(best[-1].method):
            best.append(candidate)
    return best


def find_best_at_equal_total(summary: Summary, queries: int, reference_method: str) -> str | None:
    """Return the most accurate method within the total FLOPs of the reference method. None: it was not measured."""
    limit = compute_total_flops(summary, reference_method, queries)
    return next((b.method for b in reversed(find_best_by_total(summary, queries)) if b.total_flops <= limit), None)


def describe_best_for_budget(summary: Summary, reference_method: str = "best_of_16") -> str:
    """Return a phrase on the most accurate methods within the total FLOPs of the reference method.

    Empty where the reference method was not measured.
    """
    counts_by_method: dict[str, list[str]] = {}
    for queries in QUERY_COUNTS:
        method = find_best_at_equal_total(summary, queries, reference_method)
        if method is None:
            return ""
        counts_by_method.setdefault(method, []).append(format_count(queries))
    parts = [f"{method} for {' and '.join(counts)}" for method, counts in counts_by_method.items()]
    return f"Most accurate within the total FLOPs of {reference_method}, by number of queries: {'; '.join(parts)}"


# --- the section --------------------------------------------------------------------------------------


def build_tradeoff_section(
    summary: Summary, grids: Mapping[str, ResultGrid], facts: Mapping[str, Any], images: Mapping[str, str]
) -> list[str]:
    """Return the blocks of Markdown under the heading.

    Args:
        images: Name -> Markdown of each figure that was drawn.
    """
    labels = list_policy_labels(list_methods(summary))
    if not labels:
        return ["Missing: no trained policy was evaluated."]
    costs = read_training_costs(facts)
    cost_lines = [f"{label}: {_format_training_cost(costs.get(label))}" for label in labels]
    reward_flops = get_value(summary, "flops.training", REWARD_LABEL)
    if math.isfinite(reward_flops):
        cost_lines.append(f"the reward itself: {format_si(reward_flops, 'FLOPs')}, counted apart in rows of its own")
    pictures = {name: [images[name]] if name in images else [] for name in TRADEOFF_FIGURES}
    return [
        "One policy, one reward and the same held-out problems. Training, with its traces or rollouts and the audit, "
        "took:",
        format_bullets(cost_lines),
        _format_method_table(summary),
        " ".join([_KL_LEGEND, *_describe_sampling_filters(facts)]),
        "### Reward and divergence",
        *(pictures["reward_kl"] or ["Missing: no method with a known divergence and a reward."]),
        "### Accuracy against total compute",
        *_format_total_compute(summary),
        *pictures["total_compute"],
        "### Break-even",
        *_format_break_even(summary, grids),
        *pictures["break_even"],
    ]


def _format_training_cost(cost: TrainingCost | None) -> str:
    if cost is None:
        return "its training cost is not known"
    beta = "" if cost.beta is None else f", β = {cost.beta:g}"
    flops = "FLOPs not known" if cost.train_flops is None else format_si(cost.train_flops, "FLOPs")
    seconds = "" if cost.train_seconds is None else f" in {format_seconds(cost.train_seconds)}"
    return f"{cost.method} ({cost.tuning}{beta}), {flops}{seconds}"


def _format_method_table(summary: Summary) -> str:
    heads = [
        "kind",
        "method",
        "accuracy",
        "reward",
        "KL to base",
        "FLOPs / query",
        "time / query",
        "training FLOPs",
    ]
    lines = []
    for method in sorted(list_methods(summary), key=lambda method: METHOD_KINDS.index(get_method_kind(method))):
        training = compute_total_flops(summary, method, 0)
        lines.append(
            [
                get_method_kind(method),
                method,
                format_accuracy(summary, method),
                format_reward(summary, method),
                format_kl(summary, method),
                format_cost(summary, "flops", method),
                format_cost(summary, "seconds", method),
                "–" if math.isnan(training) else format_si(training, "FLOPs") if training else "0",
            ]
        )
    return format_table(heads, lines)


def format_kl(summary: Summary, method: str) -> str:
    """Return a method's KL to the base policy, marked as exact, a bound or an estimate."""
    kl = summary.get(f"kl.{method}")
    if kl is None:
        return "–"
    parsed = Method.parse(method)
    text = f"{format_interval(kl, '.2f')} (estimate)" if parsed.policy else f"{kl['value']:.2f}"
    return f"≤ {text}" if parsed.selection_size > 1 else text if parsed.policy else "0"


def _describe_sampling_filters(facts: Mapping[str, Any]) -> list[str]:
    """Return what the KL values mean where a filter changes the distribution of samples."""
    sampling = facts.get("sampling") or {}
    defaults = {field.name: field.default for field in fields(Sampling) if field.name != "max_new_tokens"}
    filters = [
        f"{name} {sampling[name]:g}" for name in defaults if sampling.get(name, defaults[name]) != defaults[name]
    ]
    if not filters:
        return []
    return [
        f"Here responses are sampled with {', '.join(filters)}: the bound is on the divergence from the base policy "
        "sampled in this way, and the estimate is the mean over such responses."
    ]


def _format_total_compute(summary: Summary) -> Sequence[str]:
    best = describe_best_for_budget(summary)
    trained = select_methods_of_kind(summary, KIND_TRAINED, KIND_TRAINED_TEST_TIME)
    unknown = [method for method in trained if math.isnan(compute_total_flops(summary, method, 0))]
    lines = [
        [format_count(queries), format_si(total, "FLOPs"), method, format_accuracy(summary, method)]
        for queries in QUERY_COUNTS
        for total, method in find_best_by_total(summary, queries)
    ]
    blocks = [
        _TOTAL_LEGEND,
        f"{best}." if best else "",
        format_table(["queries", "total from", "best", "accuracy"], lines),
    ]
    blocks.append(f"Left out, because the FLOPs of training are not known: {', '.join(unknown)}." if unknown else "")
    return [block for block in blocks if block]


def _format_break_even(summary: Summary, grids: Mapping[str, ResultGrid]) -> list[str]:
    trained = [m for m in list_trained_greedy(summary) if math.isfinite(compute_total_flops(summary, m, 0))]
    if not trained:
        return ["Missing: a trained policy's greedy decode, or the FLOPs of training."]
    baselines = select_methods_of_kind(summary, KIND_BASE, KIND_TEST_TIME, KIND_OTHER_MODEL)
    heads = ["baseline", *(f"{method} {format_accuracy(summary, method)}" for method in trained)]
    has_reward_cost = math.isfinite(get_value(summary, "flops.training", REWARD_LABEL))
    lines = []
    for baseline in baselines:
        cells = [_format_break_even_cell(summary, grids, method, baseline, "break_even") for method in trained]
        lines.append([f"{baseline} {format_accuracy(summary, baseline)}", *cells])
        if has_reward_cost:
            name = "break_even_with_reward"
            cells = [_format_break_even_cell(summary, grids, method, baseline, name) for method in trained]
            lines.append([f"{baseline}, training of the reward included", *cells])
    head = "Number of queries after which a trained policy has cost less in total, training included, than a baseline:"
    legend = f"{_BREAK_EVEN_LEGEND} {_REWARD_COST_LEGEND}" if has_reward_cost else _BREAK_EVEN_LEGEND
    return [head, format_table(heads, lines), legend]


def _format_break_even_cell(
    summary: Summary, grids: Mapping[str, ResultGrid], trained: str, baseline: str, name: str
) -> str:
    """Return the number of queries, marked by how the accuracies compare, or the reason why there is none."""
    queries = summary.get(f"{name}.{trained}-{baseline}")
    if queries is None:
        cheaper = get_value(summary, "flops", trained) < get_value(summary, "flops", baseline)
        return "unsure" if cheaper else "never"
    gap = compare_grids(grids, "accuracy", trained, baseline)
    low, value, high = (format_count(queries[key]) for key in ("low", "value", "high"))
    return f"{value} [{low}, {high}]" + {"ahead": "", "behind": " †", "": " ≈"}[gap.side]
