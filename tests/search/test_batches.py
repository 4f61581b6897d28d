"""Searches batch by batch: the problems of a batch may share a budget, in whatever processes they are searched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from scipy import stats

from nabla_trl.baselines.allocation import count_flops
from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.search.batches import run_search_with_shared_budget
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search, run_search
from nabla_trl.tasks.problem import Problem


def test_rounds_go_to_searches_whose_reward_is_low(problems, policy, scalar_reward):
    """An even share limits each search. One budget for all is spent unevenly, most on a search of a low reward."""
    config = SearchConfig(max_new_tokens=8, patience=2, batch_size=2, candidate_min_p=0.0)
    shared = {"policy": policy, "reward": scalar_reward}
    share = sum(trace.cost.flops for trace in run_search(problems, config=replace(config, max_rounds=6), **shared))
    run = partial(run_search_with_shared_budget, problems, max_flops=share, **shared)
    traces = run(config=config)
    costs, rewards = [trace.cost.flops for trace in traces], [trace.reward for trace in traces]
    assert 0.8 * share < sum(costs) <= 1.1 * share
    assert max(costs) > 1.2 * share / len(problems)
    assert stats.spearmanr(costs, rewards).statistic < 0
    assert {trace.stop_reason for trace in traces} == {"max_flops"}
    again = run(config=replace(config, batch_size=64))
    assert [(one.response_ids, one.cost.flops) for one in again] == [
        (one.response_ids, one.cost.flops) for one in traces
    ]


def test_a_prompt_that_cannot_be_read_takes_nothing(problems, policy, scalar_reward):
    long = Problem(id="long", question="1+" * 5000)
    config = SearchConfig(max_new_tokens=8)
    traces = run_search_with_shared_budget(
        [long, *problems[:2]], policy=policy, reward=scalar_reward, config=config, max_flops=1e7
    )
    assert traces[0].error and not any(trace.error for trace in traces[1:])
    assert traces[0].cost.flops == 0 < traces[1].cost.flops


def test_a_problem_alone_spends_its_whole_budget(problems, policy, scalar_reward):
    """Its own rewards are all there is to compare with, so it would never seem to gain from a round."""
    config, shared = SearchConfig(max_new_tokens=8, batch_size=2), {"policy": policy, "reward": scalar_reward}
    [alone] = run_search_with_shared_budget(problems[:1], config=config, max_flops=8e6, **shared)
    [searched] = run_search(problems[:1], config=config.with_shared_budget(8e6), **shared)
    assert alone.response_ids == searched.response_ids and 5e6 < alone.cost.flops == searched.cost.flops <= 8e6


def test_first_responses_stay_within_the_even_share(problems, policy, scalar_reward):
    """Each search could pay for more first responses from the budget of all. Together they would overspend it."""
    config, shared = SearchConfig(max_new_tokens=8, num_starts=6, num_chains=2), {"reward": scalar_reward}
    pool = draw_pool(problems, 2, policy=policy, sampling=config.get_sampling(), **shared)
    budget = sum(count_flops(entry, with_reward=True) for entry in pool.entries)
    traces = run_search_with_shared_budget(problems, policy=policy, config=config, max_flops=budget, **shared)
    assert sum(trace.cost.flops for trace in traces) <= 1.1 * budget


def test_only_the_response_that_a_search_goes_on_from_takes_memory(problems, policy, scalar_reward, monkeypatch):
    searches, build_trace = [], Search.build_trace
    monkeypatch.setattr(Search, "build_trace", lambda search: searches.append(search) or build_trace(search))
    config = SearchConfig(max_new_tokens=8, patience=1, candidate_min_p=0.0)
    run_search_with_shared_budget(problems, policy=policy, reward=scalar_reward, config=config, max_flops=2e7)
    assert max(len(search.chains) for search in searches) > 1
    assert any(chain.num_accepted for search in searches for chain in search.chains)
    for search in searches:
        responses = [response for chain in search.chains for response in (chain.initial, chain.incumbent)]
        kept = {id(response) for response in responses if response.policy_cache.length or response.score_caches}
        assert kept == {id(search.chains[-1].incumbent)}
