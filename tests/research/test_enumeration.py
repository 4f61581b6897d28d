"""Every response of a small world: none missing, each with the probability, reward and cost that others give it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import worlds
from enumeration import (
    EnumeratedResponses,
    compute_exact_distributions,
    count_responses,
    enumerate_responses,
    score_enumerated_responses,
)

from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem

LENGTH = 3
FEW = ["1", "2", worlds.PAD, worlds.USER, worlds.ASSISTANT, worlds.END, worlds.UNK]
PROBLEM = Problem(id="p", question="12")


def few_tokens(architecture: str = "llama", **options: int) -> Policy:
    """A policy of six tokens that may be drawn, one of which ends, and a padding token that may not."""
    return worlds.tiny_policy(architecture, tokenizer=worlds.char_tokenizer(FEW), **options)


@pytest.fixture(scope="module")
def small() -> Policy:
    return few_tokens()


@pytest.fixture(scope="module")
def tree(small: Policy) -> EnumeratedResponses:
    return enumerate_responses(small, PROBLEM, LENGTH)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_the_whole_tree_has_probability_one(architecture: str) -> None:
    policy = few_tokens(architecture)
    tree = enumerate_responses(policy, PROBLEM, LENGTH, batch_size=7)
    [stop] = policy.stop_ids
    going = [token for token in range(len(FEW)) if token != stop and not policy.forbidden_mask[token]]
    expected = {(*head, stop) for size in range(LENGTH) for head in product(going, repeat=size)}
    expected |= set(product(going, repeat=LENGTH))
    assert set(tree.responses) == expected and len(tree.responses) == len(expected) == count_responses(policy, LENGTH)
    assert np.exp(tree.logp).sum() == pytest.approx(1, abs=1e-10)
    assert all(tree.index_by_response[response] == place for place, response in enumerate(tree.responses))


def test_probabilities_are_those_of_a_plain_forward(small: Policy, tree: EnumeratedResponses) -> None:
    for place in range(0, len(tree.responses), 17):
        ids = list(tree.responses[place])
        logits = small.model(torch.tensor([tree.prompt_ids + ids])).logits[0, len(tree.prompt_ids) - 1 : -1]
        logp = logits.masked_fill(small.forbidden_mask, -torch.inf).log_softmax(-1)
        assert tree.logp[place] == pytest.approx(float(logp.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-5)


def test_steps_are_those_of_the_likelihood(small: Policy, tree: EnumeratedResponses) -> None:
    """… which counts what the padding token takes: not drawn, yet in the softmax."""
    term = worlds.tiny_logratio(small).objectives[1]
    samples = [Sample(PROBLEM, tree.prompt_ids, list(ids)) for ids in tree.responses]
    memos = term.compute_prompt_caches(samples[:1], FlopCounter()) * len(samples)
    values, _ = term.score(samples, memos, [0] * len(samples), FlopCounter())
    assert [float(walk.sum()) for walk in tree.token_logps] == pytest.approx(values, abs=1e-5)
    assert (tree.logp > np.array(values)).all()


@pytest.mark.parametrize("kind", ["scalar", "log-ratio"])
def test_rewards_and_costs_are_those_of_a_pool(kind: str, small: Policy, tree: EnumeratedResponses) -> None:
    reward: Reward = worlds.tiny_scalar(small) if kind == "scalar" else worlds.tiny_logratio(small)
    scored = score_enumerated_responses(tree, small, reward)
    sampling = Sampling(max_new_tokens=LENGTH)
    [entry] = draw_pool([PROBLEM], 60, policy=small, reward=reward, sampling=sampling).entries
    assert (entry.policy_prefill_cost.flops, entry.reward_prefill_cost.flops) == (
        scored.prompt_sampling_flops,
        scored.prompt_scoring_flops,
    )
    for draw in entry.responses:
        place = tree.index_by_response[tuple(draw.response_ids)]
        assert draw.reward == pytest.approx(scored.rewards[place], abs=1e-4)
        assert (draw.generation_cost.flops, draw.scoring_cost.flops) == (
            scored.sampling_flops[place],
            scored.scoring_flops[place],
        )
    assert len({tuple(draw.response_ids) for draw in entry.responses}) > 5


def test_another_policy_over_the_same_responses(small: Policy, tree: EnumeratedResponses) -> None:
    [own], [other] = (
        compute_exact_distributions(small, [tree]),
        compute_exact_distributions(few_tokens(seed=4), [tree]),
    )
    assert np.abs(own - np.exp(tree.logp)).max() < 1e-12
    assert other.sum() == pytest.approx(1) and np.abs(other - own).sum() > 0.1
    stranger = worlds.tiny_policy(tokenizer=worlds.char_tokenizer([*FEW[1:], FEW[0]]))
    worlds.refused(
        lambda: compute_exact_distributions(stranger, [tree]), "another vocabulary", "responses to p were enumerated"
    )


def test_worlds_too_large_are_refused(small: Policy, policy: Policy) -> None:
    assert count_responses(small, 2) == 1 + 5 * 6 and count_responses(policy, 600) == np.inf
    worlds.refused(
        lambda: enumerate_responses(small, PROBLEM, 3, max_responses=100), "156 responses of up to 3", "at most 100"
    )
    worlds.refused(lambda: enumerate_responses(policy, PROBLEM, 600), "more than 1e15 responses")
    worlds.refused(lambda: enumerate_responses(few_tokens(context=7), PROBLEM, 3), "do not fit the context")


def test_a_reward_that_is_not_a_number_is_refused(small: Policy, tree: EnumeratedResponses) -> None:
    reward = worlds.tiny_scalar(small)
    reward.in_vocabulary[FEW.index("2")] = False
    worlds.refused(lambda: score_enumerated_responses(tree, small, reward), "p: scorer gives", "-inf")
