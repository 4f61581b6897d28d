"""Methods without revisions: greedy decoding, best-of-N, weighted best-of-N and self-consistency, over one pool.

A pool holds N independent responses per problem. Best-of-n (the highest reward among the first n), self-consistency
(the commonest answer among the first n; Wang et al., arXiv 2203.11171) and weighted best-of-n (the answer with the
largest weight) read nested prefixes of the same pool, so a curve over n costs one pool; each n is charged the samples
that it reads, and no others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.flops import Cost, FlopCounter
from nabla_trl.models.generation import generate_continuations, make_rng, prepare_prompt_caches
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Trace


@dataclass(frozen=True)
class PooledResponse:
    """One response of a pool. `generation` and `scoring` are its own costs."""

    response_ids: list[int]
    reward: float
    answer: str | None
    generation_cost: Cost
    scoring_cost: Cost


@dataclass(frozen=True)
class PoolEntry:
    """The responses to one problem; `prefill` is paid once by the policy and `scored_prefill` by the reward."""

    problem: Problem
    prompt_ids: list[int]
    responses: list[PooledResponse]
    policy_prefill_cost: Cost
    reward_prefill_cost: Cost
    error: str | None = None

    def compute_cost(self) -> Cost:
        """All that was spent on the problem."""
        parts = [cost for draw in self.responses for cost in (draw.generation_cost, draw.scoring_cost)]
        return sum(parts, self.policy_prefill_cost + self.reward_prefill_cost)


@dataclass(frozen=True)
class ResponsePool:
    """N independent responses to each problem, scored if a reward was given."""

    policy: Policy
    reward_name: str
    seed: int
    config_hash: str
    entries: list[PoolEntry]


def draw_pool(
    problems: Sequence[Problem],
    num_responses: int,
    *,
    policy: Policy,
    reward: Reward | None,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 256,
) -> ResponsePool:
    """Draw `count` responses per problem; response i of a problem does not depend on `count` or on the batch."""
    name = "none" if reward is None else reward.name
    entries = []
    per_batch = max(1, batch_size // num_responses)
    for begin in range(0, len(problems), per_batch):
        entries += _draw_entries(
            problems[begin : begin + per_batch], num_responses, policy, reward, sampling, seed, batch_size
        )
    return ResponsePool(policy, name, seed, f"{sampling}", entries)


def _draw_entries(
    problems: Sequence[Problem],
    num_responses: int,
    policy: Policy,
    reward: Reward | None,
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[PoolEntry]:
    prompts, limits, errors = encode_prompts(problems, policy, reward, sampling)
    if not prompts:
        return [PoolEntry(problem, [], [], Cost(), Cost(), errors[problem.id]) for problem in problems]
    made, scored = FlopCounter(), FlopCounter()
    with made.measure_seconds([problem.id for problem, _ in prompts]):
        caches = prepare_prompt_caches(policy, [(problem.id, ids) for problem, ids in prompts], made)
    jobs, samples = [], []
    for (problem, ids), limit, cache in zip(prompts, limits, caches, strict=True):
        for draw in range(num_responses):
            stream = make_rng(seed, problem.id, "suffix", 0 if draw == 0 else f"pool-{draw}")
            jobs.append(
                GenerationRequest(
                    _make_account_key(problem, draw), ids, stream, limit, cache, policy.get_stop_strings(problem)
                )
            )
    drafts = generate_continuations(policy, jobs, sampling, flop_counter=made, batch_size=batch_size)
    rewards = [math.nan] * len(drafts)
    if reward is not None:
        for index, draft in enumerate(drafts):
            problem, ids = prompts[index // num_responses]
            known = DrawInfo(policy.model, draft.candidates, draft.logp)
            samples.append(Sample(problem, ids, draft.ids, _make_account_key(problem, index % num_responses), known))
        bare = reward.compute_prompt_caches([Sample(problem, ids, []) for problem, ids in prompts], scored)
        memos = [bare[index // num_responses] for index in range(len(samples))]
        rewards, _ = reward.score(samples, memos, flop_counter=scored)
    entries = {
        problem.id: _build_entry(
            problem,
            ids,
            drafts[row * num_responses :][:num_responses],
            rewards[row * num_responses :][:num_responses],
            policy,
            made,
            scored,
        )
        for row, (problem, ids) in enumerate(prompts)
    }
    return [entries[p.id] if p.id in entries else PoolEntry(p, [], [], Cost(), Cost(), errors[p.id]) for p in problems]


def encode_prompts(
    problems: Sequence[Problem], policy: Policy, reward: Reward | None, sampling: Sampling
) -> tuple[list[tuple[Problem, list[int]]], list[int], dict[str, str]]:
    """Prompts with the most tokens a response to each may have, and why the others cannot be run."""
    prompts, limits, errors = [], [], {}
    for problem in problems:
        try:
            ids = policy.encode(problem)
            rooms = [sampling.max_new_tokens, policy.context_length - len(ids)]
            limits.append(min(rooms if reward is None else [*rooms, reward.compute_max_new_tokens(problem, ids)]))
            prompts.append((problem, ids))
        except ValueError as error:
            errors[problem.id] = str(error)
    return prompts, limits, errors


def _build_entry(
    problem: Problem,
    prompt_ids: list[int],
    outputs: Sequence[GenerationOutput],
    rewards: Sequence[float],
    policy: Policy,
    generation_counter: FlopCounter,
    scoring_counter: FlopCounter,
) -> PoolEntry:
    draws = [
        PooledResponse(
            draft.ids,
            value,
            extract_answer(policy.decode_response(draft.ids, policy.get_stop_strings(problem))),
            generation_counter.get_cost(_make_account_key(problem, number)),
            scoring_counter.get_cost(_make_account_key(problem, number)),
        )
        for number, (draft, value) in enumerate(zip(outputs, rewards, strict=True))
    ]
    return PoolEntry(
        problem, prompt_ids, draws, generation_counter.get_cost(problem.id), scoring_counter.get_cost(problem.id)
    )


def _make_account_key(problem: Problem, response_index: int) -> str:
    return f"{problem.id}#{response_index}"


def select_best_of_n(pool: ResponsePool, num_responses: int, method_name: str | None = None) -> list[Trace]:
    """Of the first `count` responses the one with the highest reward; the first among equals.

    best-of-1 is a plain sample: its reward is recorded if there is one, but not charged, since nothing needs it.
    """
    return _build_reward_selected_traces(
        pool, num_responses, method_name or f"best_of_{num_responses}", _select_highest_reward
    )


def build_sample_traces(pool: ResponsePool, num_responses: int) -> list[Trace]:
    """The first `count` responses of each problem, each a trace of its own, as samples_<count>: nothing is chosen.

    The prompt is charged to the first of them; the reward is recorded if there is one, but not charged.
    """
    name, traces = f"samples_{num_responses}", []
    for entry in pool.entries:
        if entry.error:
            traces.append(_build_error_trace(pool, entry, name, entry.error, entry.policy_prefill_cost))
        shared = [entry.policy_prefill_cost, *[Cost()] * num_responses]
        traces += [
            _build_trace(pool, entry, name, draw, before + draw.generation_cost)
            for before, draw in zip(shared, entry.responses[:num_responses], strict=False)
        ]
    return traces


def select_weighted_best_of_n(pool: ResponsePool, num_responses: int, beta: float) -> list[Trace]:
    """Of the first `count` responses the best one with the answer that weighs most: the answer's sum of exp(r/β).

    Weighted best-of-N sums a verifier's probabilities over the responses that share an answer (Li et al., arXiv
    2206.02336; Snell et al., arXiv 2408.03314). Rewards here are no probabilities: where they are negative, their
    sum favours what is rare, and a sigmoid of a log-ratio means nothing. So the weights are a softmax of r/β over the
    pool, whatever the kind of reward: for draws from π (temperature 1, nothing filtered) they are the self-normalised
    importance weights of π* ∝ π·exp(r/β), at which the search aims, and the answer is the likeliest under π*, as
    estimated from the pool. β → 0 is best-of-N, β → ∞ is self-consistency.

    Ties go to the answer seen first, and within it to the response seen first. Responses that have no answer or that
    the reward cannot read do not vote; where none votes, this is best-of-N. It is charged as best-of-N is.
    """

    def choose(draws: Sequence[PooledResponse]) -> PooledResponse:
        voters = [draw for draw in draws if draw.answer is not None and draw.reward > -math.inf]
        if not voters:
            return _select_highest_reward(draws)
        groups: dict[str, list[PooledResponse]] = {}
        for draw in voters:
            groups.setdefault(normalize_answer(draw.answer), []).append(draw)
        top = _select_highest_reward(voters).reward
        weights = {
            answer: math.fsum(_compute_vote_weight(draw.reward, top, beta) for draw in group)
            for answer, group in groups.items()
        }
        return _select_highest_reward(groups[max(weights, key=weights.__getitem__)])

    return _build_reward_selected_traces(pool, num_responses, f"weighted_best_of_{num_responses}", choose)


def _build_reward_selected_traces(
    pool: ResponsePool,
    num_responses: int,
    method_name: str,
    choose: Callable[[Sequence[PooledResponse]], PooledResponse],
) -> list[Trace]:
    """What `choose` takes of the first `count` responses. A single one needs no reward, and none is charged."""
    traces = []
    for entry in pool.entries:
        draws = entry.responses[:num_responses]
        cost = sum((draw.generation_cost for draw in draws), entry.policy_prefill_cost)
        if num_responses > 1:
            cost = sum((draw.scoring_cost for draw in draws), cost + entry.reward_prefill_cost)
        unusable = entry.error or (_describe_unusable_rewards(pool.reward_name, draws) if num_responses > 1 else None)
        if unusable:
            traces.append(_build_error_trace(pool, entry, method_name, unusable, cost))
        else:
            traces.append(
                _build_trace(pool, entry, method_name, draws[0] if num_responses == 1 else choose(draws), cost)
            )
    return traces


def _select_highest_reward(responses: Sequence[PooledResponse]) -> PooledResponse:
    """The draw with the highest reward; the first among equals."""
    return max(responses, key=lambda draw: draw.reward)


def _compute_vote_weight(reward: float, max_reward: float, beta: float) -> float:
    """exp((r − r_top)/β); 1 for the highest reward, even if it is infinite."""
    return 1.0 if reward == max_reward else math.exp((reward - max_reward) / beta)


def select_by_self_consistency(pool: ResponsePool, num_responses: int) -> list[Trace]:
    """The commonest answer among the first `count` responses (ties: the one seen first); no reward is charged."""
    traces = []
    for entry in pool.entries:
        name = f"self_consistency_{num_responses}"
        if entry.error:
            traces.append(_build_error_trace(pool, entry, name, entry.error, entry.policy_prefill_cost))
            continue
        draws = entry.responses[:num_responses]
        votes = Counter(normalize_answer(draw.answer) for draw in draws if draw.answer is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        chosen = next((d for d in draws if d.answer is not None and normalize_answer(d.answer) == winner), draws[0])
        traces.append(
            _build_trace(
                pool, entry, name, chosen, sum((draw.generation_cost for draw in draws), entry.policy_prefill_cost)
            )
        )
    return traces


def decode_greedily(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward | None,
    max_new_tokens: int,
    method_name: str = "greedy",
    batch_size: int = 256,
) -> list[Trace]:
    """One greedy response per problem; its reward is recorded but not charged."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    pool = draw_pool(problems, 1, policy=policy, reward=reward, sampling=sampling, batch_size=batch_size)
    return select_best_of_n(pool, 1, method_name)


def _describe_unusable_rewards(reward_name: str, responses: Sequence[PooledResponse]) -> str | None:
    if any(math.isnan(draw.reward) for draw in responses):
        return f"the reward {reward_name} gave nan"
    if all(draw.reward == -math.inf for draw in responses):
        return f"the reward {reward_name} cannot read any response"
    return None


def _build_trace(
    pool: ResponsePool, entry: PoolEntry, method_name: str, response: PooledResponse, cost: Cost
) -> Trace:
    return build_response_trace(
        pool.policy,
        entry.problem,
        method=method_name,
        seed=pool.seed,
        prompt_ids=entry.prompt_ids,
        response_ids=response.response_ids,
        reward=response.reward if math.isfinite(response.reward) else math.nan,
        cost=cost,
        meta=build_trace_meta(pool.policy, pool.reward_name, pool.config_hash),
    )


def _build_error_trace(pool: ResponsePool, entry: PoolEntry, method_name: str, message: str, cost: Cost) -> Trace:
    meta = build_trace_meta(pool.policy, pool.reward_name, pool.config_hash)
    return build_error_trace(entry.problem, method_name, pool.seed, message, meta, cost)
