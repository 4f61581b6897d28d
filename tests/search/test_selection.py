"""Which of the scored responses a search returns: the best by reward, or the winner of a vote."""

from __future__ import annotations

import math
from typing import Any

import pytest
import worlds

from nabla_trl.baselines.sampling import draw_pool, select_weighted_best_of_n
from nabla_trl.baselines.votes import vote_in_pool
from nabla_trl.grading.voting import vote
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search, run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import replay_revisions


def config(**options: Any) -> SearchConfig:
    return worlds.search_config(**{"solver": "none", "max_new_tokens": 3, "max_rounds": 4, **options})


def run(problems: list[Problem], settings: SearchConfig, **options: Any) -> tuple[list, dict[str, Search]]:
    searches: dict[str, Search] = {}
    traces = run_search(
        problems, config=settings, on_round=lambda search: searches.update({search.problem.id: search}), **options
    )
    return traces, searches


@pytest.mark.parametrize("beta", [0.05, 0.5, 50.0])
def test_a_weighted_vote_without_rounds_is_weighted_best_of_n(
    beta: float, policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    settings = config(num_starts=12, max_rollouts=12, select={"name": "weighted_vote", "vote_beta": beta})
    pool = draw_pool(problems, 12, policy=policy, reward=reward, sampling=settings.get_sampling(), seed=7)
    traces, _ = run(problems, settings, policy=policy, reward=reward, seed=7)
    for trace, baseline in zip(traces, select_weighted_best_of_n(pool, 12, beta), strict=True):
        assert trace.response_ids == baseline.response_ids
        assert trace.cost.flops == pytest.approx(baseline.cost.flops)


def test_a_vote_without_rounds_is_self_consistency(policy: Policy, reward: Reward, problems: list[Problem]) -> None:
    settings = config(num_starts=12, max_rollouts=12, select="vote")
    pool = draw_pool(problems, 12, policy=policy, reward=reward, sampling=settings.get_sampling(), seed=7)
    traces, _ = run(problems, settings, policy=policy, reward=reward, seed=7)
    for trace, baseline in zip(traces, vote_in_pool(pool, "self_consistency", 12), strict=True):
        assert trace.answer == baseline.answer


@pytest.mark.parametrize("select", ["vote", "weighted_vote"])
def test_every_scored_response_votes_and_the_search_itself_is_the_same(
    select: str, policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    options = {"num_starts": 3, "num_chains": 2, "max_rounds": 6}
    by_reward, _ = run(problems, config(**options), policy=policy, reward=reward, seed=1)
    by_vote, searches = run(problems, config(**options, select=select), policy=policy, reward=reward, seed=1)
    changed = 0
    for plain, voted in zip(by_reward, by_vote, strict=True):
        voted.validate()
        search = searches[voted.problem_id]
        assert voted.cost.flops == plain.cost.flops
        assert len(search.voters) == 3 + sum(len(chain.revisions) for chain in search.chains)
        voters = [voter for voter in search.voters if voter.reward > -math.inf]
        weights = [0.0 if select == "vote" else voter.reward for voter in voters]
        winners = [voters[index] for index in vote([voter.answer for voter in voters], weights)]
        if winners:
            assert (voted.response_ids, voted.reward) == max(
                ((voter.response_ids, voter.reward) for voter in winners), key=lambda pair: pair[1]
            )
        else:
            assert voted.response_ids == plain.response_ids
        changed += voted.response_ids != plain.response_ids
    assert changed or select == "weighted_vote"


def test_the_states_of_a_metropolis_chain_vote_after_the_burn_in(
    policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    options = {"acceptance": "metropolis", "max_rounds": 8, "max_new_tokens": 3, "beta": 0.5}
    settings = config(**options, select={"name": "vote", "burn_in": 0.5})
    traces, searches = run(problems, settings, policy=policy, reward=reward)
    for trace in traces:
        search = searches[trace.problem_id]
        [chain] = search.chains
        states, state = [], chain.initial.response_ids
        for revision, base in replay_revisions(state, chain.revisions):
            state = base[: revision.position] + list(revision.suffix) if revision.accepted else state
            states.append(state)
        assert [voter.response_ids for voter in search.voters] == states and len(states) == 8
        late = search.voters[4:]
        winners = vote([voter.answer for voter in late])
        if winners:
            assert trace.response_ids in [late[index].response_ids for index in winners]


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="use select vote"):
        config(acceptance="metropolis", select="weighted_vote")
    with pytest.raises(ValueError, match="burn_in needs metropolis"):
        config(select={"name": "vote", "burn_in": 0.5})
    assert config(select="weighted_vote").vote_beta == 1.0
    assert config(select="weighted_vote", solver="none", beta=0.2).vote_beta == pytest.approx(0.2)
