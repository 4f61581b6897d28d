"""The numbers of a summary in words: figures, targets, verdicts, titles. Every sentence is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nabla_trl.evaluation.method import RIVAL, labels, main_search, methods, split
from nabla_trl.report.compute_tradeoff import QUERIES, best_for, best_test_time, best_trained
from nabla_trl.report.summary import FLOPS_SHARE, Summary, cost_ratio, nabla_within, unmeasured
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import si, span

GAIN_SHARE = 0.6  # target: the share of nabla's gain that one greedy decode keeps after training
WAY_SHARE = 0.8  # target: the share of the way from greedy to the best test-time method that training makes
EQUAL_FLOPS = 0.9  # a control that spent less than this share of nabla's FLOPs was not given an equal budget
RIVAL_NOTE = f"The reward is a log-ratio, so the obvious rival is sampling from the better model itself, {RIVAL}"
_EXPECTED = ("greedy", "best_of_8", "best_of_16", "control", "nabla")


def accuracy(summary: Summary, method: str) -> str:
    """An accuracy as it is always printed: with its interval."""
    return span(summary[f"accuracy.{method}"])


def strict_differs(summary: Summary) -> bool:
    """Whether some method is less accurate where answers count in the form that was asked for alone."""
    known = [method for method in methods(summary) if f"accuracy_strict.{method}" in summary]
    return any(summary[f"accuracy_strict.{one}"]["value"] != summary[f"accuracy.{one}"]["value"] for one in known)


def strict_in_words(summary: Summary, method: str) -> str:
    """A strict accuracy with its interval."""
    one = summary.get(f"accuracy_strict.{method}")
    return span(one) if one else "–"


def gap_in_words(summary: Summary, a: str, b: str) -> str:
    """The paired difference a − b, its p-value, and which side of zero it is on."""
    one = summary[f"paired.{a}-{b}"]
    side = statistics.side(one["low"], one["high"], summary[f"p_value.{a}-{b}"]["value"])
    side = side or "not distinguishable from zero"
    return f"paired difference {span(one, '+.3f')}, {chance_in_words(summary, a, b)}: {side}"


def chance_in_words(summary: Summary, a: str, b: str) -> str:
    """The p-value of the paired difference a − b."""
    p_value = summary[f"p_value.{a}-{b}"]["value"]
    return f"p = {p_value:.3f}" if p_value >= 0.001 else "p < 0.001"


def cost_in_words(summary: Summary, cost: str, method: str) -> str:
    """A method's cost (flops or seconds) per problem, with its unit."""
    one = summary.get(f"{cost}.{method}")
    return si(one["value"], "s" if cost == "seconds" else "FLOPs") if one else "–"


def relative_in_words(summary: Summary, method: str) -> str:
    """A method's FLOPs as a share of best_of_16's."""
    ratio = cost_ratio(summary, "flops", method, "best_of_16")
    return f"{ratio:.2f}" if math.isfinite(ratio) else "–"


def _against_best_of_16(summary: Summary, method: str) -> str:
    return (
        f"{method} reaches {accuracy(summary, method)} at {relative_in_words(summary, method)} of best_of_16's FLOPs "
        f"(best_of_16: {accuracy(summary, 'best_of_16')}); {gap_in_words(summary, method, 'best_of_16')}"
    )


def _against_control(summary: Summary, method: str, control: str) -> str:
    return (
        f"{method} {accuracy(summary, method)} against {control} {accuracy(summary, control)}, which spent "
        f"{cost_ratio(summary, 'flops', control, method):.2f} of its FLOPs; {gap_in_words(summary, method, control)}"
    )


def targets(summary: Summary) -> list[tuple[str, str, str]]:
    """(target, measurement, verdict) by figure to reach; verdicts: reached, NOT reached, not measured."""
    share, gain, way = f"{FLOPS_SHARE:.2f}", f"{GAIN_SHARE:.0%}", f"{WAY_SHARE:.0%}"
    return [
        (f"nabla reaches best_of_16 at no more than {share} of its FLOPs", *_cheap_target(summary)),
        ("nabla beats the control at equal FLOPs, paired interval without zero", *_control_target(summary)),
        (f"a trained greedy decode keeps at least {gain} of nabla's gain over greedy", *_gain_target(summary)),
        (
            f"a trained greedy decode goes at least {way} of the way to the best test-time method",
            *_way_target(summary),
        ),
    ]


def _cheap_target(summary: Summary) -> tuple[str, str]:
    main = main_search(methods(summary))
    if main is None or unmeasured(summary, "best_of_16"):
        return f"missing: {'nabla' if main is None else 'best_of_16'}", "not measured"
    method = nabla_within(summary)
    if method is None:
        return f"no nabla run was that cheap: {_against_best_of_16(summary, main)}", "NOT reached"
    reached = summary[f"paired.{method}-best_of_16"]["value"] >= 0
    return _against_best_of_16(summary, method), "reached" if reached else "NOT reached"


def _control_target(summary: Summary) -> tuple[str, str]:
    method = nabla_within(summary) or main_search(methods(summary))
    control = method.replace("nabla", "control") if method else "control"
    if method is None or unmeasured(summary, control):
        return f"missing: {control if method else 'nabla'}", "not measured"
    measured = _against_control(summary, method, control)
    if cost_ratio(summary, "flops", control, method) < EQUAL_FLOPS:
        return f"the budgets were not equal: {measured}", "not measured"
    return measured, "reached" if measured.endswith("ahead") else "NOT reached"


def _gain_target(summary: Summary) -> tuple[str, str]:
    return _share_target(summary, "recovered", "nabla", GAIN_SHARE)


def _way_target(summary: Summary) -> tuple[str, str]:
    return _share_target(summary, "way", best_test_time(summary), WAY_SHARE)


def _share_target(summary: Summary, name: str, goal: str | None, least: float) -> tuple[str, str]:
    """What the trained policy with the best greedy decode makes of the way from base greedy to `goal`."""
    own = best_trained(summary)
    missing = [] if own else ["a trained policy's greedy"]
    missing += unmeasured(summary, "greedy", goal) if goal else ["a test-time method"]
    if missing or not own or not goal:
        return f"missing: {', '.join(missing)}", "not measured"
    share = summary.get(f"{name}.{own}")
    if share is None:
        gap = gap_in_words(summary, goal, "greedy")
        return f"{goal}'s gain over greedy may be zero, so a share of it means nothing: {gap}", "NOT reached"
    measured = (
        f"{share['value']:.0%} [{share['low']:.0%}, {share['high']:.0%}]: greedy {accuracy(summary, 'greedy')}, {own} "
        f"{accuracy(summary, own)}, {goal} {accuracy(summary, goal)}; "
        f"{cost_ratio(summary, 'flops', own, 'greedy'):.2f} of greedy's FLOPs per query"
    )
    return measured, "reached" if share["value"] >= least else "NOT reached"


def verdict(summary: Summary, facts: Mapping) -> list[str]:
    """What the numbers say, one sentence per comparison that was measured."""
    found = []
    for method in methods(summary):
        if f"paired.{method}-best_of_16" in summary and not split(method)[0]:
            found.append(_against_best_of_16(summary, method))
    for method in methods(summary):
        control = method.replace("nabla", "control")
        if f"paired.{method}-{control}" in summary:
            found.append(_against_control(summary, method, control))
    trained = [(method, split(method)[1]) for method in methods(summary) if split(method)[0]]
    for a, b in [("nabla", "greedy"), *trained]:
        if f"paired.{a}-{b}" in summary:
            found.append(
                f"{a} {accuracy(summary, a)} against {b} {accuracy(summary, b)}; {gap_in_words(summary, a, b)}"
            )
    absent = unmeasured(summary, *_EXPECTED) + ([] if labels(methods(summary)) else ["trained policies"])
    note = [f"Missing, and so not compared: {', '.join(absent)}."] if absent else []
    return [f"{sentence}." for sentence in found] + _rival(summary, facts) + note


def _rival(summary: Summary, facts: Mapping) -> list[str]:
    if facts["reward_kind"] != "log-ratio":
        return []
    ours = main_search(methods(summary))
    if ours is None or unmeasured(summary, RIVAL):
        return [f"{RIVAL_NOTE}; missing: {RIVAL if ours else 'nabla'}."]
    gap = summary[f"paired.{ours}-{RIVAL}"]
    winner = f"{ours} wins" if gap["low"] > 0 else "the rival wins" if gap["high"] < 0 else "neither is ahead"
    cost = f"{accuracy(summary, RIVAL)} at {cost_ratio(summary, 'flops', RIVAL, ours):.2f} of {ours}'s FLOPs"
    measured = f"{cost}, {ours} {accuracy(summary, ours)}; {gap_in_words(summary, ours, RIVAL)}"
    return [f"{RIVAL_NOTE}: {measured}. Here {winner}."]


def bought_in_words(summary: Summary, setter: str = "best_of_16") -> str:
    """What is most accurate for the total FLOPs of `setter`, by the number of queries; empty where not measured."""
    by_method: dict[str, list[str]] = {}
    for queries in QUERIES:
        method = best_for(summary, queries, setter)
        if method is None:
            return ""
        by_method.setdefault(method, []).append(si(queries))
    parts = [f"{method} ({', '.join(counts)})" for method, counts in by_method.items()]
    return f"Best for what {setter} costs in all, by queries: {', '.join(parts)}"


def plot_titles(summary: Summary, facts: Mapping) -> dict[str, str]:
    """Titles of the plots, by what they say: flops, seconds, tokens, and the subject of them all."""
    method = nabla_within(summary) or main_search(methods(summary))
    titles = {}
    for cost, unit in (("flops", "FLOPs"), ("seconds", "seconds"), ("tokens", "tokens")):
        ratio = cost_ratio(summary, cost, method, "best_of_16") if method else math.nan
        titles[cost] = f"Accuracy against {unit} per problem"
        if method and math.isfinite(ratio):
            a, b = accuracy(summary, method), accuracy(summary, "best_of_16")
            titles[cost] = f"{method} scores {a} at {ratio:.2f} of best_of_16's {unit} ({b})"
    problems = max(one["problems"] for one in summary.values())
    titles["subject"] = f"{facts['task']}, {problems} held-out problems"
    return titles
