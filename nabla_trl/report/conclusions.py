"""The numbers of a summary in words: figures, targets, verdicts, titles. Every sentence is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nabla_trl.evaluation.method import (
    REWARD_MODEL_SAMPLING,
    get_main_search,
    list_methods,
    list_policy_labels,
    split_label,
)
from nabla_trl.report.compute_tradeoff import (
    QUERY_COUNTS,
    find_best_at_equal_total,
    find_best_test_time,
    find_best_trained,
)
from nabla_trl.report.summary import (
    MAX_FLOPS_SHARE,
    Summary,
    compute_cost_ratio,
    find_nabla_within_flops_share,
    find_unmeasured,
)
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import format_interval, format_si

MIN_PGR_NABLA = 0.6  # target: the share of nabla's gain that one greedy decode keeps after training
MIN_PGR_BEST = 0.8  # target: the share of the way from greedy to the best test-time method that training makes
MIN_EQUAL_FLOPS_SHARE = 0.9  # a control that spent less than this share of nabla's FLOPs was not given an equal budget
REWARD_MODEL_SAMPLING_NOTE = f"The reward is a log-ratio, so the obvious rival is sampling from the better model itself, {REWARD_MODEL_SAMPLING}"
_EXPECTED_METHODS = ("greedy", "best_of_8", "best_of_16", "control", "nabla")


def format_accuracy(summary: Summary, method: str) -> str:
    """An accuracy as it is always printed: with its interval."""
    return format_interval(summary[f"accuracy.{method}"])


def has_strict_difference(summary: Summary) -> bool:
    """Whether some method is less accurate where answers count in the form that was asked for alone."""
    known = [method for method in list_methods(summary) if f"accuracy_strict.{method}" in summary]
    return any(summary[f"accuracy_strict.{one}"]["value"] != summary[f"accuracy.{one}"]["value"] for one in known)


def format_strict_accuracy(summary: Summary, method: str) -> str:
    """A strict accuracy with its interval."""
    one = summary.get(f"accuracy_strict.{method}")
    return format_interval(one) if one else "–"


def describe_difference(summary: Summary, a: str, b: str) -> str:
    """The paired difference a − b, its p-value, and which side of zero it is on."""
    one = summary[f"paired.{a}-{b}"]
    side = statistics.classify_difference(one["low"], one["high"], summary[f"p_value.{a}-{b}"]["value"])
    side = side or "not distinguishable from zero"
    return f"paired difference {format_interval(one, '+.3f')}, {format_p_value(summary, a, b)}: {side}"


def format_p_value(summary: Summary, a: str, b: str) -> str:
    """The p-value of the paired difference a − b."""
    p_value = summary[f"p_value.{a}-{b}"]["value"]
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def format_cost(summary: Summary, cost: str, method: str) -> str:
    """A method's cost (flops or seconds) per problem, with its unit."""
    one = summary.get(f"{cost}.{method}")
    return format_si(one["value"], "s" if cost == "seconds" else "FLOPs") if one else "–"


def format_relative_flops(summary: Summary, method: str) -> str:
    """A method's FLOPs as a share of best_of_16's."""
    ratio = compute_cost_ratio(summary, "flops", method, "best_of_16")
    return f"{ratio:.2f}" if math.isfinite(ratio) else "–"


def _compare_with_best_of_16(summary: Summary, method: str) -> str:
    return (
        f"{method} reaches {format_accuracy(summary, method)} at {format_relative_flops(summary, method)} of best_of_16's FLOPs "
        f"(best_of_16: {format_accuracy(summary, 'best_of_16')}); {describe_difference(summary, method, 'best_of_16')}"
    )


def _compare_with_control(summary: Summary, method: str, control: str) -> str:
    return (
        f"{method} {format_accuracy(summary, method)} against {control} {format_accuracy(summary, control)}, which spent "
        f"{compute_cost_ratio(summary, 'flops', control, method):.2f} of its FLOPs; {describe_difference(summary, method, control)}"
    )


def evaluate_targets(summary: Summary) -> list[tuple[str, str, str]]:
    """(target, measurement, verdict) by figure to reach; verdicts: reached, NOT reached, not measured."""
    share, gain, way = f"{MAX_FLOPS_SHARE:.2f}", f"{MIN_PGR_NABLA:.0%}", f"{MIN_PGR_BEST:.0%}"
    return [
        (f"nabla reaches best_of_16 at no more than {share} of its FLOPs", *_evaluate_flops_target(summary)),
        ("nabla beats the control at equal FLOPs, paired interval without zero", *_evaluate_control_target(summary)),
        (
            f"a trained greedy decode keeps at least {gain} of nabla's gain over greedy",
            *_evaluate_pgr_nabla_target(summary),
        ),
        (
            f"a trained greedy decode goes at least {way} of the way to the best test-time method",
            *_evaluate_pgr_best_target(summary),
        ),
    ]


def _evaluate_flops_target(summary: Summary) -> tuple[str, str]:
    main = get_main_search(list_methods(summary))
    if main is None or find_unmeasured(summary, "best_of_16"):
        return f"missing: {'nabla' if main is None else 'best_of_16'}", "not measured"
    method = find_nabla_within_flops_share(summary)
    if method is None:
        return f"no nabla run was that cheap: {_compare_with_best_of_16(summary, main)}", "NOT reached"
    reached = summary[f"paired.{method}-best_of_16"]["value"] >= 0
    return _compare_with_best_of_16(summary, method), "reached" if reached else "NOT reached"


def _evaluate_control_target(summary: Summary) -> tuple[str, str]:
    method = find_nabla_within_flops_share(summary) or get_main_search(list_methods(summary))
    control = method.replace("nabla", "control") if method else "control"
    if method is None or find_unmeasured(summary, control):
        return f"missing: {control if method else 'nabla'}", "not measured"
    measured = _compare_with_control(summary, method, control)
    if compute_cost_ratio(summary, "flops", control, method) < MIN_EQUAL_FLOPS_SHARE:
        return f"the budgets were not equal: {measured}", "not measured"
    return measured, "reached" if measured.endswith("ahead") else "NOT reached"


def _evaluate_pgr_nabla_target(summary: Summary) -> tuple[str, str]:
    return _evaluate_pgr_target(summary, "recovered", "nabla", MIN_PGR_NABLA)


def _evaluate_pgr_best_target(summary: Summary) -> tuple[str, str]:
    return _evaluate_pgr_target(summary, "way", find_best_test_time(summary), MIN_PGR_BEST)


def _evaluate_pgr_target(summary: Summary, name: str, reference_method: str | None, min_pgr: float) -> tuple[str, str]:
    """What the trained policy with the best greedy decode makes of the way from base greedy to `goal`."""
    own = find_best_trained(summary)
    missing = [] if own else ["a trained policy's greedy"]
    missing += find_unmeasured(summary, "greedy", reference_method) if reference_method else ["a test-time method"]
    if missing or not own or not reference_method:
        return f"missing: {', '.join(missing)}", "not measured"
    share = summary.get(f"{name}.{own}")
    if share is None:
        gap = describe_difference(summary, reference_method, "greedy")
        return (
            f"{reference_method}'s gain over greedy may be zero, so a share of it means nothing: {gap}",
            "NOT reached",
        )
    measured = (
        f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]: greedy {format_accuracy(summary, 'greedy')}, {own} "
        f"{format_accuracy(summary, own)}, {reference_method} {format_accuracy(summary, reference_method)}; "
        f"{compute_cost_ratio(summary, 'flops', own, 'greedy'):.2f} of greedy's FLOPs per query"
    )
    return measured, "reached" if share["value"] >= min_pgr else "NOT reached"


def write_conclusions(summary: Summary, facts: Mapping) -> list[str]:
    """What the numbers say, one sentence per comparison that was measured."""
    found = []
    for method in list_methods(summary):
        if f"paired.{method}-best_of_16" in summary and not split_label(method)[0]:
            found.append(_compare_with_best_of_16(summary, method))
    for method in list_methods(summary):
        control = method.replace("nabla", "control")
        if f"paired.{method}-{control}" in summary:
            found.append(_compare_with_control(summary, method, control))
    trained = [(method, split_label(method)[1]) for method in list_methods(summary) if split_label(method)[0]]
    for a, b in [("nabla", "greedy"), *trained]:
        if f"paired.{a}-{b}" in summary:
            found.append(
                f"{a} {format_accuracy(summary, a)} against {b} {format_accuracy(summary, b)}; {describe_difference(summary, a, b)}"
            )
    absent = find_unmeasured(summary, *_EXPECTED_METHODS) + (
        [] if list_policy_labels(list_methods(summary)) else ["trained policies"]
    )
    note = [f"Missing, and so not compared: {', '.join(absent)}."] if absent else []
    return [f"{sentence}." for sentence in found] + _compare_with_reward_model_sampling(summary, facts) + note


def _compare_with_reward_model_sampling(summary: Summary, facts: Mapping) -> list[str]:
    if facts["reward_kind"] != "log-ratio":
        return []
    ours = get_main_search(list_methods(summary))
    if ours is None or find_unmeasured(summary, REWARD_MODEL_SAMPLING):
        return [f"{REWARD_MODEL_SAMPLING_NOTE}; missing: {REWARD_MODEL_SAMPLING if ours else 'nabla'}."]
    gap = summary[f"paired.{ours}-{REWARD_MODEL_SAMPLING}"]
    winner = f"{ours} wins" if gap["low"] > 0 else "the rival wins" if gap["high"] < 0 else "neither is ahead"
    cost = f"{format_accuracy(summary, REWARD_MODEL_SAMPLING)} at {compute_cost_ratio(summary, 'flops', REWARD_MODEL_SAMPLING, ours):.2f} of {ours}'s FLOPs"
    measured = (
        f"{cost}, {ours} {format_accuracy(summary, ours)}; {describe_difference(summary, ours, REWARD_MODEL_SAMPLING)}"
    )
    return [f"{REWARD_MODEL_SAMPLING_NOTE}: {measured}. Here {winner}."]


def describe_best_for_budget(summary: Summary, reference_method: str = "best_of_16") -> str:
    """What is most accurate for the total FLOPs of `setter`, by the number of queries; empty where not measured."""
    by_method: dict[str, list[str]] = {}
    for queries in QUERY_COUNTS:
        method = find_best_at_equal_total(summary, queries, reference_method)
        if method is None:
            return ""
        by_method.setdefault(method, []).append(format_si(queries))
    parts = [f"{method} ({', '.join(counts)})" for method, counts in by_method.items()]
    return f"Best for what {reference_method} costs in all, by queries: {', '.join(parts)}"


def build_plot_titles(summary: Summary, facts: Mapping) -> dict[str, str]:
    """Titles of the plots, by what they say: flops, seconds, tokens, and the subject of them all."""
    method = find_nabla_within_flops_share(summary) or get_main_search(list_methods(summary))
    titles = {}
    for cost, unit in (("flops", "FLOPs"), ("seconds", "seconds"), ("tokens", "tokens")):
        ratio = compute_cost_ratio(summary, cost, method, "best_of_16") if method else math.nan
        titles[cost] = f"Accuracy against {unit} per problem"
        if method and math.isfinite(ratio):
            a, b = format_accuracy(summary, method), format_accuracy(summary, "best_of_16")
            titles[cost] = f"{method} scores {a} at {ratio:.2f} of best_of_16's {unit} ({b})"
    problems = max(one["problems"] for one in summary.values())
    titles["subject"] = f"{facts['task']}, {problems} held-out problems"
    return titles
