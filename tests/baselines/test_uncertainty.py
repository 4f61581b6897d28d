"""Searches that act where the policy is uncertain, against the same by hand from plain forward passes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import worlds

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.step_methods import beam_search
from nabla_trl.baselines.step_tree import MIN_SEGMENT_TOKENS, StepNode, StepTree, run_step_search
from nabla_trl.baselines.uncertainty import UNCERTAINTY_METHODS, find_uncertain_token
from nabla_trl.evaluation.method import parse_methods
from nabla_trl.evaluation.plan import EvaluationSetup, get_baseline_settings
from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

FEW = ["1", ";", "2", "3", worlds.PAD, worlds.USER, worlds.ASSISTANT, worlds.END, worlds.UNK]
PROBLEMS = [Problem(id=f"q{number}", question=text) for number, text in enumerate(["1", "11;1", ";1;", "112"])]
LENGTH = 14
STEPS = BaselineConfig(step_delimiter=";", max_step_tokens=5, steps_per_prefix=3, entropy_threshold=1.0)


@pytest.fixture(scope="module")
def small() -> Policy:
    return worlds.tiny_policy(tokenizer=worlds.char_tokenizer(FEW), dtype=torch.float64, context=64)


@pytest.fixture(scope="module", params=["scalar", "log-ratio"])
def small_reward(request: pytest.FixtureRequest, small: Policy) -> Reward:
    build = worlds.tiny_scalar if request.param == "scalar" else worlds.tiny_logratio
    return build(small, context=64)


def run(
    name: str, policy: Policy, reward: Reward, size: int | None, config: BaselineConfig = STEPS, **options
) -> list[Trace]:
    method, drawing = UNCERTAINTY_METHODS[name]
    how = {"sampling": Sampling(max_new_tokens=LENGTH), "method_name": name, "problems": PROBLEMS, **options}
    problems = how.pop("problems")
    return run_step_search(
        problems, method=method, size=size, policy=policy, reward=reward, step_config=config, drawing=drawing, **how
    )


def score(reward: Reward, policy: Policy, problem: Problem, ids: list[int], *, is_partial: bool = False) -> float:
    sample = Sample(problem, policy.encode(problem), ids, is_partial=is_partial)
    [value], _ = reward.score(
        [sample], reward.compute_prompt_caches([sample], FlopCounter()), flop_counter=FlopCounter()
    )
    return value


def test_the_first_uncertain_token_is_found() -> None:
    statistics = torch.zeros(4, 3)
    statistics[:, 2] = torch.tensor([0.2, 0.9, 1.4, 0.1])
    assert [find_uncertain_token(statistics, threshold) for threshold in (0.1, 0.9, 1.0, 2.0)] == [0, 1, 2, None]


def test_without_uncertain_steps_it_is_a_beam_search_that_draws_once(small: Policy, small_reward: Reward) -> None:
    certain = run("entropy_branching", small, small_reward, 3, replace(STEPS, entropy_threshold=100.0))
    plain = run_step_search(
        PROBLEMS,
        method=beam_search,
        size=3,
        policy=small,
        reward=small_reward,
        sampling=Sampling(max_new_tokens=LENGTH),
        step_config=replace(STEPS, steps_per_prefix=1),
        method_name="beam_search",
    )
    # A beam search draws again for beams that coincide, so only searches of equal cost are equal.
    equal = [one for one in zip(certain, plain, strict=True) if one[0].cost.flops == one[1].cost.flops]
    assert len(equal) >= 1 and all(ours.response_ids == theirs.response_ids for ours, theirs in equal)
    branched = run("entropy_branching", small, small_reward, 3)
    assert all(many.cost.flops > few.cost.flops for many, few in zip(branched, certain, strict=True))


@pytest.mark.parametrize("name", UNCERTAINTY_METHODS)
def test_rewards_are_those_of_whole_responses_and_batches_do_not_matter(
    name: str, small: Policy, small_reward: Reward
) -> None:
    together = run(name, small, small_reward, 3)
    for trace, problem in zip(together, PROBLEMS, strict=True):
        assert (trace.error is None and trace.finished) or len(trace.response_ids) == LENGTH
        assert trace.reward == pytest.approx(score(small_reward, small, problem, trace.response_ids), abs=1e-6)
    [alone] = run(name, small, small_reward, 3, problems=PROBLEMS[1:2], batch_size=1)
    assert (alone.response_ids, alone.cost.flops) == (together[1].response_ids, together[1].cost.flops)


def test_a_branch_that_writes_what_its_step_wrote_counts_once(monkeypatch: pytest.MonkeyPatch, small: Policy) -> None:
    """Else rounding, which depends on the batch, would decide which of the two goes on."""
    reward, kept = worlds.tiny_scalar(small, context=64), list[list[StepNode]]()
    draw_steps = StepTree.draw_steps

    async def note_beams(tree: StepTree, nodes: list[StepNode]) -> list[StepNode]:
        kept.append([node for node in nodes if node.tree_path[-1] >= 0])  # no forks
        return await draw_steps(tree, nodes)

    monkeypatch.setattr(StepTree, "draw_steps", note_beams)
    run("entropy_branching", small, reward, 6, replace(STEPS, max_step_tokens=1, entropy_threshold=0.0))
    assert any(len(set(beams)) > 1 for beams in kept)
    for beams in kept:
        assert len({tuple(node.token_ids) for node in beams}) == len(set(beams))


def test_branches_are_drawn_only_from_a_budget_that_is_left(small: Policy, small_reward: Reward) -> None:
    """The first response is drawn whatever it costs, and nothing beside it."""
    config = replace(STEPS, entropy_threshold=0.0)
    spent = run("entropy_branching", small, small_reward, None, config, max_flops=1.0)
    plain = run("entropy_branching", small, small_reward, 1, replace(STEPS, entropy_threshold=100.0))
    for trace, alone in zip(spent, plain, strict=True):
        assert (trace.response_ids, trace.cost.flops) == (alone.response_ids, alone.cost.flops)


def test_a_fork_goes_on_as_its_prefix_would(small: Policy, small_reward: Reward) -> None:
    """With its own token, or with another one in its place."""
    seen: list[tuple[StepNode, StepNode]] = []

    async def fork_twice(tree: StepTree, size: int | None) -> None:
        root = tree.start_attempt()
        [child] = await tree.draw_steps([root])
        other = next(int(token) for token in child.get_output().candidates[2] if token not in (child.token_ids[2], 7))
        for token in (None, other):
            fork = tree.fork(root, child, 2, token)
            assert fork.token_ids == child.token_ids[:2] + ([] if token is None else [token])
            seen.extend(zip([fork], await tree.draw_steps([fork]), strict=True))

    _, drawing = UNCERTAINTY_METHODS["ggro"]
    config = replace(STEPS, entropy_threshold=100.0)
    options = {"sampling": Sampling(max_new_tokens=LENGTH), "step_config": config, "method_name": "x"}
    run_step_search([PROBLEMS[0]], method=fork_twice, size=1, policy=small, reward=small_reward,
                    drawing=drawing, **options)  # fmt: skip
    assert len(seen) == 2
    for fork, child in seen:
        prefix = small.encode(PROBLEMS[0]) + fork.token_ids
        rng = make_rng(0, "q0", "step", *fork.tree_path, 0)
        request = GenerationRequest("p", prefix, rng, LENGTH - len(fork.token_ids))
        [output] = generate_continuations(
            small, [request], Sampling(max_new_tokens=LENGTH), flop_counter=FlopCounter()
        )
        assert child.token_ids == fork.token_ids + output.ids
        logits = small.model(torch.tensor([prefix + output.ids])).logits[0, len(small.encode(PROBLEMS[0])) - 1 : -1]
        logp = logits.log_softmax(-1).gather(1, torch.tensor(child.token_ids)[:, None])[:, 0]
        assert child.logp == pytest.approx(logp.detach().numpy(), abs=1e-5)
        assert child.reward == pytest.approx(
            score(small_reward, small, PROBLEMS[0], child.token_ids, is_partial=not child.is_complete), abs=1e-6
        )


# --- GGRO by hand ---------------------------------------------------------------------------------------

THRESHOLD = 1.0


def write_greedily(policy: Policy, problem: Problem, start: list[int]) -> list[int]:
    """A segment behind some tokens, up to the token before which the policy is uncertain."""
    ids = list(start)
    while len(ids) < LENGTH and not (ids and ids[-1] in policy.stop_ids):
        logits = policy.model(torch.tensor([policy.encode(problem) + ids])).logits[0, -1]
        logp = logits.log_softmax(-1).masked_fill(policy.forbidden_mask, -torch.inf)
        entropy = -float((logp.exp() * logp.clamp(min=-1e9)).sum())
        ids.append(int(logp.argmax()))
        is_end = ids[-1] in policy.stop_ids or len(ids) == LENGTH
        if entropy >= THRESHOLD and len(ids) - len(start) >= MIN_SEGMENT_TOKENS and not is_end:
            return ids[:-1]
    return ids


def ggro_by_hand(policy: Policy, reward: Reward, problem: Problem, num_candidates: int) -> tuple[list[int], int]:
    """The response and how many nudges it has. The world is smaller than 25 tokens, so all of them are candidates."""
    prefix, offset, num_nudges = list[int](), MIN_SEGMENT_TOKENS, 0

    def is_complete(ids: list[int]) -> bool:
        return len(ids) == LENGTH or (bool(ids) and ids[-1] in policy.stop_ids)

    while not is_complete(prefix):
        start, candidates, position = prefix, list[list[int]](), len(prefix) + offset
        while len(candidates) < num_candidates:
            ids = write_greedily(policy, problem, start)
            if ids in candidates:
                break
            candidates.append(ids)
            if position >= len(ids):
                break
            prompt = policy.encode(problem)
            logits = policy.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            draw_info = DrawInfo(
                policy.model,
                torch.tensor(ids)[:, None],
                logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).detach(),
            )
            sample = Sample(problem, prompt, ids, draw_info=draw_info, is_partial=not is_complete(ids))
            [gradient] = reward.compute_backward_gradient(
                [sample], reward.compute_prompt_caches([sample], FlopCounter()), None, flop_counter=FlopCounter()
            )
            gain = gradient[position] - gradient[position][ids[position]]
            usable = [v for v in range(len(gain)) if not policy.forbidden_mask[v] and v not in policy.stop_ids]
            token = max([ids[position], *usable], key=lambda v: float(gain[v]))
            if token == ids[position]:
                break
            start = [*ids[:position], token]
        rewards = [score(reward, policy, problem, ids, is_partial=not is_complete(ids)) for ids in candidates]
        best = rewards.index(max(rewards))
        prefix, offset, num_nudges = candidates[best], 0, num_nudges + (best > 0)
    return prefix, num_nudges


def test_ggro_is_that_of_its_authors_decoded_greedily(small: Policy, small_reward: Reward) -> None:
    config = replace(STEPS, entropy_threshold=THRESHOLD)
    sampling = Sampling(temperature=0.0, max_new_tokens=LENGTH)
    num_nudges = num_gradients = 0
    for trace, problem in zip(run("ggro", small, small_reward, 4, config, sampling=sampling), PROBLEMS, strict=True):
        response, nudges = ggro_by_hand(small, small_reward, problem, 4)
        assert trace.response_ids == response
        num_nudges += nudges
        num_gradients += any("backward" in name for name in trace.cost.tokens)
    assert num_gradients, "the gradients are charged"
    assert num_nudges, "some responses were nudged"


# --- in an evaluation -----------------------------------------------------------------------------------


def test_they_run_at_sizes_and_budgets(policy: Policy, scalar_reward: Reward) -> None:
    names = parse_methods("best_of_6,entropy_branching_2,ggro_2,entropy_branching@best_of_6,ggro@best_of_6")
    config = SearchConfig(max_new_tokens=8, batch_size=4)
    setup = EvaluationSetup(policy, scalar_reward, config, (0,), baseline_config=replace(STEPS, step_delimiter="#"))
    problems = [Problem(id=f"p{number}", question=text, answer="1") for number, text in enumerate(("1+2", "7"))]
    flops, _, traces = worlds.run_plan(names, setup, problems)
    assert len(traces) == 10 and all(math.isfinite(trace.reward) for trace in traces)
    for name in ("entropy_branching", "ggro"):
        assert 0.4 < flops[f"{name}@best_of_6"] / flops["best_of_6"] < 1.3, flops
    assert get_baseline_settings(["ggro_2"], setup)["step_search"]["entropy_threshold"] == "1.0"
