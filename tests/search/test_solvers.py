"""Solvers against literal references, and branches against their stated distribution."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import Tensor

from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import Sample
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import HARD_GRADIENT_POINT, GradientPoint
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import proposals, solvers
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.options import MirrorSolver, SequentialProposals, SteSolver
from nabla_trl.search.state import EncodedPrompt, ScoredResponse, SearchState
from nabla_trl.states.batch import prefill_sequences
from nabla_trl.states.probe import get_layout
from nabla_trl.tasks.problem import Problem

DOUBLE = torch.float64
END = worlds.TOKENS.index(worlds.END)
LAM = 0.5

# --- ste against a literal reference -----------------------------------------------------------------------


def literal_ste(
    logp: Tensor,
    choice: Tensor,
    objective: Callable[[Tensor], Tensor],
    config: SteSolver,
    movable: slice = slice(None),
) -> tuple[Tensor, list[list[int]]]:
    """Autograd through everything at every step; the optimized logits and the hard tokens of each step.

    Positions outside `movable` keep their logits.
    """
    z = logp.clone().requires_grad_(True)
    adam = torch.optim.Adam([z], lr=config.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, T_max=config.steps, eta_min=config.final_learning_rate)
    start, left, seen = logp.argmax(-1), torch.zeros(len(logp), dtype=torch.bool), []
    for _ in range(config.steps):
        left |= z.argmax(-1) != start
        hard = torch.where(left, z.argmax(-1), choice)
        soft = (z / config.tau).softmax(-1)
        one_hot = F.one_hot(hard, z.shape[1]).to(z.dtype) + soft - soft.detach()
        adam.zero_grad()
        objective(one_hot).backward()
        still = torch.ones(len(z), dtype=torch.bool)
        still[movable] = False
        z.grad[still] = 0
        adam.step()
        cosine.step()
        seen.append(hard.tolist())
    return z.detach(), seen


def log_likelihood(model: Any, item: Sample, rows: Tensor, direct: bool = True, postfix: bool = True) -> Tensor:
    """Σ Y·log p of one-hot rows [T, V] by one full forward."""
    whole = torch.cat((F.one_hot(torch.tensor(item.prompt_ids), rows.shape[1]).to(rows.dtype), rows))
    embeds = (whole if postfix else whole.detach()) @ model.get_input_embeddings().weight
    logp = model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)[len(item.prompt_ids) - 1 : -1]
    return ((rows if direct else rows.detach()) * logp).sum()


def score(model: Any, item: Sample, rows: Tensor) -> Tensor:
    """A classifier's score; the template closes the turn with the stop token, unless the response has done so."""
    tail = [] if int(rows[-1].argmax()) == END else [END]
    before, after = (F.one_hot(torch.tensor(ids, dtype=torch.long), rows.shape[1]) for ids in (item.prompt_ids, tail))
    whole = torch.cat((before.to(rows.dtype), rows, after.to(rows.dtype)))
    return model(inputs_embeds=(whole @ model.get_input_embeddings().weight)[None]).logits.squeeze()


def score_steps(model: Any, item: Sample, width: int) -> Tensor:
    """[T, V] what the score rose by at each response token but the first, by one full forward."""
    states = model.base_model(torch.tensor([item.prompt_ids + item.response_ids])).last_hidden_state[0]
    levels = model.score(states).squeeze(-1).detach()
    steps = torch.zeros(len(item.response_ids), width, dtype=DOUBLE)
    for at in range(1, len(item.response_ids)):
        here = len(item.prompt_ids) + at
        steps[at, item.response_ids[at]] = levels[here] - levels[here - 1]
    return steps


def reward_value(reward: Reward, item: Sample, rows: Tensor, postfix: bool = True) -> Tensor:
    if reward.kind == "scalar":
        return score(reward.objectives[0].model, item, rows)
    better, base = (log_likelihood(term.model, item, rows, postfix=postfix) for term in reward.objectives)
    return better - base


def relaxed_objective(
    policy: Policy, reward: Reward, item: Sample, direct: bool = True, postfix: bool = True
) -> Callable[[Tensor], Tensor]:
    """one-hot [T, V] → −λ·r − log π."""

    def objective(rows: Tensor) -> Tensor:
        own = log_likelihood(policy.model, item, rows, direct, postfix)
        return -LAM * reward_value(reward, item, rows) - own

    return objective


class Problems:
    """Responses of a policy with everything `ste` wants, over the whole vocabulary."""

    def __init__(self, policy: Policy, reward: Reward, texts: list[tuple[str, bool]]):
        self.policy, self.reward = policy, reward
        questions = worlds.tiny_problems()
        self.samples = [worlds.sample(policy, questions[i], t, finished=f) for i, (t, f) in enumerate(texts)]
        self.choices = [torch.tensor(item.response_ids) for item in self.samples]
        self.logp = [self._logp(item) for item in self.samples]
        self.calls: list[list[int]] = []
        self.hard: list[Tensor] = list(self.choices)

    def _logp(self, item: Sample) -> Tensor:
        with torch.no_grad():
            logits = self.policy.model(torch.tensor([item.prompt_ids + item.response_ids])).logits[0]
        logp = logits[len(item.prompt_ids) - 1 : -1].log_softmax(-1)
        return logp.masked_fill(self.policy.forbidden_mask, -torch.inf)

    def gradient(self, rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        """∂L/∂Y by the package's token gradients; records who asked."""
        if self.calls:
            assert all(not torch.equal(self.hard[row], now) for row, now in zip(rows, hard, strict=True))
        self.calls.append(rows)
        for row, now in zip(rows, hard, strict=True):
            self.hard[row] = now
        moved = [
            Sample(self.samples[row].problem, self.samples[row].prompt_ids, now.tolist())
            for row, now in zip(rows, hard, strict=True)
        ]
        own = policy_likelihood(self.policy)
        total = [torch.zeros(()) for _ in rows]
        for terms, factor in ((self.reward.objectives, -LAM), ([own], -1.0)):
            memos = list(zip(*(term.compute_prompt_caches(moved, FlopCounter()) for term in terms), strict=True))
            parts = compute_token_gradient(terms, moved, memos, None, flop_counter=FlopCounter())
            total = [a + factor * b for a, b in zip(total, parts, strict=True)]
        return total

    def only(self, row: int) -> Problems:
        alone = object.__new__(Problems)
        alone.policy, alone.reward, alone.calls = self.policy, self.reward, []
        alone.samples, alone.choices = [self.samples[row]], [self.choices[row]]
        alone.logp, alone.hard = [self.logp[row]], [self.choices[row]]
        return alone

    def solve(self, config: SteSolver) -> list[Tensor]:
        return solvers.solve_ste(self.logp, self.choices, self.gradient, config).logits


TEXTS = [("4-5=9;#9", True), ("3*4", False)]


@pytest.fixture(scope="module", params=["scalar", "log-ratio"])
def world(request: pytest.FixtureRequest) -> tuple[Policy, Reward]:
    policy = worlds.tiny_policy(dtype=DOUBLE)
    return policy, (worlds.tiny_scalar if request.param == "scalar" else worlds.tiny_logratio)(policy)


def test_ste_equals_the_literal_reference(world: tuple[Policy, Reward]) -> None:
    """… over 100 steps in which tokens flip, and asks for a gradient at flips only."""
    config = SteSolver(
        steps=100, learning_rate=0.1, final_learning_rate=0.01, tau=1.0 if world[1].kind == "scalar" else 0.7
    )
    ours = Problems(*world, TEXTS)
    found = ours.solve(config)
    asked = Counter(row for rows in ours.calls for row in rows)
    flips = 0
    for row, item in enumerate(ours.samples):
        objective = relaxed_objective(*world, item)
        expected, seen = literal_ste(ours.logp[row], ours.choices[row], objective, config)
        finite = expected.isfinite()
        assert finite.equal(found[row].isfinite()) and not finite.all()
        assert float((found[row] - expected)[finite].abs().max()) <= 1e-6
        assert float((expected - ours.logp[row])[finite].abs().max()) > 1  # it went somewhere
        changed = sum(a != b for a, b in pairwise(seen))
        assert seen[0] == item.response_ids and asked[row] == 1 + changed
        flips += changed
    assert flips >= 5 and len(ours.calls) < config.steps


def test_a_batch_of_rows_equals_single_rows(world: tuple[Policy, Reward]) -> None:
    config = SteSolver(steps=40, learning_rate=0.2, final_learning_rate=0.01)
    together = Problems(*world, TEXTS)
    solved = together.solve(config)
    assert len(together.calls) > 1
    for row, logits in enumerate(solved):
        alone = together.only(row)
        assert torch.allclose(alone.solve(config)[0], logits, rtol=0, atol=1e-9)


def test_without_a_flip_one_gradient_serves_all_steps() -> None:
    calls = []

    def constant(rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        calls.append(rows)
        return [torch.tensor([[-1.0, 0.0, 1.0]]) for _ in rows]

    logp = torch.tensor([[0.6, 0.3, 0.1]]).log()
    solvers.solve_ste(
        [logp, logp], [torch.tensor([0]), torch.tensor([2])], constant, SteSolver(steps=50, learning_rate=0.1)
    )
    assert calls == [[0, 1]]


def test_once_the_arg_max_has_moved_the_arg_max_is_the_token() -> None:
    """Also when it comes back to where it began: the incumbent's token does not return."""
    seen = []

    def pushed(rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        seen.append(hard[0].tolist())
        slope = torch.zeros(1, 3)
        slope[0, 1 if len(seen) == 1 else 0] = -3.0
        return [slope]

    logp = torch.tensor([[0.5, 0.45, 0.05]]).log()
    solvers.solve_ste(
        [logp], [torch.tensor([2])], pushed, SteSolver(steps=60, learning_rate=0.1, final_learning_rate=0.1)
    )
    assert seen == [[2], [1], [0]]


def test_ste_solves_a_quadratic() -> None:
    """½‖Y − C‖² over one-hot rows is least at the arg max of C, wherever the search begins."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(6, 5, generator=generator).log_softmax(-1)
    best = torch.randint(0, 5, (6,), generator=generator)
    target = 3.0 * F.one_hot(best, 5) + 0.1 * torch.rand(6, 5, generator=generator)
    choice = torch.randint(0, 5, (6,), generator=generator)
    assert (choice != best).any() and (logp.argmax(-1) != best).any()

    def slope(rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        return [F.one_hot(hard[0], 5) - target]

    solved = solvers.solve_ste([logp], [choice], slope, SteSolver(steps=100, learning_rate=0.1)).logits[0]
    assert solved.argmax(-1).equal(best)


# --- mirror ------------------------------------------------------------------------------------------------


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """log π [T, K], ∂r/∂Y [T, K] and the incumbent's columns [T]."""
    generator = torch.Generator().manual_seed(1)
    logp = (2 * torch.randn(5, 7, generator=generator, dtype=DOUBLE)).log_softmax(-1)
    slope = 3 * torch.randn(5, 7, generator=generator, dtype=DOUBLE)
    return logp, slope, torch.tensor([0, 3, 6, 2, 2])


@pytest.mark.parametrize("lam", [0.1, 1.0, 4.0])
def test_mirror_is_the_optimum_of_its_proximal_problem(numbers: tuple[Tensor, ...], lam: float) -> None:
    logp, slope, choice = numbers
    scores = solvers.solve_mirror(logp, slope, choice, lam)
    advantage = lam * (slope - slope[torch.arange(5), choice][:, None])
    q = scores.softmax(-1)

    def objective(q: Tensor) -> Tensor:
        return (q * (q.log() - logp - advantage)).sum(-1)

    # Stationarity on the simplex: the derivative is the same for every token, up to the multiplier.
    derivative = q.log() - logp - advantage
    assert torch.allclose(derivative, derivative[:, :1].expand(-1, 7), rtol=0, atol=1e-10)
    assert (q > 0).all() and torch.allclose(q.sum(-1), torch.ones(5, dtype=DOUBLE))
    random = torch.distributions.Dirichlet(torch.full((7,), 0.7, dtype=DOUBLE))
    torch.manual_seed(2)
    for other in random.sample((200, 5)).clamp(min=1e-12):
        for step in (1.0, 0.1, 1e-3):
            moved = (1 - step) * q + step * other / other.sum(-1, keepdim=True)
            assert (objective(moved) >= objective(q) - 1e-12).all()
        assert (objective(other / other.sum(-1, keepdim=True)) > objective(q) + 1e-6).all()


def test_mirror_scores_compare_across_positions(numbers: tuple[Tensor, ...]) -> None:
    """An incumbent's own score is its log π; at λ → 0 so is everyone's; what is forbidden stays so."""
    logp, slope, choice = numbers
    logp[0, 1] = -torch.inf
    scores = solvers.solve_mirror(logp, slope, choice, 2.0)
    assert torch.equal(scores.gather(1, choice[:, None]), logp.gather(1, choice[:, None]))
    assert scores[0, 1] == -torch.inf
    assert torch.allclose(solvers.solve_mirror(logp, slope, choice, 1e-12).softmax(-1), logp.softmax(-1), atol=1e-10)
    shifted = solvers.solve_mirror(logp, slope + torch.randn(5, 1, dtype=DOUBLE), choice, 2.0)
    assert torch.allclose(shifted, scores, atol=1e-12)


# --- the three solvers through solve_tokens ----------------------------------------------------------------


def make_state(
    candidates: Tensor, logp: Tensor, response: list[int], prompt: EncodedPrompt, **values: Any
) -> ScoredResponse:
    known = {"policy_cache": None, "score_caches": [], **values}
    return ScoredResponse(prompt, response, False, candidates, logp, None, reward=0.0, **known)


def real_states(policy: Policy, reward: Reward) -> list[ScoredResponse]:
    """States over the whole vocabulary, in the policy's precision."""
    ready = Problems(policy, reward, TEXTS)
    bare = reward.compute_prompt_caches(ready.samples, FlopCounter())
    _, kept = reward.score(ready.samples, bare, flop_counter=FlopCounter(), return_caches=True)
    caches = prefill_sequences(
        policy.model, get_layout(policy.model), [item.prompt_ids + item.response_ids[:-1] for item in ready.samples]
    )
    states = []
    for item, logp, first, memo, cache in zip(ready.samples, ready.logp, bare, kept, caches, strict=True):
        table = torch.arange(logp.shape[1]).expand(len(item.response_ids), -1)
        prompt = EncodedPrompt(item.problem, item.prompt_ids, 99, first)
        states.append(make_state(table, logp, item.response_ids, prompt, score_caches=memo, policy_cache=cache))
    return states


def test_none_is_the_policy_and_costs_nothing(world: tuple[Policy, Reward]) -> None:
    states, meter = real_states(*world), FlopCounter()
    proposals.compute_proposal_scores(states, *world, SearchConfig(solver="none"), meter)
    assert all(torch.equal(state.proposal_scores, state.logp) for state in states)
    assert meter.get_total_cost().flops == 0


@pytest.mark.parametrize("point", ["direct", "hard", "direct+hard"])
def test_mirror_reads_the_reward_alone(world: tuple[Policy, Reward], point: str) -> None:
    """Of log-likelihoods, the part through later tokens only with a backward pass; there "hard" has the direct part
    already, so that "direct+hard" is the same. Of a score, "direct+hard" is the sum of two gradients."""
    reward = world[1]
    states, meter = real_states(*world), FlopCounter()
    config = SearchConfig(solver=MirrorSolver(gradient_at=point), beta=1 / LAM, candidate_min_p=0.0)
    proposals.compute_proposal_scores(states, *world, config, meter)
    for state in states:
        rows = F.one_hot(torch.tensor(state.response_ids), state.logp.shape[1]).to(DOUBLE).requires_grad_(True)
        if reward.kind == "log-ratio" or "hard" in point:
            value = reward_value(reward, state.make_sample(), rows, postfix="hard" in point)
            slope = torch.autograd.grad(value, rows)[0]
        else:
            slope = torch.zeros_like(rows)
        if reward.kind == "scalar" and "direct" in point:
            slope = slope + score_steps(reward.objectives[0].model, state.make_sample(), rows.shape[1])
        slope = LAM * slope
        expected = state.logp + slope - slope.gather(1, torch.tensor(state.response_ids)[:, None])
        finite = state.logp.isfinite()
        assert torch.allclose(state.proposal_scores[finite], expected[finite], rtol=1e-5, atol=1e-4)
        free = reward.kind == "scalar" and point == "direct"  # scoring has shown it already
        assert (meter.get_cost(state.problem.id).flops == 0) == free


def test_a_solver_must_know_its_point(world: tuple[Policy, Reward]) -> None:
    states = real_states(*world)
    with pytest.raises(RuntimeError, match="has no gradient_at"):
        proposals.compute_proposal_scores(states, *world, SearchConfig(), FlopCounter())
    with pytest.raises(RuntimeError, match="has no gradient_at"):
        proposals.estimate_round_flops(states[0], [], *world, SearchConfig())


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("postfix", [True, False])
def test_ste_descends_the_paper_loss(world: tuple[Policy, Reward], direct: bool, postfix: bool) -> None:
    """L = −λ·r − log π, its switches included, from state to scores (gradients in float32 there)."""
    states = real_states(*world)
    solver = SteSolver(
        steps=20, learning_rate=0.1, tau=0.9, likelihood_token_grad=direct, likelihood_suffix_grad=postfix
    )
    config = SearchConfig(solver=solver, beta=1 / LAM)
    proposals.compute_proposal_scores(states, *world, config, FlopCounter())
    moved = 0
    for state in states:
        objective = relaxed_objective(*world, state.make_sample(), direct, postfix)
        expected, seen = literal_ste(state.logp, torch.tensor(state.response_ids), objective, solver)
        finite = expected.isfinite()
        assert torch.allclose(state.proposal_scores[finite], expected[finite], rtol=0, atol=1e-3)
        moved += seen[-1] != state.response_ids
    assert moved


@pytest.mark.parametrize("moving", ["all", "first"])
@pytest.mark.parametrize("lr", [0.01, 0.1])
def test_a_scan_optimizes_from_each_position_on(world: tuple[Policy, Reward], moving: str, lr: float) -> None:
    """The paper's algorithm at every scanned position by itself: tokens before it stay, and so do those after it if
    only the first position moves. With small steps hardly a token changes, and one run serves almost all positions."""
    states, meter = real_states(*world), FlopCounter()
    solver = SteSolver(steps=20, learning_rate=lr, final_learning_rate=lr / 10, optimize_positions=moving)
    config = SearchConfig(solver=solver, proposals="sequential", beta=1 / LAM)
    proposals.compute_proposal_scores(states, *world, config, meter)
    stale = 0
    for state in states:
        objective = relaxed_objective(*world, state.make_sample())
        for position in range(len(state.response_ids)):
            stale += bool(state.stale_mask[position])
            proposals.refresh_stale_scores(
                state, position, lambda s, p: proposals.compute_ste_scores_at(s, p, *world, config, meter)
            )
            movable = slice(position, position + 1 if moving == "first" else None)
            expected, _ = literal_ste(state.logp, torch.tensor(state.response_ids), objective, solver, movable)
            finite = expected[position].isfinite()
            found = state.proposal_scores[position][finite]
            assert torch.allclose(found, expected[position][finite], rtol=0, atol=1e-3)
        assert not state.stale_mask.any()
    assert stale <= 2 if lr == 0.01 else stale > 2


@pytest.mark.parametrize(
    "options",
    [
        *(
            {"gradient_at": point}
            for point in ("direct", "hard", "mixture:0.2,0.8", "direct+hard", "direct+mixture:0.5")
        ),
        {"solver": "ste", "steps": 1},
    ],
    ids=lambda options: options.get("gradient_at", "ste"),
)
def test_the_budget_expects_what_the_gradient_costs(world: tuple[Policy, Reward], options: dict[str, Any]) -> None:
    states, meter, config = real_states(*world), FlopCounter(), worlds.search_config(**options)
    expected = [proposals.estimate_round_flops(state, [], *world, config) for state in states]
    proposals.compute_proposal_scores(states, *world, config, meter)
    assert [meter.get_cost(state.problem.id).flops for state in states] == expected
    free = world[1].kind == "scalar" and options == {"gradient_at": "direct"}
    assert all((flops == 0) == free for flops in expected)
    assert [proposals.estimate_round_flops(state, [], *world, config) for state in states] == [0.0, 0.0]  # paid for


def test_ste_pays_once_for_tokens_that_come_back(
    world: tuple[Policy, Reward], monkeypatch: pytest.MonkeyPatch
) -> None:
    states, meter, requests, solve = real_states(*world), FlopCounter(), [], solvers.solve_ste

    def watched(logp: Any, choices: Any, loss_gradient: solvers.LossGradientFn, config: SteSolver) -> list[Tensor]:
        def asked(rows: list[int], hard: list[Tensor]) -> list[Tensor]:
            requests.extend((row, *tokens.tolist()) for row, tokens in zip(rows, hard, strict=True))
            return loss_gradient(rows, hard)

        return solve(logp, choices, asked, config)  # whole responses: nothing is held still

    monkeypatch.setattr(solvers, "solve_ste", watched)
    config = SearchConfig(solver=SteSolver(steps=60, learning_rate=1.0, final_learning_rate=1.0), beta=1 / LAM)
    proposals.compute_proposal_scores(states, *world, config, meter)
    assert len(requests) > len(set(requests))
    for row, state in enumerate(states):
        distinct = sum(request[0] == row for request in set(requests))
        assert meter.get_cost(state.problem.id).tokens["policy/backward"] == distinct * len(state.response_ids)


def test_ste_never_asks_the_reward_to_read_what_it_cannot() -> None:
    """A likely token that the reward lacks may stand as the response's stop, and nowhere else."""
    close = "<|close|>"
    tokens = [*(token for token in worlds.TOKENS if token != worlds.END), close]
    own = worlds.char_tokenizer(tokens, eos=close, template=worlds.TEMPLATE.replace(worlds.END, close))
    policy = worlds.tiny_policy(dtype=DOUBLE)
    reward = worlds.tiny_scalar(policy, tokenizer=own)
    states = real_states(policy, reward)
    for state in states:
        state.logp = state.logp.clone()
        state.logp[:, END] = state.logp.amax(-1) + 5  # the stop token is everywhere the likeliest
    proposals.compute_proposal_scores(
        states, policy, reward, SearchConfig(solver=SteSolver(learning_rate=0.3, steps=30)), FlopCounter()
    )
    for state, (_, finished) in zip(states, TEXTS, strict=True):
        assert state.proposal_scores[:, END].isfinite().tolist() == [False] * (len(state.response_ids) - 1) + [
            finished
        ]


# --- the size of mirror's step ------------------------------------------------------------------------------


def branch_kl(logp: Tensor, gain: Tensor, usable: Tensor, lam: float) -> float:
    """KL of the branches drawn with and without the gradient."""
    base = logp[usable].double().softmax(-1)
    tilted = (logp[usable].double() + lam * gain[usable].double()).softmax(-1)
    return float((tilted * (tilted / base).log()).sum())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("budget", [0.01, 1.0, 2.5])
def test_the_step_spends_its_kl_budget_whatever_the_rewards_scale(budget: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logp = torch.randn(9, 6, generator=generator).log_softmax(-1)
    gain, usable = scale * torch.randn(9, 6, generator=generator), torch.rand(9, 6, generator=generator) < 0.6
    lam = solvers.find_reward_weight_for_kl(logp, gain, usable, budget)
    assert branch_kl(logp, gain, usable, lam) == pytest.approx(budget, rel=1e-6)


def test_a_budget_beyond_reach_goes_almost_all_the_way() -> None:
    logp = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]).log()
    gain, usable = torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.5, 3.0]]), torch.ones(2, 3, dtype=torch.bool)
    limit = -math.log(0.1 / 2)  # all on the one branch of the largest gain
    assert branch_kl(logp, gain, usable, solvers.find_reward_weight_for_kl(logp, gain, usable, 99.0)) == pytest.approx(
        0.99 * limit
    )


@pytest.mark.parametrize("gain", [0.0, 7.0, math.nan, math.inf])
def test_without_a_better_branch_the_step_is_zero(gain: float) -> None:
    logp = torch.full((2, 3), 1 / 3).log()
    assert (
        solvers.find_reward_weight_for_kl(logp, torch.full((2, 3), gain), torch.ones(2, 3, dtype=torch.bool), 1.0)
        == 0.0
    )
    assert solvers.find_reward_weight_for_kl(logp, torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), 1.0) == 0.0


def test_mirror_by_a_budget_is_mirror_at_the_lambda_it_gives(world: tuple[Policy, Reward]) -> None:
    budgeted, plain = real_states(*world), real_states(*world)
    config = SearchConfig(solver=MirrorSolver(target_kl=0.7, gradient_at="hard"), candidate_min_p=0.01)
    proposals.compute_proposal_scores(budgeted, *world, config, FlopCounter())
    for one, two in zip(budgeted, plain, strict=True):
        gain = solvers.compute_advantages(one.reward_gradient, one.find_response_columns())
        usable = proposals.compute_proposable_mask(one, world[1].in_vocabulary, config)
        lam = solvers.find_reward_weight_for_kl(one.logp, gain, usable, 0.7)
        proposals.compute_proposal_scores([two], *world, config.with_beta(1 / lam), FlopCounter())
        assert torch.allclose(one.proposal_scores[usable], two.proposal_scores[usable], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_kl": 1.0, "beta": 1.0}, "set one of them"),
        ({"target_kl": 0.0}, "target_kl must be a positive number"),
        ({"target_kl": 1.0, "solver": "none"}, "solver none has no option 'target_kl'"),
        ({"target_kl": 1.0, "proposals": "sequential"}, "target_kl needs global proposals"),
        ({"step_size": 0.0}, "step_size must be a positive number"),
        ({"step_size": 0.5, "solver": "none"}, "solver none has no option 'step_size'"),
        ({"shuffle_gradient": True, "solver": "ste"}, "solver ste has no option 'shuffle_gradient'"),
        ({"optimize_positions": "last", "solver": "ste"}, "optimize_positions must be one of all, first"),
        ({"num_chains": 2}, "num_chains must be at most num_starts"),
        ({"acceptance": "never"}, "acceptance must be one of"),
    ],
)
def test_steps_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    worlds.refused(lambda: worlds.search_config(**options), words)


def test_the_shuffled_control_moves_rows_and_nothing_else() -> None:
    """Each position gets the advantages of another's alternatives; the incumbents' stay 0."""
    generator = torch.Generator().manual_seed(1)
    choice = torch.tensor([0, 2, 1, 2, 0])
    gain = solvers.compute_advantages(torch.randn(5, 4, generator=generator), choice)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = solvers.shuffle_advantages(gain, choice, order)
    assert (moved.gather(1, choice[:, None]) == 0).all()
    for position, source in enumerate(order.tolist()):
        rows = (moved[position], choice[position]), (gain[source], choice[source])
        ours, theirs = (torch.cat((row[:own], row[own + 1 :])) for row, own in rows)
        assert torch.equal(ours, theirs)
    assert torch.equal(solvers.shuffle_advantages(gain, choice, torch.arange(5)), gain)


# --- global branches ---------------------------------------------------------------------------------------

READABLE = torch.ones(20, dtype=torch.bool)


def toy_chain(**values: Any) -> SearchState:
    """Three positions with four candidates each; log π is uniform, scores differ; token 13 is forbidden."""
    candidates = torch.tensor([[1, 2, 3, 4], [4, 3, 12, 13], [5, 6, 7, 8]])
    logp = torch.full((3, 4), math.log(0.25))
    logp[1, 3] = -torch.inf
    state = make_state(candidates, logp, [2, 4, 8], EncodedPrompt(Problem(id="p", question="1"), [0], 99, []))
    state.proposal_scores = torch.tensor([[0.5, 9.0, -1.0, 0.0], [9.0, 1.0, -0.5, -torch.inf], [0.2, -2.0, 1.5, 9.0]])
    return SearchState(state, initial=state, **values)


def global_draws(chain: SearchState, readable: Tensor, draws: int, **config: Any) -> Counter[tuple]:
    stream, settings = np.random.default_rng(0), worlds.search_config(solver="none", **config)
    shape = tuple(chain.incumbent.candidates.shape)
    noises = (torch.from_numpy(stream.gumbel(size=shape)) for _ in range(draws))
    return Counter(tuple(proposals.draw_global_branches(chain, noise, readable, settings)) for noise in noises)


def chi_square(counts: Counter[tuple], expected: dict[tuple, float]) -> float:
    """The statistic over its degrees of freedom; about 1 if `expected` (probabilities) is right."""
    draws = sum(counts.values())
    assert set(counts) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    parts = ((counts[key] - draws * p) ** 2 / (draws * p) for key, p in expected.items())
    return sum(parts) / (len(expected) - 1)


def without_replacement(weights: dict[tuple, float]) -> dict[tuple, float]:
    """Probability of each ordered pair."""
    total = sum(weights.values())
    return {(a, b): weights[a] / total * weights[b] / (total - weights[a]) for a in weights for b in weights if a != b}


def test_global_branches_are_drawn_by_exp_score_without_replacement() -> None:
    chain = toy_chain()
    chain.rejected_branches = {(2, 5), (0, 6)}  # (0, 6) is no candidate there: tried elsewhere, it excludes nothing
    readable = READABLE.clone()
    readable[12] = False
    weights = {(0, 1): 0.5, (0, 3): -1.0, (0, 4): 0.0, (1, 3): 1.0, (2, 6): -2.0, (2, 7): 1.5}
    expected = without_replacement({branch: math.exp(score) for branch, score in weights.items()})
    counts = global_draws(chain, readable, 6000, proposals_per_round=2)
    assert chi_square(counts, expected) < 1.6
    assert chi_square(counts, {pair: 1 / len(expected) for pair in expected}) > 10  # the test can tell


def test_global_branches_use_up_what_there_is() -> None:
    (all_,) = global_draws(toy_chain(), READABLE, 1, proposals_per_round=99)
    usable = {(0, 1), (0, 3), (0, 4), (1, 3), (1, 12), (2, 5), (2, 6), (2, 7)}
    assert set(all_) == usable and len(all_) == len(usable)
    chain = toy_chain()
    chain.rejected_branches = set(usable)
    assert global_draws(chain, READABLE, 1, proposals_per_round=3) == {(): 1}
    assert global_draws(toy_chain(), ~READABLE, 1) == {(): 1}


def test_candidate_min_p_drops_what_the_policy_finds_unlikely() -> None:
    """Relative to the position's likeliest token, the incumbent's included."""
    chain = toy_chain()
    chain.incumbent.logp = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.08, 0.02, 0.0], [0.25] * 4]).log()
    (drawn,) = global_draws(chain, READABLE, 1, proposals_per_round=99, candidate_min_p=0.2)
    assert set(drawn) == {(0, 1), (0, 3), (2, 5), (2, 6), (2, 7)}


def fresh(state: ScoredResponse, position: int) -> Tensor:
    raise AssertionError("no row is stale here")


# --- the sequential scan -----------------------------------------------------------------------------------


def test_sequential_scan_skips_confident_positions_and_ends() -> None:
    chain = toy_chain()
    sure = torch.tensor([0.98, 0.01, 0.005, 0.005]).log()
    chain.incumbent.logp = sure.expand(3, 4)
    chain.incumbent.proposal_scores[
        chain.incumbent.proposal_scores == 9.0
    ] = -torch.inf  # no incumbent would stay, if asked
    config = SearchConfig(solver="none", proposals="sequential")
    assert proposals.draw_sequential_branch(chain, np.random.default_rng(0), READABLE, config, fresh) == []
    assert chain.scan_position == 3

    chain.scan_position, chain.incumbent.logp = 0, torch.stack((sure, toy_chain().incumbent.logp[1], sure))
    ((position, token),) = proposals.draw_sequential_branch(chain, np.random.default_rng(0), READABLE, config, fresh)
    assert (position, chain.scan_position) == (1, 2) and token in (3, 12)
    assert proposals.draw_sequential_branch(chain, np.random.default_rng(0), READABLE, config, fresh) == []


def test_sequential_scan_resamples_from_left_to_right() -> None:
    """At temperature T from softmax(score / T) over what may stand there; keeping the incumbent moves on."""
    temperature = 2.0
    config = SearchConfig(solver="none", proposals=SequentialProposals(resample_temperature=temperature))
    readable, stream, counts = READABLE.clone(), np.random.default_rng(0), Counter()
    readable[[12, 8]] = False  # 8 is an incumbent: it may stay
    for _ in range(4000):
        chain = toy_chain()
        chain.incumbent.proposal_scores = chain.incumbent.proposal_scores.masked_fill(
            chain.incumbent.proposal_scores == 9.0, 2.0
        )
        counts[tuple(proposals.draw_sequential_branch(chain, stream, readable, config, fresh))] += 1
    weights = [{1: 0.5, None: 2.0, 3: -1.0, 4: 0.0}, {None: 2.0, 3: 1.0}, {5: 0.2, 6: -2.0, 7: 1.5, None: 2.0}]
    expected, arrived = {}, 1.0
    for position, row in enumerate(weights):
        mass = {token: math.exp(score / temperature) for token, score in row.items()}
        total = sum(mass.values())
        expected |= {((position, token),): arrived * m / total for token, m in mass.items() if token is not None}
        arrived *= mass[None] / total
    expected[()] = arrived
    assert chi_square(counts, expected) < 2


# --- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": -0.1},
        {"learning_rate": math.nan},
        {"final_learning_rate": -1e-3},
        {"tau": 0.0},
        {"tau": -1.0},
    ],
)
def test_ste_config_refuses(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SteSolver(**bad)
    with pytest.raises(ValueError, match=next(iter(bad))):
        SearchConfig(solver={"name": "ste", **bad})


def test_ste_rate_is_torch_cosine() -> None:
    config = SteSolver(steps=7, learning_rate=0.3, final_learning_rate=0.05)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7, eta_min=0.05)
    for step in range(7):
        assert config.compute_learning_rate(step) == pytest.approx(cosine.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        cosine.step()
    clipped = [replace(config, schedule="clipped_cosine").compute_learning_rate(step) for step in range(7)]
    free = [0.15 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert clipped == pytest.approx([max(rate, 0.05) for rate in free]) and min(free) < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "adam"}, "solver must be one of"),
        ({"proposals": "local"}, "proposals must be one of"),
        ({"beta": 0.0}, "beta"),
        ({"beta": -1.0}, "beta"),
        ({"max_rounds": -1}, "max_rounds"),
        ({"max_rollouts": -1}, "max_rollouts"),
        ({"max_flops": -1.0}, "max_flops"),
        ({"patience": -1}, "patience"),
        ({"proposals_per_round": 0}, "proposals_per_round"),
        ({"top_k_candidates": 0}, "top_k_candidates"),
        ({"batch_size": 0}, "batch_size"),
        ({"candidate_min_p": 1.0}, "candidate_min_p"),
        ({"candidate_min_p": -0.1}, "candidate_min_p"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_rounds": 0}, "never end"),
        ({"proposals": "sequential", "proposals_per_round": 2}, "proposals_per_round belongs to global"),
        ({"proposals": "sequential", "resample_temperature": 0.0}, "resample_temperature"),
        ({"proposals": "sequential", "confidence": math.nan}, "confidence"),
        ({"beta": math.nan}, "beta"),
    ],
)
def test_reasoner_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        worlds.search_config(**options)


@pytest.mark.parametrize("solver", ["mirror", "none"])
@pytest.mark.parametrize(
    "option",
    [
        {"steps": 5},
        {"learning_rate": 0.1},
        {"final_learning_rate": 0.1},
        {"tau": 1.0},
        {"likelihood_token_grad": True},
        {"likelihood_token_grad": False},
        {"likelihood_suffix_grad": True},
        {"likelihood_suffix_grad": False},
    ],
)
def test_options_of_ste_are_refused_elsewhere(solver: str, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"solver {solver} has no option .* {next(iter(option))} belongs to ste"):
        SearchConfig(solver={"name": solver, **option})
    assert SearchConfig(solver={"name": "ste", **option})


def test_both_parts_of_the_likelihood_are_on_in_ste_unless_told_otherwise() -> None:
    both = SearchConfig(solver="ste").solver
    assert both.likelihood_token_grad is both.likelihood_suffix_grad is True
    off = SearchConfig(solver=SteSolver(likelihood_token_grad=False, likelihood_suffix_grad=False)).solver
    assert off.likelihood_token_grad is off.likelihood_suffix_grad is False


# --- the point --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("direct", GradientPoint((), direct=True)),
        ("hard", GradientPoint((0.0,))),
        ("mixture:0.5", GradientPoint((0.5,))),
        ("mixture:1", GradientPoint((1.0,))),
        ("mixture:0.25,0.5,1", GradientPoint((0.25, 0.5, 1.0))),
        ("direct+hard", GradientPoint((0.0,), direct=True)),
        ("direct+mixture:0.6", GradientPoint((0.6,), direct=True)),
        ("direct+mixture:0.2,0.8", GradientPoint((0.2, 0.8), direct=True)),
    ],
)
def test_what_a_point_means(text: str, point: GradientPoint) -> None:
    assert GradientPoint.parse(text) == point
    assert worlds.search_config(gradient_at=text).get_gradient_point() == point
    if "mixture" in text:  # the rest mixes nothing
        assert GradientPoint.parse(text, 0.1) == replace(point, candidate_min_p=0.1)
        config = worlds.search_config(gradient_at=text, candidate_min_p=0.1)
        assert config.get_gradient_point() == replace(point, candidate_min_p=0.1)
    assert GradientPoint.parse("hard") == HARD_GRADIENT_POINT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soft",
        "Direct",
        "direct ",
        "direct:0.5",
        "direct+",
        "direct+direct",
        "direct+direct+hard",
        "direct+soft",
        "hard+direct",
        "hard+mixture:0.5",
        "hard:0.5",
        "hard,mixture:0.5",
        "mixture",
        "mixture:",
        "mixture:a",
        "mixture:0",
        "mixture:0.5,0",
        "mixture:-0.5",
        "mixture:1.1",
        "mixture:nan",
        "mixture:inf",
        "mixture:0.5,",
        "mixture:0.5;1",
        "mixture:0.5+direct",
        "direct+mixture",
        "direct+mixture:2",
    ],
)
def test_points_that_are_refused(text: str) -> None:
    words = ["gradient_at must be direct, hard, mixture:A[,A…]", "or direct+ one of these", f"not {text!r}"]
    worlds.refused(lambda: GradientPoint.parse(text), *words)
    worlds.refused(lambda: worlds.search_config(gradient_at=text), *words)


def test_without_a_point_it_is_the_rewards_own() -> None:
    left, told = worlds.search_config(max_rounds=7), worlds.search_config(max_rounds=7, gradient_at="direct+hard")
    assert left.solver.gradient_at is None
    with pytest.raises(RuntimeError, match="has no gradient_at"):
        left.get_gradient_point()
    assert (
        left.with_default_gradient_at("direct+hard") == told
        and left.with_default_gradient_at("direct+hard").compute_hash() == told.compute_hash() != left.compute_hash()
    )
    assert told.with_default_gradient_at("direct") is told and left.solver.gradient_at is None
    worlds.refused(lambda: left.with_default_gradient_at("soft"), "gradient_at must be")


@pytest.mark.parametrize("solver", ["ste", "none"])
def test_the_point_belongs_to_mirror(solver: str) -> None:
    for text in ("direct", "hard", "mixture:0.5"):
        with pytest.raises(ValueError, match=f"solver {solver} has no option .* gradient_at belongs to mirror"):
            worlds.search_config(solver=solver, gradient_at=text)
    config = SearchConfig(solver=solver)
    assert config.with_default_gradient_at("direct") is config and config.get_gradient_point() == HARD_GRADIENT_POINT


def test_the_control_has_no_options_of_a_gradient() -> None:
    assert worlds.search_config(gradient_at="direct", max_rounds=3).with_no_gradient() == SearchConfig(
        candidate_min_p=0.0, solver="none", max_rounds=3
    )
    assert SearchConfig(max_rounds=3).with_no_gradient() == SearchConfig(solver="none", max_rounds=3)
    assert SearchConfig(solver="ste", max_rounds=3).with_no_gradient() == SearchConfig(solver="none", max_rounds=3)


@pytest.mark.parametrize("option", [{"confidence": 0.9}, {"resample_temperature": 1.0}])
def test_options_of_the_scan_are_refused_elsewhere(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} belongs to sequential"):
        SearchConfig(proposals=option)
    assert SearchConfig(proposals={"name": "sequential", **option})


def test_the_paper_preset_is_the_papers() -> None:
    """arXiv 2603.04948: Adam 0.01 → 0.001 in 20 steps, a scan with at most eight rollouts."""
    config = SearchConfig.from_preset("paper", beta=2.0)
    assert (config.max_rollouts, config.reward_weight) == (8, 0.5)
    assert config.solver == SteSolver(
        steps=20,
        learning_rate=0.01,
        final_learning_rate=0.001,
        tau=1.0,
        likelihood_token_grad=True,
        likelihood_suffix_grad=True,
        optimize_positions="all",
    )
    assert config.proposals == SequentialProposals(confidence=0.97, resample_temperature=0.5)
    assert set(PRESETS) == {"default", "paper", "released", "qalign", "power"}
    assert SearchConfig.from_preset("default") == SearchConfig()
    released = SearchConfig.from_preset("released")
    assert released.reward_weight == 1000.0
    assert released.solver == SteSolver(
        optimize_positions="first", hard_tokens="argmax", schedule="clipped_cosine", repeat_turn_end=True
    )
    assert released.proposals.resample_top_p == 0.95
    with pytest.raises(ValueError, match="unknown preset"):
        SearchConfig.from_preset("papre")
    with pytest.raises(ValueError, match="unknown option 'learning_rate'"):
        SearchConfig.from_preset("paper", learning_rate=0.1)
