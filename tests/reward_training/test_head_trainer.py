"""Training of heads on the policy's hidden states, on labels that the states determine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from trl import RewardConfig

from nabla_trl.audit.ranking import estimate_within_problem_auc
from nabla_trl.gradient.objectives import Sample
from nabla_trl.gradient.state_head import StateHead
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, compute_hidden_states, sample_responses
from nabla_trl.reward_training.head_trainer import train_state_head
from nabla_trl.reward_training.trainer import RewardOptions
from nabla_trl.rewards.loading import load_reward

NUM_SAMPLES = 40


def make_config(folder: Path, **options: object) -> RewardConfig:
    trainer = worlds.TRAINER | {"max_steps": 150, "per_device_train_batch_size": 80, "learning_rate": 0.02}
    return RewardConfig(output_dir=str(folder), **(trainer | options))


@pytest.fixture(scope="module")
def data(policy: Policy) -> list[LabeledResponse]:
    """Responses that are correct if their last state is above their problem's median in a random direction."""
    problems = worlds.tiny_problems()
    samples = sample_responses(problems, NUM_SAMPLES, policy=policy, sampling=Sampling(max_new_tokens=8))
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    values = torch.stack([states[-1] @ direction for states in compute_hidden_states(policy, samples, 16)])
    medians = values.view(len(problems), NUM_SAMPLES).median(1).values.repeat_interleave(NUM_SAMPLES)
    return [LabeledResponse(sample, bool(correct)) for sample, correct in zip(samples, values > medians, strict=True)]


def compute_auc(folder: Path, policy: Policy, data: list[LabeledResponse]) -> float:
    reward = load_reward(f"head:{folder}", policy=policy)
    samples = [response.sample for response in data]
    caches = reward.compute_prompt_caches(samples, FlopCounter())
    rewards, _ = reward.score(samples, caches, flop_counter=FlopCounter())
    correct = np.array([response.correct for response in data])
    shape = (-1, NUM_SAMPLES)
    return estimate_within_problem_auc(np.array(rewards).reshape(shape), correct.reshape(shape)).value


def test_the_states_are_those_of_a_plain_forward(policy: Policy, data: list[LabeledResponse]) -> None:
    samples = [response.sample for response in data[::17]]
    for sample, states in zip(samples, compute_hidden_states(policy, samples, 3), strict=True):
        plain = policy.model.base_model(torch.tensor([sample.prompt_ids + sample.response_ids])).last_hidden_state[0]
        torch.testing.assert_close(states, plain[len(sample.prompt_ids) - 1 : -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"head_width": 16}, {"ranking_weight": 0.0}, {"loss_type": "pairs"}],
    ids=["linear", "network", "tokens alone", "pairs alone"],
)
def test_a_head_learns_what_the_states_tell(
    options: dict, policy: Policy, data: list[LabeledResponse], tmp_path: Path
) -> None:
    stats = train_state_head(
        data, tmp_path, policy=policy, options=RewardOptions(kind="head", **options), config=make_config(tmp_path)
    )
    assert compute_auc(tmp_path, policy, data) > 0.9
    assert stats.rows == len(data) and stats.steps == 150 and stats.loss > 0
    prompts = {tuple(response.sample.prompt_ids) for response in data}
    num_tokens = sum(len(prompt) - 1 for prompt in prompts) + sum(len(one.sample.response_ids) for one in data)
    assert stats.tokens == num_tokens and stats.flops > 2 * policy.size.linear_params * stats.tokens


def test_a_head_depends_on_its_seed_and_on_nothing_else(
    policy: Policy, data: list[LabeledResponse], tmp_path: Path
) -> None:
    for name, seed, order in (("a", 0, 1), ("b", 0, 1), ("c", 1, 1)):
        torch.manual_seed(order)
        config = make_config(tmp_path, seed=seed, max_steps=3)
        options = RewardOptions(kind="head", head_width=4)
        train_state_head(data, tmp_path / name, policy=policy, options=options, config=config)
    first, second, other = (StateHead.load(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_step_labels_are_targets_of_the_states_that_have_read_them(policy: Policy, tmp_path: Path) -> None:
    """A state that has read t tokens says whether these t are free of error."""
    from nabla_trl.reward_training.head_trainer import _build_targets

    class Labeler:
        def label_prefixes(self, problem: object, ids: list[int]) -> list[bool]:
            return [True, True, False, False]

    sample = Sample(worlds.tiny_problems()[0], [1, 2], [3, 4, 5, 6])
    targets = _build_targets(LabeledResponse(sample, False), Labeler())  # type: ignore[arg-type]
    assert targets.tolist() == [1, 1, 1, 0]
    assert _build_targets(LabeledResponse(sample, False), None).tolist() == [0, 0, 0, 0]


def test_what_is_no_head_training_is_refused(policy: Policy, data: list[LabeledResponse], tmp_path: Path) -> None:
    worlds.refused(lambda: RewardOptions(kind="head", head_width=-1), "head_width")
    worlds.refused(lambda: RewardOptions(kind="head", base_model="other"), "base_model")
    config = make_config(tmp_path, learning_rate=float("inf"))
    options = RewardOptions(kind="head")
    worlds.refused(
        lambda: train_state_head(data, tmp_path / "head", policy=policy, options=options, config=config),
        "learning_rate",
    )
    assert not (tmp_path / "head").exists()
