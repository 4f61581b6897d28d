"""Accuracy and reward against the reward weight λ: where a larger λ stops helping, and where it hacks the reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_trl.evaluation.grids import build_grids
from nabla_trl.evaluation.rows import Row
from nabla_trl.report.markdown import format_table
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.statistics import Interval, mean_interval, proportion_interval


@dataclass(frozen=True)
class RewardWeightPoint:
    """Accuracy and mean reward of the search at one λ."""

    reward_weight: float
    accuracy: Interval
    reward: Interval


def compute_reward_weight_curve(
    rows: Sequence[Row], method_by_reward_weight: Mapping[float, str]
) -> list[RewardWeightPoint]:
    """Return the curve over λ of result rows.

    Args:
        method_by_reward_weight: λ -> the method that was run with it.

    Raises:
        ValueError: a method without rows.
    """
    grids = build_grids(rows)
    curve = []
    for reward_weight, name in sorted(method_by_reward_weight.items()):
        if name not in grids:
            raise ValueError(f"no rows of {name}: run it before the curve is read")
        columns = grids[name].columns
        curve.append(
            RewardWeightPoint(
                reward_weight, proportion_interval(columns["accuracy"]), mean_interval(columns["reward"])
            )
        )
    return curve


def conclude_reward_weight_curve(curve: Sequence[RewardWeightPoint]) -> str:
    """Return where accuracy is highest, and whether the reward keeps rising while accuracy falls."""
    best, last = max(curve, key=lambda point: point.accuracy.value), curve[-1]
    conclusion = f"accuracy is highest, {best.accuracy.value:.3f}, at λ = {best.reward_weight:g}"
    if last.accuracy.high >= best.accuracy.low:
        return f"{conclusion}; at no λ tried does it fall beyond chance"
    hacked = ": hacked" if last.reward.value > best.reward.value else ""
    return (
        f"{conclusion}; at λ = {last.reward_weight:g} it is {last.accuracy.value:.3f}, while the reward went from "
        f"{best.reward.value:.2f} to {last.reward.value:.2f}{hacked}"
    )


def format_curve_table(curve: Sequence[RewardWeightPoint]) -> str:
    """Return the curve as a Markdown table."""
    lines = [
        [
            f"{point.reward_weight:g}",
            format_interval(point.accuracy.to_dict()),
            format_interval(point.reward.to_dict()),
        ]
        for point in curve
    ]
    return format_table(["λ", "accuracy", "reward"], lines)


def plot_reward_weight_curve(path: Path, curve: Sequence[RewardWeightPoint], subject: str) -> None:
    """Draw accuracy and mean reward with their intervals, as two panels over one axis of λ."""
    from nabla_trl.report.plots.figures import (
        plot_reward_weight_curves,  # here, so that a table does not load matplotlib
    )

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.stem + ".tmp.png")
    reward_weights = [point.reward_weight for point in curve]
    panels = {"accuracy": [point.accuracy for point in curve], "mean reward": [point.reward for point in curve]}
    plot_reward_weight_curves(reward_weights, panels, conclude_reward_weight_curve(curve), subject).savefig(draft)
    draft.replace(path)
