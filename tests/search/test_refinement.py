"""Refined distributions: what a search records along its responses is one mirror step from the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import worlds
from torch import Tensor

from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.refinement import compute_refined_logp
from nabla_trl.traces.schema import Trace

VOCAB = len(worlds.TOKENS)
OPTIONS = {"beta": 0.5, "max_rounds": 4, "max_new_tokens": 6, "top_k_candidates": VOCAB, "soft_target_top_k": VOCAB}
OPTIONS["candidate_min_p"] = 0.0


def compute_logp(policy: Policy, trace: Trace, response_ids: list[int]) -> Tensor:
    """Return [T, V] log-probabilities along a response, by one plain forward pass."""
    logits = policy.model(torch.tensor([trace.prompt_ids + response_ids])).logits[0]
    return logits[len(trace.prompt_ids) - 1 : -1].log_softmax(-1)


def compute_tilted_logp(policy: Policy, logp: Tensor, better_logp: Tensor) -> Tensor:
    """Return [T, V] log of π·(better/π)^2 over the tokens that can be sampled, which keep their total probability."""
    own, tilted = (
        one.masked_fill(policy.forbidden_mask, -torch.inf) for one in (logp, logp + 2 * (better_logp - logp))
    )
    return tilted.log_softmax(-1) + own.logsumexp(-1, keepdim=True)


def read_targets(trace: Trace, index: int) -> Tensor:
    """Return [T, V] recorded log-probabilities, -inf for tokens that were not recorded."""
    ids, logp = map(torch.tensor, trace.soft_targets[index].to_arrays())
    return torch.full((len(ids), VOCAB), -torch.inf).scatter(1, ids.long(), logp)


def test_probability_moves_among_the_refined_tokens_alone() -> None:
    torch.manual_seed(0)
    logp, gains = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7)
    mask = torch.rand(5, 7) < 0.6
    mask[:, 0] = True
    refined = compute_refined_logp(logp, gains, mask)
    assert torch.equal(refined[~mask], logp[~mask])
    torch.testing.assert_close(refined.exp().sum(-1), torch.ones(5))
    everything = torch.ones_like(mask)
    torch.testing.assert_close(compute_refined_logp(logp, gains, everything), (logp + gains).log_softmax(-1))
    torch.testing.assert_close(compute_refined_logp(logp, 3 * torch.ones(5, 7), mask), logp)


def test_targets_of_a_log_ratio_are_the_tilted_policy(policy: Policy, logratio_reward: Reward) -> None:
    """With every token a candidate, q ∝ π·(better/π)^λ at every prefix that the search has visited."""
    config = SearchConfig(solver={"gradient_at": "direct"}, **OPTIONS)
    better = logratio_reward.preferred_model
    assert better is not None
    traces = run_search(worlds.tiny_problems(), policy=policy, reward=logratio_reward, config=config)
    assert sum(len(trace.soft_targets) for trace in traces) > len(traces)
    for trace in traces:
        for index, (response_ids, _) in zip(range(len(trace.soft_targets)), trace.list_incumbents(), strict=False):
            own, other = (compute_logp(model, trace, response_ids) for model in (policy, better))
            expected = compute_tilted_logp(policy, own, other)
            torch.testing.assert_close(read_targets(trace, index), expected, atol=2e-4, rtol=1e-3)


def test_targets_of_a_score_know_every_token_that_was_scored(policy: Policy, scalar_reward: Reward) -> None:
    """A direct gradient knows the response's own token. Tokens of rejected proposals are known as well."""
    config = SearchConfig(solver={"gradient_at": "direct"}, **OPTIONS)
    problems = worlds.tiny_problems()
    num_compared = 0
    for problem, trace in zip(
        problems, run_search(problems, policy=policy, reward=scalar_reward, config=config), strict=True
    ):
        incumbents = [ids for ids, _ in trace.list_incumbents()][: len(trace.soft_targets)]
        for revision, base in trace.replay_revisions():
            if base not in incumbents:
                continue
            targets = read_targets(trace, incumbents.index(base))[revision.position]
            logp = compute_logp(policy, trace, base)[revision.position]
            old, new = revision.old_token, revision.new_token
            gains = [
                compute_increment(scalar_reward, Sample(problem, trace.prompt_ids, ids), revision.position)
                for ids in (base, base[: revision.position] + list(revision.suffix))
            ]
            tilt = float((targets[new] - targets[old]) - (logp[new] - logp[old]))
            assert tilt == pytest.approx(2 * (gains[1] - gains[0]), abs=2e-3)
            num_compared += 1
    assert num_compared >= 8


def compute_increment(reward: Reward, sample: Sample, position: int) -> float:
    caches = reward.compute_prompt_caches([sample], FlopCounter())
    _, caches = reward.score([sample], caches, flop_counter=FlopCounter(), return_caches=True)
    own = [torch.tensor(sample.response_ids)[:, None]]
    [increments] = reward.compute_direct_gradient([sample], caches, own, flop_counter=FlopCounter())
    return float(increments[position])


@pytest.mark.parametrize("gradient_at", ["direct", pytest.param("hard", marks=pytest.mark.slow)])
def test_recording_changes_no_search(gradient_at: str, policy: Policy, scalar_reward: Reward) -> None:
    config = SearchConfig(solver={"gradient_at": gradient_at}, **OPTIONS)
    recorded, plain = (
        run_search(worlds.tiny_problems(), policy=policy, reward=scalar_reward, config=one)
        for one in (config, replace(config, soft_target_top_k=0))
    )
    for trace, other in zip(recorded, plain, strict=True):
        assert trace.soft_targets and not other.soft_targets
        assert (trace.revisions, trace.response_ids) == (other.revisions, other.response_ids)
        assert trace.cost.flops == other.cost.flops


def test_only_the_mirror_step_has_targets() -> None:
    worlds.refused(lambda: SearchConfig(solver="ste", soft_target_top_k=4), "soft_target_top_k needs solver mirror")
    config = SearchConfig(soft_target_top_k=4)
    assert config.with_no_gradient().soft_target_top_k == 0
    assert "soft_target_top_k" not in SearchConfig().get_settings(), "runs of earlier versions can go on"
