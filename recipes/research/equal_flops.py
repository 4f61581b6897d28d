"""Methods side by side at equal budgets: a ladder whose rungs are the FLOPs of best-of-N. Numpy only.

Each rung compares one method of ours with every other: paired differences of accuracy over the same problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nabla_trl.evaluation.grids import Grid, build_grids
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Difference, Interval


@dataclass(frozen=True)
class Entry:
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
    share: float
    seconds: float
    proposed: float
    rejected: float | None
    ahead: Difference | None


@dataclass(frozen=True)
class Rung:
    """A budget, set by `setter` (a best_of_N), and the methods that were given it; ours comes first."""

    setter: str
    budget: float
    entries: tuple[Entry, ...]

    @property
    def beaten(self) -> list[str]:
        """Methods that ours is ahead of, the whole interval above zero."""
        return [one.method for one in self.entries if one.ahead is not None and one.ahead.low > 0]

    @property
    def unbeaten(self) -> list[str]:
        return [one.method for one in self.entries if one.ahead is not None and one.ahead.low <= 0]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def climb(rows: Sequence[Mapping[str, Any]], rungs: Mapping[str, Sequence[str]]) -> list[Rung]:
    """Read result rows as a ladder.

    Args:
        rungs: setter → the methods compared there, ours first.

    Raises:
        ValueError: a method without rows, or rows that are incomplete or repeated.
    """
    grids = build_grids(rows)
    missing = [name for setter, names in rungs.items() for name in (setter, *names) if name not in grids]
    if missing:
        raise ValueError(f"no rows of {missing[0]}: run it before the ladder is read")
    moves = _moves(rows)
    ladder = []
    for setter, names in rungs.items():
        budget = float(grids[setter].columns["flops"].mean())
        entries = tuple(_entry(name, grids, names[0], budget, *moves[name]) for name in names)
        ladder.append(Rung(setter, budget, entries))
    return ladder


def _entry(name: str, grids: Mapping[str, Grid], ours: str, budget: float, proposed: int, accepted: int) -> Entry:
    grid = grids[name]
    cells = len(grid.problems) * len(grid.seeds)
    flops = float(grid.columns["flops"].mean())
    known = bool((grid.columns["reward"] == grid.columns["reward"]).any())
    return Entry(
        method=name,
        accuracy=statistics.mean_interval(grid.columns["accuracy"]),
        reward=statistics.mean_interval(grid.columns["reward"]) if known else None,
        flops=flops,
        share=flops / budget,
        seconds=float(grid.columns["seconds"].mean()),
        proposed=proposed / cells,
        rejected=1 - accepted / proposed if proposed else None,
        ahead=None
        if name == ours
        else statistics.paired_difference(grids[ours].scores("accuracy"), grid.scores("accuracy")),
    )


def _moves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Method → proposals made and kept."""
    found: dict[str, tuple[int, int]] = {}
    for row in rows:
        proposed, accepted = found.get(row["method"], (0, 0))
        found[row["method"]] = proposed + row["proposals"], accepted + row["proposals_accepted"]
    return found


def verdict(ladder: Sequence[Rung], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where ours is ahead of everything, and at what cost it reaches the top rung's best-of-N."""
    said = []
    for rung in ladder:
        ours = rung.entries[0].method
        if rung.unbeaten:
            gaps = ", ".join(
                f"{one.method} ({one.ahead.value:+.3f} [{one.ahead.low:+.3f}, {one.ahead.high:+.3f}])"
                for one in rung.entries
                if one.ahead is not None and one.ahead.low <= 0
            )
            said.append(f"{rung.setter}: {ours} is not ahead beyond chance of {gaps}")
        else:
            said.append(f"{rung.setter}: {ours} is ahead of all {len(rung.beaten)} others, every interval above zero")
    return said + _cheapest(ladder, rows)


def _cheapest(ladder: Sequence[Rung], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lowest rung at which ours is no worse than the top rung's setter."""
    grids = build_grids(rows)
    top = ladder[-1].setter
    for rung in ladder:
        ours = rung.entries[0]
        gap = statistics.paired_difference(grids[ours.method].scores("accuracy"), grids[top].scores("accuracy"))
        if gap.value >= 0:
            share = ours.flops / float(grids[top].columns["flops"].mean())
            return [
                f"{ours.method} scores {ours.accuracy.value:.3f}, {top} {grids[top].columns['accuracy'].mean():.3f} "
                f"(paired {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]), at {share:.2f} of its FLOPs"
            ]
    return [f"at no rung is ours as good as {top}"]


def page(ladder: Sequence[Rung], rows: Sequence[Mapping[str, Any]], title: str, command: str) -> str:
    """The ladder as a Markdown page; brackets are 95% bootstrap intervals over problems."""
    problems, seeds = (len({row[name] for row in rows}) for name in ("problem", "seed"))
    parts = [
        f"# {title}",
        f"{problems} problems, up to {seeds} seeds; brackets are 95% bootstrap intervals over problems; FLOPs and "
        "seconds are per problem, rejected work included.",
        "    " + command,
        "\n".join(f"- {sentence}" for sentence in verdict(ladder, rows)),
    ]
    for rung in ladder:
        parts += [f"## At the FLOPs of {rung.setter}: {rung.budget:.3g} per problem", _table(rung)]
    return "\n\n".join(parts) + "\n"


def _table(rung: Rung) -> str:
    head = ["method", "accuracy", "ours ahead by", "reward", "× budget", "seconds", "proposals", "rejected"]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    for one in rung.entries:
        cells = [
            one.method,
            _span(one.accuracy),
            "" if one.ahead is None else _span(one.ahead, "+.3f"),
            "" if one.reward is None else f"{one.reward.value:.2f}",
            f"{one.share:.2f}",
            f"{one.seconds:.3f}",
            f"{one.proposed:.1f}" if one.rejected is not None else "",
            f"{one.rejected:.0%}" if one.rejected is not None else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _span(one: Interval, form: str = ".3f") -> str:
    return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"
