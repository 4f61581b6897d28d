"""How fast Metropolis chains mix: acceptance, autocorrelation time, effective samples per FLOP. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nabla_trl.traces.schema import Trace


@dataclass(frozen=True)
class MixingStatistics:
    """What C chains of R steps did.

    Attributes:
        stuck: chains that never moved.
        accepted: share of the proposals.
        autocorrelation: integrated autocorrelation time of the reward in the chains that moved, in steps; 1 =
            independent samples; None where none moved. A chain much shorter than 50 times that is too short to tell
            (Sokal 1997), and `reliable` says so.
        effective: independent samples that all steps are worth, those of stuck chains none; `per_gflop` of model work,
            that of stuck chains included.
        reward: mean over the second halves of the chains.
    """

    num_chains: int
    num_stuck_chains: int
    num_rounds: int
    acceptance_rate: float
    autocorrelation_time: float | None
    is_reliable: bool
    effective_samples: float
    effective_samples_per_gflop: float
    mean_reward: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_mixing(traces: Sequence[Trace]) -> MixingStatistics:
    """Read equally long chains from their traces (global proposals: one a round).

    Raises:
        ValueError: no traces, one with an error, or chains of different lengths.
    """
    failed = next((trace for trace in traces if trace.error is not None), None)
    if failed is not None or not traces:
        raise ValueError(
            "there are no chains to measure" if failed is None else f"{failed.problem_id}: {failed.error}"
        )
    series = [collect_chain_rewards(trace) for trace in traces]
    lengths = {len(one) for one in series}
    if len(lengths) > 1 or lengths == {1}:
        raise ValueError(f"chains of {min(lengths) - 1} to {max(lengths) - 1} steps cannot be measured together")
    table = np.array(series)
    moved = np.array([any(revision.accepted for revision in trace.revisions) for trace in traces])
    time = compute_autocorrelation_time(table[moved]) if moved.any() else None
    steps = table.shape[1] - 1
    effective = 0.0 if time is None else int(moved.sum()) * steps / time
    flops = sum(trace.cost.flops for trace in traces)
    return MixingStatistics(
        num_chains=len(table),
        num_stuck_chains=int((~moved).sum()),
        num_rounds=steps,
        acceptance_rate=float(np.mean([revision.accepted for trace in traces for revision in trace.revisions])),
        autocorrelation_time=time,
        is_reliable=time is not None and steps >= 50 * time,
        effective_samples=effective,
        effective_samples_per_gflop=effective / (flops / 1e9),
        mean_reward=float(table[:, table.shape[1] // 2 :].mean()),
    )


def collect_chain_rewards(trace: Trace) -> list[float]:
    """Reward of the state at the start and after each step."""
    values = [trace.reward_initial]
    for revision in trace.revisions:
        values.append(revision.reward_after if revision.accepted else values[-1])
    return values


def compute_autocorrelation_time(series_CR: np.ndarray) -> float:
    """τ = 1 + 2 Σ_k ρ_k of chains [C, R] of one quantity, ρ pooled over the chains about their own means.

    The sum ends where a pair ρ_2k + ρ_2k+1 turns negative (Geyer 1992, initial positive sequence); it begins after
    the first half, so that the way from the start does not count. A quantity that never changes has τ = 1.
    """
    late = series_CR[:, series_CR.shape[1] // 2 :]
    centred = late - late.mean(axis=1, keepdims=True)
    length = centred.shape[1]
    size = 2 ** int(np.ceil(np.log2(2 * length)))
    power = np.abs(np.fft.rfft(centred, size, axis=1)) ** 2
    covariance = np.fft.irfft(power, size, axis=1)[:, :length].mean(axis=0) / length
    if covariance[0] <= 0:
        return 1.0
    rho = covariance / covariance[0]
    pairs = rho[: 2 * (length // 2)].reshape(-1, 2).sum(axis=1)
    stop = int(np.argmax(pairs < 0)) if (pairs < 0).any() else len(pairs)
    return max(1.0, float(2 * pairs[:stop].sum() - 1))
