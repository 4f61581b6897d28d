"""Whether the paper's headline holds in a run, in the paper's own units.

The abstract of arXiv 2603.04948 claims over 20% more accuracy with about 10 to 40% fewer calls of models than strong
baselines. Here every search of the base policy is measured by both halves:

- Fewer calls: at most 0.9 times the calls of best-of-N, at no lower accuracy. N is the smallest one that was measured
  and is as accurate as the search. If none is, it is the most accurate one.
- More accuracy: at least 1.2 times the accuracy of greedy decoding.

Calls are counted as in the paper (`nabla_trl.models.flops.count_model_calls`). Its baseline is best of 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from nabla_trl.evaluation.grids import ResultGrid
from nabla_trl.evaluation.method import Method
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.statistics import (
    SIGNIFICANCE_LEVEL,
    Interval,
    PairedDifference,
    adjust_p_values,
    paired_mean_difference,
    ratio_of_means,
)

MAX_CALLS_RATIO = 0.9
MIN_ACCURACY_RATIO = 1.2
_SEARCHES = ("paper", "released", "nabla")  # the claim is about searches with the gradient
CLAIM_NOTE = (
    f"The paper's headline (arXiv 2603.04948) in its own units: a search holds it if it makes at most "
    f"{MAX_CALLS_RATIO:g} times the calls of the smallest best-of-N that is as accurate (of the most accurate one, if "
    f"none is), and is at least {MIN_ACCURACY_RATIO:g} times as accurate as greedy decoding. A call is a decoded "
    "token, a scored response, or one forward or one backward of a model for a gradient."
)


class PaperClaim(NamedTuple):
    """How one search fares by the paper's headline.

    Attributes:
        baseline: the best-of-N that the calls are compared with. `flops_ratio`: FLOPs of the search divided by its.
        calls_ratio: calls of the search divided by those of the baseline. `calls_p`: p-value of "the ratio is the
            claim's limit", adjusted for the number of comparisons, like the other two.
        gap: accuracy of the search minus that of the baseline.
        accuracy_ratio: accuracy of the search divided by greedy's. None: greedy has no right answer.
    """

    search: str
    baseline: str
    flops_ratio: float
    calls_ratio: Interval | None
    calls_p: float
    gap: PairedDifference
    accuracy_ratio: Interval | None
    accuracy_p: float

    @property
    def has_fewer_calls(self) -> bool:
        """Return whether the search makes fewer calls than the claim's limit, and is not less accurate for it."""
        ratio = self.calls_ratio
        is_below = ratio is not None and ratio.high <= MAX_CALLS_RATIO and self.calls_p < SIGNIFICANCE_LEVEL
        return is_below and self.gap.side != "behind"

    @property
    def has_more_accuracy(self) -> bool:
        """Return whether the search is more accurate than greedy decoding by the claim's factor."""
        ratio = self.accuracy_ratio
        return ratio is not None and ratio.low >= MIN_ACCURACY_RATIO and self.accuracy_p < SIGNIFICANCE_LEVEL


def compute_paper_claims(grids: Mapping[str, ResultGrid]) -> list[PaperClaim]:
    """Return the claim of every search of the base policy whose calls were counted, beside best-of-N and greedy."""
    counted = {name: grid for name, grid in grids.items() if np.isfinite(grid.columns["calls"]).all()}
    searches = [name for name in counted if Method.parse(name).family in _SEARCHES]
    baselines = {name: baseline for name in searches if (baseline := _find_baseline(counted, name))}
    if "greedy" not in grids:
        return []
    gaps = {name: grids[name].compute_difference("accuracy", grids[baselines[name]]) for name in baselines}
    p_values = {("gap", name): gap.p_value for name, gap in gaps.items()}
    for name, baseline in baselines.items():
        p_values["calls", name] = _test_ratio("calls", grids[name], grids[baseline], MAX_CALLS_RATIO)
        p_values["accuracy", name] = _test_ratio("accuracy", grids[name], grids["greedy"], MIN_ACCURACY_RATIO)
    adjusted = adjust_p_values(p_values)
    return [
        PaperClaim(
            search=name,
            baseline=baseline,
            flops_ratio=float(grids[name].columns["flops"].mean() / grids[baseline].columns["flops"].mean()),
            calls_ratio=_compute_ratio("calls", grids[name], grids[baseline]),
            calls_p=adjusted["calls", name],
            gap=replace(gaps[name], p_value=adjusted["gap", name]),
            accuracy_ratio=_compute_ratio("accuracy", grids[name], grids["greedy"]),
            accuracy_p=adjusted["accuracy", name],
        )
        for name, baseline in baselines.items()
    ]


def _find_baseline(grids: Mapping[str, ResultGrid], search: str) -> str | None:
    """Return the best_of_N with the fewest calls that is as accurate as the search on average.

    If none is, return the most accurate one. None: there is no best_of_N with N > 1.
    """
    accuracies = {name: float(grid.columns["accuracy"].mean()) for name, grid in grids.items()}
    pools = [name for name in grids if Method.parse(name).family == "best_of" and (Method.parse(name).n or 0) > 1]
    equal = [name for name in pools if accuracies[name] >= accuracies[search]]
    if equal:
        return min(equal, key=lambda name: grids[name].columns["calls"].mean())
    return max(pools, key=accuracies.__getitem__, default=None)


def _compute_ratio(metric: str, a: ResultGrid, b: ResultGrid) -> Interval | None:
    return ratio_of_means(a.get_problem_values(metric), b.get_problem_values(metric))


def _test_ratio(metric: str, a: ResultGrid, b: ResultGrid, limit: float) -> float:
    """Return the p-value of "the mean of a is `limit` times the mean of b"."""
    scaled = {problem: limit * values for problem, values in b.get_problem_values(metric).items()}
    return paired_mean_difference(a.get_problem_values(metric), scaled).p_value


def list_claim_intervals(claims: Iterable[PaperClaim]) -> dict[str, Interval]:
    """Return the ratios under their names in summary.json."""
    ratios = {
        name: ratio
        for claim in claims
        for name, ratio in (
            (f"calls_ratio.{claim.search}-{claim.baseline}", claim.calls_ratio),
            (f"accuracy_ratio.{claim.search}-greedy", claim.accuracy_ratio),
        )
    }
    return {name: ratio for name, ratio in ratios.items() if ratio is not None}


def describe_paper_claims(claims: Sequence[PaperClaim]) -> list[str]:
    """Return the note on the claim and a sentence for each search. Empty without searches."""
    return [CLAIM_NOTE, *map(_describe_claim, claims)] if claims else []


def _describe_claim(claim: PaperClaim) -> str:
    ratio = claim.calls_ratio
    calls = "?" if ratio is None else format_interval(ratio.to_dict(), ".2f")
    gap = format_interval(claim.gap.to_dict(), "+.3f")
    ratio = claim.accuracy_ratio
    gain = "greedy decoding has no right answer"
    if ratio is not None:
        gain = f"it is {format_interval(ratio.to_dict(), '.2f')} times as accurate as greedy decoding"
    halves = {
        "fewer calls at no lower accuracy": claim.has_fewer_calls,
        f"{MIN_ACCURACY_RATIO:g} times greedy's accuracy": claim.has_more_accuracy,
    }
    missing = [half for half, holds in halves.items() if not holds]
    verdict = f"is not shown here (missing beyond chance: {', '.join(missing)})" if missing else "holds here"
    return (
        f"{claim.search} makes {calls} times the calls of {claim.baseline} (at {claim.flops_ratio:.2f} times its "
        f"FLOPs), at a difference of accuracy of {gap}, and {gain}: the paper's headline {verdict}."
    )
