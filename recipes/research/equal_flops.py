"""Methods side by side at equal FLOPs budgets, each budget being what best-of-N costs. Numpy only.

At every budget the main method is compared with every other one by paired differences of accuracy over the same
problems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nabla_trl.evaluation.grids import ResultGrid, build_grids
from nabla_trl.evaluation.rows import Row
from nabla_trl.report.markdown import format_bullets, format_table
from nabla_trl.utils.formatting import finite_or_none, format_interval
from nabla_trl.utils.statistics import (
    INTERVAL_NOTE,
    SIGNIFICANCE_LEVEL,
    Interval,
    PairedDifference,
    adjust_differences,
    mean_interval,
    proportion_interval,
)


@dataclass(frozen=True)
class MethodResult:
    """One method at one budget.

    Attributes:
        flops: FLOPs per problem, rejected work included. `seconds`: the same in seconds. `calls`: the same in calls of
            models, as the paper counts them. None: not counted.
        budget_fraction: `flops` divided by the budget.
        proposals_per_problem: proposals of all chains and starts.
        rejection_rate: share of the proposals that were not accepted. None: no proposals.
        accuracy_lead: accuracy of the main method minus this one's, paired by problem. None for the main method. Its
            p-value is adjusted for the number of all comparisons, of all budgets.
    """

    method: str
    accuracy: Interval
    reward: Interval | None
    flops: float
    budget_fraction: float
    seconds: float
    calls: float | None
    proposals_per_problem: float
    rejection_rate: float | None
    accuracy_lead: PairedDifference | None


@dataclass(frozen=True)
class BudgetComparison:
    """The methods at one budget, which a reference method (a best_of_N) sets. The main method comes first."""

    reference_method: str
    budget_flops: float
    results: tuple[MethodResult, ...]

    def list_baselines(self, *, beaten: bool) -> list[MethodResult]:
        """Return the methods that the main one is ahead of beyond chance (`beaten`), or all others."""
        others = [(result, result.accuracy_lead) for result in self.results]
        return [result for result, lead in others if lead is not None and (lead.side == "ahead") == beaten]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_at_equal_flops(
    rows: Sequence[Row], methods_by_reference: Mapping[str, Sequence[str]]
) -> list[BudgetComparison]:
    """Return one comparison per budget from result rows.

    Args:
        methods_by_reference: reference method -> the methods compared at its FLOPs, the main method first.

    Raises:
        ValueError: a method without rows, or rows that are incomplete or repeated.
    """
    grids = build_grids(rows)
    for reference, names in methods_by_reference.items():
        for name in (reference, *names):
            if name not in grids:
                raise ValueError(f"no rows of {name}: run it before the comparison")
    leads = adjust_differences(
        {
            (reference, name): _compare_accuracy(grids, names[0], name)
            for reference, names in methods_by_reference.items()
            for name in names[1:]
        }
    )
    comparisons = []
    for reference, names in methods_by_reference.items():
        budget = float(grids[reference].columns["flops"].mean())
        results = tuple(
            _compute_method_result(name, rows, grids[name], budget, leads.get((reference, name))) for name in names
        )
        comparisons.append(BudgetComparison(reference, budget, results))
    return comparisons


def _compute_method_result(
    name: str, rows: Sequence[Row], grid: ResultGrid, budget_flops: float, accuracy_lead: PairedDifference | None
) -> MethodResult:
    method_rows = [row for row in rows if row.method == name]
    num_proposals = sum(row.proposals for row in method_rows)
    num_accepted = sum(row.proposals_accepted for row in method_rows)
    flops = float(grid.columns["flops"].mean())
    has_reward = any(not math.isnan(value) for value in grid.columns["reward"].ravel())
    return MethodResult(
        method=name,
        accuracy=proportion_interval(grid.columns["accuracy"]),
        reward=mean_interval(grid.columns["reward"]) if has_reward else None,
        flops=flops,
        budget_fraction=flops / budget_flops,
        seconds=float(grid.columns["seconds"].mean()),
        calls=finite_or_none(float(grid.columns["calls"].mean())),
        proposals_per_problem=num_proposals / len(method_rows),
        rejection_rate=1 - num_accepted / num_proposals if num_proposals else None,
        accuracy_lead=accuracy_lead,
    )


def _compare_accuracy(grids: Mapping[str, ResultGrid], a: str, b: str) -> PairedDifference:
    return grids[a].compute_difference("accuracy", grids[b])


def conclude_comparison(comparisons: Sequence[BudgetComparison], rows: Sequence[Row]) -> list[str]:
    """Return sentences on where the main method is ahead, and at what cost it reaches the largest best-of-N."""
    sentences = []
    for comparison in comparisons:
        reference, main_method = comparison.reference_method, comparison.results[0].method
        unbeaten = comparison.list_baselines(beaten=False)
        if unbeaten:
            leads = ", ".join(
                f"{result.method} ({format_interval(result.accuracy_lead.to_dict(), '+.3f')})"
                for result in unbeaten
                if result.accuracy_lead
            )
            sentences.append(f"{reference}: {main_method} is not ahead beyond chance of {leads}")
        else:
            count = len(comparison.list_baselines(beaten=True))
            sentences.append(f"{reference}: {main_method} is ahead of all {count} others, every interval above zero")
    grids, largest = build_grids(rows), comparisons[-1].reference_method
    for comparison in comparisons:
        result = comparison.results[0]
        lead = _compare_accuracy(grids, result.method, largest)
        if lead.value >= 0:
            share = result.flops / float(grids[largest].columns["flops"].mean())
            return [
                *sentences,
                f"{result.method} scores {result.accuracy.value:.3f}, {largest} "
                f"{grids[largest].columns['accuracy'].mean():.3f} (paired {format_interval(lead.to_dict(), '+.3f')}), "
                f"at {share:.2f} of its FLOPs",
            ]
    return [*sentences, f"at no budget is {comparisons[0].results[0].method.partition('@')[0]} as good as {largest}"]


def format_comparison_markdown(
    comparisons: Sequence[BudgetComparison], rows: Sequence[Row], title: str, command: str
) -> str:
    """Return the comparison as a Markdown page."""
    problems, seeds = len({row.problem for row in rows}), len({row.seed for row in rows})
    parts = [
        f"# {title}",
        f"{problems} problems, up to {seeds} seeds. {INTERVAL_NOTE} FLOPs and seconds are per problem, rejected work "
        "included. A lead counts as beyond chance if its interval excludes zero and its p-value, adjusted for the "
        f"number of all comparisons on this page (Holm), is below {SIGNIFICANCE_LEVEL:g}.",
        "    " + command,
        format_bullets(conclude_comparison(comparisons, rows)),
    ]
    for comparison in comparisons:
        parts += [
            f"## At the FLOPs of {comparison.reference_method}: {comparison.budget_flops:.3g} per problem",
            _format_budget_table(comparison),
        ]
    return "\n\n".join(parts) + "\n"


def _format_budget_table(comparison: BudgetComparison) -> str:
    lead = f"{comparison.results[0].method} ahead by"
    head = ["method", "accuracy", lead, "reward", "× budget", "seconds", "calls", "proposals", "rejected"]
    lines = []
    for result in comparison.results:
        has_proposals = result.rejection_rate is not None
        lines.append(
            [
                result.method,
                format_interval(result.accuracy.to_dict()),
                format_interval(result.accuracy_lead.to_dict(), "+.3f") if result.accuracy_lead else "",
                f"{result.reward.value:.2f}" if result.reward else "",
                f"{result.budget_fraction:.2f}",
                f"{result.seconds:.3f}",
                "" if result.calls is None else f"{result.calls:.0f}",
                f"{result.proposals_per_problem:.1f}" if has_proposals else "",
                f"{result.rejection_rate:.0%}" if has_proposals else "",
            ]
        )
    return format_table(head, lines)
