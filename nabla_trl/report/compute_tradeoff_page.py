"""The section "Test-time against train-time" of a report: `nabla_trl.report.compute_tradeoff` in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nabla_trl.evaluation.grids import ResultGrid
from nabla_trl.evaluation.method import list_methods, list_policy_labels, parse_family, split_label
from nabla_trl.models.options import Sampling
from nabla_trl.report.compute_tradeoff import (
    KIND_BASE,
    KIND_OTHER_MODEL,
    KIND_TEST_TIME,
    KIND_TRAINED,
    KIND_TRAINED_TEST_TIME,
    METHOD_KINDS,
    QUERY_COUNTS,
    TrainingCost,
    compute_total_flops,
    find_best_by_total,
    read_training_costs,
    select_methods_of_kind,
)
from nabla_trl.report.conclusions import describe_best_for_budget, format_accuracy, format_cost
from nabla_trl.report.summary import Summary
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import format_interval, format_si
from nabla_trl.utils.markdown import format_bullets, format_table

TRADEOFF_FIGURES = {
    "reward_kl": "Mean reward against KL to the base policy",
    "total_compute": "Accuracy against total compute",
    "break_even": "Break-even",
}
_KL_LEGEND = (
    "KL to the base policy, nats per response: 0 for the base policy's own samples; ≤ marks the known upper bound "
    "log N − (N − 1)/N of best-of-N (Beirami et al., arXiv 2401.01879); (estimate) is the mean of log π_trained(y|x) "
    "− log π_base(y|x) at temperature 1 over sampled responses y, for best-of-N of a trained policy on top of its "
    "bound. –: a greedy decode is one response and no sample, and the density of what a search keeps, or of an answer "
    "that was voted for, is not known."
)
_BREAK_EVEN_LEGEND = (
    "†: overtakes in cost alone, being less accurate beyond chance; ≈: the accuracies are not told apart; unmarked: "
    "more accurate too (paired, as above). never: costs no less per query; unsure: what a query saves may be nothing. "
    "summary.json (break_even.) also holds sampling and searching from the trained policies."
)


def build_tradeoff_section(
    summary: Summary, grids: Mapping[str, ResultGrid], facts: Mapping[str, Any], images: Mapping[str, str]
) -> list[str]:
    """The paragraphs under the heading; `images`: name -> Markdown of a figure that was drawn."""
    if not list_policy_labels(list_methods(summary)):
        return ["Missing: no trained policy was evaluated."]
    pictures = {name: [images[name]] if name in images else [] for name in TRADEOFF_FIGURES}
    return [
        _format_training_costs(summary, facts),
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


def _format_training_costs(summary: Summary, facts: Mapping[str, Any]) -> str:
    made = read_training_costs(facts)
    lines = [
        f"{label}: {_format_training_cost(made[label]) if label in made else 'what its training took is not known'}"
        for label in list_policy_labels(list_methods(summary))
    ]
    head = "One policy, one reward, the same held-out problems. Trained, traces or rollouts and audit included:"
    return f"{head}\n\n{format_bullets(lines)}"


def _format_training_cost(one: TrainingCost) -> str:
    beta = "" if one.beta is None else f", β = {one.beta:g}"
    flops = "FLOPs not known" if one.train_flops is None else format_si(one.train_flops, "FLOPs")
    clock = "" if one.train_seconds is None else f" in {format_si(one.train_seconds, 's')}"
    return f"{one.method} ({one.tuning}{beta}), {flops}{clock}"


def _format_method_table(summary: Summary) -> str:
    heads = ["", "method", "accuracy", "reward", "KL to base", "FLOPs / query", "seconds / query", "training FLOPs"]
    lines = []
    for group in METHOD_KINDS:
        for method in select_methods_of_kind(summary, group):
            reward = summary.get(f"reward.{method}")
            costs = [format_cost(summary, cost, method) for cost in ("flops", "seconds")]
            cells = [
                group,
                method,
                format_accuracy(summary, method),
                format_interval(reward, ".3g") if reward else "–",
            ]
            lines.append([*cells, format_kl(summary, method), *costs, _format_training_flops(summary, method)])
    return format_table(heads, lines)


def format_kl(summary: Summary, method: str) -> str:
    """A method's divergence from the base policy, and what kind of number that is."""
    one = summary.get(f"kl.{method}")
    if one is None:
        return "–"
    label, rest = split_label(method)
    drawn = parse_family(rest)[1]  # samples of which one was kept
    text = f"{format_interval(one, '.2f')} (estimate)" if label else f"{one['value']:.2f}"
    return f"≤ {text}" if drawn > 1 else text if label else "0"


def _format_training_flops(summary: Summary, method: str) -> str:
    spent = compute_total_flops(summary, method, 0)
    return "–" if spent is None else format_si(spent, "FLOPs") if spent else "0"


def _describe_sampling_filters(facts: Mapping[str, Any]) -> list[str]:
    """What it means for the divergences that the run's samples are not the policy's own."""
    sampling = facts.get("sampling") or {}
    plain = {one.name: one.default for one in fields(Sampling) if one.name != "max_new_tokens"}
    others = [f"{name} {sampling[name]:g}" for name in plain if name in sampling and sampling[name] != plain[name]]
    if not others:
        return []
    return [
        f"Here responses are sampled with {', '.join(others)}: the bound is on the divergence from the base policy so "
        "sampled, and the estimate is the mean over such responses."
    ]


# --- total compute ------------------------------------------------------------------------------------


def _format_total_compute(summary: Summary) -> list[str]:
    head = (
        "Total = training FLOPs + queries × FLOPs per query. Each line holds from its total up to the next one's: of "
        "the methods that cost no more, it has the highest mean accuracy (chosen on these very problems)."
    )
    bought = describe_best_for_budget(summary)
    unknown = [
        method
        for method in select_methods_of_kind(summary, KIND_TRAINED, KIND_TRAINED_TEST_TIME)
        if compute_total_flops(summary, method, 0) is None
    ]
    lines = [
        [format_si(queries), format_si(one.total_flops, "FLOPs"), one.method, format_accuracy(summary, one.method)]
        for queries in QUERY_COUNTS
        for one in find_best_by_total(summary, queries)
    ]
    page = [
        head,
        *([f"{bought}."] if bought else []),
        format_table(["queries", "total from", "best", "accuracy"], lines),
    ]
    return page + ([f"Left out, as their training's FLOPs are not known: {', '.join(unknown)}."] if unknown else [])


# --- break-even ---------------------------------------------------------------------------------------


def _format_break_even(summary: Summary, grids: Mapping[str, ResultGrid]) -> list[str]:
    greedy = [method for method in select_methods_of_kind(summary, KIND_TRAINED) if split_label(method)[1] == "greedy"]
    trained = [method for method in greedy if compute_total_flops(summary, method, 0) is not None]
    if not trained:
        return ["Missing: a trained policy's greedy decode, or the FLOPs of training."]
    heads = ["against", *(f"{own} {format_accuracy(summary, own)}" for own in trained)]
    lines = [
        [
            f"{rival} {format_accuracy(summary, rival)}",
            *(_format_break_even_cell(summary, grids, own, rival) for own in trained),
        ]
        for rival in select_methods_of_kind(summary, KIND_BASE, KIND_TEST_TIME, KIND_OTHER_MODEL)
    ]
    head = "Queries after which a trained policy has cost less in all, training included, than answering with:"
    return [head, format_table(heads, lines), _BREAK_EVEN_LEGEND]


def _format_break_even_cell(
    summary: Summary, grids: Mapping[str, ResultGrid], trained_method: str, baseline: str
) -> str:
    """After how many queries, and whether with the accuracy; or why never."""
    one = summary.get(f"break_even.{trained_method}-{baseline}")
    if one is None:
        return (
            "never"
            if summary[f"flops.{trained_method}"]["value"] >= summary[f"flops.{baseline}"]["value"]
            else "unsure"
        )
    low, value, high = (format_si(one[key]) for key in ("low", "value", "high"))
    return f"{value} [{low}, {high}]{_get_accuracy_mark(grids, trained_method, baseline)}"


def _get_accuracy_mark(grids: Mapping[str, ResultGrid], trained_method: str, baseline: str) -> str:
    gap = statistics.paired_difference(
        grids[trained_method].get_problem_values("accuracy"), grids[baseline].get_problem_values("accuracy")
    )
    return {"ahead": "", "behind": " †", "": " ≈"}[statistics.classify_difference(gap.low, gap.high, gap.p_value)]
