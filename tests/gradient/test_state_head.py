"""Heads on the policy's hidden states, against plain forwards and plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import Tensor

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.sampling import draw_pool, select_weighted_best_of_n
from nabla_trl.baselines.step_methods import STEP_SEARCH_METHODS
from nabla_trl.baselines.step_tree import run_step_search
from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.gradient.state_head import HEAD_FILE, StateHead, compute_probe
from nabla_trl.models.decoding import SlotDecoder
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.options import GradientPoint, Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import compute_top_candidates, make_rng
from nabla_trl.planning.preflight import check_reward_files
from nabla_trl.rewards.loading import build_ensemble_reward, build_head_reward, check_reward, load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import RewardManifest, compute_reward_identity, parse_reward_spec, write_manifest
from nabla_trl.search.loop import run_search
from nabla_trl.traces.schema import Trace

DOUBLE = torch.float64
TEXTS = ("1+2=3", "3*4=12;#7", "7", "12-3=9;4*5=20#29")
SAMPLING = Sampling(max_new_tokens=12)


def random_head(policy: Policy, hidden_width: int = 8, seed: int = 0) -> StateHead:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = policy.model.config.hidden_size
        head = StateHead(width, hidden_width).to(policy.model.dtype)
        head.mean.normal_()
        head.std.uniform_(0.5, 2.0)
        for weight in head.layers.parameters():
            weight.data.normal_()
    head.probe.copy_(compute_probe(policy.model))
    return head.requires_grad_(False)


def head_reward(policy: Policy, hidden_width: int = 8) -> Reward:
    return build_head_reward(policy, random_head(policy, hidden_width), "head")


@pytest.fixture(scope="module")
def double() -> Policy:
    return worlds.tiny_policy(dtype=DOUBLE)


def samples(policy: Policy) -> list[Sample]:
    pairs = zip(worlds.tiny_problems(), TEXTS, strict=True)
    return [worlds.sample(policy, problem, text, finished=done) for problem, text in pairs for done in (True, False)]


def plain_levels(reward: Reward, policy: Policy, prompt_ids: list[int], response_ids: Sequence[int]) -> Tensor:
    """[T] the head's output before each of the tokens, by one plain forward."""
    states = policy.model.base_model(torch.tensor([prompt_ids + list(response_ids)])).last_hidden_state[0]
    return reward.objectives[0].head(states[len(prompt_ids) - 1 : -1]).detach()  # type: ignore[attr-defined]


def score(reward: Reward, items: Sequence[Sample], counter: FlopCounter | None = None) -> list[float]:
    counter = FlopCounter() if counter is None else counter
    return reward.score(items, reward.compute_prompt_caches(items, FlopCounter()), flop_counter=counter)[0]


def test_a_score_is_read_where_the_last_token_was_predicted(double: Policy) -> None:
    for hidden_width in (0, 8):
        reward = head_reward(double, hidden_width)
        items = samples(double)
        values = score(reward, items)
        for item, value in zip(items, values, strict=True):
            assert value == pytest.approx(float(plain_levels(reward, double, item.prompt_ids, item.response_ids)[-1]))
            assert score(reward, [replace(item, is_partial=True)]) == pytest.approx([value])
        check_reward(reward, double)
        swapped = [replace(item, response_ids=[*item.response_ids[:-1], 0]) for item in items]
        assert score(reward, swapped) == pytest.approx(values)  # the last token does not count


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_drawing_gives_the_states_and_the_same_tokens(architecture: str) -> None:
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    reward = head_reward(policy)

    def draw(return_hidden_states: bool) -> list:
        session = SlotDecoder(
            policy, SAMPLING, max_sequences=3, return_hidden_states=return_hidden_states, top_k_candidates=2
        )
        prompts = [policy.encode(problem) for problem in worlds.tiny_problems()] * 2
        for number, (ids, state) in enumerate(
            zip(prompts, policy.backend.prefill(policy, [ids[:-1] for ids in prompts]), strict=True)
        ):
            # Of unequal lengths, so that slots are taken over.
            session.submit(number, GenerationRequest("q", ids, make_rng(0, str(number)), 3 + 2 * number, state))
        ended = {}
        while session.num_unfinished:
            ended.update(session.step())
        return [(prompts[number], ended[number]) for number in range(len(prompts))]

    for (prompt, output), (_, bare) in zip(draw(True), draw(False), strict=True):
        assert output.ids == bare.ids and torch.equal(output.logp, bare.logp) and bare.hidden_states is None
        levels = reward.objectives[0].head(output.hidden_states)  # type: ignore[attr-defined]
        torch.testing.assert_close(levels, plain_levels(reward, policy, prompt, output.ids))


def test_best_of_n_and_weighted_votes_cost_what_votes_cost(double: Policy) -> None:
    """The scores are those of a plain forward. No prompt and no response is read again."""
    reward, problems = head_reward(double), worlds.tiny_problems()
    pool = draw_pool(problems, 5, policy=double, reward=reward, sampling=SAMPLING)
    bare = draw_pool(problems, 5, policy=double, reward=None, sampling=SAMPLING)
    for entry, bare_entry in zip(pool.entries, bare.entries, strict=True):
        assert entry.reward_prefill_cost.flops == 0
        for response, other in zip(entry.responses, bare_entry.responses, strict=True):
            levels = plain_levels(reward, double, entry.prompt_ids, response.response_ids)
            assert response.response_ids == other.response_ids
            assert response.reward == pytest.approx(float(levels[-1]))
            assert response.generation_cost.flops == other.generation_cost.flops
            head = reward.objectives[0].head  # type: ignore[attr-defined]
            assert response.scoring_cost.flops == 2 * head.num_params * len(response.response_ids)
            assert response.scoring_cost.tokens == {"reward/forward": 0}
    assert len(select_weighted_best_of_n(pool, 5, 1.0)) == len(problems)


def with_candidates(policy: Policy, item: Sample, width: int) -> Sample:
    logits = policy.model(torch.tensor([item.prompt_ids + item.response_ids])).logits[0, len(item.prompt_ids) - 1 : -1]
    response = torch.tensor(item.response_ids)
    ids, logp = compute_top_candidates(logits.detach(), response, policy.forbidden_mask, width)
    return replace(item, draw_info=DrawInfo(policy.model, ids, logp))


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_the_backward_gradient_equals_autograd_through_the_policy(alpha: float, double: Policy) -> None:
    reward = head_reward(double)
    items = [with_candidates(double, item, 5) for item in samples(double)]
    caches = reward.compute_prompt_caches(items, FlopCounter())
    ours = reward.compute_backward_gradient(
        items, caches, None, flop_counter=FlopCounter(), gradient_at=GradientPoint((alpha,))
    )
    table = double.model.get_input_embeddings().weight.detach()
    for item, gradient in zip(items, ours, strict=True):
        begin, relaxed = len(item.prompt_ids), item.relax(alpha)
        rows = F.one_hot(torch.tensor(item.prompt_ids + item.response_ids), len(table)).double()
        rows[begin:] = torch.zeros_like(rows[begin:]).scatter_add_(1, relaxed.ids, relaxed.weights.double())
        rows.requires_grad_(True)
        hidden = double.model.base_model(inputs_embeds=(rows @ table)[None]).last_hidden_state[0]
        value = reward.objectives[0].head(hidden[-2])  # type: ignore[attr-defined]
        expected = torch.autograd.grad(value, rows)[0][begin:]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # weights are float32
        assert not gradient[-1].any()  # it is never read
        assert len(gradient) == 1 or gradient[:-1].abs().max() > 1e-4


def test_the_direct_gradient_is_what_each_token_added(double: Policy) -> None:
    reward = head_reward(double)
    items = [with_candidates(double, item, 5) for item in samples(double)]
    prompts = reward.compute_prompt_caches(items, FlopCounter())
    _, caches = reward.score(items, prompts, flop_counter=FlopCounter(), return_caches=True)
    tables = [item.draw_info.candidates for item in items]  # type: ignore[union-attr]
    gradients = reward.compute_direct_gradient(items, caches, tables, flop_counter=FlopCounter())
    for item, table, gradient in zip(items, tables, gradients, strict=True):
        levels = plain_levels(reward, double, item.prompt_ids, item.response_ids)
        added = torch.cat((levels.diff(), levels.new_zeros(1)))
        added[0] = 0  # nothing was before it
        own = table == torch.tensor(item.response_ids)[:, None]
        torch.testing.assert_close(gradient, torch.where(own, added[:, None], 0.0).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_at": "direct"},
        {"gradient_at": "mixture:0.5"},
        {"acceptance": "metropolis", "gradient_at": "direct"},
        {"gradient_at": "direct", "select": "weighted_vote"},
    ],
)
def test_a_search_scores_with_the_states_it_has_drawn(options: dict, double: Policy) -> None:
    reward, problems = head_reward(double), worlds.tiny_problems()
    config = worlds.search_config(max_rounds=5, max_new_tokens=12, top_k_candidates=4, **options)
    traces = run_search(problems, policy=double, reward=reward, config=config)
    accepted = 0
    for trace in traces:
        assert trace.error is None
        for ids, value in trace.list_incumbents():
            levels = plain_levels(reward, double, list(trace.prompt_ids), ids)
            assert value == pytest.approx(float(levels[-1]), rel=1e-6, abs=1e-9)
        accepted += sum(revision.accepted for revision in trace.revisions)
        tokens = trace.cost.tokens
        assert "reward/prefill" not in tokens and tokens["reward/forward"] == tokens.get("reward/backward", 0)
        assert ("reward/backward" in tokens) == (options["gradient_at"] != "direct")
    assert accepted > 0 or "select" in options
    alone = [run_search([problem], policy=double, reward=reward, config=config)[0] for problem in problems]
    assert [trace.response_ids for trace in alone] == [trace.response_ids for trace in traces]


def run_steps(policy: Policy, reward: Reward) -> list[Trace]:
    steps = BaselineConfig(step_delimiter=";", max_step_tokens=4, steps_per_prefix=3)
    return run_step_search(
        worlds.tiny_problems(),
        method=STEP_SEARCH_METHODS["beam_search"],
        size=4,
        policy=policy,
        reward=reward,
        sampling=SAMPLING,
        step_config=steps,
        method_name="beam_search_4",
    )


def test_a_search_over_steps_reads_no_token_twice(double: Policy) -> None:
    reward = head_reward(double)
    for trace in run_steps(double, reward):
        levels = plain_levels(reward, double, list(trace.prompt_ids), trace.response_ids)
        assert trace.reward == pytest.approx(float(levels[-1]))
        assert trace.cost.tokens["reward/forward"] == 0 and "reward/prefill" not in trace.cost.tokens


class _Server:
    """A back end that gives no states, as a server."""

    returns_caches = False
    supports_should_stop = True

    def __init__(self, policy: Policy):
        self.inner = policy.backend

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def open_session(self, policy: Policy, sampling: Sampling, *, return_hidden_states: bool = False, **options):
        return self.inner.open_session(policy, sampling, **options)


def test_without_states_the_policy_reads_the_response_again(double: Policy) -> None:
    reward, problems = head_reward(double), worlds.tiny_problems()
    served = replace(double, backend=_Server(double))
    pool = draw_pool(problems, 3, policy=double, reward=reward, sampling=SAMPLING)
    for entry, other in zip(
        draw_pool(problems, 3, policy=served, reward=reward, sampling=SAMPLING).entries, pool.entries, strict=True
    ):
        assert entry.reward_prefill_cost.flops > 0
        for response, known in zip(entry.responses, other.responses, strict=True):
            assert response.reward == pytest.approx(known.reward)
            assert response.scoring_cost.tokens == {"reward/forward": len(response.response_ids)}


def test_another_policy_draws_and_the_head_reads_its_own(double: Policy) -> None:
    """A policy that was trained later has other states, so the head's policy reads prompts and responses itself."""
    reward, problems = head_reward(double), worlds.tiny_problems()
    trained = worlds.tiny_policy(dtype=DOUBLE, seed=7, name="trained")
    for entry in draw_pool(problems, 3, policy=trained, reward=reward, sampling=SAMPLING).entries:
        assert entry.reward_prefill_cost.flops > 0
        for response in entry.responses:
            levels = plain_levels(reward, double, entry.prompt_ids, response.response_ids)
            assert response.reward == pytest.approx(float(levels[-1]))
            assert response.scoring_cost.tokens == {"reward/forward": len(response.response_ids)}
    config = worlds.search_config(max_rounds=4, max_new_tokens=12, top_k_candidates=4)
    for trace in run_search(problems, policy=trained, reward=reward, config=config):
        levels = plain_levels(reward, double, list(trace.prompt_ids), trace.response_ids)
        assert trace.reward == pytest.approx(float(levels[-1])) and trace.error is None


def test_an_ensemble_of_heads(double: Policy) -> None:
    members = [build_head_reward(double, random_head(double, seed=seed), f"head {seed}") for seed in range(3)]
    reward = build_ensemble_reward(members, 0.5, "three")
    pool = draw_pool(worlds.tiny_problems(), 2, policy=double, reward=reward, sampling=SAMPLING)
    for entry in pool.entries:
        for response in entry.responses:
            levels = torch.stack(
                [plain_levels(one, double, entry.prompt_ids, response.response_ids)[-1] for one in members]
            )
            assert response.reward == pytest.approx(float(levels.mean() - 0.5 * levels.std(correction=0)))
            assert response.scoring_cost.tokens == {"reward/forward": 0}


def test_a_folder_with_a_head(tmp_path: Path, double: Policy) -> None:
    head = random_head(double)
    head.save(tmp_path / "head")
    reward = load_reward(f"head:{tmp_path / 'head'}", policy=double)
    items = samples(double)
    expected = score(build_head_reward(double, head, "head"), items)
    assert reward.kind == "head" and reward.gradient_at == "direct" and score(reward, items) == expected
    identity = compute_reward_identity(f"head:{tmp_path / 'head'}")
    write_manifest(tmp_path / "head", RewardManifest(kind="head", base_model="p", gradient_at="mixture:0.5"))
    for spec in (str(tmp_path / "head"), {"kind": "head", "model": str(tmp_path / "head")}):
        loaded = load_reward(spec, policy=double)
        assert loaded.gradient_at == "mixture:0.5" and score(loaded, items) == expected
    random_head(double, seed=1).save(tmp_path / "head")
    assert compute_reward_identity(f"head:{tmp_path / 'head'}") != identity


def test_what_is_no_head_of_this_policy_is_refused(tmp_path: Path, double: Policy) -> None:
    name = f"head:{tmp_path}"
    worlds.refused(lambda: parse_reward_spec("head:"), "head:FOLDER")
    worlds.refused(lambda: load_reward(name, policy=double), HEAD_FILE)
    worlds.refused(lambda: check_reward_files(name, policy="double"), HEAD_FILE)
    (tmp_path / HEAD_FILE).write_bytes(b"no tensors")
    worlds.refused(lambda: load_reward(name, policy=double), HEAD_FILE)
    random_head(double).save(tmp_path)
    check_reward_files(name, policy="double")
    worlds.refused(lambda: parse_reward_spec(f"ensemble:{name},{name}"), "twice")
    other = worlds.tiny_policy(dtype=DOUBLE, seed=5, name="other")
    worlds.refused(lambda: load_reward(name, policy=other), "another policy than other")
    wide = worlds.tiny_policy(dtype=DOUBLE, width=64, name="wide")
    worlds.refused(lambda: load_reward(name, policy=wide), "32", "64", "wide")
    broken = random_head(double)
    broken.layers[0].weight.data[0, 0] = torch.nan
    broken.save(tmp_path)
    worlds.refused(lambda: load_reward(name, policy=double), "not finite")
    write_manifest(tmp_path, RewardManifest(kind="scalar"))
    worlds.refused(lambda: parse_reward_spec(name), "kind scalar")


def test_continuations_without_a_reward_have_no_states(policy: Policy) -> None:
    request = GenerationRequest("q", policy.encode(worlds.tiny_problems()[0]), make_rng(0, "q"), 4)
    [output] = generate_continuations(policy, [request], SAMPLING, flop_counter=FlopCounter())
    assert output.hidden_states is None
