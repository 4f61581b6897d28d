"""Every response of a small world: none missing, each with the probability, reward and cost that others give it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import worlds
from enumeration import Tree, count, enumerate_tree, law_of, score_tree

from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import Meter
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
def tree(small: Policy) -> Tree:
    return enumerate_tree(small, PROBLEM, LENGTH)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_the_whole_tree_has_probability_one(architecture: str) -> None:
    policy = few_tokens(architecture)
    tree = enumerate_tree(policy, PROBLEM, LENGTH, batch_size=7)
    [stop] = policy.stop_ids
    going = [token for token in range(len(FEW)) if token != stop and not policy.forbidden[token]]
    expected = {(*head, stop) for size in range(LENGTH) for head in product(going, repeat=size)}
    expected |= set(product(going, repeat=LENGTH))
    assert set(tree.responses) == expected and len(tree.responses) == len(expected) == count(policy, LENGTH)
    assert np.exp(tree.logp).sum() == pytest.approx(1, abs=1e-10)
    assert all(tree.places[response] == place for place, response in enumerate(tree.responses))


def test_probabilities_are_those_of_a_plain_forward(small: Policy, tree: Tree) -> None:
    for place in range(0, len(tree.responses), 17):
        ids = list(tree.responses[place])
        logits = small.model(torch.tensor([tree.prompt + ids])).logits[0, len(tree.prompt) - 1 : -1]
        logp = logits.masked_fill(small.forbidden, -torch.inf).log_softmax(-1)
        assert tree.logp[place] == pytest.approx(float(logp.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-5)


def test_steps_are_those_of_the_likelihood(small: Policy, tree: Tree) -> None:
    """… which counts what the padding token takes: not drawn, yet in the softmax."""
    term = worlds.tiny_logratio(small).terms[1]
    samples = [Sample(PROBLEM, tree.prompt, list(ids)) for ids in tree.responses]
    memos = term.prompt_memos(samples[:1], Meter()) * len(samples)
    values, _ = term.score(samples, memos, [0] * len(samples), Meter())
    assert [float(walk.sum()) for walk in tree.steps] == pytest.approx(values, abs=1e-5)
    assert (tree.logp > np.array(values)).all()


@pytest.mark.parametrize("kind", ["scalar", "log-ratio"])
def test_rewards_and_costs_are_those_of_a_pool(kind: str, small: Policy, tree: Tree) -> None:
    reward: Reward = worlds.tiny_scalar(small) if kind == "scalar" else worlds.tiny_logratio(small)
    scored = score_tree(tree, small, reward)
    sampling = Sampling(max_new_tokens=LENGTH)
    [entry] = draw_pool([PROBLEM], 60, policy=small, reward=reward, sampling=sampling).entries
    assert (entry.prefill.flops, entry.scored_prefill.flops) == (scored.drawing_prompt, scored.scoring_prompt)
    for draw in entry.draws:
        place = tree.places[tuple(draw.ids)]
        assert draw.reward == pytest.approx(scored.rewards[place], abs=1e-4)
        assert (draw.generation.flops, draw.scoring.flops) == (scored.drawing[place], scored.scoring[place])
    assert len({tuple(draw.ids) for draw in entry.draws}) > 5


def test_another_policy_over_the_same_responses(small: Policy, tree: Tree) -> None:
    [own], [other] = law_of(small, [tree]), law_of(few_tokens(seed=4), [tree])
    assert np.abs(own - np.exp(tree.logp)).max() < 1e-12
    assert other.sum() == pytest.approx(1) and np.abs(other - own).sum() > 0.1
    stranger = worlds.tiny_policy(tokenizer=worlds.char_tokenizer([*FEW[1:], FEW[0]]))
    worlds.refused(lambda: law_of(stranger, [tree]), "another vocabulary", "p was written down for")


def test_worlds_too_large_are_refused(small: Policy, policy: Policy) -> None:
    assert count(small, 2) == 1 + 5 * 6 and count(policy, 600) == np.inf
    worlds.refused(lambda: enumerate_tree(small, PROBLEM, 3, limit=100), "156 responses of up to 3", "at most 100")
    worlds.refused(lambda: enumerate_tree(policy, PROBLEM, 600), "more than 1e15 responses")
    worlds.refused(lambda: enumerate_tree(few_tokens(context=7), PROBLEM, 3), "do not fit the context")


def test_a_reward_that_is_not_a_number_is_refused(small: Policy, tree: Tree) -> None:
    reward = worlds.tiny_scalar(small)
    reward.readable[FEW.index("2")] = False
    worlds.refused(lambda: score_tree(tree, small, reward), "p: scorer gives", "-inf")
