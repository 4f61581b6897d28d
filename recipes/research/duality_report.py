"""How far laws are from π*, as a table and a page: test-time methods against trained policies at one β. Numpy only.

The claim under test (∇-Reasoner, arXiv 2603.04948, Theorem 4.1): sampling responses by −r/β − log π, and maximising
E[r] − β·KL over policies, are one problem, whose solution is π* ∝ π·exp(r/β). So samples of a right search are samples
of π*, and a policy trained right has π* as its law. The last column of the table says of each row whether it is so.
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

from nabla_trl.utils.formatting import format_si
from nabla_trl.utils.statistics import SIGNIFICANCE_LEVEL

KL_TOLERANCE = 0.1  # nats of KL(q‖π*) within which an exact law is called π*
ONE_SIDED_Z_95 = 1.645  # standard deviations that chance exceeds once in twenty
TEST_TIME, TRAINED_POLICY = "test time", "trained"


@dataclass(frozen=True)
class NoiseStatistics:
    """What a counted law would measure if it were counted from draws of π*: mean and standard deviation.

    Attributes:
        kl, kl_sd, tv: of KL(q‖π*) and total variation; `p_value` of the row's KL.
    """

    kl: float
    kl_sd: float
    tv: float
    p_value: float


@dataclass(frozen=True)
class DualityRow:
    """One law, mean over prompts.

    Attributes:
        method: rows of one method are points of one curve. `size`: samples, steps or rounds; None: has none.
        kind: TEST_TIME or TRAINED.
        frontier: the largest E[r] at the same KL(q‖π); None for counted laws, whose KL is biased.
        flops: per answer; `training_flops`: once.
        noise: of a law counted from chains; None where it is exact.
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
        return self.method if self.size is None else f"{self.method} @{self.size}"

    @property
    def position_label(self) -> str:
        """Where on its method's curve it stands."""
        return f"{format_si(self.training_flops, 'FLOPs')} of training" if self.size is None else str(self.size)

    @property
    def excess_kl(self) -> float:
        """KL(q‖π*) beyond what chance gives."""
        return self.measures.kl_optimum - (self.noise.kl if self.noise else 0.0)

    @property
    def corrected_kl_policy(self) -> float:
        """KL(q‖π); of a counted law less what chance adds, which is the same as to its KL(q‖π*)."""
        return self.measures.kl_policy - (self.noise.kl if self.noise else 0.0)

    @property
    def is_optimum(self) -> bool:
        """π*, as far as can be told."""
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
    """The row of laws that are known exactly, one per prompt."""
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
    """The row of laws that were counted from as many chains per prompt as the floor from draws."""
    measures = compute_mean_metrics(cases, distributions)
    kl, sd, tv = float(noise_floor.kl.mean()), float(noise_floor.kl.std(ddof=1)), float(noise_floor.tv.mean())
    return DualityRow(
        method,
        TEST_TIME,
        size,
        measures,
        None,
        flops,
        noise=NoiseStatistics(kl, sd, tv, noise_floor.compute_p_value(measures.kl_optimum)),
    )


def conclude_row(row: DualityRow, optimum: DistributionMetrics) -> str:
    """Whether a row's law is π*; if not, how far off it is and in which direction."""
    if row.noise is not None and row.is_optimum:
        return f"samples π*: within the noise of as many draws of it (p = {row.noise.p_value:.2f})"
    if row.is_optimum:
        return f"is π* to {row.measures.kl_optimum:.3f} nats"
    said = f"not π*: {row.excess_kl:.2f} nats off{'' if row.noise is None else ' beyond noise'}"
    against = f"KL(q‖π) {row.corrected_kl_policy:.2f} against {optimum.kl_policy:.2f}"
    if abs(row.corrected_kl_policy - optimum.kl_policy) <= KL_TOLERANCE:
        return f"{said}; as far from π as π* is, {against}"
    return f"{said}; {'overshoots' if row.corrected_kl_policy > optimum.kl_policy else 'falls short'}, {against}"


def conclude_method(rows: Sequence[DualityRow]) -> str:
    """Of one method's rows, in their order: from where on its law is π*, or how near it comes and where it ends."""
    wrong = [place for place, row in enumerate(rows) if not row.is_optimum]
    first = wrong[-1] + 1 if wrong else 0
    if first < len(rows):
        where = f" from {rows[first].position_label} on" if first else ""
        return f"{rows[0].method}: π*{where}" + ("" if rows[first].noise is None else ", within noise")
    nearest = min(rows, key=lambda row: row.excess_kl)
    said = f"{rows[0].method}: {nearest.excess_kl:.2f} nats off"
    if len(rows) == 1:
        return said
    return f"{said} at its nearest ({nearest.position_label}), {rows[-1].excess_kl:.2f} at its end ({rows[-1].position_label})"


def group_by_method(rows: Sequence[DualityRow]) -> dict[str, list[DualityRow]]:
    found: dict[str, list[DualityRow]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    return found


def conclude_final_points(rows: Sequence[DualityRow]) -> str:
    """Which methods have π* as their law at their last point."""
    last = [own[-1] for own in group_by_method(rows).values()]
    there = ", ".join(row.method for row in last if row.is_optimum) or "none"
    elsewhere = ", ".join(row.method for row in last if not row.is_optimum)
    return f"π* at the end: {there}" + (f". Elsewhere: {elsewhere}" if elsewhere else "")


def format_duality_table(rows: Sequence[DualityRow], optimum: DistributionMetrics) -> str:
    """Markdown; the closed form comes first."""
    lines = [
        "| law q | E[r] | most at that KL(q‖π) | KL(q‖π) | KL(q‖π*) | noise | TV(q, π*) | noise | FLOPs per answer "
        "| FLOPs of training | what it says |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
        f"| π* | {optimum.reward:.3f} | {optimum.reward:.3f} | {optimum.kl_policy:.3f} | 0 | | 0 | | | "
        f"| closed form: the largest E[r] − β·KL(q‖π), {optimum.regularized_reward:.3f} |",
    ]
    for row in rows:
        one, noise = row.measures, row.noise
        cells = [
            row.name,
            f"{one.reward:.3f}",
            "" if row.frontier_reward is None else f"{row.frontier_reward:.3f}",
            f"{max(row.corrected_kl_policy, 0.0):.3f}",
            f"{one.kl_optimum:.3f}",
            "" if noise is None else f"{noise.kl:.3f} ± {noise.kl_sd:.3f}",
            f"{one.tv_optimum:.3f}",
            "" if noise is None else f"{noise.tv:.3f}",
            format_si(row.flops),
            format_si(row.training_flops) if row.training_flops else "",
            conclude_row(row, optimum),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TABLE_NOTES = """\
Means over prompts; KL in nats; E[r] in the reward's own unit. Laws of best-of-N and of trained policies are exact, by
enumeration. Those of chains are counted, which makes KL(q‖π*) too large: the noise beside it is what as many draws of
π* measure (mean ± standard deviation), p the chance that they measure at least as much; their KL(q‖π) is given less
that mean. "Most at that KL(q‖π)" is the reward of π·exp(r/β') with the β' that is as far from π: no law has more. For
every q, β·KL(q‖π*) is what it lacks of the largest E[r] − β·KL(q‖π)."""


def format_duality_markdown(rows: Sequence[DualityRow], optimum: DistributionMetrics, facts: dict[str, Any]) -> str:
    """Markdown.

    Args:
        facts: title, command, subject (a sentence on the world) and beta.
    """
    parts = [
        f"# {facts['title']}",
        f"    {facts['command']}",
        f"{facts['subject']} β = {facts['beta']:g}.",
        "\n".join(f"- {conclude_method(own)}" for own in group_by_method(rows).values()),
        format_duality_table(rows, optimum),
        TABLE_NOTES,
        "![KL to the optimum against FLOPs](duality.png)",
    ]
    return "\n\n".join(parts) + "\n"


def duality_to_json(rows: Sequence[DualityRow], optimum: DistributionMetrics, facts: dict[str, Any]) -> dict[str, Any]:
    """For JSON."""
    listed = [asdict(row) | {"excess": row.excess_kl, "verdict": conclude_row(row, optimum)} for row in rows]
    return {"facts": facts, "optimum": asdict(optimum), "rows": listed}


def plot_duality(path: Path, rows: Sequence[DualityRow], facts: dict[str, Any]) -> None:
    """KL(q‖π*) against FLOPs: those per answer at test time, those of training for trained policies.

    Of counted laws what lies beyond noise is drawn, down to where nothing can be told from π*.
    """
    from duality_plots import make_duality_figure  # here, so that a table does not load matplotlib

    noises = [ONE_SIDED_Z_95 * row.noise.kl_sd for row in rows if row.noise is not None]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {TEST_TIME: {}, TRAINED_POLICY: {}}
    for row in rows:
        spent = row.flops if row.kind == TEST_TIME else row.training_flops
        least = 0.0 if row.noise is None else ONE_SIDED_Z_95 * row.noise.kl_sd
        curves[row.kind].setdefault(row.method, []).append((spent, max(row.excess_kl, least)))
    draft = path.with_name(path.stem + ".tmp.png")
    noise = noises[0] if noises else None
    make_duality_figure(
        curves[TEST_TIME], curves[TRAINED_POLICY], noise, conclude_final_points(rows), facts["subject"]
    ).savefig(draft)
    draft.replace(path)
