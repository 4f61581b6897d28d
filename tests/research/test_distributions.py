"""The optimum, best-of-N and distances between laws, against identities, bounds and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import worlds
from distributions import (
    EnumeratedCase,
    compute_empirical_distribution,
    compute_frontier_reward,
    compute_kl,
    compute_mean_metrics,
    compute_total_variation,
    estimate_noise_floor,
)

from nabla_trl.evaluation.kl import compute_best_of_n_kl_bound


def make_case(size: int = 40, beta: float = 0.7, seed: int = 0, *, ties: bool = False) -> EnumeratedCase:
    rng = np.random.default_rng(seed)
    scores = rng.normal(scale=1.5, size=size)
    rewards = rng.normal(size=size)
    return EnumeratedCase(scores - np.logaddexp.reduce(scores), rewards.round(0) if ties else rewards, beta)


@pytest.fixture
def case() -> EnumeratedCase:
    return make_case()


def test_the_gap_in_the_objective_is_the_divergence_from_the_optimum(case: EnumeratedCase) -> None:
    """β·KL(q‖π*) = β·log Z − J(q) for every q, so π* has the largest J."""
    rng = np.random.default_rng(1)
    assert case.optimum_probs.sum() == pytest.approx(1)
    for law in [*rng.dirichlet(np.full(40, 0.3), size=20), case.policy_probs, case.optimum_probs]:
        one = case.compute_metrics(law)
        assert case.beta * one.kl_optimum == pytest.approx(
            case.beta * case.log_partition - one.regularized_reward, abs=1e-12
        )
        assert one.tv_optimum**2 <= one.kl_optimum / 2 + 1e-12  # Pinsker


def test_a_law_may_leave_responses_out_but_not_add_any(case: EnumeratedCase) -> None:
    one = np.zeros(40)
    one[3] = 1.0
    assert case.compute_metrics(one).kl_policy == pytest.approx(-case.logp[3])
    assert compute_kl(np.array([0.5, 0.5]), np.array([0.0, -np.inf])) == np.inf
    assert compute_total_variation(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_best_of_n_against_simulation(count: int, ties: bool) -> None:
    case, draws = make_case(12, ties=ties), 200_000
    pool = np.random.default_rng(0).choice(12, p=case.policy_probs, size=(draws, count))
    chosen = pool[np.arange(draws), case.rewards[pool].argmax(1)]  # the first of equals
    simulated = np.bincount(chosen, minlength=12) / draws
    assert compute_total_variation(simulated, case.compute_best_of_n_distribution(count)) < 0.005
    assert count > 1 or compute_total_variation(case.policy_probs, case.compute_best_of_n_distribution(1)) < 1e-12


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_keeps_within_its_bound(ties: bool) -> None:
    for count in (1, 2, 4, 16, 256):
        for seed in range(5):
            moved = make_case(200, seed=seed, ties=ties).compute_metrics(
                make_case(200, seed=seed, ties=ties).compute_best_of_n_distribution(count)
            )
            assert -1e-12 < moved.kl_policy <= compute_best_of_n_kl_bound(count) + 1e-12
    fine = EnumeratedCase(np.full(20_000, -np.log(20_000)), np.arange(20_000.0), 1.0)
    assert fine.compute_metrics(fine.compute_best_of_n_distribution(8)).kl_policy == pytest.approx(
        compute_best_of_n_kl_bound(8), abs=1e-3
    )  # it is tight


def test_best_of_n_of_hardly_possible_responses() -> None:
    """N·m·F^(N−1) for a mass m of 1e-14, where F^N − (F − m)^N would be rounding alone."""
    case = EnumeratedCase(np.log([0.7, 1e-14, 0.3 - 1e-14]), np.array([0.0, 1.0, 2.0]), 1.0)
    assert case.compute_best_of_n_distribution(3)[1] == pytest.approx(3 * 1e-14 * 0.7**2, rel=1e-6)


def test_no_law_is_above_the_frontier() -> None:
    """With one β' for all prompts, which π* itself has; best-of-N gets less reward for its KL."""
    cases = [make_case(seed=seed) for seed in range(3)]
    best = compute_mean_metrics(cases, [case.optimum_probs for case in cases])
    assert compute_frontier_reward(cases, best.kl_policy) == pytest.approx(best.reward, abs=1e-6)
    for count in (2, 4, 8):
        one = compute_mean_metrics(cases, [case.compute_best_of_n_distribution(count) for case in cases])
        assert one.reward < compute_frontier_reward(cases, one.kl_policy)


def test_the_noise_of_counted_laws_tells_the_optimum_from_others() -> None:
    cases, rng = [make_case(seed=seed) for seed in range(2)], np.random.default_rng(5)
    floor = estimate_noise_floor(cases, 300)

    def drawn(laws: list[np.ndarray]) -> float:
        return compute_mean_metrics(
            cases, [compute_empirical_distribution(rng.multinomial(300, law)) for law in laws]
        ).kl_optimum

    p_values = [floor.compute_p_value(drawn([case.optimum_probs for case in cases])) for _ in range(40)]
    assert 0.35 < np.mean(p_values) < 0.65  # uniform
    assert floor.compute_p_value(drawn([case.policy_probs for case in cases])) == 1 / 200
    assert estimate_noise_floor(cases, 3000).kl.mean() < floor.kl.mean() / 5


def test_what_is_no_case_is_refused() -> None:
    worlds.refused(
        lambda: EnumeratedCase(np.log([0.5, 0.5]), np.array([0.0, np.nan]), 1.0), "1 responses have no finite reward"
    )
    worlds.refused(lambda: EnumeratedCase(np.log([0.5, 0.4]), np.zeros(2), 1.0), "sum to 0.9")
