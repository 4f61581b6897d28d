"""The search loop against a plain replay of it, batches against singles, budgets, and what must not break it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import worlds
from torch import Tensor

from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import FlopCounter, count_model_calls
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.options import GradientPoint
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import proposals
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Revision, Trace

END = worlds.TOKENS.index(worlds.END)
MANY = ("1+2", "3*4-5", "7", "12-3+4*5", "9*9", "2-2-2")


def _config(solver: str = "none", **options: Any) -> SearchConfig:
    """A short search; ste with large steps, so that tokens flip."""
    ste = {"steps": 4, "learning_rate": 1.5, "final_learning_rate": 1.0} if solver == "ste" else {}
    return worlds.search_config(**{"solver": solver, "max_new_tokens": 8, "max_rounds": 4, **ste, **options})


def _moves(trace: Trace) -> list[tuple]:
    return [(r.round, r.position, r.old_token, r.new_token, r.suffix, r.accepted) for r in trace.revisions]


def _assert_same(one: Trace, two: Trace) -> None:
    """Equal but for rounding: everything discrete exactly, rewards and FLOPs as numbers, seconds not at all."""
    for name in (
        "problem_id",
        "response_ids",
        "initial_ids",
        "prompt_ids",
        "stop_reason",
        "finished",
        "error",
        "answer",
    ):
        assert getattr(one, name) == getattr(two, name), name
    assert _moves(one) == _moves(two)
    for a, b in zip(one.revisions, two.revisions, strict=True):
        close = pytest.approx((b.reward_before, b.reward_after), rel=1e-4, abs=1e-4)
        assert (a.reward_before, a.reward_after) == close
        assert a.cumulative_flops == pytest.approx(b.cumulative_flops, rel=1e-9)
    assert one.cost.tokens == two.cost.tokens
    assert one.cost.flops == pytest.approx(two.cost.flops, rel=1e-9)
    close = pytest.approx((two.reward_initial, two.reward), rel=1e-4, abs=1e-4, nan_ok=True)
    assert (one.reward_initial, one.reward) == close


def _fresh_reward(reward: Reward, trace: Trace, problem: Problem, response: Sequence[int]) -> float:
    sample = Sample(problem, trace.prompt_ids, list(response))
    memos = reward.compute_prompt_caches([sample], FlopCounter())
    return reward.score([sample], memos, flop_counter=FlopCounter())[0][0]


@contextmanager
def _logits(policy: Policy, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Rewrite the policy's logits inside a `with` block."""
    hook = policy.model.get_output_embeddings().register_forward_hook(lambda module, args, logits: change(logits))
    try:
        yield
    finally:
        hook.remove()


def _favour(token: int, by: float) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits + by * torch.nn.functional.one_hot(torch.tensor(token), logits.shape[-1])


# --- a batch equals singles -------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", ["global", "sequential"])
@pytest.mark.parametrize("solver", ["mirror", "mirror at direct+mixture:0.5", "none", "ste"])
def test_batch_of_n_equals_n_singles_in_any_order_and_batch_size(
    solver: str, proposals: str, policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    solver, _, point = solver.partition(" at ")
    config = _config(
        solver, proposals=proposals, max_rounds=3, max_new_tokens=7, **({"gradient_at": point} if point else {})
    )

    def run(some: Sequence[Problem], batch_size: int) -> dict[str, Trace]:
        settings = replace(config, batch_size=batch_size)
        return {t.problem_id: t for t in run_search(some, policy=policy, reward=reward, config=settings, seed=3)}

    together = run(problems, 64)
    assert list(together) == [problem.id for problem in problems]
    for other in (run(problems, 1), run(problems[::-1], 3)):
        for problem in problems:
            _assert_same(together[problem.id], other[problem.id])
    assert sum(len(trace.revisions) for trace in together.values()) > len(problems)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_batch_equals_singles_with_several_branches_and_a_reward_of_other_ids(
    architecture: str, problems: list[Problem]
) -> None:
    policy = worlds.tiny_policy(architecture)
    tokenizer, _ = worlds.permuted_tokenizer(policy.tokenizer)
    reward = worlds.tiny_scalar(policy, architecture, tokenizer=tokenizer)
    config = _config("mirror", proposals_per_round=3, max_rounds=3)
    together = run_search(problems, policy=policy, reward=reward, config=config)
    for problem, trace in zip(problems, together, strict=True):
        [single] = run_search([problem], policy=policy, reward=reward, config=config)
        _assert_same(trace, single)
        assert len(trace.revisions) == 9


def test_the_same_seed_gives_the_same_traces_and_another_gives_others(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    first, again, other = (
        run_search(problems, policy=policy, reward=scalar_reward, config=_config("mirror"), seed=seed)
        for seed in (1, 1, 2)
    )
    for one, two in zip(first, again, strict=True):
        _assert_same(one, two)
        assert [r.reward_after for r in one.revisions] == [r.reward_after for r in two.revisions]  # to the bit
    assert sum(one.initial_ids != two.initial_ids for one, two in zip(first, other, strict=True)) >= 3
    assert {trace.seed for trace in other} == {2}


# --- what a trace says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("solver", ["mirror", "none"])
def test_accepted_means_strictly_higher_and_the_best_of_its_round(
    solver: str, branches: int, policy: Policy, reward: Reward
) -> None:
    problems = worlds.tiny_problems(MANY)
    config = _config(solver, proposals_per_round=branches, max_rounds=5)
    accepted = rejected = 0
    for problem, trace in zip(
        problems, run_search(problems, policy=policy, reward=reward, config=config), strict=True
    ):
        trace.validate()
        assert trace.error is None and trace.method == ("control" if solver == "none" else "nabla")
        value = trace.reward_initial
        for number in range(1 + trace.revisions[-1].round):
            tried = [revision for revision in trace.revisions if revision.round == number]
            assert len({(r.position, r.new_token) for r in tried}) == len(tried) == branches
            assert {r.reward_before for r in tried} == {value}
            best = max(tried, key=lambda r: r.reward_after)
            for revision in tried:
                assert revision.accepted == (revision is best and revision.reward_after > value)
                accepted, rejected = accepted + revision.accepted, rejected + (not revision.accepted)
            value = max(value, best.reward_after)
        assert trace.reward == value
        for response, recorded in trace.list_incumbents():
            assert recorded == pytest.approx(_fresh_reward(reward, trace, problem, response), rel=1e-4, abs=1e-4)
    assert accepted > 3 and rejected > 3


def test_a_rejected_branch_is_not_tried_again_on_the_same_response(policy: Policy, scalar_reward: Reward) -> None:
    config = _config(max_rounds=40, top_k_candidates=2)
    for trace in run_search(worlds.tiny_problems(), policy=policy, reward=scalar_reward, config=config):
        tried: set[tuple[int, int]] = set()
        for revision in trace.revisions:
            assert (revision.position, revision.new_token) not in tried
            tried = set() if revision.accepted else tried | {(revision.position, revision.new_token)}


def _closed(response: list[int]) -> list[int]:
    return response if response[-1] == END else [*response, END]


def _plain_backward(
    reward: Reward, prompt: list[int], response: list[int], policy: Tensor, alpha: float, direct: bool
) -> Tensor:
    """[T, V] ∂r/∂Y at the mixture by autograd through a whole sequence: no cache, no batch, no candidates.

    A score is read at the end of the closed sequence; a log-likelihood is Σ_t Σ_v Y[t, v]·log p(v | Y_<t), and
    `direct` says whether Y[t, v] itself varies there. `policy` is [T, V], the policy's probabilities.
    """
    onehot = torch.nn.functional.one_hot(torch.tensor(response), len(worlds.TOKENS)).float()
    relaxed = ((1 - alpha) * onehot + alpha * policy).requires_grad_()
    picked, value = relaxed if direct else relaxed.detach(), torch.zeros(())
    for term in reward.objectives:
        table = term.model.get_input_embeddings().weight
        tail = _closed(response)[len(response) :] if reward.kind == "scalar" else []
        embeds = torch.cat((table[prompt], relaxed @ table, table[tail]))
        logits = term.model(inputs_embeds=embeds[None]).logits
        if reward.kind == "log-ratio":
            logits = picked * logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        value = value + term.weight * logits.sum()
    return torch.autograd.grad(value, relaxed)[0]


def _plain_direct(reward: Reward, prompt: list[int], response: list[int]) -> Tensor:
    """[T, V] of a log-ratio: log p_better − log p_reference of every token in the place of each response token.

    Of a score: what it rose by at each response token but the first, read everywhere in the whole closed sequence.
    """
    if reward.kind == "log-ratio":
        ids = torch.tensor([prompt + response])
        parts = [term.weight * term.model(ids).logits[0].detach().log_softmax(-1) for term in reward.objectives]
        return sum(parts)[len(prompt) - 1 : -1]
    [term] = reward.objectives
    states = term.model.base_model(torch.tensor([prompt + _closed(response)])).last_hidden_state[0].detach()
    levels = term.model.score(states).squeeze(-1).detach()
    steps = torch.zeros(len(response), len(worlds.TOKENS))
    for at in range(1, len(response)):
        here = len(prompt) + at
        steps[at, response[at]] = levels[here] - levels[here - 1]
    return steps


def _plain_gradient(
    reward: Reward, prompt: list[int], response: list[int], policy: Tensor, point: GradientPoint
) -> Tensor:
    """[T, V] as the point asks for: the direct part at the hard tokens, the mean over backward passes, or the sum."""
    parts = [_plain_direct(reward, prompt, response)] if point.direct else []
    passes = [_plain_backward(reward, prompt, response, policy, alpha, not point.direct) for alpha in point.alphas]
    parts += [torch.stack(passes).mean(0)] if passes else []
    return sum(parts)


def _plain_scores(
    policy: Policy, reward: Reward, config: SearchConfig, prompt: list[int], response: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, V], likeliest first, their log π and their scores log π + A, from plain forwards of everything."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].detach()
    unsorted = logits.log_softmax(-1).masked_fill(policy.forbidden_mask, -torch.inf)
    logp, tokens = unsorted.sort(-1, descending=True)
    if config.solver.name == "none":
        return tokens, logp, logp.double()
    point = config.with_default_gradient_at(reward.gradient_at).get_gradient_point()
    gradient = _plain_gradient(reward, prompt, response, unsorted.softmax(-1), point).double()
    own = gradient.gather(1, torch.tensor(response)[:, None])
    return tokens, logp, logp + (gradient - own).gather(1, tokens) / config.beta


def _expected_branch(policy: Policy, reward: Reward, config: SearchConfig, trace: Trace, state: dict) -> tuple:
    """The branch with the largest score plus Gumbel noise."""
    tokens, _, scores = _plain_scores(policy, reward, config, trace.prompt_ids, state["response"])
    noise = make_rng(trace.seed, trace.problem_id, "branch", state["round"]).gumbel(size=tuple(tokens.shape))
    keys = scores + torch.from_numpy(noise)
    for position, own_token in enumerate(state["response"]):
        keys[position][tokens[position] == own_token] = -torch.inf
    for position, token in state["tried"]:
        keys[position][tokens[position] == token] = -torch.inf
    best = int(keys.argmax())
    position = best // tokens.shape[1]
    return position, int(tokens[position, best % tokens.shape[1]])


def test_the_calls_of_a_search_are_those_of_the_paper(policy: Policy, scalar_reward: Reward) -> None:
    """A token is one, a scored response one, a gradient four: forward and backward of the policy and the reward."""
    [problem] = worlds.tiny_problems()[:1]
    config = replace(SearchConfig.from_preset("paper"), max_new_tokens=8, top_k_candidates=4)
    [trace] = run_search([problem], policy=policy, reward=scalar_reward, config=config)
    calls, tokens = trace.cost.calls, trace.cost.tokens
    gradients = calls["reward/backward"]
    scored = int(trace.meta["starts"]) + int(trace.meta["proposals"])
    assert gradients > 0 and calls["policy/forward"] == calls["policy/backward"] == gradients
    assert calls["reward/forward"] == gradients + scored and calls["policy/decode"] == tokens["policy/decode"]
    assert count_model_calls(calls) == tokens["policy/decode"] + scored + 4 * gradients


@pytest.mark.parametrize(
    "point", ["none", "direct", "hard", "mixture:0.6", "mixture:0.3,0.9", "direct+hard", "direct+mixture:0.6"]
)
def test_a_search_equals_its_plain_replay(point: str, policy: Policy, reward: Reward, problems: list[Problem]) -> None:
    """Every branch, suffix and decision again, from the definition: whole forwards, one at a time."""
    options = {"solver": "none"} if point == "none" else {"solver": "mirror", "beta": 0.5, "gradient_at": point}
    config = _config(**options, max_rounds=6, top_k_candidates=len(worlds.TOKENS))
    for problem, trace in zip(
        problems, run_search(problems, policy=policy, reward=reward, config=config, seed=4), strict=True
    ):
        state: dict[str, Any] = {"response": trace.initial_ids, "round": 0, "tried": set()}
        value = _fresh_reward(reward, trace, problem, trace.initial_ids)
        for number, revision in enumerate(trace.revisions):
            state["round"] = number
            branch = _expected_branch(policy, reward, config, trace, state)
            assert (revision.position, revision.new_token) == branch
            suffix = _plain_suffix(policy, trace, state["response"], revision, number, config)
            assert list(revision.suffix) == [revision.new_token, *suffix]
            proposal = state["response"][: revision.position] + list(revision.suffix)
            proposed = _fresh_reward(reward, trace, problem, proposal)
            assert revision.accepted == (proposed > value)
            state["tried"] |= {branch}
            if revision.accepted:
                state, value = {"response": proposal, "tried": set()}, proposed
        assert trace.response_ids == state["response"]
        assert len(trace.revisions) == 6


def test_without_a_point_the_search_follows_the_rewards_own(
    policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    """… and its traces are those of a search that was told it."""
    assert reward.gradient_at == {"scalar": "mixture:0.5", "log-ratio": "direct"}[reward.kind]
    others = []
    for own in (reward.gradient_at, "direct+hard"):
        audited = replace(reward, gradient_at=own)
        left, told = (
            run_search(problems, policy=policy, reward=audited, config=_config("mirror", gradient_at=point), seed=2)
            for point in (None, own)
        )
        for one, two in zip(left, told, strict=True):
            _assert_same(one, two)
            assert one.meta["config_hash"] == two.meta["config_hash"]
        others.append([_moves(trace) for trace in left])
    assert others[0] != others[1]


def _plain_suffix(
    policy: Policy, trace: Trace, base: list[int], revision: Revision, number: int, config: SearchConfig
) -> list[int]:
    """What the policy draws after a branch, from scratch and with the branch's own randomness."""
    head = [*base[: revision.position], revision.new_token]
    limit = config.max_new_tokens - len(head)
    if revision.new_token in policy.stop_ids or limit < 1:
        return []
    stream = make_rng(trace.seed, trace.problem_id, "suffix", number + 1)
    job = GenerationRequest(trace.problem_id, trace.prompt_ids + head, stream, limit)
    return generate_continuations(policy, [job], config.get_sampling(), flop_counter=FlopCounter())[0].ids


@pytest.mark.parametrize("solver", ["none", "mirror"])
def test_a_scan_equals_its_plain_replay(solver: str, policy: Policy, reward: Reward) -> None:
    """From left to right, confident positions skipped, others resampled until a token changes."""
    problems = worlds.tiny_problems(MANY)
    scan = {"proposals": "sequential", "confidence": 0.6, "resample_temperature": 0.7}
    config = _config(
        solver, **scan, beta=2.0, max_rounds=0, max_rollouts=20, restarts=False, top_k_candidates=len(worlds.TOKENS)
    )
    skipped = kept = 0
    for trace in run_search(problems, policy=policy, reward=reward, config=config, seed=1):
        start, revisions, response = 0, list(trace.replay_revisions()), trace.initial_ids
        for number in range(len(revisions) + 1):
            revision, response = revisions[number] if number < len(revisions) else (None, trace.response_ids)
            tokens, logp, scores = _plain_scores(policy, reward, config, trace.prompt_ids, response)
            stream = make_rng(trace.seed, trace.problem_id, "resample", number)
            branch = None
            while branch is None and start < len(response):
                at, start = start, start + 1
                if logp[at, 0].exp() > 0.6:
                    skipped += 1
                    continue
                mass = (scores[at] / 0.7).softmax(-1).cumsum(-1)
                token = int(tokens[at, int((mass <= stream.random() * mass[-1]).sum())])
                kept += token == response[at]
                branch = None if token == response[at] else (at, token)
            assert branch == (None if revision is None else (revision.position, revision.new_token))
            if revision is not None:
                suffix = _plain_suffix(policy, trace, response, revision, number, config)
                assert list(revision.suffix) == [revision.new_token, *suffix]
        assert trace.stop_reason == "scanned" and start == len(trace.response_ids)
    assert skipped > 0 and kept > 0


# --- the gradient, once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["mirror", "ste"])
def test_token_gradients_are_computed_once_per_distinct_response(
    solver: str, policy: Policy, reward: Reward, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, str, tuple[int, ...]]] = []
    read: list[tuple[int, str, tuple[int, ...]]] = []
    plain, direct, compute_scores, calls = (
        Reward.compute_backward_gradient,
        Reward.compute_direct_gradient,
        proposals.compute_proposal_scores,
        [],
    )

    def gradient(self: Reward, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Tensor]:
        asked.extend((len(calls), sample.problem.id, tuple(sample.response_ids)) for sample in samples)
        return plain(self, samples, *args, **options)

    def direct_gradient(self: Reward, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Tensor]:
        read.extend((len(calls), sample.problem.id, tuple(sample.response_ids)) for sample in samples)
        return direct(self, samples, *args, **options)

    monkeypatch.setattr(Reward, "compute_backward_gradient", gradient)
    monkeypatch.setattr(Reward, "compute_direct_gradient", direct_gradient)
    monkeypatch.setattr(proposals, "compute_proposal_scores", lambda *args: calls.append(1) or compute_scores(*args))
    flips = (
        {"steps": 6, "learning_rate": 1.0, "final_learning_rate": 0.5}
        if solver == "ste"
        else {"gradient_at": "direct+hard"}
    )  # there and back
    config = _config(solver, max_rounds=6, **flips)
    traces = run_search(problems, policy=policy, reward=reward, config=config, seed=1)
    assert len(set(asked)) == len(asked)  # however often ste's tokens flip there and back
    responses = {key[1:] for key in asked}
    incumbents = set()
    for trace in traces:
        solved = trace.list_incumbents()[:-1] if trace.revisions[-1].accepted else trace.list_incumbents()
        incumbents |= {(trace.problem_id, tuple(response)) for response, _ in solved}
    if solver == "ste":
        assert incumbents < responses and not read
    else:
        assert incumbents == responses and len(responses) == len(asked) and read == asked
    for trace in traces:
        fed = [
            reward.objectives[0].encode(Sample(problems[0], trace.prompt_ids, list(ids)))
            for _, key, ids in asked
            if key == trace.problem_id
        ]
        tail = 1 if reward.kind == "scalar" else 0  # a likelihood does not read the last token
        expected = sum(len(row.response_ids) + len(row.turn_end_ids) + tail for row in fed)
        assert trace.cost.tokens["reward/backward"] == expected


def test_the_control_asks_for_no_gradient(
    policy: Policy, reward: Reward, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compute_backward_gradient", "compute_direct_gradient", "compute_gradient"):
        monkeypatch.setattr(Reward, name, lambda *args, **options: pytest.fail("the control has no gradient"))
    for kind in ("global", "sequential"):
        for trace in run_search(problems, policy=policy, reward=reward, config=_config(proposals=kind)):
            assert not any("backward" in kind for kind in trace.cost.tokens)
            assert trace.method == "control"


# --- budgets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "stop", "revisions"),
    [
        ({"max_rounds": 3}, "max_rounds", 3),
        ({"max_rounds": 3, "proposals_per_round": 2}, "max_rounds", 6),
        ({"max_rounds": 0, "max_rollouts": 5}, "max_rollouts", 4),
        ({"max_rounds": 0, "max_rollouts": 6, "proposals_per_round": 2}, "max_rollouts", 4),  # not 7
        ({"max_rounds": 9, "max_rollouts": 1}, "max_rollouts", 0),
    ],
)
def test_budgets_in_rounds_and_rollouts(
    options: dict, stop: str, revisions: int, policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    for trace in run_search(problems, policy=policy, reward=scalar_reward, config=_config("mirror", **options)):
        assert (trace.stop_reason, len(trace.revisions)) == (stop, revisions)
        drawn = len(trace.initial_ids) + sum(len(r.suffix) - 1 for r in trace.revisions)
        assert trace.cost.tokens["policy/decode"] == drawn


def test_patience_counts_rounds_without_acceptance(policy: Policy, scalar_reward: Reward) -> None:
    config = _config("mirror", max_rounds=0, patience=3)
    for trace in run_search(worlds.tiny_problems(MANY), policy=policy, reward=scalar_reward, config=config):
        assert trace.stop_reason == "patience"
        verdicts = "".join("+" if revision.accepted else "-" for revision in trace.revisions)
        assert verdicts.endswith("---") and "---" not in verdicts[:-1]


@pytest.mark.parametrize("solver", ["none", "mirror", "ste"])
def test_a_larger_budget_continues_the_trace_of_a_smaller_one(
    solver: str, policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    reward = scalar_reward
    [free] = run_search(problems[3:], policy=policy, reward=reward, config=_config(solver, max_rounds=8))
    budgets = [free.cost.flops * share for share in (0.05, 0.4, 0.7, 0.9, 1.5)]
    previous: list[tuple] = []
    lengths = []
    for budget in budgets:
        config = _config(solver, max_rounds=8, max_flops=budget)
        [trace] = run_search(problems[3:], policy=policy, reward=reward, config=config)
        moves = _moves(trace)
        assert moves[: len(previous)] == previous and moves == _moves(free)[: len(moves)]
        assert trace.stop_reason == ("max_flops" if len(moves) < 8 else "max_rounds")
        # No round began beyond the budget: what was spent before it lies below.
        assert all(revision.cumulative_flops < budget for revision in trace.revisions[:-1])
        assert trace.revisions == [] or trace.cost.flops < 1.5 * budget
        previous = moves
        lengths.append(len(moves))
    assert lengths[0] == 0 and lengths[-1] == 8 and len(set(lengths)) > 2


def test_a_round_starts_only_if_it_is_expected_to_fit(
    policy: Policy, scalar_reward: Reward, problems: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With branches at the first token only and no stop, a round costs exactly what is expected of it."""
    monkeypatch.setattr(
        proposals,
        "draw_global_branches",
        lambda chain, *args: [(0, (chain.incumbent.response_ids[0] + 1 + chain.num_rounds) % 10)],
    )
    with _logits(policy, _favour(END, -1000.0)):
        [free] = run_search(problems[:1], policy=policy, reward=scalar_reward, config=_config(max_rounds=4))
        for rounds in (1, 2, 3):
            spent = free.revisions[rounds - 1].cumulative_flops
            for extra, expected in ((-1.0, rounds - 1), (1.0, rounds)):
                config = _config(max_rounds=4, max_flops=spent + extra)
                [trace] = run_search(problems[:1], policy=policy, reward=scalar_reward, config=config)
                assert (len(trace.revisions), trace.stop_reason) == (expected, "max_flops")
                assert trace.cost.flops <= spent + extra


def test_a_search_ends_when_every_branch_was_tried(
    policy: Policy, scalar_reward: Reward, problems: list[Problem]
) -> None:
    config = _config(max_rounds=500, top_k_candidates=2, max_new_tokens=3)
    for trace in run_search(problems, policy=policy, reward=scalar_reward, config=config):
        assert trace.stop_reason == "exhausted"
        since = [r.accepted for r in trace.revisions][::-1]
        rejected = since.index(True) if True in since else len(since)
        assert rejected == len(trace.response_ids)  # one alternative at each position


# --- odd responses ----------------------------------------------------------------------------------------


def test_a_branch_on_the_stop_token_ends_the_response(
    policy: Policy, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn after it, and the search goes on from the shortened response."""
    plain = proposals.draw_global_branches

    def branches(chain: Any, *args: Any) -> list[tuple[int, int]]:
        return [(2, END)] if chain.num_rounds == 0 else plain(chain, *args)

    monkeypatch.setattr(proposals, "draw_global_branches", branches)
    problems = worlds.tiny_problems(MANY)
    config = _config("mirror", max_rounds=5, top_k_candidates=len(worlds.TOKENS))
    with _logits(policy, _favour(END, -4.0)):  # so that the first responses are longer than the branch
        traces = run_search(problems, policy=policy, reward=reward, config=config, seed=1)
        kept = [trace for trace in traces if trace.revisions[0].accepted]
        assert kept
        for problem, trace in zip(problems, traces, strict=True):
            trace.validate()
            assert trace.revisions[0].suffix == (END,)
            fresh = _fresh_reward(reward, trace, problem, trace.response_ids)
            assert trace.reward == pytest.approx(fresh, rel=1e-4, abs=1e-4)
            for number, (revision, base) in enumerate(trace.replay_revisions()):
                suffix = _plain_suffix(policy, trace, base, revision, number, config)
                assert list(revision.suffix) == [revision.new_token, *suffix]
        assert all(trace.list_incumbents()[1][0] == [*trace.initial_ids[:2], END] for trace in kept)


@pytest.mark.parametrize("solver", ["mirror", "none", "ste"])
@pytest.mark.parametrize("proposals", ["global", "sequential"])
def test_a_response_that_stops_at_once(
    proposals: str, solver: str, policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    options = {"confidence": 1.0, "resample_temperature": 20.0} if proposals == "sequential" else {}
    with _logits(policy, _favour(END, 15.0)):
        for trace in run_search(
            problems, policy=policy, reward=reward, config=_config(solver, proposals=proposals, **options)
        ):
            trace.validate()
            assert trace.error is None and trace.initial_ids == [END]
            assert all(r.position == 0 for r in trace.revisions if not trace.list_incumbents()[1:])
            assert trace.finished


@pytest.mark.parametrize("context", [None, 16])
def test_responses_cut_by_the_limit_or_the_context(context: int | None, problems: list[Problem]) -> None:
    policy = worlds.tiny_policy("gpt2", **({} if context is None else {"context": context}))
    reward = worlds.tiny_scalar(policy, "gpt2")
    with _logits(policy, _favour(END, -1000.0)):
        for trace in run_search(problems, policy=policy, reward=reward, config=_config("mirror", max_rounds=12)):
            trace.validate()
            room = 8 if context is None else min(8, context - len(trace.prompt_ids))
            assert trace.error is None and not trace.finished
            assert len(trace.initial_ids) == len(trace.response_ids) == room
            assert all(r.position + len(r.suffix) == room for r in trace.revisions)
            assert len(trace.revisions) == 12


def test_a_reward_with_a_shorter_context_limits_the_response(policy: Policy, problems: list[Problem]) -> None:
    reward = worlds.tiny_scalar(policy, "gpt2", context=12)
    fits, long = run_search([problems[0], problems[3]], policy=policy, reward=reward, config=_config("mirror"))
    assert long.error is not None and "q3" in long.error and "context" in long.error
    assert fits.error is None
    assert all(r.position + len(r.suffix) <= 12 - len(fits.prompt_ids) - 1 for r in fits.revisions)


@pytest.mark.parametrize("proposals", ["global", "sequential"])
@pytest.mark.parametrize("solver", ["mirror", "ste"])
def test_equal_logits_and_a_reward_without_gradient(
    solver: str, proposals: str, policy: Policy, problems: list[Problem]
) -> None:
    reward = worlds.tiny_scalar(policy)
    with torch.no_grad():
        reward.objectives[0].model.score.weight.zero_()
    with _logits(policy, lambda logits: logits * 0):
        traces = run_search(problems, policy=policy, reward=reward, config=_config(solver, proposals=proposals))
    assert sum(len(trace.revisions) for trace in traces) > 4
    for trace in traces:
        trace.validate()
        assert trace.error is None and trace.reward == trace.reward_initial == 0.0
        assert not any(revision.accepted for revision in trace.revisions)


# --- errors stay with their problem -----------------------------------------------------------------------


def _assert_others_unaffected(
    problems: list[Problem], broken: str, traces: list[Trace], without: list[Trace], *words: str
) -> Trace:
    """The broken problem's trace, after checking that the others equal a run without it."""
    assert [trace.problem_id for trace in traces] == [problem.id for problem in problems]
    [bad] = [trace for trace in traces if trace.error is not None]
    assert (bad.problem_id, bad.stop_reason) == (broken, "error")
    assert "\n" not in bad.error and all(word in bad.error for word in words), bad.error
    bad.validate()
    for one, two in zip([t for t in traces if t is not bad], without, strict=True):
        _assert_same(one, two)
    return bad


@pytest.mark.parametrize(
    ("question", "words"),
    [("1" * 130, ["context"]), ("1+π", ["does not know"])],
    ids=["too long", "unknown character"],
)
def test_a_prompt_that_cannot_be_read_gives_an_error_trace(
    question: str, words: list[str], policy: Policy, reward: Reward, problems: list[Problem]
) -> None:
    run = {"policy": policy, "reward": reward, "config": _config("mirror")}
    some = [problems[0], Problem(id="bad", question=question, answer="1"), *problems[1:]]
    bad = _assert_others_unaffected(some, "bad", run_search(some, **run), run_search(problems, **run), "bad", *words)
    assert bad.response_ids == [] and bad.gold == "1" and math.isnan(bad.reward)
    [alone] = run_search(some[1:2], **run)
    assert alone.error == bad.error


def test_a_prompt_that_only_the_reward_cannot_read_gives_an_error_trace(problems: list[Problem]) -> None:
    # Only a template can put such a token into a prompt: in a question it stays text.
    template = worlds.TEMPLATE.replace("{{ '<|' +", "{{ ('<é>' if m['content'] == 'f' else '') + '<|' +")
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer((*worlds.TOKENS, "<é>"), template=template))
    reward = worlds.tiny_logratio(policy, tokenizer=worlds.char_tokenizer())
    run = {"policy": policy, "reward": reward, "config": _config("mirror")}
    some = [*problems, Problem(id="bad", question="f")]
    with _logits(policy, _favour(len(worlds.TOKENS), -1000.0)):  # never draw it: the others can be read
        traces, without = run_search(some, **run), run_search(problems, **run)
    _assert_others_unaffected(some, "bad", traces, without, "bad", "no token")


def _spoil(monkeypatch: pytest.MonkeyPatch, value: float, when: Callable[[Sample], bool]) -> None:
    plain = Reward.score

    def score(self: Reward, samples: Sequence[Sample], *args: Any, **options: Any) -> Any:
        values, memos = plain(self, samples, *args, **options)
        return [value if when(s) else v for s, v in zip(samples, values, strict=True)], memos

    monkeypatch.setattr(Reward, "score", score)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("moment", ["at once", "later"])
def test_a_reward_that_is_no_number_stays_with_its_problem(
    value: float, moment: str, policy: Policy, reward: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = worlds.tiny_problems(MANY)
    run = {"policy": policy, "reward": reward, "config": _config("mirror")}
    without = run_search([p for p in problems if p.id != "q3"], **run)
    [first] = run_search([problems[3]], **{**run, "config": _config("mirror", max_rollouts=1)})
    _spoil(
        monkeypatch,
        value,
        lambda s: s.problem.id == "q3" and (moment == "at once" or s.response_ids != first.initial_ids),
    )
    bad = _assert_others_unaffected(problems, "q3", run_search(problems, **run), without, reward.name, str(value))
    assert bad.initial_ids == first.initial_ids  # what was drawn stays visible
    assert bad.cost.flops > 0


@pytest.mark.parametrize("point", ["direct", "hard"])
@pytest.mark.parametrize("proposals", ["global", "sequential"])
def test_a_gradient_that_is_no_number_stays_with_its_problem(
    proposals: str,
    point: str,
    policy: Policy,
    reward: Reward,
    problems: list[Problem],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = _config("mirror", proposals=proposals, gradient_at=point)
    run = {"policy": policy, "reward": reward, "config": config}
    without = run_search([p for p in problems if p.id != "q1"], **run)
    name = {"direct": "compute_direct_gradient", "hard": "compute_backward_gradient"}[point]
    plain = getattr(Reward, name)

    def gradient(self: Reward, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Tensor]:
        found = plain(self, samples, *args, **options)
        return [g * math.nan if s.problem.id == "q1" else g for s, g in zip(samples, found, strict=True)]

    monkeypatch.setattr(Reward, name, gradient)
    _assert_others_unaffected(problems, "q1", run_search(problems, **run), without, reward.name, "gradient")


def _narrow_reward(policy: Policy) -> Reward:
    """A scalar reward that lacks the policy's special tokens of user and assistant."""
    template = "{% for m in messages %}{{ '#' + m['content'] + '<|end|>' }}{% endfor %}"
    tokens = [*worlds.CHARS, worlds.PAD, worlds.END, worlds.UNK]
    return worlds.tiny_scalar(policy, tokenizer=worlds.char_tokenizer(tokens, template=template))


@pytest.mark.parametrize("solver", ["none", "mirror", "ste"])
@pytest.mark.parametrize("proposals", ["global", "sequential"])
def test_tokens_that_the_reward_cannot_read_are_neither_proposed_nor_kept(
    proposals: str, solver: str, policy: Policy
) -> None:
    reward = _narrow_reward(policy)
    unreadable = {worlds.TOKENS.index(token) for token in (worlds.USER, worlds.ASSISTANT)}
    problems = worlds.tiny_problems([str(number) for number in range(24)])
    traces = run_search(problems, policy=policy, reward=reward, config=_config(solver, proposals=proposals))
    for trace in traces:
        trace.validate()
        assert (trace.error is not None) == bool(unreadable & set(trace.initial_ids))
        assert trace.error is None or "cannot read" in trace.error
        for revision in trace.revisions:
            assert revision.new_token not in unreadable
            assert (revision.reward_after == -math.inf) == bool(unreadable & set(revision.suffix))
            assert not (revision.accepted and revision.reward_after == -math.inf)
    assert 0 < sum(trace.error is None for trace in traces) < len(traces)
    assert any(r.reward_after == -math.inf for trace in traces for r in trace.revisions)


def test_duplicate_problems_are_refused(policy: Policy, scalar_reward: Reward, problems: list[Problem]) -> None:
    twice = [*problems, Problem(id="q2", question="another")]
    with pytest.raises(ValueError, match="'q2' occurs 2 times"):
        run_search(twice, policy=policy, reward=scalar_reward, config=_config(batch_size=2))


def test_no_problems_give_no_traces(policy: Policy, scalar_reward: Reward) -> None:
    assert run_search([], policy=policy, reward=scalar_reward, config=_config()) == []


# --- provenance -------------------------------------------------------------------------------------------


def test_a_trace_tells_where_it_came_from(policy: Policy, scalar_reward: Reward, problems: list[Problem]) -> None:
    def run(**options: Any) -> Trace:
        [trace] = run_search(problems[:1], policy=policy, reward=scalar_reward, config=_config("mirror", **options))
        return trace

    trace = run()
    assert (trace.meta["policy"], trace.meta["reward"]) == ("policy", "scorer")
    assert trace.prompt == "<|user|>1+2<|end|><|assistant|>"
    assert trace.response == policy.decode(trace.response_ids)
    assert trace.meta["version/torch"] == torch.__version__
    assert trace.cost.seconds > 0
    assert run(batch_size=1).meta["config_hash"] == trace.meta["config_hash"]
    assert run(beta=0.5).meta["config_hash"] != trace.meta["config_hash"]


# --- what the gradient promised ---------------------------------------------------------------------------


@pytest.mark.parametrize("acceptance", ["greedy", "metropolis"])
def test_pull_is_of_the_incumbents_and_leads_the_search(
    policy: Policy, scalar_reward: Reward, acceptance: str
) -> None:
    config = _config("mirror", beta=1e-6, acceptance=acceptance, gradient_at="hard")
    for trace in run_search(worlds.tiny_problems(MANY), policy=policy, reward=scalar_reward, config=config):
        trace.validate()
        accepted = sum(revision.accepted for revision in trace.revisions)
        assert len(trace.predicted_gain) in (accepted, accepted + 1)
        assert all(one >= 0 for own in trace.predicted_gain for one in own)
        # With a gradient that outweighs π by far, the first branch is where it promises most.
        first, pull = trace.revisions[0], trace.predicted_gain[0]
        assert pull[first.position] == max(pull) > 0


def test_without_a_gradient_there_is_no_pull(policy: Policy, scalar_reward: Reward) -> None:
    traces = run_search(worlds.tiny_problems(), policy=policy, reward=scalar_reward, config=_config())
    assert all(trace.predicted_gain == [] and trace.revisions for trace in traces)
