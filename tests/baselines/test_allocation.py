"""One budget over many problems: gains against closed forms and simulation, and a world whose best split is known."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import worlds
from scipy import stats

from nabla_trl.baselines import allocation
from nabla_trl.baselines.allocation import draw_allocated_pool, estimate_vote_gains
from nabla_trl.baselines.sampling import PooledResponse, PoolEntry, draw_pool
from nabla_trl.engine.allocation import MAX_ALLOCATION_RATIO, allocate, estimate_reward_gains
from nabla_trl.evaluation.method import Method, parse_methods
from nabla_trl.evaluation.plan import EvaluationSetup, check_method_options, plan_jobs
from nabla_trl.models.flops import Cost
from nabla_trl.models.options import Sampling
from nabla_trl.search.batches import run_search_with_shared_budget
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem


class WrittenWorld:
    """Problems whose responses are written down: (answer, reward) of response 0, 1, 2, …

    Args:
        flops: FLOPs of a response to each problem (default: 1).
    """

    def __init__(self, *responses, flops=None):
        self.written, self.flops = responses, flops or [1.0] * len(responses)
        problems = [Problem(id=f"p{number}", question="?") for number in range(len(responses))]
        self.entries = [PoolEntry(problem, [], [], Cost(), Cost()) for problem in problems]

    def draw(self, counts):
        counts = [0 if entry.error else count for entry, count in zip(self.entries, counts, strict=True)]
        for entry, written, flops, count in zip(self.entries, self.written, self.flops, counts, strict=True):
            first = len(entry.responses)
            for answer, reward in written[first : first + count]:
                costs = Cost(flops=flops), Cost()
                entry.responses.append(PooledResponse([1], reward, answer, -1.0, *costs))

    def allocate(self, max_flops, *, with_reward=True, pilot=4):
        estimate = allocation.build_gain_estimator(with_reward, 1.0)
        allocate(self.draw, self.count, lambda: estimate(self.entries), max_flops=max_flops, pilot=pilot)
        return [len(entry.responses) for entry in self.entries]

    def count(self):
        counts = np.array([len(entry.responses) for entry in self.entries])
        return counts, counts * np.array(self.flops)


def entry(*responses):
    """Return a problem with these responses."""
    world = WrittenWorld(responses)
    world.draw([len(responses)])
    return world.entries[0]


# --- gains --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second", "others"), [(2, 2, 0), (3, 1, 2), (5, 0, 0), (1, 1, 6)])
def test_the_gain_of_votes_is_that_of_a_simulation(first, second, others):
    rng = np.random.default_rng(0)
    draws = 60_000
    chances = rng.dirichlet((first + 1, second + 1, others + 1), draws)
    gains = []
    for count in (1, 4, allocation.HORIZON):
        votes = rng.multinomial(count, chances)
        rise = np.maximum(second + votes[:, 1] - first - votes[:, 0], 0) / (first + second + others + 3 + count)
        gains.append(rise.mean() / count)
    best = allocation.compute_vote_gain(first, second, others)
    assert best >= max(gains) * 0.95
    if first == second:
        assert best == pytest.approx(gains[0], rel=0.05), "a tie is broken by a single vote"


def test_the_beta_binomial_is_the_reference():
    for trials, a, b in ((5, 3, 2), (16, 1, 9)):
        ours = [allocation.compute_beta_binomial(k, trials, a, b) for k in range(trials + 1)]
        assert ours == pytest.approx(stats.betabinom(trials, a, b).pmf(range(trials + 1)))


def test_a_close_vote_gains_more_than_a_safe_one():
    close, safe, hopeless = (allocation.compute_vote_gain(*votes) for votes in ((4, 4, 0), (8, 0, 0), (1, 1, 6)))
    assert close > hopeless > safe > 0


def test_the_gain_of_a_reward_is_its_closed_form():
    """Rewards 0 and 4 are equally likely. Only the problem that has seen no 4 can rise, by tanh(2)/2/(n + 1)."""
    rewards = [[0.0, 0.0], [4.0, 4.0]]
    assert estimate_reward_gains(rewards, 1.0) == pytest.approx([math.tanh(2) / 2 / 3, 0.0])


def test_rewards_that_are_no_numbers_gain_nothing_and_unreadable_ones_something():
    gains = estimate_reward_gains([[math.nan], [-math.inf], [1.0], [-1.0]], 1.0)
    assert gains[0] == gains[2] == 0 and gains[1] > gains[3] > 0
    assert estimate_reward_gains([[math.nan]], 1.0) == [0.0]


# --- a world whose best split is known ------------------------------------------------------------------


def easy_and_hard(num_easy, successes_at):
    """Easy problems are right at once. A hard one is right at one response only, and a reward of 1 says so."""
    easy = [[("7", 1.0)] * 99] * num_easy
    hard = [[("7", 1.0) if index == at else (f"x{index}", -1.0) for index in range(99)] for at in successes_at]
    return WrittenWorld(*easy, *hard)


def test_all_of_the_budget_goes_where_the_reward_can_still_rise():
    """Best is: nothing more for what has the highest reward, and equal shares for all others until they have it."""
    successes_at = [5, 7, 9, 11, 8, 6, 10, 11]
    counts = easy_and_hard(8, successes_at).allocate(16 * 8)
    assert counts[:8] == [4] * 8, "the pilot, and no more"
    assert counts[8:] == [at + 1 for at in successes_at], "each ends with its right response"
    # A uniform split of 8 each finds the right response of the problems that have it among their first 8.
    assert sum(at < 8 for at in successes_at) == 3
    assert sum(counts) == 32 + sum(at + 1 for at in successes_at) < 16 * 8


def test_the_budget_is_a_limit_and_so_is_the_share_of_a_problem():
    """A uniform split of 128 FLOPs draws 8 responses to each of 16 problems."""
    assert easy_and_hard(12, [90] * 4).allocate(16 * 8) == [4] * 12 + [20] * 4
    assert easy_and_hard(15, [90]).allocate(16 * 8) == [4] * 15 + [8 * MAX_ALLOCATION_RATIO]


def test_votes_go_to_what_is_undecided():
    safe = [("1", 0.0)] * 99
    undecided = [("1", 0.0), ("2", 0.0)] * 50
    counts = WrittenWorld(safe, safe, safe, undecided).allocate(4 * 8, with_reward=False)
    assert counts[3] > 2 * max(counts[:3]) and sum(counts) == 32


def test_cheap_responses_come_first_at_equal_gain():
    hard = [("1", -1.0)] * 99
    counts = WrittenWorld(hard, hard, [("1", 1.0)] * 99, flops=[4.0, 1.0, 1.0]).allocate(48.0, pilot=2)
    assert counts[1] > 2 * counts[0] > 2 and counts[2] == 2


@pytest.mark.parametrize(("max_flops", "counts"), [(0.5, [1, 1, 1]), (3.0, [1, 1, 1]), (5.9, [1, 1, 3])])
def test_a_budget_below_the_pilot_draws_at_least_one_response_each(max_flops, counts):
    assert easy_and_hard(2, [9]).allocate(max_flops) == counts


def test_problems_that_cannot_be_run_get_nothing():
    world = easy_and_hard(1, [9, 9])
    world.entries[1] = replace(world.entries[1], error="too long")
    counts = world.allocate(16.0)
    assert counts[1] == 0 and counts[2] > counts[0] > 0
    world.entries[:] = [replace(one, error="too long") for one in world.entries]
    world.allocate(16.0)


# --- with models ----------------------------------------------------------------------------------------


def test_responses_are_those_of_any_pool_whatever_the_batch(problems, policy, scalar_reward):
    shared = {"policy": policy, "reward": scalar_reward, "sampling": Sampling(max_new_tokens=6), "seed": 3}
    whole = draw_pool(problems, 16, **shared)
    max_flops = sum(one.compute_cost().flops for one in whole.entries) / 4
    estimate = allocation.build_gain_estimator(True, 1.0)
    pools = [
        allocation.draw_allocated_pool(problems, estimate, max_flops=max_flops, batch_size=size, **shared)
        for size in (1, 64)
    ]
    for pool in pools:
        for one, reference in zip(pool.entries, whole.entries, strict=True):
            ids = [response.response_ids for response in one.responses]
            assert ids == [response.response_ids for response in reference.responses[: len(ids)]]
            assert one.policy_cache is None
        assert sum(one.compute_cost().flops for one in pool.entries) <= 1.1 * max_flops
    assert len({tuple(len(one.responses) for one in pool.entries) for pool in pools}) == 1


def test_the_methods_run_at_a_budget_of_all_problems(problems, policy, scalar_reward):
    names = ["best_of_4", *(f"{name}@best_of_4" for name in ("allocated_vote", "allocated_best_of"))]
    names += ["allocated_weighted_best_of@best_of_4", "allocated_nabla@best_of_4", "allocated_control@best_of_4"]
    assert parse_methods(",".join(names)) == names
    setup = EvaluationSetup(policy, scalar_reward, SearchConfig(max_new_tokens=6), (0,))
    mean_flops = {}
    best_of, *jobs = stepwise(plan_jobs(names, setup, {}, mean_flops.__getitem__), problems, mean_flops)
    assert [job.needs_all_problems for job, _ in (best_of, *jobs)] == [False, *[True] * 5]
    for job, traces in jobs:
        assert [trace.problem_id for trace in traces] == [problem.id for problem in problems]
        assert {trace.method for trace in traces} == set(job.methods)
        assert sum(trace.cost.flops for trace in traces) <= 1.1 * mean_flops["best_of_4"] * len(problems)
        has_reward_cost = any("reward/forward" in trace.cost.tokens for trace in traces)
        assert has_reward_cost == Method.parse(job.methods[0]).needs_reward


def test_the_reward_is_charged_even_where_no_problem_gets_a_second_response(problems, policy, scalar_reward):
    names = ["best_of_1", *(f"{name}@best_of_1" for name in ("allocated_best_of", "allocated_weighted_best_of"))]
    setup = EvaluationSetup(policy, scalar_reward, SearchConfig(max_new_tokens=6), (0,))
    single, *allocated = stepwise(plan_jobs(names, setup, {}, (mean_flops := {}).__getitem__), problems, mean_flops)
    for _, traces in allocated:
        for trace, one in zip(traces, single[1], strict=True):
            assert trace.response_ids == one.response_ids and trace.cost.flops > one.cost.flops


def stepwise(jobs, problems, mean_flops):
    """Run each job before the next one is planned, and note what its first method costs."""
    for job in jobs:
        traces = job.run(problems, 0)
        mean_flops[job.methods[0]] = sum(trace.cost.flops for trace in traces) / len(problems)
        yield job, traces


def test_problems_of_one_budget_have_ids_of_their_own(problems, policy, scalar_reward):
    twice, shared = [problems[0], problems[0]], {"policy": policy, "reward": scalar_reward, "max_flops": 1e9}
    pool_options = {"sampling": Sampling(max_new_tokens=8), "estimate_gains": estimate_vote_gains}
    with pytest.raises(ValueError, match="occurs 2 times"):
        run_search_with_shared_budget(twice, config=SearchConfig(max_new_tokens=8), **shared)
    with pytest.raises(ValueError, match="occurs 2 times"):
        draw_allocated_pool(twice, **pool_options, **shared)


def test_a_search_that_no_budget_may_end_is_refused_before_models_are_loaded():
    config = SearchConfig(acceptance="metropolis", max_rounds=4)
    check = partial(check_method_options, ["allocated_nabla@0.5"], policy_labels=[], has_better_model=False)
    worlds.refused(lambda: check(config=config), "allocated_nabla@0.5: metropolis samples are biased")
    check(config=replace(config, select="vote"))


@pytest.mark.parametrize("name", ["allocated_vote", "allocated_vote_8", "sft_allocated_vote@0.5"])
def test_an_allocated_method_needs_a_budget_and_the_base_policy(name):
    worlds.refused(lambda: parse_methods(f"best_of_16,{name}"), "unknown method")


def test_what_an_allocated_method_may_choose_among_is_known():
    assert Method.parse("allocated_best_of@best_of_8").selection_size == 8 * MAX_ALLOCATION_RATIO
    assert Method.parse("allocated_vote@best_of_8").selection_size == 1
