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
from nabla_trl.report.markdown import format_bullets, format_table
from nabla_trl.report.prices import (
    UNIT_WORDS,
    UNITS,
    TrainingCost,
    compute_break_even,
    format_break_even,
    read_reward_price,
    read_training_costs,
)
from nabla_trl.report.summary import (
    KIND_BASE,
    KIND_OTHER_MODEL,
    KIND_TEST_TIME,
    KIND_TRAINED,
    KIND_TRAINED_TEST_TIME,
    METHOD_KINDS,
    REWARD_LABEL,
    Summary,
    compare_grids,
    get_method_kind,
    get_value,
    list_trained_greedy,
    select_methods_of_kind,
)
from nabla_trl.utils.formatting import format_count, format_interval, format_seconds, format_si
from nabla_trl.utils.statistics import adjust_differences

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
    "more accurate (paired, adjusted for the number of these comparisons). never: a query costs no less. unsure: the "
    "saving per query may be zero. at once: the first query pays already. not known: a cost is missing. summary.json "
    "(break_even., break_even_seconds. and so on) also holds sampling and search with the trained policies."
)

_REWARD_COST_LEGEND = (
    "The training of the reward counts in full in the rows that include it, although test-time methods that use the "
    "reward need it too. The other rows suppose that the reward is there already."
)


class BestMethod(NamedTuple):
    """The method with the highest mean accuracy from a total of FLOPs up to the total of the next one."""

    total_flops: float
    method: str


def compute_total_flops(summary: Summary, method: str, queries: float, *, with_reward: bool = False) -> float:
    """Return the FLOPs of training (if the method needs any) and of `queries` answers. NaN: training not known.

    Args:
        with_reward: count the training of the reward too, for every method that needs the reward.
    """
    parsed = Method.parse(method)
    training = get_value(summary, "flops.training", parsed.policy) if parsed.policy else 0.0
    if with_reward and parsed.needs_reward:
        training += get_value(summary, "flops.training", REWARD_LABEL)
    return training + queries * get_value(summary, "flops", method)


def find_best_by_total(summary: Summary, queries: int, *, with_reward: bool = False) -> list[BestMethod]:
    """Return the best methods by total FLOPs, cheapest first. Each is more accurate than all that cost less.

    Args:
        with_reward: as in `compute_total_flops`.
    """

    def accuracy(method: str) -> float:
        return get_value(summary, "accuracy", method)

    totals = [
        BestMethod(compute_total_flops(summary, m, queries, with_reward=with_reward), m) for m in list_methods(summary)
    ]
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
    cost_lines = [f"{label}: {_format_training_cost(summary, label, costs.get(label))}" for label in labels]
    if _has_reward_cost(summary):
        cost_lines.append(f"the reward itself: {_format_amounts(summary, REWARD_LABEL)}, counted apart")
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
        *_format_break_even(summary, grids, facts),
        *pictures["break_even"],
    ]


def _format_training_cost(summary: Summary, label: str, cost: TrainingCost | None) -> str:
    if cost is None:
        return "its training cost is not known"
    beta = "" if cost.beta is None else f", β = {cost.beta:g}"
    return f"{cost.method} ({cost.tuning}{beta}), {_format_amounts(summary, label)}"


def _format_amounts(summary: Summary, label: str) -> str:
    """Return what a training cost: "912 GFLOPs in 20.3 s, $0.0141"."""
    flops, seconds, dollars = (get_value(summary, f"{unit}.training", label) for unit in UNITS)
    text = "FLOPs not known" if math.isnan(flops) else format_si(flops, "FLOPs")
    text += "" if math.isnan(seconds) else f" in {format_seconds(seconds)}"
    return text + ("" if math.isnan(dollars) else f", ${dollars:.3g}")


def _has_reward_cost(summary: Summary) -> bool:
    return any(f"{unit}.training.{REWARD_LABEL}" in summary for unit in UNITS)


def _format_method_table(summary: Summary) -> str:
    heads = ["method", "kind", "accuracy", "reward", "KL to base", "FLOPs / query", "time / query", "training FLOPs"]
    lines = []
    for method in sorted(list_methods(summary), key=lambda method: METHOD_KINDS.index(get_method_kind(method))):
        training = compute_total_flops(summary, method, 0)
        lines.append(
            [
                method,
                get_method_kind(method),
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
    blocks = [_TOTAL_LEGEND, f"{best}." if best else "", _format_total_table(summary, with_reward=False)]
    if math.isfinite(get_value(summary, "flops.training", REWARD_LABEL)):
        blocks += [
            "The same with the training of the reward, for every method that needs the reward:",
            _format_total_table(summary, with_reward=True),
        ]
    blocks.append(f"Left out, because the FLOPs of training are not known: {', '.join(unknown)}." if unknown else "")
    return [block for block in blocks if block]


def _format_total_table(summary: Summary, *, with_reward: bool) -> str:
    lines = [
        [format_count(queries), format_si(total, "FLOPs"), method, format_accuracy(summary, method)]
        for queries in QUERY_COUNTS
        for total, method in find_best_by_total(summary, queries, with_reward=with_reward)
    ]
    return format_table(["queries", "total from", "best", "accuracy"], lines)


def _format_break_even(summary: Summary, grids: Mapping[str, ResultGrid], facts: Mapping[str, Any]) -> list[str]:
    """Return a table for each unit in which the cost of training is known."""
    trained = list_trained_greedy(summary)
    baselines = select_methods_of_kind(summary, KIND_BASE, KIND_TEST_TIME, KIND_OTHER_MODEL)
    gaps = {(a, b): compare_grids(grids, "accuracy", a, b) for a in trained for b in baselines}
    sides = {pair: gap.side for pair, gap in adjust_differences(gaps).items()}
    tables = []
    for unit in UNITS:
        known = [method for method in trained if f"{unit}.training.{Method.parse(method).policy}" in summary]
        if known and baselines:
            table = _format_break_even_table(summary, grids, known, baselines, unit, sides, facts)
            tables += [f"By {UNIT_WORDS[unit]}:", table]
    if not tables:
        return ["Missing: a trained policy's greedy decode, or the cost of training."]
    accuracies = ", ".join(f"{method} {format_accuracy(summary, method)}" for method in trained)
    head = (
        "Number of queries after which a trained policy has cost less in total, training included, than a baseline. "
        f"Accuracy of the trained policies: {accuracies}."
    )
    legend = [_BREAK_EVEN_LEGEND, *([_REWARD_COST_LEGEND] if _has_reward_cost(summary) else [])]
    return [head, *tables, " ".join(legend)]


def _format_break_even_table(
    summary: Summary,
    grids: Mapping[str, ResultGrid],
    trained: Sequence[str],
    baselines: Sequence[str],
    unit: str,
    sides: Mapping[tuple[str, str], str],
    facts: Mapping[str, Any],
) -> str:
    rate, reward_price = facts.get("dollars_per_gpu_hour"), read_reward_price(facts)
    prices = {method: read_training_costs(facts)[Method.parse(method).policy].price for method in trained}
    versions = {"": prices}
    if reward_price.get_amount(unit, rate) is not None:
        with_reward = {method: price + reward_price for method, price in prices.items()}
        versions[", training of the reward included"] = with_reward
    lines = []
    for baseline in baselines:
        for words, own_prices in versions.items():
            cells = [f"{baseline}{words}", format_accuracy(summary, baseline)]
            for method, price in own_prices.items():
                amount = price.get_amount(unit, rate)
                result = compute_break_even(grids[method], grids[baseline], unit, amount, rate)
                cells.append(format_break_even(result, sides[method, baseline]))
            lines.append(cells)
    heads = ["baseline", "its accuracy", *trained]
    return format_table(heads, lines)
