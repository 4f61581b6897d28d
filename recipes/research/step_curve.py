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
class RewardWeightPoint:
    """What the search came to at one λ."""

    reward_weight: float
    accuracy: Interval
    reward: Interval


def compute_reward_weight_curve(
    rows: Sequence[Mapping[str, Any]], method_by_reward_weight: Mapping[float, str]
) -> list[RewardWeightPoint]:
    """Result rows as a curve over λ.

    Args:
        methods: λ → the method that was run with it.

    Raises:
        ValueError: a method without rows.
    """
    grids = build_grids(rows)
    missing = [name for name in method_by_reward_weight.values() if name not in grids]
    if missing:
        raise ValueError(f"no rows of {missing[0]}: run it before the curve is read")
    return [
        RewardWeightPoint(
            lam,
            statistics.mean_interval(grids[name].columns["accuracy"]),
            statistics.mean_interval(grids[name].columns["reward"]),
        )
        for lam, name in sorted(method_by_reward_weight.items())
    ]


def conclude_reward_weight_curve(curve: Sequence[RewardWeightPoint]) -> str:
    """Where accuracy is highest, and whether the reward goes on rising while it falls."""
    best, last = max(curve, key=lambda point: point.accuracy.value), curve[-1]
    said = f"accuracy is highest, {best.accuracy.value:.3f}, at λ = {best.reward_weight:g}"
    if last.accuracy.high < best.accuracy.low:
        fell = f"; at λ = {last.reward_weight:g} it is {last.accuracy.value:.3f}"
        reward = f"while the reward went from {best.reward.value:.2f} to {last.reward.value:.2f}"
        return f"{said}{fell}, {reward}{': hacked' if last.reward.value > best.reward.value else ''}"
    return f"{said}; at no λ tried does it fall beyond chance"


def format_curve_table(curve: Sequence[RewardWeightPoint]) -> str:
    """The curve as a Markdown table."""
    lines = ["| λ | accuracy | reward |", "| --- | --- | --- |"]
    for point in curve:
        cells = [f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in (point.accuracy, point.reward)]
        lines.append(f"| {point.reward_weight:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_reward_weight_curve(path: Path, curve: Sequence[RewardWeightPoint], subject: str) -> None:
    """Two panels over one axis of λ: accuracy and mean reward, with their intervals."""
    from nabla_trl.report.figures import plot_reward_weight_curves  # here, so that a table does not load matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.stem + ".tmp.png")
    lams = [point.reward_weight for point in curve]
    panels = {"accuracy": [point.accuracy for point in curve], "mean reward": [point.reward for point in curve]}
    plot_reward_weight_curves(lams, panels, conclude_reward_weight_curve(curve), subject).savefig(draft)
    draft.replace(path)
