"""Autocorrelation times against processes whose time is known, and the recipe."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import worlds
from mixing_statistics import autocorrelation_time, measure, rewards

from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.loop import solve
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
    assert autocorrelation_time(series) == pytest.approx((1 + rho) / (1 - rho), rel=0.1)
    assert autocorrelation_time(100 + 7 * series) == pytest.approx(autocorrelation_time(series))


def test_what_never_changes_has_time_one() -> None:
    assert autocorrelation_time(np.ones((3, 10))) == 1.0


def test_chains_are_read_from_their_traces(policy: Policy, scalar_reward: Reward, problems: list[Problem]) -> None:
    config = ReasonerConfig(
        solver="none", acceptance="metropolis", beta=1.0, rounds=12, candidates=16, max_new_tokens=6
    )
    traces = solve(problems, policy=policy, reward=scalar_reward, config=config)
    for trace in traces:
        assert len(rewards(trace)) == 13 and rewards(trace)[-1] == trace.reward
        assert [r.reward_before for r in trace.revisions] == rewards(trace)[:-1]
    mixed = measure(traces)
    assert (mixed.chains, mixed.steps, mixed.reliable) == (4, 12, False)
    assert mixed.stuck == 0 and 0 < mixed.accepted < 1
    assert mixed.effective == pytest.approx(48 / mixed.autocorrelation)
    assert mixed.per_gflop == pytest.approx(mixed.effective / sum(trace.cost.flops for trace in traces) * 1e9)
    short = solve(problems[:1], policy=policy, reward=scalar_reward, config=ReasonerConfig(solver="none", rounds=3))
    worlds.refused(lambda: measure([*traces, *short]), "chains of 3 to 12 steps")
    worlds.refused(lambda: measure([]), "no chains")


def test_chains_that_never_moved_are_counted_and_are_worth_nothing(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    config = ReasonerConfig(solver="none", acceptance="metropolis", beta=1.0, rounds=12, max_new_tokens=6)
    moved = solve(problems, policy=policy, reward=scalar_reward, config=config)
    still = [
        replace(one, revisions=[replace(revision, accepted=False) for revision in one.revisions]) for one in moved[:3]
    ]
    alone, both, none = measure(moved), measure([*moved, *still]), measure(still)
    assert (both.chains, both.stuck, both.autocorrelation) == (7, 3, alone.autocorrelation)
    assert both.effective == alone.effective and both.per_gflop < alone.per_gflop
    assert (none.stuck, none.autocorrelation, none.effective, none.per_gflop) == (3, None, 0.0, 0.0)
    assert not none.reliable and json.dumps(none.to_dict(), allow_nan=False)


def test_the_recipe_measures_every_proposal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("mixing_recipe", ROOT / "recipes" / "research" / "mixing.py")
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["mixing_recipe"] = recipe
    spec.loader.exec_module(recipe)
    monkeypatch.chdir(ROOT)
    argv = ["--config", "recipes/tiny/mixing.yaml", "--output_dir", str(tmp_path), "--limit", "3", "--rounds", "4"]
    recipe.main(argv)
    found = json.loads((tmp_path / "mixing.json").read_text())
    assert list(found) == ["no gradient", *(f"{p}, step {s}" for p in ("direct", "mixture:0.5") for s in ("1", "0.5"))]
    worlds.refused(lambda: recipe.main([*argv, "--acceptance", "greedy"]), "acceptance metropolis")
