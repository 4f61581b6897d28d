"""Autocorrelation times against processes whose time is known, and the recipe."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import worlds
from mixing import count_needed_rounds, main
from mixing_statistics import (
    MixingStatistics,
    _compute_per_gflop_interval,
    collect_chain_rewards,
    compute_autocorrelation_time,
    measure_mixing,
)

from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_time_of_an_autoregressive_process(rho: float) -> None:
    """τ = (1 + ρ) / (1 − ρ)."""
    rng = np.random.default_rng(0)
    series = np.zeros((40, 6000))
    series[:, 0] = rng.normal(size=40) / np.sqrt(1 - rho**2)
    for step in range(1, series.shape[1]):
        series[:, step] = rho * series[:, step - 1] + rng.normal(size=40)
    assert compute_autocorrelation_time(series) == pytest.approx((1 + rho) / (1 - rho), rel=0.1)
    assert compute_autocorrelation_time(100 + 7 * series) == pytest.approx(compute_autocorrelation_time(series))


def test_what_never_changes_has_time_one() -> None:
    assert compute_autocorrelation_time(np.ones((3, 10))) == 1.0


def test_chains_are_read_from_their_traces(policy: Policy, scalar_reward: Reward, problems: list[Problem]) -> None:
    config = SearchConfig(
        solver="none", acceptance="metropolis", beta=1.0, max_rounds=12, top_k_candidates=16, max_new_tokens=6
    )
    traces = run_search(problems, policy=policy, reward=scalar_reward, config=config)
    for trace in traces:
        assert len(collect_chain_rewards(trace)) == 13 and collect_chain_rewards(trace)[-1] == trace.reward
        assert [r.reward_before for r in trace.revisions] == collect_chain_rewards(trace)[:-1]
    mixed = measure_mixing(traces)
    assert (mixed.num_chains, mixed.num_rounds, mixed.is_reliable) == (4, 12, False)
    assert mixed.num_stuck_chains == 0 and 0 < mixed.acceptance_rate < 1
    assert mixed.effective_samples == pytest.approx(48 / mixed.autocorrelation_time)
    assert mixed.effective_samples_per_gflop == pytest.approx(
        mixed.effective_samples / sum(trace.cost.flops for trace in traces) * 1e9
    )
    short = run_search(
        problems[:1], policy=policy, reward=scalar_reward, config=SearchConfig(solver="none", max_rounds=3)
    )
    worlds.refused(lambda: measure_mixing([*traces, *short]), "chains of 3 to 12 steps")
    worlds.refused(lambda: measure_mixing([]), "no chains")


def test_chains_that_never_moved_are_counted_and_are_worth_nothing(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    config = SearchConfig(solver="none", acceptance="metropolis", beta=1.0, max_rounds=12, max_new_tokens=6)
    moved = run_search(problems, policy=policy, reward=scalar_reward, config=config)
    still = [
        replace(one, revisions=[replace(revision, accepted=False) for revision in one.revisions]) for one in moved[:3]
    ]
    alone, both, none = measure_mixing(moved), measure_mixing([*moved, *still]), measure_mixing(still)
    assert (both.num_chains, both.num_stuck_chains, both.autocorrelation_time) == (7, 3, alone.autocorrelation_time)
    assert (
        both.effective_samples == alone.effective_samples
        and both.effective_samples_per_gflop < alone.effective_samples_per_gflop
    )
    assert (
        none.num_stuck_chains,
        none.autocorrelation_time,
        none.effective_samples,
        none.effective_samples_per_gflop,
    ) == (3, None, 0.0, 0.0)
    assert not none.is_reliable and json.dumps(asdict(none), allow_nan=False)


def test_the_interval_over_chains_holds_the_true_number() -> None:
    """… in most of 40 repetitions with 12 chains of an autoregressive process, whose chains cost 1 GFLOP each."""
    rng, rho, held = np.random.default_rng(1), 0.5, 0
    for _ in range(40):
        series = np.zeros((12, 1200))
        for step in range(1, series.shape[1]):
            series[:, step] = rho * series[:, step - 1] + rng.normal(size=12)
        low, high = _compute_per_gflop_interval(series, np.ones(12, dtype=bool), np.full(12, 1e9))
        held += low <= 1199 / 3 <= high and high < 2 * low
    assert held >= 34


def test_short_chains_are_run_again_up_to_a_limit() -> None:
    mixing = MixingStatistics(3, 0, 100, 0.5, 10.0, False, 30.0, 1.0, 0.0)
    assert count_needed_rounds(mixing, 0) == 0
    assert count_needed_rounds(mixing, 5000) == 600 and count_needed_rounds(mixing, 150) == 150


def test_the_recipe_measures_every_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    argv = [
        "--config",
        "recipes/tiny/mixing.yaml",
        "--output_dir",
        str(tmp_path),
        "--max_problems",
        "3",
        "--max_rounds",
        "4",
    ]
    main(argv)
    results = json.loads((tmp_path / "mixing.json").read_text())
    assert list(results) == [
        "no gradient, cut token",
        *(f"{p}, step size {s}" for p in ("direct", "mixture:0.5") for s in ("1", "0.5")),
    ]
    worlds.refused(lambda: main([*argv, "--acceptance", "greedy"]), "acceptance metropolis")
