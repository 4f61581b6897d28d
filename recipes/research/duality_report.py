"""Report how far distributions are from π*: test-time methods and trained policies at the same β. Numpy only.

The claim under test is Theorem 4.1 of ∇-Reasoner (arXiv 2603.04948): sampling responses by −r/β − log π, and
maximizing E[r] − β·KL over policies, are the same problem with the solution π* ∝ π·exp(r/β). So a correct search
samples π*, and a correctly trained policy has the distribution π*. The last column of the table says for each row if
this holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from distributions import (
    DistributionMetrics,
    EnumeratedCase,
    NoiseFloor,
    compute_frontier_reward,
    compute_mean_metrics,
)

from nabla_trl.report.markdown import format_bullets, format_table
from nabla_trl.utils.formatting import format_si
from nabla_trl.utils.statistics import SIGNIFICANCE_LEVEL

KL_TOLERANCE = 0.1  # nats of KL(q‖π*) up to which an exact distribution is called π*
ONE_SIDED_Z_95 = 1.645  # noise exceeds so many standard deviations with probability 5%
TEST_TIME, TRAINED_POLICY = "test time", "trained"


@dataclass(frozen=True)
class NoiseStatistics:
    """The metrics of an empirical distribution of samples of π*.

    Attributes:
        kl, kl_sd: mean and standard deviation of KL(q‖π*).
        tv: mean of the total variation.
        p_value: p-value of the row's KL.
    """

    kl: float
    kl_sd: float
    tv: float
    p_value: float


@dataclass(frozen=True)
class DualityRow:
    """One distribution, with means over prompts.

    Attributes:
        method: rows of the same method are points of one curve.
        kind: TEST_TIME or TRAINED_POLICY.
        size: number of samples or rounds, or None.
        frontier_reward: the largest E[r] at the same KL(q‖π). None for empirical distributions, whose KL is biased.
        flops: FLOPs per answer.
        training_flops: FLOPs of training.
        noise: metrics of as many samples of π*. None for an exact distribution.
    """

    method: str
    kind: str
    size: int | None
    measures: DistributionMetrics
    frontier_reward: float | None
    flops: float
    training_flops: float = 0.0
    noise: NoiseStatistics | None = None

    @property
    def name(self) -> str:
        """Method and size."""
        return self.method if self.size is None else f"{self.method} @{self.size}"

    @property
    def position_label(self) -> str:
        """The row's position on the curve of its method."""
        return f"{format_si(self.training_flops, 'FLOPs')} of training" if self.size is None else str(self.size)

    @property
    def excess_kl(self) -> float:
        """KL(q‖π*) without the mean of the noise."""
        return self.measures.kl_optimum - (self.noise.kl if self.noise else 0.0)

    @property
    def corrected_kl_policy(self) -> float:
        """KL(q‖π) without the mean of the noise, which is the same as that of KL(q‖π*)."""
        return self.measures.kl_policy - (self.noise.kl if self.noise else 0.0)

    @property
    def is_optimum(self) -> bool:
        """If the distribution cannot be distinguished from π*."""
        return self.excess_kl <= KL_TOLERANCE if self.noise is None else self.noise.p_value >= SIGNIFICANCE_LEVEL


def make_exact_row(
    cases: Sequence[EnumeratedCase],
    distributions: Sequence[np.ndarray],
    method: str,
    size: int | None = None,
    *,
    kind: str = TEST_TIME,
    flops: float,
    training_flops: float = 0.0,
) -> DualityRow:
    """Return the row of exact distributions, one per prompt."""
    measures = compute_mean_metrics(cases, distributions)
    frontier = compute_frontier_reward(cases, measures.kl_policy)
    return DualityRow(method, kind, size, measures, frontier, flops, training_flops)


def make_empirical_row(
    cases: Sequence[EnumeratedCase],
    distributions: Sequence[np.ndarray],
    method: str,
    size: int,
    *,
    noise_floor: NoiseFloor,
    flops: float,
) -> DualityRow:
    """Return the row of empirical distributions, one per prompt, of as many chains as the noise floor has samples."""
    measures = compute_mean_metrics(cases, distributions)
    noise = NoiseStatistics(
        kl=float(noise_floor.kl.mean()),
        kl_sd=float(noise_floor.kl.std(ddof=1)),
        tv=float(noise_floor.tv.mean()),
        p_value=noise_floor.compute_p_value(measures.kl_optimum),
    )
    return DualityRow(method, TEST_TIME, size, measures, None, flops, noise=noise)


def conclude_row(row: DualityRow, optimum: DistributionMetrics) -> str:
    """Say if a row's distribution is π*, and else how far from π* it is and in which direction."""
    if row.noise is not None and row.is_optimum:
        return f"samples π*: within the noise of as many draws of it (p = {row.noise.p_value:.2f})"
    if row.is_optimum:
        return f"is π* to {row.measures.kl_optimum:.3f} nats"
    distance = f"not π*: {row.excess_kl:.2f} nats off{'' if row.noise is None else ' beyond noise'}"
    comparison = f"KL(q‖π) {row.corrected_kl_policy:.2f} against {optimum.kl_policy:.2f}"
    if abs(row.corrected_kl_policy - optimum.kl_policy) <= KL_TOLERANCE:
        return f"{distance}; as far from π as π* is, {comparison}"
    direction = "overshoots" if row.corrected_kl_policy > optimum.kl_policy else "falls short"
    return f"{distance}; {direction}, {comparison}"


def conclude_method(rows: Sequence[DualityRow]) -> str:
    """Say from which row of a method on its distribution is π*, or else how near it comes and where it ends."""
    others = [index for index, row in enumerate(rows) if not row.is_optimum]
    first = others[-1] + 1 if others else 0
    if first < len(rows):
        start = f" from {rows[first].position_label} on" if first else ""
        return f"{rows[0].method}: π*{start}" + ("" if rows[first].noise is None else ", within noise")
    nearest, last = min(rows, key=lambda row: row.excess_kl), rows[-1]
    distance = f"{rows[0].method}: {nearest.excess_kl:.2f} nats off"
    if len(rows) == 1:
        return distance
    end = f"{last.excess_kl:.2f} at its end ({last.position_label})"
    return f"{distance} at its nearest ({nearest.position_label}), {end}"


def group_by_method(rows: Sequence[DualityRow]) -> dict[str, list[DualityRow]]:
    """Return the rows of each method in their order."""
    groups: dict[str, list[DualityRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    return groups


def conclude_final_points(rows: Sequence[DualityRow]) -> str:
    """Say which methods have the distribution π* at their last point."""
    last = [group[-1] for group in group_by_method(rows).values()]
    at_optimum = ", ".join(row.method for row in last if row.is_optimum) or "none"
    elsewhere = ", ".join(row.method for row in last if not row.is_optimum)
    return f"π* at the end: {at_optimum}" + (f". Elsewhere: {elsewhere}" if elsewhere else "")


def format_duality_table(rows: Sequence[DualityRow], optimum: DistributionMetrics) -> str:
    """Return the rows as a Markdown table, with π* in the first row."""
    headers = [
        *("distribution q", "E[r]", "most at that KL(q‖π)", "KL(q‖π)", "KL(q‖π*)", "noise", "TV(q, π*)", "noise"),
        *("FLOPs per answer", "FLOPs of training", "conclusion"),
    ]
    best = f"closed form: the largest E[r] − β·KL(q‖π), {optimum.regularized_reward:.3f}"
    lines = [["π*", *[f"{optimum.reward:.3f}"] * 2, f"{optimum.kl_policy:.3f}", "0", "", "0", "", "", "", best]]
    for row in rows:
        metrics, noise = row.measures, row.noise
        lines.append(
            [
                row.name,
                f"{metrics.reward:.3f}",
                "" if row.frontier_reward is None else f"{row.frontier_reward:.3f}",
                f"{max(row.corrected_kl_policy, 0.0):.3f}",
                f"{metrics.kl_optimum:.3f}",
                "" if noise is None else f"{noise.kl:.3f} ± {noise.kl_sd:.3f}",
                f"{metrics.tv_optimum:.3f}",
                "" if noise is None else f"{noise.tv:.3f}",
                format_si(row.flops),
                format_si(row.training_flops) if row.training_flops else "",
                conclude_row(row, optimum),
            ]
        )
    return format_table(headers, lines)


TABLE_NOTES = """\
Values are means over prompts, KL is in nats, and E[r] has the reward's unit. The distributions of best-of-N and of
trained policies are exact, by enumeration. Those of chains are empirical, which makes KL(q‖π*) too large. The noise
next to it is the KL of as many samples of π* (mean ± standard deviation), and p is the probability that these samples
have at least the row's KL. The KL(q‖π) of chains is given without that mean. "Most at that KL(q‖π)" is the reward of
π·exp(r/β') with the β' of the same KL to π, the largest reward possible. For every q, β·KL(q‖π*) is the difference to
the largest E[r] − β·KL(q‖π)."""


def format_duality_markdown(rows: Sequence[DualityRow], optimum: DistributionMetrics, facts: dict[str, Any]) -> str:
    """Return the page as Markdown.

    Args:
        facts: title, command, subject (a sentence about the world) and beta.
    """
    parts = [
        f"# {facts['title']}",
        f"    {facts['command']}",
        f"{facts['subject']} β = {facts['beta']:g}.",
        format_bullets(conclude_method(group) for group in group_by_method(rows).values()),
        format_duality_table(rows, optimum),
        TABLE_NOTES,
        "![KL to the optimum against FLOPs](duality.png)",
    ]
    return "\n\n".join(parts) + "\n"


def duality_to_json(rows: Sequence[DualityRow], optimum: DistributionMetrics, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the page's content for JSON."""
    entries = [asdict(row) | {"excess_kl": row.excess_kl, "conclusion": conclude_row(row, optimum)} for row in rows]
    return {"facts": facts, "optimum": asdict(optimum), "rows": entries}


def plot_duality(path: Path, rows: Sequence[DualityRow], facts: dict[str, Any]) -> None:
    """Plot KL(q‖π*) against FLOPs per answer, and for trained policies against FLOPs of training.

    For empirical distributions the mean noise is subtracted. Values within the noise of π* are drawn at its limit.
    """
    from duality_plots import make_duality_figure  # imports matplotlib, which the table does not need

    noises = [ONE_SIDED_Z_95 * row.noise.kl_sd for row in rows if row.noise is not None]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {TEST_TIME: {}, TRAINED_POLICY: {}}
    for row in rows:
        flops = row.flops if row.kind == TEST_TIME else row.training_flops
        limit = 0.0 if row.noise is None else ONE_SIDED_Z_95 * row.noise.kl_sd
        curves[row.kind].setdefault(row.method, []).append((flops, max(row.excess_kl, limit)))
    noise_kl = noises[0] if noises else None
    title = conclude_final_points(rows)
    figure = make_duality_figure(curves[TEST_TIME], curves[TRAINED_POLICY], noise_kl, title, facts["subject"])
    draft = path.with_name(path.stem + ".tmp.png")
    figure.savefig(draft)
    draft.replace(path)
