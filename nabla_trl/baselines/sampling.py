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

from nabla_trl.gradient.objectives import Known, Sample
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.flops import Cost, Meter
from nabla_trl.models.generation import generate, prompt_caches, random_stream
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import Draft, Job
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import error_trace, response_trace, run_meta
from nabla_trl.traces.schema import Trace


@dataclass(frozen=True)
class Draw:
    """One response of a pool. `generation` and `scoring` are its own costs."""

    ids: list[int]
    reward: float
    answer: str | None
    generation: Cost
    scoring: Cost


@dataclass(frozen=True)
class Entry:
    """The responses to one problem; `prefill` is paid once by the policy and `scored_prefill` by the reward."""

    problem: Problem
    prompt: list[int]
    draws: list[Draw]
    prefill: Cost
    scored_prefill: Cost
    error: str | None = None

    def cost(self) -> Cost:
        """All that was spent on the problem."""
        parts = [cost for draw in self.draws for cost in (draw.generation, draw.scoring)]
        return sum(parts, self.prefill + self.scored_prefill)


@dataclass(frozen=True)
class Pool:
    """N independent responses to each problem, scored if a reward was given."""

    policy: Policy
    reward: str
    seed: int
    config_hash: str
    entries: list[Entry]


def draw_pool(
    problems: Sequence[Problem],
    count: int,
    *,
    policy: Policy,
    reward: Reward | None,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 256,
) -> Pool:
    """Draw `count` responses per problem; response i of a problem does not depend on `count` or on the batch."""
    name = "none" if reward is None else reward.name
    entries = []
    per_batch = max(1, batch_size // count)
    for begin in range(0, len(problems), per_batch):
        entries += _draw_entries(
            problems[begin : begin + per_batch], count, policy, reward, sampling, seed, batch_size
        )
    return Pool(policy, name, seed, f"{sampling}", entries)


def _draw_entries(
    problems: Sequence[Problem],
    count: int,
    policy: Policy,
    reward: Reward | None,
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[Entry]:
    prompts, limits, errors = encode_prompts(problems, policy, reward, sampling)
    if not prompts:
        return [Entry(problem, [], [], Cost(), Cost(), errors[problem.id]) for problem in problems]
    made, scored = Meter(), Meter()
    with made.clock([problem.id for problem, _ in prompts]):
        caches = prompt_caches(policy, [(problem.id, ids) for problem, ids in prompts], made)
    jobs, samples = [], []
    for (problem, ids), limit, cache in zip(prompts, limits, caches, strict=True):
        for draw in range(count):
            stream = random_stream(seed, problem.id, "suffix", 0 if draw == 0 else f"pool-{draw}")
            jobs.append(Job(_account(problem, draw), ids, stream, limit, cache, policy.stops(problem)))
    drafts = generate(policy, jobs, sampling, meter=made, batch_size=batch_size)
    rewards = [math.nan] * len(drafts)
    if reward is not None:
        for index, draft in enumerate(drafts):
            problem, ids = prompts[index // count]
            known = Known(policy.model, draft.candidates, draft.logp)
            samples.append(Sample(problem, ids, draft.ids, _account(problem, index % count), known))
        bare = reward.prompt_memos([Sample(problem, ids, []) for problem, ids in prompts], scored)
        memos = [bare[index // count] for index in range(len(samples))]
        rewards, _ = reward.score(samples, memos, meter=scored)
    entries = {
        problem.id: _entry(
            problem, ids, drafts[row * count :][:count], rewards[row * count :][:count], policy, made, scored
        )
        for row, (problem, ids) in enumerate(prompts)
    }
    return [entries[p.id] if p.id in entries else Entry(p, [], [], Cost(), Cost(), errors[p.id]) for p in problems]


def encode_prompts(
    problems: Sequence[Problem], policy: Policy, reward: Reward | None, sampling: Sampling
) -> tuple[list[tuple[Problem, list[int]]], list[int], dict[str, str]]:
    """Prompts with the most tokens a response to each may have, and why the others cannot be run."""
    prompts, limits, errors = [], [], {}
    for problem in problems:
        try:
            ids = policy.encode(problem)
            rooms = [sampling.max_new_tokens, policy.context - len(ids)]
            limits.append(min(rooms if reward is None else [*rooms, reward.room(problem, ids)]))
            prompts.append((problem, ids))
        except ValueError as error:
            errors[problem.id] = str(error)
    return prompts, limits, errors


def _entry(
    problem: Problem,
    prompt: list[int],
    drafts: Sequence[Draft],
    rewards: Sequence[float],
    policy: Policy,
    made: Meter,
    scored: Meter,
) -> Entry:
    draws = [
        Draw(
            draft.ids,
            value,
            extract_answer(policy.said(draft.ids, policy.stops(problem))),
            made.cost(_account(problem, number)),
            scored.cost(_account(problem, number)),
        )
        for number, (draft, value) in enumerate(zip(drafts, rewards, strict=True))
    ]
    return Entry(problem, prompt, draws, made.cost(problem.id), scored.cost(problem.id))


def _account(problem: Problem, draw: int) -> str:
    return f"{problem.id}#{draw}"


def best_of(pool: Pool, count: int, method: str | None = None) -> list[Trace]:
    """Of the first `count` responses the one with the highest reward; the first among equals.

    best-of-1 is a plain sample: its reward is recorded if there is one, but not charged, since nothing needs it.
    """
    return _by_reward(pool, count, method or f"best_of_{count}", _highest)


def independent(pool: Pool, count: int) -> list[Trace]:
    """The first `count` responses of each problem, each a trace of its own, as samples_<count>: nothing is chosen.

    The prompt is charged to the first of them; the reward is recorded if there is one, but not charged.
    """
    name, traces = f"samples_{count}", []
    for entry in pool.entries:
        if entry.error:
            traces.append(_error(pool, entry, name, entry.error, entry.prefill))
        shared = [entry.prefill, *[Cost()] * count]
        traces += [
            _trace(pool, entry, name, draw, before + draw.generation)
            for before, draw in zip(shared, entry.draws[:count], strict=False)
        ]
    return traces


def weighted_best_of(pool: Pool, count: int, beta: float) -> list[Trace]:
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

    def choose(draws: Sequence[Draw]) -> Draw:
        voters = [draw for draw in draws if draw.answer is not None and draw.reward > -math.inf]
        if not voters:
            return _highest(draws)
        groups: dict[str, list[Draw]] = {}
        for draw in voters:
            groups.setdefault(normalize_answer(draw.answer), []).append(draw)
        top = _highest(voters).reward
        weights = {
            answer: math.fsum(_weight(draw.reward, top, beta) for draw in group) for answer, group in groups.items()
        }
        return _highest(groups[max(weights, key=weights.__getitem__)])

    return _by_reward(pool, count, f"weighted_best_of_{count}", choose)


def _by_reward(pool: Pool, count: int, name: str, choose: Callable[[Sequence[Draw]], Draw]) -> list[Trace]:
    """What `choose` takes of the first `count` responses. A single one needs no reward, and none is charged."""
    traces = []
    for entry in pool.entries:
        draws = entry.draws[:count]
        cost = sum((draw.generation for draw in draws), entry.prefill)
        if count > 1:
            cost = sum((draw.scoring for draw in draws), cost + entry.scored_prefill)
        unusable = entry.error or (_unusable(pool.reward, draws) if count > 1 else None)
        if unusable:
            traces.append(_error(pool, entry, name, unusable, cost))
        else:
            traces.append(_trace(pool, entry, name, draws[0] if count == 1 else choose(draws), cost))
    return traces


def _highest(draws: Sequence[Draw]) -> Draw:
    """The draw with the highest reward; the first among equals."""
    return max(draws, key=lambda draw: draw.reward)


def _weight(reward: float, top: float, beta: float) -> float:
    """exp((r − r_top)/β); 1 for the highest reward, even if it is infinite."""
    return 1.0 if reward == top else math.exp((reward - top) / beta)


def self_consistency(pool: Pool, count: int) -> list[Trace]:
    """The commonest answer among the first `count` responses (ties: the one seen first); no reward is charged."""
    traces = []
    for entry in pool.entries:
        name = f"self_consistency_{count}"
        if entry.error:
            traces.append(_error(pool, entry, name, entry.error, entry.prefill))
            continue
        draws = entry.draws[:count]
        votes = Counter(normalize_answer(draw.answer) for draw in draws if draw.answer is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        chosen = next((d for d in draws if d.answer is not None and normalize_answer(d.answer) == winner), draws[0])
        traces.append(_trace(pool, entry, name, chosen, sum((draw.generation for draw in draws), entry.prefill)))
    return traces


def greedy(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward | None,
    max_new_tokens: int,
    method: str = "greedy",
    batch_size: int = 256,
) -> list[Trace]:
    """One greedy response per problem; its reward is recorded but not charged."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    pool = draw_pool(problems, 1, policy=policy, reward=reward, sampling=sampling, batch_size=batch_size)
    return best_of(pool, 1, method)


def _unusable(reward: str, draws: Sequence[Draw]) -> str | None:
    if any(math.isnan(draw.reward) for draw in draws):
        return f"the reward {reward} gave nan"
    if all(draw.reward == -math.inf for draw in draws):
        return f"the reward {reward} cannot read any response"
    return None


def _trace(pool: Pool, entry: Entry, method: str, draw: Draw, cost: Cost) -> Trace:
    return response_trace(
        pool.policy,
        entry.problem,
        method=method,
        seed=pool.seed,
        prompt=entry.prompt,
        response=draw.ids,
        reward=draw.reward if math.isfinite(draw.reward) else math.nan,
        cost=cost,
        meta=run_meta(pool.policy, pool.reward, pool.config_hash),
    )


def _error(pool: Pool, entry: Entry, method: str, message: str, cost: Cost) -> Trace:
    meta = run_meta(pool.policy, pool.reward, pool.config_hash)
    return error_trace(entry.problem, method, pool.seed, message, meta, cost)
