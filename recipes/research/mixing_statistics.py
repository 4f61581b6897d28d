"""Statistics of mixing Metropolis chains: acceptance rate, autocorrelation time and effective samples. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nabla_trl.traces.schema import Trace


@dataclass(frozen=True)
class MixingStatistics:
    """Statistics of chains of the same length.

    Attributes:
        num_stuck_chains: chains that never moved.
        acceptance_rate: fraction of the proposals that were accepted.
        autocorrelation_time: integrated autocorrelation time of the reward in the chains that moved, in rounds.
            1 means independent samples, and None that no chain moved.
        is_reliable: the chains are at least 50 autocorrelation times long. The time of shorter chains is uncertain
            (Sokal 1997).
        effective_samples: number of independent samples with the same information. Stuck chains give none.
        effective_samples_per_gflop: per GFLOP of all chains, including stuck ones.
        mean_reward: mean over the second halves of the chains.
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


def measure_mixing(traces: Sequence[Trace]) -> MixingStatistics:
    """Return the statistics of the chains of traces with global proposals, which make one proposal a round.

    Raises:
        ValueError: if there are no traces, a trace has an error, or the chains have different lengths.
    """
    failed = next((trace for trace in traces if trace.error is not None), None)
    if failed is not None or not traces:
        raise ValueError(
            "there are no chains to measure" if failed is None else f"{failed.problem_id}: {failed.error}"
        )
    series = [collect_chain_rewards(trace) for trace in traces]
    lengths = set(map(len, series))
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
    """Return the rewards of the first state and of the state after each round."""
    values = [trace.reward_initial]
    for revision in trace.revisions:
        values.append(revision.reward_after if revision.accepted else values[-1])
    return values


def compute_autocorrelation_time(series_CR: np.ndarray) -> float:
    """Return τ = 1 + 2 Σ_k ρ_k of C chains of one quantity over R rounds.

    The autocorrelations ρ are pooled over chains, each around its own mean. The first half of a chain is left out as
    burn-in. The sum ends where ρ_2k + ρ_2k+1 turns negative (Geyer 1992, initial positive sequence). A quantity that
    never changes has τ = 1.
    """
    late = series_CR[:, series_CR.shape[1] // 2 :]
    centered = late - late.mean(axis=1, keepdims=True)
    length = centered.shape[1]
    size = 2 ** int(np.ceil(np.log2(2 * length)))
    power = np.abs(np.fft.rfft(centered, size, axis=1)) ** 2
    covariance = np.fft.irfft(power, size, axis=1)[:, :length].mean(axis=0) / length
    if covariance[0] <= 0:
        return 1.0
    rho = covariance / covariance[0]
    pairs = rho[: 2 * (length // 2)].reshape(-1, 2).sum(axis=1)
    stop = int(np.argmax(pairs < 0)) if (pairs < 0).any() else len(pairs)
    return max(1.0, float(2 * pairs[:stop].sum() - 1))
