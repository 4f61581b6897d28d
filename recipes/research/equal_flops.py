"""Methods side by side at equal budgets: a ladder whose rungs are the FLOPs of best-of-N. Numpy only.

Each rung compares one method of ours with every other: paired differences of accuracy over the same problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nabla_trl.evaluation.grids import ResultGrid, build_grids
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Interval, PairedDifference


@dataclass(frozen=True)
class MethodResult:
    """One method at one rung.

    Attributes:
        flops, seconds: per problem, rejected work included; `share`: FLOPs over the rung's budget.
        proposed: proposals per problem, of all chains and starts; `rejected`: share of them that were not kept; None
            without any.
        ahead: accuracy of ours less this method's, paired by problem; None for ours.
    """

    method: str
    accuracy: Interval
    reward: Interval | None
    flops: float
    budget_fraction: float
    seconds: float
    proposals_per_problem: float
    rejection_rate: float | None
    accuracy_lead: PairedDifference | None


@dataclass(frozen=True)
class BudgetComparison:
    """A budget, set by `setter` (a best_of_N), and the methods that were given it; ours comes first."""

    reference_method: str
    budget_flops: float
    results: tuple[MethodResult, ...]

    @property
    def beaten_methods(self) -> list[str]:
        """Methods that ours is ahead of, the whole interval above zero."""
        return [one.method for one in self.results if one.accuracy_lead is not None and one.accuracy_lead.low > 0]

    @property
    def unbeaten_methods(self) -> list[str]:
        return [one.method for one in self.results if one.accuracy_lead is not None and one.accuracy_lead.low <= 0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_at_equal_flops(
    rows: Sequence[Mapping[str, Any]], methods_by_reference: Mapping[str, Sequence[str]]
) -> list[BudgetComparison]:
    """Read result rows as a ladder.

    Args:
        rungs: setter → the methods compared there, ours first.

    Raises:
        ValueError: a method without rows, or rows that are incomplete or repeated.
    """
    grids = build_grids(rows)
    missing = [
        name for setter, names in methods_by_reference.items() for name in (setter, *names) if name not in grids
    ]
    if missing:
        raise ValueError(f"no rows of {missing[0]}: run it before the ladder is read")
    moves = _count_proposals(rows)
    ladder = []
    for setter, names in methods_by_reference.items():
        budget = float(grids[setter].columns["flops"].mean())
        entries = tuple(_compute_method_result(name, grids, names[0], budget, *moves[name]) for name in names)
        ladder.append(BudgetComparison(setter, budget, entries))
    return ladder


def _compute_method_result(
    name: str,
    grids: Mapping[str, ResultGrid],
    main_method: str,
    budget_flops: float,
    num_proposals: int,
    num_accepted: int,
) -> MethodResult:
    grid = grids[name]
    cells = len(grid.problems) * len(grid.seeds)
    flops = float(grid.columns["flops"].mean())
    known = bool((grid.columns["reward"] == grid.columns["reward"]).any())
    return MethodResult(
        method=name,
        accuracy=statistics.mean_interval(grid.columns["accuracy"]),
        reward=statistics.mean_interval(grid.columns["reward"]) if known else None,
        flops=flops,
        budget_fraction=flops / budget_flops,
        seconds=float(grid.columns["seconds"].mean()),
        proposals_per_problem=num_proposals / cells,
        rejection_rate=1 - num_accepted / num_proposals if num_proposals else None,
        accuracy_lead=None
        if name == main_method
        else statistics.paired_difference(
            grids[main_method].get_problem_values("accuracy"), grid.get_problem_values("accuracy")
        ),
    )


def _count_proposals(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Method → proposals made and kept."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        proposed, accepted = found.get(row["method"], (0, 0))
        found[row["method"]] = proposed + row["proposals"], accepted + row["proposals_accepted"]
    return found


def conclude_comparison(comparisons: Sequence[BudgetComparison], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where ours is ahead of everything, and at what cost it reaches the top rung's best-of-N."""
    said = []
    for rung in comparisons:
        ours = rung.results[0].method
        if rung.unbeaten_methods:
            gaps = ", ".join(
                f"{one.method} ({one.accuracy_lead.value:+.3f} [{one.accuracy_lead.low:+.3f}, {one.accuracy_lead.high:+.3f}])"
                for one in rung.results
                if one.accuracy_lead is not None and one.accuracy_lead.low <= 0
            )
            said.append(f"{rung.reference_method}: {ours} is not ahead beyond chance of {gaps}")
        else:
            said.append(
                f"{rung.reference_method}: {ours} is ahead of all {len(rung.beaten_methods)} others, every interval above zero"
            )
    return said + _conclude_reference_cost(comparisons, rows)


def _conclude_reference_cost(comparisons: Sequence[BudgetComparison], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lowest rung at which ours is no worse than the top rung's setter."""
    grids = build_grids(rows)
    top = comparisons[-1].reference_method
    for rung in comparisons:
        ours = rung.results[0]
        gap = statistics.paired_difference(
            grids[ours.method].get_problem_values("accuracy"), grids[top].get_problem_values("accuracy")
        )
        if gap.value >= 0:
            share = ours.flops / float(grids[top].columns["flops"].mean())
            return [
                f"{ours.method} scores {ours.accuracy.value:.3f}, {top} {grids[top].columns['accuracy'].mean():.3f} "
                f"(paired {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]), at {share:.2f} of its FLOPs"
            ]
    return [f"at no rung is ours as good as {top}"]


def format_comparison_markdown(
    comparisons: Sequence[BudgetComparison], rows: Sequence[Mapping[str, Any]], title: str, command: str
) -> str:
    """The ladder as a Markdown page; brackets are 95% bootstrap intervals over problems."""
    problems, seeds = (len({row[name] for row in rows}) for name in ("problem", "seed"))
    parts = [
        f"# {title}",
        f"{problems} problems, up to {seeds} seeds; brackets are 95% bootstrap intervals over problems; FLOPs and "
        "seconds are per problem, rejected work included.",
        "    " + command,
        "\n".join(f"- {sentence}" for sentence in conclude_comparison(comparisons, rows)),
    ]
    for rung in comparisons:
        parts += [
            f"## At the FLOPs of {rung.reference_method}: {rung.budget_flops:.3g} per problem",
            _format_budget_table(rung),
        ]
    return "\n\n".join(parts) + "\n"


def _format_budget_table(comparison: BudgetComparison) -> str:
    head = ["method", "accuracy", "ours ahead by", "reward", "× budget", "seconds", "proposals", "rejected"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for one in comparison.results:
        cells = [
            one.method,
            _format_interval(one.accuracy),
            "" if one.accuracy_lead is None else _format_interval(one.accuracy_lead, "+.3f"),
            "" if one.reward is None else f"{one.reward.value:.2f}",
            f"{one.budget_fraction:.2f}",
            f"{one.seconds:.3f}",
            f"{one.proposals_per_problem:.1f}" if one.rejection_rate is not None else "",
            f"{one.rejection_rate:.0%}" if one.rejection_rate is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_interval(interval: Interval, format_spec: str = ".3f") -> str:
    return f"{interval.value:{format_spec}} [{interval.low:{format_spec}}, {interval.high:{format_spec}}]"
