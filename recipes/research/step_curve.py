"""Accuracy and reward against the size of the step: where a larger λ stops helping, and where it hacks the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_trl.evaluation.grids import build_grids
from nabla_trl.utils import statistics
from nabla_trl.utils.statistics import Interval


@dataclass(frozen=True)
class StepPoint:
    """What the search came to at one λ."""

    lam: float
    accuracy: Interval
    reward: Interval


def read(rows: Sequence[Mapping[str, Any]], methods: Mapping[float, str]) -> list[StepPoint]:
    """Result rows as a curve over λ.

    Args:
        methods: λ → the method that was run with it.

    Raises:
        ValueError: a method without rows.
    """
    grids = build_grids(rows)
    missing = [name for name in methods.values() if name not in grids]
    if missing:
        raise ValueError(f"no rows of {missing[0]}: run it before the curve is read")
    return [
        StepPoint(
            lam,
            statistics.mean_interval(grids[name].columns["accuracy"]),
            statistics.mean_interval(grids[name].columns["reward"]),
        )
        for lam, name in sorted(methods.items())
    ]


def verdict(curve: Sequence[StepPoint]) -> str:
    """Where accuracy is highest, and whether the reward goes on rising while it falls."""
    best, last = max(curve, key=lambda point: point.accuracy.value), curve[-1]
    said = f"accuracy is highest, {best.accuracy.value:.3f}, at λ = {best.lam:g}"
    if last.accuracy.high < best.accuracy.low:
        fell = f"; at λ = {last.lam:g} it is {last.accuracy.value:.3f}"
        reward = f"while the reward went from {best.reward.value:.2f} to {last.reward.value:.2f}"
        return f"{said}{fell}, {reward}{': hacked' if last.reward.value > best.reward.value else ''}"
    return f"{said}; at no λ tried does it fall beyond chance"


def table(curve: Sequence[StepPoint]) -> str:
    """The curve as a Markdown table."""
    lines = ["| λ | accuracy | reward |", "| --- | --- | --- |"]
    for point in curve:
        cells = [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (point.accuracy, point.reward)]
        lines.append(f"| {point.lam:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path: Path, curve: Sequence[StepPoint], subject: str) -> None:
    """Two panels over one axis of λ: accuracy and mean reward, with their intervals."""
    from nabla_trl.report.figures import step_figure  # here, so that a table does not load matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.stem + ".tmp.png")
    lams = [point.lam for point in curve]
    panels = {"accuracy": [point.accuracy for point in curve], "mean reward": [point.reward for point in curve]}
    step_figure(lams, panels, verdict(curve), subject).savefig(draft)
    draft.replace(path)
