"""Methods that do not revise: greedy decoding, best-of-N and weighted best-of-N, from one pool of responses.

A pool holds N independent responses per problem. Best-of-n (the highest reward among the first n), weighted best-of-n
(the answer with the largest weight) and votes without a reward (`nabla_trl.baselines.votes`) read nested prefixes of
the same pool, so a curve over n costs one pool. Each n is charged only the samples that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from nabla_trl.engine.engine import Engine
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.grading.voting import vote
from nabla_trl.models.flops import Cost
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import find_token_columns, make_response_rng
from nabla_trl.rewards.reward import Reward, encode_prompt
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace, build_trace_meta
from nabla_trl.traces.schema import Trace


@dataclass(frozen=True)
class PooledResponse:
    """One response of a pool, with the costs of this response alone.

    Attributes:
        mean_logp: log π(y|x) divided by the number of tokens, in nats.
        statistics: [T, 3] of the distributions that the tokens were drawn from (`TokenStatistic`). None if they were
            not asked for.
    """

    response_ids: list[int]
    reward: float
    answer: str | None
    mean_logp: float
    generation_cost: Cost
    scoring_cost: Cost
    statistics: Tensor | None = None

    def get_statistics(self) -> Tensor:
        """Return the statistics of a pool drawn with `statistics_top_k`."""
        if self.statistics is None:
            raise RuntimeError("the pool has no statistics of its distributions: draw it with statistics_top_k")
        return self.statistics


@dataclass(frozen=True)
class PoolEntry:
    """The responses to one problem. Policy and reward read the prompt once, at the prefill costs.

    Attributes:
        error: why the problem could not be run. There are no responses then.
        max_new_tokens: most tokens of a response.
        policy_cache, score_caches: caches of the prompt while responses are drawn.
    """

    problem: Problem
    prompt_ids: list[int]
    responses: list[PooledResponse]
    policy_prefill_cost: Cost
    reward_prefill_cost: Cost
    error: str | None = None
    max_new_tokens: int = 0
    policy_cache: PrefixState | None = None
    score_caches: list[ScoreCache] = field(default_factory=list)

    def compute_cost(self) -> Cost:
        """Return all that was spent on the problem."""
        costs = [cost for response in self.responses for cost in (response.generation_cost, response.scoring_cost)]
        return sum(costs, self.policy_prefill_cost + self.reward_prefill_cost)


@dataclass(frozen=True)
class ResponsePool:
    """Independent responses to each problem, scored if a reward was given."""

    policy: Policy
    reward_name: str
    seed: int
    config_hash: str
    entries: list[PoolEntry]


# A problem with the responses drawn so far -> how many more it needs.
CountMissing = Callable[[PoolEntry], int]
# Chooses one of the responses to a problem.
SelectResponse = Callable[[Sequence[PooledResponse]], PooledResponse]


def draw_pool(
    problems: Sequence[Problem],
    num_responses: int,
    *,
    policy: Policy,
    reward: Reward | None,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 256,
    statistics_top_k: int = 0,
    count_missing: CountMissing | None = None,
) -> ResponsePool:
    """Draw a pool of responses. Response i of a problem depends neither on `num_responses` nor on the batch.

    Args:
        num_responses: responses per problem.
        reward: scores the responses. None: rewards are NaN.
        batch_size: responses drawn together.
        statistics_top_k: record statistics of the distributions, with this k (`TokenStatistic`). 0: none.
        count_missing: returns how many responses a problem still needs. They are drawn until it returns 0.

    Raises:
        ValueError: two problems have the same id.
    """
    engine = Engine(policy, reward, num_slots=batch_size)

    async def draw_entry(problem: Problem) -> PoolEntry:
        entry = await begin_entry(problem, engine, sampling)
        num_missing = 0 if entry.error else num_responses
        while num_missing:
            await draw_responses(entry, num_missing, engine, sampling, seed, statistics_top_k)
            num_missing = count_missing(entry) if count_missing else 0
        return replace(entry, policy_cache=None, score_caches=[])

    # Twice the problems that fill the slots, so that slots stay occupied while others are scored.
    entries = engine.run_problems(problems, draw_entry, max_concurrent=max(1, 2 * batch_size // num_responses))
    return ResponsePool(policy, "none" if reward is None else reward.name, seed, f"{sampling}", entries)


async def begin_entry(problem: Problem, engine: Engine, sampling: Sampling) -> PoolEntry:
    """Return an entry without responses, with the caches of its prompt."""
    try:
        ids, limit = encode_prompt(problem, engine.policy, engine.reward, sampling.max_new_tokens)
    except ValueError as error:
        return PoolEntry(problem, [], [], Cost(), Cost(), str(error))
    prompt_key, scoring_key = f"{problem.id}/prompt", f"{problem.id}/reward prompt"
    caches = await engine.read_prompt(Sample(problem, ids, [], prompt_key), reward_cost_key=scoring_key)
    costs = [engine.flop_counter.get_cost(key) for key in (prompt_key, scoring_key)]
    return PoolEntry(problem, ids, [], costs[0], costs[1], None, limit, *caches)


async def draw_responses(
    entry: PoolEntry, count: int, engine: Engine, sampling: Sampling, seed: int, statistics_top_k: int = 0
) -> None:
    """Draw and score further responses to one problem. What each of them costs is charged to a key of its own."""
    problem, ids, policy, counter = entry.problem, entry.prompt_ids, engine.policy, engine.flop_counter
    first = len(entry.responses)
    keys = [f"{problem.id}#{index}" for index in range(first, first + count)]
    stops = policy.get_stop_strings(problem)
    requests = [
        GenerationRequest(
            key, ids, make_response_rng(seed, problem.id, index), entry.max_new_tokens, entry.policy_cache, stops
        )
        for index, key in enumerate(keys, first)
    ]
    outputs = await engine.generate(requests, sampling, statistics_top_k=statistics_top_k)
    rewards = [math.nan] * count
    if engine.reward is not None:
        samples = [
            Sample(
                problem,
                ids,
                output.ids,
                f"{key}/reward",
                DrawInfo(policy.model, output.candidates, output.logp, output.hidden_states),
            )
            for key, output in zip(keys, outputs, strict=True)
        ]
        scored = await engine.score(samples, [entry.score_caches] * count, [0] * count, return_caches=False)
        rewards = [reward for reward, _ in scored]
    for key, output, reward in zip(keys, outputs, rewards, strict=True):
        answer = extract_answer(policy.decode_response(output.ids, stops))
        own_columns = find_token_columns(output.candidates, output.ids)
        mean_logp = float(output.logp.gather(1, own_columns[:, None]).mean())
        costs = counter.get_cost(key), counter.get_cost(f"{key}/reward")
        entry.responses.append(
            PooledResponse(output.ids, reward, answer, mean_logp, *costs, statistics=output.statistics)
        )


def decode_greedily(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward | None,
    max_new_tokens: int,
    batch_size: int = 256,
) -> list[Trace]:
    """Return one greedy response per problem. Its reward is recorded but not charged."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
    pool = draw_pool(problems, 1, policy=policy, reward=reward, sampling=sampling, batch_size=batch_size)
    return select_best_of_n(pool, 1, "greedy")


def build_sample_traces(pool: ResponsePool, num_responses: int) -> list[Trace]:
    """Return the first `num_responses` responses of each problem, each as a trace of its own, named samples_<n>.

    The first trace of a problem is charged the prompt. Rewards are recorded but not charged.
    """
    name, traces = f"samples_{num_responses}", []
    for entry in pool.entries:
        if entry.error:
            traces.append(build_pool_error_trace(pool, entry, name, entry.error, entry.policy_prefill_cost))
        for index, response in enumerate(entry.responses[:num_responses]):
            prompt_cost = Cost() if index else entry.policy_prefill_cost
            traces.append(build_pool_trace(pool, entry, name, response, prompt_cost + response.generation_cost))
    return traces


def select_best_of_n(pool: ResponsePool, num_responses: int, method_name: str | None = None) -> list[Trace]:
    """Return the response with the highest reward among the first `num_responses`. Ties go to the first.

    Best-of-1 is a plain sample. Its reward is recorded if there is one, but not charged, since nothing needs it.
    """
    return _select_by_reward(pool, num_responses, method_name or f"best_of_{num_responses}", _get_highest_reward)


def select_weighted_best_of_n(
    pool: ResponsePool, num_responses: int, beta: float, method_name: str | None = None
) -> list[Trace]:
    """Return the best response with the answer of the largest weight, which is its responses' sum of exp(r/β).

    Weighted best-of-N sums a verifier's probabilities over the responses that share an answer (Li et al., arXiv
    2206.02336, and Snell et al., arXiv 2408.03314). Rewards here are no probabilities. Where they are negative, their
    sum favors rare answers, and the sigmoid of a log-ratio means nothing. So the weights are a softmax of r/β over the
    pool, for every kind of reward. For samples from π (temperature 1, nothing filtered) they are the self-normalized
    importance weights of π* ∝ π·exp(r/β), at which the search aims. The answer is then the likeliest under π*, as
    estimated from the pool. β → 0 gives best-of-N, β → ∞ gives self-consistency.

    Ties go to the answer seen first, and within an answer to the response seen first. Responses without an answer, or
    that the reward cannot read, do not vote. If none votes, the method is best-of-N. It is charged as best-of-N is.
    """

    def select(responses: Sequence[PooledResponse]) -> PooledResponse:
        answers = [response.answer for response in responses]
        voters = vote(answers, [response.reward / beta for response in responses])
        return _get_highest_reward([responses[index] for index in voters] or responses)

    return _select_by_reward(pool, num_responses, method_name or f"weighted_best_of_{num_responses}", select)


def _select_by_reward(pool: ResponsePool, num_responses: int, method_name: str, select: SelectResponse) -> list[Trace]:
    """Return what `select` chooses among the first responses. One response needs no reward, and none is charged."""
    traces = []
    for entry in pool.entries:
        responses = entry.responses[:num_responses]
        cost = sum((response.generation_cost for response in responses), entry.policy_prefill_cost)
        error = entry.error
        if num_responses > 1:
            cost = sum((response.scoring_cost for response in responses), cost + entry.reward_prefill_cost)
            error = error or _describe_unusable_rewards(pool.reward_name, responses)
        if error:
            traces.append(build_pool_error_trace(pool, entry, method_name, error, cost))
        else:
            traces.append(build_pool_trace(pool, entry, method_name, select(responses), cost))
    return traces


def _get_highest_reward(responses: Sequence[PooledResponse]) -> PooledResponse:
    return max(responses, key=lambda response: response.reward)  # the first among equals


def _describe_unusable_rewards(reward_name: str, responses: Sequence[PooledResponse]) -> str | None:
    if any(math.isnan(response.reward) for response in responses):
        return f"the reward {reward_name} gave nan"
    if all(response.reward == -math.inf for response in responses):
        return f"the reward {reward_name} cannot read any response"
    return None


def build_pool_trace(
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


def build_pool_error_trace(pool: ResponsePool, entry: PoolEntry, method_name: str, message: str, cost: Cost) -> Trace:
    meta = build_trace_meta(pool.policy, pool.reward_name, pool.config_hash)
    return build_error_trace(entry.problem, method_name, pool.seed, message, meta, cost)
