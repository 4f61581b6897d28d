"""The section "Test-time against train-time" of a report: `nabla_trl.report.compute_tradeoff` in words and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from nabla_trl.evaluation.grids import Grid
from nabla_trl.evaluation.method import family, labels, methods, split
from nabla_trl.models.options import Sampling
from nabla_trl.report.compute_tradeoff import (
    BASE,
    BOTH,
    KINDS,
    OTHER,
    QUERIES,
    SEARCH,
    TRAINED,
    Training,
    best_under,
    of_kind,
    total_flops,
    trainings,
)
from nabla_trl.report.conclusions import accuracy, bought_in_words, cost_in_words
from nabla_trl.report.summary import Summary
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import si, span
from nabla_trl.utils.markdown import bullets, table

FIGURES = {
    "reward_kl": "Mean reward against KL to the base policy",
    "total_compute": "Accuracy against total compute",
    "break_even": "Break-even",
}
_LEGEND = (
    "KL to the base policy, nats per response: 0 for the base policy's own samples; ≤ marks the known upper bound "
    "log N − (N − 1)/N of best-of-N (Beirami et al., arXiv 2401.01879); (estimate) is the mean of log π_trained(y|x) "
    "− log π_base(y|x) at temperature 1 over sampled responses y, for best-of-N of a trained policy on top of its "
    "bound. –: a greedy decode is one response and no sample, and the density of what a search keeps, or of an answer "
    "that was voted for, is not known."
)
_MARKS = (
    "†: overtakes in cost alone, being less accurate beyond chance; ≈: the accuracies are not told apart; unmarked: "
    "more accurate too (paired, as above). never: costs no less per query; unsure: what a query saves may be nothing. "
    "summary.json (break_even.) also holds sampling and searching from the trained policies."
)


def sections(
    summary: Summary, grids: Mapping[str, Grid], facts: Mapping[str, Any], images: Mapping[str, str]
) -> list[str]:
    """The paragraphs under the heading; `images`: name -> Markdown of a figure that was drawn."""
    if not labels(methods(summary)):
        return ["Missing: no trained policy was evaluated."]
    pictures = {name: [images[name]] if name in images else [] for name in FIGURES}
    return [
        _what_was_trained(summary, facts),
        _side_by_side(summary),
        " ".join([_LEGEND, *_filtered(facts)]),
        "### Reward and divergence",
        *(pictures["reward_kl"] or ["Missing: no method with a known divergence and a reward."]),
        "### Accuracy against total compute",
        *_total_compute(summary),
        *pictures["total_compute"],
        "### Break-even",
        *_break_even(summary, grids),
        *pictures["break_even"],
    ]


def _what_was_trained(summary: Summary, facts: Mapping[str, Any]) -> str:
    made = trainings(facts)
    lines = [
        f"{label}: {_training(made[label]) if label in made else 'what its training took is not known'}"
        for label in labels(methods(summary))
    ]
    head = "One policy, one reward, the same held-out problems. Trained, traces or rollouts and audit included:"
    return f"{head}\n\n{bullets(lines)}"


def _training(one: Training) -> str:
    beta = "" if one.beta is None else f", β = {one.beta:g}"
    flops = "FLOPs not known" if one.train_flops is None else si(one.train_flops, "FLOPs")
    clock = "" if one.train_seconds is None else f" in {si(one.train_seconds, 's')}"
    return f"{one.method} ({one.tuning}{beta}), {flops}{clock}"


def _side_by_side(summary: Summary) -> str:
    heads = ["", "method", "accuracy", "reward", "KL to base", "FLOPs / query", "seconds / query", "training FLOPs"]
    lines = []
    for group in KINDS:
        for method in of_kind(summary, group):
            reward = summary.get(f"reward.{method}")
            costs = [cost_in_words(summary, cost, method) for cost in ("flops", "seconds")]
            cells = [group, method, accuracy(summary, method), span(reward, ".3g") if reward else "–"]
            lines.append([*cells, kl_in_words(summary, method), *costs, _paid_once(summary, method)])
    return table(heads, lines)


def kl_in_words(summary: Summary, method: str) -> str:
    """A method's divergence from the base policy, and what kind of number that is."""
    one = summary.get(f"kl.{method}")
    if one is None:
        return "–"
    label, rest = split(method)
    drawn = family(rest)[1]  # samples of which one was kept
    text = f"{span(one, '.2f')} (estimate)" if label else f"{one['value']:.2f}"
    return f"≤ {text}" if drawn > 1 else text if label else "0"


def _paid_once(summary: Summary, method: str) -> str:
    spent = total_flops(summary, method, 0)
    return "–" if spent is None else si(spent, "FLOPs") if spent else "0"


def _filtered(facts: Mapping[str, Any]) -> list[str]:
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


def _total_compute(summary: Summary) -> list[str]:
    head = (
        "Total = training FLOPs + queries × FLOPs per query. Each line holds from its total up to the next one's: of "
        "the methods that cost no more, it has the highest mean accuracy (chosen on these very problems)."
    )
    bought = bought_in_words(summary)
    unknown = [method for method in of_kind(summary, TRAINED, BOTH) if total_flops(summary, method, 0) is None]
    lines = [
        [si(queries), si(one.total, "FLOPs"), one.method, accuracy(summary, one.method)]
        for queries in QUERIES
        for one in best_under(summary, queries)
    ]
    page = [head, *([f"{bought}."] if bought else []), table(["queries", "total from", "best", "accuracy"], lines)]
    return page + ([f"Left out, as their training's FLOPs are not known: {', '.join(unknown)}."] if unknown else [])


# --- break-even ---------------------------------------------------------------------------------------


def _break_even(summary: Summary, grids: Mapping[str, Grid]) -> list[str]:
    greedy = [method for method in of_kind(summary, TRAINED) if split(method)[1] == "greedy"]
    trained = [method for method in greedy if total_flops(summary, method, 0) is not None]
    if not trained:
        return ["Missing: a trained policy's greedy decode, or the FLOPs of training."]
    heads = ["against", *(f"{own} {accuracy(summary, own)}" for own in trained)]
    lines = [
        [f"{rival} {accuracy(summary, rival)}", *(_crossing(summary, grids, own, rival) for own in trained)]
        for rival in of_kind(summary, BASE, SEARCH, OTHER)
    ]
    head = "Queries after which a trained policy has cost less in all, training included, than answering with:"
    return [head, table(heads, lines), _MARKS]


def _crossing(summary: Summary, grids: Mapping[str, Grid], own: str, rival: str) -> str:
    """After how many queries, and whether with the accuracy; or why never."""
    one = summary.get(f"break_even.{own}-{rival}")
    if one is None:
        return "never" if summary[f"flops.{own}"]["value"] >= summary[f"flops.{rival}"]["value"] else "unsure"
    low, value, high = (si(one[key]) for key in ("low", "value", "high"))
    return f"{value} [{low}, {high}]{_mark(grids, own, rival)}"


def _mark(grids: Mapping[str, Grid], own: str, rival: str) -> str:
    gap = statistics.paired_difference(grids[own].scores("accuracy"), grids[rival].scores("accuracy"))
    return {"ahead": "", "behind": " †", "": " ≈"}[statistics.side(gap.low, gap.high, gap.p_value)]
