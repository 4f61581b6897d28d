"""The numbers of a summary in words: targets, conclusions and plot titles. Every sentence is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nabla_trl.evaluation.method import (
    REWARD_MODEL_SAMPLING,
    Method,
    get_main_search,
    list_methods,
    list_policy_labels,
)
from nabla_trl.report.summary import (
    MAX_FLOPS_SHARE,
    Summary,
    compute_cost_ratio,
    find_best_test_time,
    find_best_trained,
    find_nabla_within_flops_share,
    find_unmeasured,
    get_value,
)
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import format_count, format_interval, format_seconds, format_si

MIN_PGR_NABLA = 0.6  # target: share of nabla's gain over greedy that one trained greedy decode recovers
MIN_PGR_BEST = 0.8  # target: share of the best test-time method's gain over greedy that it recovers
MIN_EQUAL_FLOPS_SHARE = 0.9  # a control that spent less than this share of nabla's FLOPs had no equal budget
REWARD_MODEL_SAMPLING_NOTE = (
    f"The reward is a log-ratio, so the obvious baseline is to sample from the better model, {REWARD_MODEL_SAMPLING}."
)
_TOO_FEW = "too few to tell"
_EXPECTED_METHODS = ("greedy", "best_of_8", "best_of_16", "control", "nabla")


def format_accuracy(summary: Summary, method: str, metric: str = "accuracy") -> str:
    """Return an accuracy with its interval, as it is always printed."""
    return format_interval(summary[f"{metric}.{method}"]) if f"{metric}.{method}" in summary else "–"


def format_reward(summary: Summary, method: str) -> str:
    """Return a method's mean reward with its interval. All rewards of a report have the same number of decimals."""
    if f"reward.{method}" not in summary:
        return "–"
    largest = max(abs(entry["value"]) for name, entry in summary.items() if name.startswith("reward."))
    return format_interval(summary[f"reward.{method}"], ".3f" if largest < 1 else ".2f" if largest < 100 else ".0f")


def format_cost(summary: Summary, cost: str, method: str) -> str:
    """Return a method's cost (flops, seconds, tokens or calls) per problem with its unit, or dollars per 1000."""
    value = get_value(summary, cost, method)
    if math.isnan(value):
        return "–"
    if cost == "dollars":
        return f"${1000 * value:.3g} / 1000"
    formats = {"seconds": format_seconds, "tokens": format_count, "calls": format_count}
    return formats[cost](value) if cost in formats else format_si(value, "FLOPs")


def format_relative_flops(summary: Summary, method: str, baseline: str = "best_of_16") -> str:
    """Return a method's FLOPs divided by those of the baseline."""
    ratio = compute_cost_ratio(summary, "flops", method, baseline)
    return f"{ratio:.2f}" if math.isfinite(ratio) else "–"


def format_p_value(summary: Summary, a: str, b: str, name: str = "p_adjusted") -> str:
    """Return the p-value of the paired difference a − b. By default it is adjusted for the number of comparisons."""
    p_value = get_value(summary, name, f"{a}-{b}")
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def has_strict_difference(summary: Summary) -> bool:
    """Return whether some method has a strict accuracy that differs from its accuracy."""
    methods = [method for method in list_methods(summary) if f"accuracy_strict.{method}" in summary]
    return any(get_value(summary, "accuracy_strict", m) != get_value(summary, "accuracy", m) for m in methods)


def classify_pair(summary: Summary, a: str, b: str) -> str:
    """Return whether a is "ahead" or "behind" b in accuracy. Empty where that is not certain.

    The p-value is adjusted for the number of comparisons in the summary.
    """
    gap = summary[f"paired.{a}-{b}"]
    return statistics.classify_difference(gap["low"], gap["high"], get_value(summary, "p_adjusted", f"{a}-{b}"))


def describe_difference(summary: Summary, a: str, b: str) -> str:
    """Return a sentence with the paired difference a − b, its adjusted p-value, and which side of zero it is on."""
    gap = format_interval(summary[f"paired.{a}-{b}"], "+.3f")
    return f"Paired difference {gap}, adjusted {format_p_value(summary, a, b)}: {_judge_pair(summary, a, b)}"


def _judge_pair(summary: Summary, a: str, b: str) -> str:
    gap = summary[f"paired.{a}-{b}"]
    return statistics.describe_difference(gap["low"], gap["high"], get_value(summary, "p_adjusted", f"{a}-{b}"))


def compare(summary: Summary, a: str, b: str, note_a: str = "", note_b: str = "") -> str:
    """Return sentences on the accuracies of a and b, each with a note behind it, and on their difference."""
    accuracy_a, accuracy_b = (format_accuracy(summary, method) for method in (a, b))
    return f"{a}{note_a} {accuracy_a} against {b} {accuracy_b}{note_b}. {describe_difference(summary, a, b)}"


def _compare_with_best_of_16(summary: Summary, method: str) -> str:
    share = f"{format_relative_flops(summary, method)} of the FLOPs of best_of_16"
    accuracy, reference_accuracy = (format_accuracy(summary, name) for name in (method, "best_of_16"))
    difference = describe_difference(summary, method, "best_of_16")
    return f"{method} reaches {accuracy} with {share} ({reference_accuracy}). {difference}"


def _compare_with_control(summary: Summary, method: str, control: str) -> str:
    ratio = format_relative_flops(summary, control, method)
    return compare(summary, method, control, note_b=f", which spent {ratio} of its FLOPs")


def evaluate_targets(summary: Summary) -> list[tuple[str, str, str]]:
    """Return (target, measurement, result) per target of this project's own demonstration.

    A result is "reached" or "NOT reached" if the interval of its measurement says so, else "too few to tell". It is
    "not measured" where methods are missing, their budgets are not those of the target, or a ratio is not defined.
    """
    return [
        (
            f"nabla reaches the accuracy of best_of_16 with at most {MAX_FLOPS_SHARE:.2f} of its FLOPs",
            *_evaluate_flops_target(summary),
        ),
        ("nabla beats the control at equal FLOPs, paired interval without zero", *_evaluate_control_target(summary)),
        (
            f"a trained greedy decode recovers at least {MIN_PGR_NABLA:.0%} of nabla's gain over greedy (PGR)",
            *_evaluate_pgr_target(summary, "pgr_nabla", "nabla", MIN_PGR_NABLA),
        ),
        (
            f"a trained greedy decode recovers at least {MIN_PGR_BEST:.0%} of the performance gap between greedy and "
            "the best test-time method (PGR)",
            *_evaluate_pgr_target(summary, "pgr_best", find_best_test_time(summary), MIN_PGR_BEST),
        ),
    ]


def _evaluate_flops_target(summary: Summary) -> tuple[str, str]:
    main = get_main_search(list_methods(summary))
    if main is None or find_unmeasured(summary, "best_of_16"):
        return f"missing: {'nabla' if main is None else 'best_of_16'}", "not measured"
    method = find_nabla_within_flops_share(summary)
    if method is None:
        return f"no nabla run was that cheap: {_compare_with_best_of_16(summary, main)}", "not measured"
    gap = summary[f"paired.{method}-best_of_16"]
    result = "reached" if gap["low"] >= 0 else _TOO_FEW
    if classify_pair(summary, method, "best_of_16") == "behind":
        result = "NOT reached"
    return _compare_with_best_of_16(summary, method), result


def _evaluate_control_target(summary: Summary) -> tuple[str, str]:
    method = find_nabla_within_flops_share(summary) or get_main_search(list_methods(summary))
    control = method.replace("nabla", "control") if method else "control"
    if method is None or find_unmeasured(summary, control):
        return f"missing: {control if method else 'nabla'}", "not measured"
    measured = _compare_with_control(summary, method, control)
    if compute_cost_ratio(summary, "flops", control, method) < MIN_EQUAL_FLOPS_SHARE:
        return f"the budgets were not equal: {measured}", "not measured"
    if classify_pair(summary, method, control) == "ahead":
        return measured, "reached"
    cannot_matter = summary[f"paired.{method}-{control}"]["high"] < statistics.RELEVANT_DIFFERENCE
    return measured, "NOT reached" if cannot_matter else _TOO_FEW


def _evaluate_pgr_target(summary: Summary, name: str, reference_method: str | None, min_pgr: float) -> tuple[str, str]:
    """Judge the trained policy with the best greedy decode by its PGR with respect to the reference method."""
    trained = find_best_trained(summary)
    missing = [] if trained else ["a trained policy's greedy"]
    missing += find_unmeasured(summary, "greedy", reference_method) if reference_method else ["a test-time method"]
    if missing or not trained or not reference_method:
        return f"missing: {', '.join(missing)}", "not measured"
    share = summary.get(f"{name}.{trained}")
    if share is None:
        gap = describe_difference(summary, reference_method, "greedy")
        return f"the gain of {reference_method} over greedy may be zero, so PGR is not defined. {gap}", "not measured"
    accuracies = [f"{method} {format_accuracy(summary, method)}" for method in ("greedy", trained, reference_method)]
    measured = (
        f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]: {', '.join(accuracies)}. {trained} costs "
        f"{format_relative_flops(summary, trained, 'greedy')} of greedy's FLOPs per query"
    )
    if share["low"] >= min_pgr:
        return measured, "reached"
    return measured, "NOT reached" if share["high"] < min_pgr else _TOO_FEW


def write_conclusions(summary: Summary, facts: Mapping) -> list[str]:
    """Return sentences on every comparison that was measured."""
    methods = list_methods(summary)
    sentences = [
        _compare_with_best_of_16(summary, method)
        for method in methods
        if f"paired.{method}-best_of_16" in summary and not Method.parse(method).policy
    ]
    controls = [(method, method.replace("nabla", "control")) for method in methods]
    sentences += [_compare_with_control(summary, a, b) for a, b in controls if f"paired.{a}-{b}" in summary]
    trained = [(str(method), str(method.base_method)) for method in map(Method.parse, methods) if method.policy]
    sentences += [compare(summary, a, b) for a, b in [("nabla", "greedy"), *trained] if f"paired.{a}-{b}" in summary]
    if facts["reward_kind"] == "log-ratio":
        sentences.append(_compare_with_reward_model_sampling(summary))
    missing = find_unmeasured(summary, *_EXPECTED_METHODS)
    missing += [] if list_policy_labels(methods) else ["trained policies"]
    if missing:
        sentences.append(f"Missing, and so not compared: {', '.join(missing)}")
    return [f"{sentence}." for sentence in sentences]


def _compare_with_reward_model_sampling(summary: Summary) -> str:
    search = get_main_search(list_methods(summary))
    if search is None or find_unmeasured(summary, REWARD_MODEL_SAMPLING):
        return f"{REWARD_MODEL_SAMPLING_NOTE} Here it is missing: {REWARD_MODEL_SAMPLING if search else 'nabla'}"
    sides = {"ahead": f"{search} wins", "behind": "the baseline wins"}
    winner = sides.get(_judge_pair(summary, search, REWARD_MODEL_SAMPLING), "neither is ahead beyond chance")
    ratio = format_relative_flops(summary, REWARD_MODEL_SAMPLING, search)
    comparison = compare(summary, search, REWARD_MODEL_SAMPLING, note_b=f", which spent {ratio} of its FLOPs")
    return f"{REWARD_MODEL_SAMPLING_NOTE} {comparison}. Here {winner}"


def build_plot_titles(summary: Summary, facts: Mapping) -> dict[str, str]:
    """Return the titles of the accuracy plots by cost (flops, seconds, tokens), and the "subject" of all plots."""
    method = find_nabla_within_flops_share(summary) or get_main_search(list_methods(summary))
    titles = {}
    for cost, unit in (("flops", "FLOPs"), ("seconds", "seconds"), ("tokens", "tokens")):
        ratio = compute_cost_ratio(summary, cost, method, "best_of_16") if method else math.nan
        titles[cost] = f"Accuracy against {unit} per problem"
        if method and math.isfinite(ratio):
            a, b = format_accuracy(summary, method), format_accuracy(summary, "best_of_16")
            titles[cost] = f"{method} scores {a} at {ratio:.2f} of best_of_16's {unit} ({b})"
    problems = max(entry["problems"] for entry in summary.values())
    titles["subject"] = f"{facts['task']}, {format_count(problems)} held-out problems"
    return titles
