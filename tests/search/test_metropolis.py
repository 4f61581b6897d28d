"""Metropolis acceptance against π*(y) ∝ π(y)·exp(r(y)/β), on a world small enough to write every response down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from torch import Tensor

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.evaluation.method import POWER_SEARCHES, Method
from nabla_trl.evaluation.plan import build_power_config
from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import build_warpers, compute_log_importance_weight
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import acceptance, proposals
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import MetropolisAcceptance
from nabla_trl.search.state import EncodedPrompt, ScoredResponse
from nabla_trl.states.batch import prefill_sequences
from nabla_trl.states.probe import get_layout
from nabla_trl.tasks.problem import Problem

LENGTH, BETA = 3, 0.6
SHORT = {"max_new_tokens": 2, "beta": 3.0}
SETTINGS: list[dict[str, Any]] = [
    {"solver": "mirror", "gradient_at": "hard"},
    {"solver": "mirror", "gradient_at": "mixture:0.5", "step_size": 0.5},
    {"solver": "ste", "learning_rate": 0.3, "steps": 5},
    {"solver": "none"},
    {"solver": "none", "cut": "uniform"},
    {"solver": "none", "cut": "entropy"},
    {"solver": "none", "cut": "jump"},
]


def name(options: dict[str, Any]) -> str:
    return " ".join(map(str, options.values()))


@dataclass
class World:
    """A policy over six tokens and a reward, in float64, and all responses of at most LENGTH tokens."""

    policy: Policy
    reward: Reward
    prompt: EncodedPrompt
    responses: list[list[int]]
    states: list[ScoredResponse]
    logp: np.ndarray  # [N] log π(y) over the tokens that may be drawn

    def target(self, beta: float = BETA) -> np.ndarray:
        """[N] π*."""
        scores = self.logp + np.array([state.reward for state in self.states]) / beta
        weights = np.exp(scores - scores.max())
        return weights / weights.sum()

    def index(self, response: Sequence[int]) -> int:
        return self.responses.index(list(response))


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def short() -> World:
    """31 responses, so that a few hundred chains tell a distribution apart from another; a log-ratio as reward.

    With β = 1 its π* would be the better model itself; 3 lets chains of ten steps come to it.
    """
    return make_world(2, ratio=True)


@pytest.fixture(scope="module")
def power() -> World:
    """31 responses and the reward power:2, so that π* at β = 1 is π²."""
    return make_world(2, alpha=2.0)


def make_world(length: int = LENGTH, ratio: bool = False, alpha: float | None = None) -> World:
    tokenizer = worlds.char_tokenizer(["1", "2", worlds.PAD, worlds.USER, worlds.ASSISTANT, worlds.END, worlds.UNK])
    policy = worlds.tiny_policy(tokenizer=tokenizer, dtype=torch.float64)
    reward = worlds.tiny_logratio(policy) if ratio else worlds.tiny_scalar(policy, seed=5)
    if alpha is not None:
        reward = load_reward(f"power:{alpha:g}", policy=policy)
    problem = Problem(id="p", question="12")
    ids = policy.encode(problem)
    memos = reward.compute_prompt_caches([Sample(problem, ids, [])], FlopCounter())[0]
    prompt = EncodedPrompt(problem, ids, length, memos)
    drawable = [index for index in range(len(policy.forbidden_mask)) if not policy.forbidden_mask[index]]
    going = [index for index in drawable if index not in policy.stop_ids]
    [stop] = policy.stop_ids
    responses = [[*head, stop] for size in range(length) for head in product(going, repeat=size)]
    responses += [list(body) for body in product(going, repeat=length)]
    states = all_states(policy, reward, prompt, responses)
    allowed = [state.logp.log_softmax(-1).gather(1, state.find_response_columns()[:, None]).sum() for state in states]
    return World(policy, reward, prompt, responses, states, torch.stack(allowed).numpy())


@torch.no_grad()
def all_states(
    policy: Policy, reward: Reward, prompt: EncodedPrompt, responses: Sequence[list[int]]
) -> list[ScoredResponse]:
    """Scored states over the whole vocabulary, from plain forwards in float64."""
    states = []
    for response in responses:
        output = policy.model(torch.tensor([prompt.ids + response]))
        logits = output.logits[0, len(prompt.ids) - 1 : -1].masked_fill(policy.forbidden_mask, -torch.inf)
        [state] = prefill_sequences(policy.model, get_layout(policy.model), [prompt.ids + response[:-1]])
        table = torch.arange(logits.shape[1]).expand(len(response), -1)
        done = response[-1] in policy.stop_ids
        states.append(
            ScoredResponse(
                prompt, response, done, table, logits.log_softmax(-1), None, state, prompt.score_caches, 0.0
            )
        )
    samples = [
        Sample(prompt.problem, prompt.ids, s.response_ids, draw_info=DrawInfo(policy.model, s.candidates, s.logp))
        for s in states
    ]
    values, memos = reward.score(
        samples, [prompt.score_caches] * len(states), flop_counter=FlopCounter(), return_caches=True
    )
    for state, value, memo in zip(states, values, memos, strict=True):
        state.reward, state.score_caches = value, memo
    return states


def metropolis(options: dict[str, Any], **more: Any) -> SearchConfig:
    common = {"acceptance": "metropolis", "beta": BETA, "top_k_candidates": 16, "max_new_tokens": LENGTH}
    return worlds.search_config(**{**common, **options, **more})


def solved(world: World, config: SearchConfig) -> list[ScoredResponse]:
    """Fresh copies of the states, with the solver's scores; rows that a scan works out by itself included."""
    states = [
        replace(state, reward_gradient=None, proposal_scores=None, stale_mask=None, loss_gradients={})
        for state in world.states
    ]
    proposals.compute_proposal_scores(states, world.policy, world.reward, config, FlopCounter())
    for state in states:
        if state.stale_mask is not None:
            for position in range(len(state.response_ids)):
                proposals.refresh_stale_scores(
                    state,
                    position,
                    lambda s, p: proposals.compute_ste_scores_at(
                        s, p, world.policy, world.reward, config, FlopCounter()
                    ),
                )
    return states


def narrow(state: ScoredResponse, candidates: int) -> None:
    """Leave the likeliest candidates alone, as drafts do; the response's own token takes the last one's place."""
    if candidates >= state.logp.shape[1]:
        return
    own = state.find_response_columns()[:, None]
    order = state.logp.topk(candidates, dim=-1).indices
    order[:, -1:] = torch.where((order == own).any(-1, keepdim=True), order[:, -1:], own)
    for part in ("logp", "proposal_scores", "candidates"):
        setattr(state, part, getattr(state, part).gather(1, order))


def suffix_logp(state: ScoredResponse, position: int, sampler: Tensor | None = None) -> float:
    """log-probability of the tokens after a position under the sampler (π by default)."""
    table = state.logp if sampler is None else sampler
    return float(table[position + 1 :].gather(1, state.find_response_columns()[position + 1 :, None]).sum())


def chosen(state: ScoredResponse, position: int, world: World, config: SearchConfig) -> Tensor:
    if config.proposals.name == "global":
        return proposals.compute_global_branch_logp(state, world.reward.in_vocabulary, config)[position]
    return proposals.compute_scan_logp(state, position, world.reward.in_vocabulary, config)


def flow(
    world: World, before: ScoredResponse, after: ScoredResponse, at: int, config: SearchConfig, target: dict
) -> float:
    """log of π*(y) · (chance to propose y' from y by a branch at this position) · (chance to accept it)."""
    there, back = chosen(before, at, world, config), chosen(after, at, world, config)
    column = (before.candidates[at] == after.response_ids[at]).nonzero()
    if not len(column):
        return -math.inf  # never proposed
    drawn = after.logp if after.log_importance_weight is None else after.logp - after.log_importance_weight
    proposed = float(there[int(column[0])]) + suffix_logp(after, at, drawn)
    ratio = acceptance.compute_branch_log_ratio(before, after, at, beta=BETA, branch_logp=(there, back))
    return target[tuple(before.response_ids)] + proposed + min(0.0, ratio)


def branches(world: World, count: int, seed: int) -> list[tuple[int, int, int]]:
    """Random pairs of responses, and the position where they first differ."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        one, two = rng.integers(len(world.responses), size=2)
        pairs = zip(world.responses[one], world.responses[two], strict=False)
        at = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        if at is not None:
            found.append((int(one), int(two), at))
    return found


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposals", ["global", "sequential"])
@pytest.mark.parametrize("options", SETTINGS, ids=name)
def test_detailed_balance(options: dict[str, Any], proposals: str, world: World) -> None:
    """As much flows from y to y' as back, for every pair, whichever solver chose the branches."""
    config = metropolis(options, proposals=proposals)
    states = solved(world, config)
    target = {tuple(r): math.log(p) for r, p in zip(world.responses, world.target(), strict=True)}
    moved = 0
    for one, two, at in branches(world, 400, seed=1):
        there = flow(world, states[one], states[two], at, config, target)
        back = flow(world, states[two], states[one], at, config, target)
        assert there == pytest.approx(back, abs=1e-10)
        moved += there > -math.inf
    assert moved == 400  # over the whole vocabulary nothing is out of reach


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.7}, {"temperature": 1.4}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.2}], ids=name
)
@pytest.mark.parametrize("few", [False, True])
def test_detailed_balance_with_another_sampler_and_fewer_candidates(
    sampling: dict[str, Any], few: bool, world: World
) -> None:
    """Suffixes drawn at another temperature or cut, and branches that cannot be taken back, keep π* all the same."""
    config = metropolis({"solver": "mirror", "gradient_at": "hard"}, **sampling, top_k_candidates=4 if few else 16)
    states = solved(world, config)
    warpers = build_warpers(config.get_sampling())
    for state in states:
        narrow(state, config.top_k_candidates)
        full = world.states[world.index(state.response_ids)].logp
        state.log_importance_weight = compute_log_importance_weight(full, state.candidates, warpers)
    target = {tuple(r): math.log(p) for r, p in zip(world.responses, world.target(), strict=True)}
    moved = blocked = 0
    for one, two, at in branches(world, 500, seed=2):
        flows = [flow(world, states[a], states[b], at, config, target) for a, b in ((one, two), (two, one))]
        assert flows[0] == flows[1] or flows[0] == pytest.approx(flows[1], abs=1e-10)
        moved, blocked = moved + (flows[0] > -math.inf), blocked + (flows[0] == -math.inf)
    assert moved > 20 and (blocked > 10 or not (few or {"top_k", "top_p", "min_p"} & set(sampling)))


@pytest.mark.parametrize(
    "options",
    [{}, {"candidate_min_p": 0.6}, {"temperature": 1.4}, {"top_k": 4}, {"top_k_candidates": 2}],
    ids=lambda options: name(options) or "plain",
)
def test_detailed_balance_with_redraws(options: dict[str, Any], world: World) -> None:
    """Of the whole kernel, branches and redraws, also where there are no branches, and where q is not π."""
    config = metropolis({"solver": "mirror", "gradient_at": "hard"}, independence_prob=0.3, **options)
    readable, warpers = world.reward.in_vocabulary, build_warpers(config.get_sampling())
    states = solved(world, config)
    for state in states:
        narrow(state, config.top_k_candidates)
        full = world.states[world.index(state.response_ids)].logp
        state.log_importance_weight = (
            compute_log_importance_weight(full, state.candidates, warpers) if warpers else None
        )
    target = {tuple(r): math.log(p) for r, p in zip(world.responses, world.target(), strict=True)}

    def rate(before: ScoredResponse, after: ScoredResponse, at: int) -> float:
        """π*(y) · (chance to go from y to y')."""
        tried = [proposals.compute_independence_logp(state, readable, config) for state in (before, after)]
        drawn = world.logp[world.index(after.response_ids)]
        drawn -= 0.0 if after.log_importance_weight is None else suffix_logp(after, -1, after.log_importance_weight)
        ratio = acceptance.compute_independence_log_ratio(before, after, beta=BETA, attempt_logp=(tried[0], tried[1]))
        anew = math.exp(target[tuple(before.response_ids)] + tried[0] + drawn + min(0.0, ratio))
        if tried[0] == 0:
            return anew
        return anew + (1 - config.acceptance.independence_prob) * math.exp(
            flow(world, before, after, at, config, target)
        )

    moved = trapped = 0
    for one, two, at in branches(world, 400, seed=3):
        there, back = rate(states[one], states[two], at), rate(states[two], states[one], at)
        assert there == pytest.approx(back, rel=1e-10, abs=1e-300)
        moved += there > 0
        trapped += proposals.compute_independence_logp(states[one], readable, config) == 0.0
    assert moved == 400 or "top_k" in options
    assert (trapped > 0) == ("top_k_candidates" in options)


# --- chains -----------------------------------------------------------------------------------------------


def total_variation(counts: Counter[int], target: np.ndarray) -> float:
    share = np.array([counts[index] for index in range(len(target))]) / sum(counts.values())
    return 0.5 * float(np.abs(share - target).sum())


def noise_floor(target: np.ndarray, samples: int) -> float:
    """Mean total variation of so many independent samples."""
    rng = np.random.default_rng(0)
    return float(np.mean([0.5 * np.abs(rng.multinomial(samples, target) / samples - target).sum() for _ in range(50)]))


def run_chains(world: World, config: SearchConfig, count: int, budgets: Sequence[int]) -> list[Counter[int]]:
    """Where chains of one prompt stand after some numbers of rounds."""
    problems = [Problem(id=f"p{index}", question="12") for index in range(count)]
    traces = run_search(problems, policy=world.policy, reward=world.reward, config=config)
    found: list[Counter[int]] = [Counter() for _ in budgets]
    for trace in traces:
        trace.validate()
        assert trace.error is None
        for counter, (response, _) in zip(found, trace.list_incumbents_at(budgets), strict=True):
            counter[world.index(response)] += 1
    return found


@pytest.mark.parametrize(
    "method",
    ["power_jump", *(pytest.param(name, marks=pytest.mark.slow) for name in POWER_SEARCHES if name != "power_jump")],
)
def test_chains_on_a_power_reward_sample_the_power_of_the_policy(method: str, power: World) -> None:
    """… and scoring is free, because drawing has scored the response already."""
    target = power.target(1.0)
    squared = np.exp(2 * power.logp)
    assert target == pytest.approx(squared / squared.sum(), abs=1e-9)
    shared = SearchConfig(max_new_tokens=2, max_rounds=20, batch_size=150)
    config = build_power_config(Method(method), shared, BaselineConfig(power_alpha=2.0, power_select="sample"))
    [ended] = run_chains(power, config, 150, (20,))
    assert total_variation(ended, target) < 1.6 * noise_floor(target, 150)
    policy_share = np.exp(power.logp) / np.exp(power.logp).sum()
    assert total_variation(ended, policy_share) > 2 * noise_floor(target, 150)


@pytest.mark.parametrize("options", [{"solver": "mirror", "gradient_at": "direct"}, {"solver": "none"}], ids=name)
def test_chains_come_to_the_target(options: dict[str, Any], short: World) -> None:
    """… from π, which is far from it; and greedy acceptance does not."""
    target, count = short.target(3.0), 200
    floor, config = noise_floor(target, count), metropolis(options, **SHORT, max_rounds=14, batch_size=count)
    begun, ended = run_chains(short, config, count, (0, 14))
    assert total_variation(begun, target) > 3 * floor
    assert total_variation(ended, target) < 2 * floor
    greedy = run_chains(short, replace(config, acceptance="greedy"), count, (14,))[0]
    assert total_variation(greedy, target) > 3 * floor


@pytest.mark.slow
@pytest.mark.parametrize("proposals", ["global", "sequential"])
@pytest.mark.parametrize("options", SETTINGS, ids=name)
def test_long_chains_come_to_the_target(options: dict[str, Any], proposals: str, world: World) -> None:
    """Gradients at hard tokens of a random reward mislead, and a chain that they drive mixes slowly, yet it comes."""
    target, count = world.target(), 400
    more = {"confidence": 1.0} if proposals == "sequential" else {}
    rounds = {"global": 100 if options.get("gradient_at") == "hard" else 40, "sequential": 75}[proposals]
    config = metropolis(options, proposals=proposals, max_rounds=rounds, batch_size=500, **more)
    [ended] = run_chains(world, config, count, (10**6,))
    assert total_variation(ended, target) < 2 * noise_floor(target, count)


def test_chains_whose_candidates_hold_a_token_reach_all_responses_by_redraws(short: World) -> None:
    target, count = short.target(3.0), 200
    config = metropolis(
        SETTINGS[3], **SHORT, max_rounds=12, batch_size=count, independence_prob=0.4, top_k_candidates=2
    )
    [ended] = run_chains(short, config, count, (12,))
    assert total_variation(ended, target) < 2 * noise_floor(target, count)
    [held] = run_chains(short, replace(config, acceptance=MetropolisAcceptance(independence_prob=0.0)), count, (12,))
    assert total_variation(held, target) > 3 * noise_floor(target, count)


def test_another_sampler_comes_to_the_same_target(short: World) -> None:
    target, count = short.target(3.0), 200
    config = metropolis(SETTINGS[3], **SHORT, max_rounds=14, temperature=1.5, batch_size=count)
    [ended] = run_chains(short, config, count, (14,))
    assert total_variation(ended, target) < 2 * noise_floor(target, count)


def test_tempered_chains_keep_the_target(short: World) -> None:
    target, count = short.target(3.0), 150
    config = metropolis(
        SETTINGS[3], **SHORT, max_rounds=12, num_starts=2, num_chains=2, parallel_tempering=2.5, batch_size=count
    )
    problems = [Problem(id=f"p{index}", question="12") for index in range(count)]
    traces = run_search(problems, policy=short.policy, reward=short.reward, config=config)
    ended = Counter(short.index(trace.response_ids) for trace in traces)
    assert total_variation(ended, target) < 2 * noise_floor(target, count)


def test_the_swap_of_tempered_chains_is_the_ratio_of_their_targets(world: World) -> None:
    cold, hot = 0.4, 1.3
    targets = {beta: np.log(world.target(beta)) for beta in (cold, hot)}
    for one, two in ((0, 5), (17, 3), (40, 100)):
        rewards = world.states[one].reward, world.states[two].reward
        expected = targets[cold][two] + targets[hot][one] - targets[cold][one] - targets[hot][two]
        assert acceptance.compute_swap_log_ratio((cold, rewards[0]), (hot, rewards[1])) == pytest.approx(
            expected, abs=1e-9
        )


# --- what cannot be exact is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proposals_per_round": 2}, ["proposals_per_round must be 1"]),
        ({"temperature": 0.0}, ["temperature must be above 0"]),
        ({"patience": 3}, ["patience must be 0"]),
        ({"target_kl": 1.0, "beta": None}, ["target_kl needs global proposals and greedy acceptance"]),
        ({"proposals": "sequential", "min_gradient_norm": 1.0}, ["min_gradient_norm"]),
        ({"proposals": "sequential", "max_rounds": 0}, ["set max_rounds"]),
        ({"independence_prob": 1.5}, ["independence_prob must be in [0, 1]"]),
        ({"parallel_tempering": 2.0}, ["two chains"]),
        ({"parallel_tempering": 2.0, "num_starts": 2, "num_chains": 2, "solver": "ste"}, ["two chains"]),
        ({"parallel_tempering": 0.5, "num_starts": 2, "num_chains": 2}, ["at least 1"]),
    ],
)
def test_what_would_not_be_exact_is_refused(options: dict[str, Any], words: list[str]) -> None:
    worlds.refused(lambda: metropolis({"solver": "mirror"}, **options), *words)


def test_tempering_and_redraws_belong_to_metropolis() -> None:
    assert metropolis({"solver": "none"}).acceptance == MetropolisAcceptance(0.1, 1.0)
    for option in ("independence_prob", "parallel_tempering"):
        worlds.refused(
            lambda option=option: SearchConfig(acceptance={"name": "greedy", option: 0.1}),
            f"acceptance greedy has no option '{option}'",
            f"{option} belongs to metropolis",
        )


def test_sampling_of_the_policy_itself_needs_no_importance_weight() -> None:
    assert not build_warpers(Sampling()) and build_warpers(Sampling(temperature=0.5))
