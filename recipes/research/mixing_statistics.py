"""Statistics of mixing Metropolis chains: acceptance rate, autocorrelation time and effective samples. Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nabla_trl.traces.schema import Trace
from nabla_trl.utils import statistics


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
        per_gflop_interval: its 95% interval over chains, a jackknife of its logarithm. None of fewer than two chains.
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
    per_gflop_interval: tuple[float, float] | None = None


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
    flops = np.array([trace.cost.flops for trace in traces])
    return MixingStatistics(
        num_chains=len(table),
        num_stuck_chains=int((~moved).sum()),
        num_rounds=steps,
        acceptance_rate=float(np.mean([revision.accepted for trace in traces for revision in trace.revisions])),
        autocorrelation_time=time,
        is_reliable=time is not None and steps >= 50 * time,
        effective_samples=effective,
        effective_samples_per_gflop=effective / (float(flops.sum()) / 1e9),
        mean_reward=float(table[:, table.shape[1] // 2 :].mean()),
        per_gflop_interval=_compute_per_gflop_interval(table, moved, flops) if moved.sum() > 1 else None,
    )


def _compute_per_gflop_interval(table_CR: np.ndarray, moved_C: np.ndarray, flops_C: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of effective samples per GFLOP over chains, by the jackknife of its logarithm.

    The autocorrelations are summed up to the same lag in all of it.
    """
    covariance_CL = np.zeros((len(table_CR), table_CR.shape[1] - table_CR.shape[1] // 2))
    covariance_CL[moved_C] = _compute_autocovariance(table_CR[moved_C])
    num_lags = _count_summed_lags(covariance_CL.sum(axis=0))
    indices = np.arange(len(table_CR))
    logs = []
    for left_out in [None, *indices]:
        kept = indices != left_out
        time = _sum_autocorrelations(covariance_CL[kept].sum(axis=0), num_lags)
        effective = moved_C[kept].sum() * (table_CR.shape[1] - 1) / time
        logs.append(np.log(effective / (flops_C[kept].sum() / 1e9)))
    estimate, without = logs[0], np.array(logs[1:])
    error = np.sqrt((len(without) - 1) * np.mean((without - without.mean()) ** 2))
    margin = statistics.get_t_quantile(len(without) - 1) * error
    return float(np.exp(estimate - margin)), float(np.exp(estimate + margin))


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
    covariance = _compute_autocovariance(series_CR).mean(axis=0)
    return _sum_autocorrelations(covariance, _count_summed_lags(covariance))


def _compute_autocovariance(series_CR: np.ndarray) -> np.ndarray:
    """Return the autocovariance of the second half of each chain, by lag [C, L]."""
    late = series_CR[:, series_CR.shape[1] // 2 :]
    centered = late - late.mean(axis=1, keepdims=True)
    length = centered.shape[1]
    size = 2 ** int(np.ceil(np.log2(2 * length)))
    power = np.abs(np.fft.rfft(centered, size, axis=1)) ** 2
    return np.fft.irfft(power, size, axis=1)[:, :length] / length


def _count_summed_lags(covariance_L: np.ndarray) -> int:
    """Return how many lags are summed: the pairs of successive lags before the first pair that is negative."""
    pairs = covariance_L[: 2 * (len(covariance_L) // 2)].reshape(-1, 2).sum(axis=1)
    return 2 * (int(np.argmax(pairs < 0)) if (pairs < 0).any() else len(pairs))


def _sum_autocorrelations(covariance_L: np.ndarray, num_lags: int) -> float:
    if covariance_L[0] <= 0:
        return 1.0
    return max(1.0, float(2 * covariance_L[:num_lags].sum() / covariance_L[0] - 1))
