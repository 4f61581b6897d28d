"""Votes among the responses of one pool, without a reward.

Each method is a small function that reads the responses to one problem in order and chooses one of them. All methods
of `VOTES` read the same pool. A method is charged the responses that it reads, and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from nabla_trl.baselines import confidence
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.baselines.sampling import (
    PooledResponse,
    PoolEntry,
    ResponsePool,
    build_pool_error_trace,
    build_pool_trace,
)
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.voting import vote
from nabla_trl.models.flops import Cost, FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.traces.schema import Trace

STOP_PROBABILITY = 0.95  # of adaptive consistency, the threshold of its paper
CONSENSUS = 0.95  # of the weights, at which DeepConf draws no further response (its paper's τ)
MAX_READ = 999  # responses that are read at a budget, whatever they cost


@dataclass(frozen=True)
class Reading:
    """What a method reads of a pool and chooses.

    Attributes:
        chosen: index of the chosen response.
        num_read: responses that the method has read, the first ones of the pool.
        stopped_lengths: index -> tokens, for responses that the method did not let end.
    """

    chosen: int
    num_read: int
    stopped_lengths: Mapping[int, int] = field(default_factory=dict)


# The responses to one problem, at least one -> what a method reads of them.
ReadPool = Callable[[Sequence[PooledResponse], BaselineConfig], Reading]


def read_self_consistency(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Choose the most common answer (Wang et al., arXiv 2203.11171). Ties go to the answer seen first."""
    return Reading(_choose(responses), len(responses))


def read_adaptive_consistency(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Choose the most common answer, and stop once its lead is safe (Aggarwal et al., arXiv 2305.11860).

    The Beta criterion of the paper: The two most common answers have v1 and v2 votes. Reading stops when the first one
    is the majority of the two with a probability of 0.95 under a uniform prior.
    """
    num_read = count_responses_to_read([response.answer for response in responses], compute_majority_probability)
    return Reading(_choose(responses[:num_read]), num_read)


def read_dirichlet_consistency(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Choose the most common answer, and stop once it is the likeliest of all (Aggarwal et al., arXiv 2305.11860).

    The Dirichlet criterion of the paper: All answers seen so far count, and reading stops when the first one is more
    probable than each of the others with a probability of 0.95 under a uniform prior. The authors' code keeps the five
    most common answers and integrates by Monte Carlo. Here all answers count, and the integral is one-dimensional.
    """
    num_read = count_responses_to_read([response.answer for response in responses], compute_lead_probability)
    return Reading(_choose(responses[:num_read]), num_read)


def count_responses_to_read(
    answers: Sequence[str | None], compute_probability: Callable[[tuple[int, ...]], float]
) -> int:
    """Return after how many answers adaptive consistency stops.

    Args:
        compute_probability: the votes of each answer, falling -> the probability that the first answer leads.
    """
    votes: Counter[str] = Counter()
    for number, answer in enumerate(answers, 1):
        if answer is not None:
            votes[normalize_answer(answer)] += 1
        if votes and compute_probability(tuple(count for _, count in votes.most_common())) > STOP_PROBABILITY:
            return number
    return len(answers)


def compute_majority_probability(votes: Sequence[int]) -> float:
    """Return P(p > 1/2) for p ~ Beta(v1 + 1, v2 + 1) of the two most common answers, by the equal binomial tail."""
    first, second = [*votes, 0][:2]
    num_trials = first + second + 1
    return (
        sum(math.comb(num_trials, count) for count in range(first + 1)) / 2**num_trials
    )  # whole numbers: no overflow


@lru_cache(maxsize=100_000)  # a budget reads the same responses again for each further one
def compute_lead_probability(votes: tuple[int, ...]) -> float:
    """Return P(p1 > max of the others) for p ~ Dirichlet(v + 1). A single answer is compared with one of no votes.

    A Dirichlet vector is a vector of Gamma variables divided by their sum. So the probability is ∫ f1(x)·Π Fj(x) dx,
    with the density f1 of Gamma(v1 + 1) and the distribution functions Fj of the others, integrated by the trapezoid
    rule.
    """
    first, *others = [*votes, 0] if len(votes) == 1 else votes
    width = 12 * math.sqrt(first + 1)
    x = np.linspace(max(1e-9, first - width), first + 3 * width, 2001)
    values = np.exp(first * np.log(x) - x - math.lgamma(first + 1))
    for count in others:
        values *= _compute_gamma_cdf(x, count)
    return float((values.sum() - (values[0] + values[-1]) / 2) * (x[1] - x[0]))


def _compute_gamma_cdf(x: np.ndarray, count: int) -> np.ndarray:
    """Return P(X ≤ x) for X ~ Gamma(count + 1): 1 − Σ_{k ≤ count} x^k·e^−x/k!."""
    upper_tail, log_x = np.zeros_like(x), np.log(x)
    for k in range(count + 1):  # each term by its logarithm, since e^−x alone vanishes where x is above 745
        upper_tail += np.exp(k * log_x - x - math.lgamma(k + 1))
    return 1 - upper_tail


def read_confidence_vote(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Choose the answer with the largest sum of confidences (Taubenfeld et al., CISC, arXiv 2502.06233).

    The confidence c of a response is its likelihood per token, exp(log π(y|x)/T), which drawing it has computed. Its
    weight is c, or with `confidence_temperature` the paper's softmax of c over the responses. The paper's other
    confidences need another call of the model.
    """
    temperature = config.confidence_temperature
    log_weights = [
        response.mean_logp if temperature is None else math.exp(response.mean_logp) / temperature
        for response in responses
    ]
    return Reading(_choose(responses, log_weights), len(responses))


def read_self_certainty(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Choose the answer with the most Borda votes by self-certainty (Kang et al., arXiv 2502.18581).

    The response of rank r among N has (N − r + 1)^p votes (p is `borda_power`, 0.5 in the authors' code).
    Self-certainty is the mean over the tokens of KL(uniform ‖ π), over the whole vocabulary.
    """
    certainty = [confidence.compute_self_certainty(response.get_statistics()) for response in responses]
    ranked = sorted(range(len(responses)), key=lambda index: -certainty[index])
    log_weights = [0.0] * len(responses)
    for rank, index in enumerate(ranked):
        log_weights[index] = config.borda_power * math.log(len(responses) - rank)
    return Reading(_choose(responses, log_weights), len(responses))


def read_deepconf_tail(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Vote among the responses of the highest tail confidence (Fu et al., DeepConf offline, arXiv 2508.15260)."""
    return _read_deepconf(responses, config, confidence.compute_tail_confidence)


def read_deepconf_bottom(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Vote among the responses of the highest bottom-10% group confidence (DeepConf offline, arXiv 2508.15260)."""
    return _read_deepconf(responses, config, confidence.compute_bottom_group_confidence)


def _read_deepconf(
    responses: Sequence[PooledResponse], config: BaselineConfig, measure: Callable[[np.ndarray, int], float]
) -> Reading:
    """Keep the share `deepconf_keep` of the most confident responses, and weigh their votes by the confidence."""
    values = [
        measure(confidence.compute_token_confidence(response.get_statistics()), config.confidence_window)
        for response in responses
    ]
    threshold = np.percentile(values, 100 * (1 - config.deepconf_keep))
    return Reading(_choose(responses, [_log_weight(value, threshold) for value in values]), len(responses))


def read_deepconf_online(responses: Sequence[PooledResponse], config: BaselineConfig) -> Reading:
    """Stop responses that lose confidence, and stop drawing at a consensus (DeepConf online, arXiv 2508.15260).

    The first `deepconf_warmup` responses are drawn whole. The share `deepconf_keep` of their lowest group confidences
    reaches the threshold. A later response is stopped where a group of `confidence_window` tokens falls below it, and
    is charged up to there. Responses above the threshold vote with their lowest group confidence as weight. No further
    response is drawn once one answer has 95% of the weight of all responses that were not stopped.

    A pool holds whole responses, and a response that is stopped is the beginning of the same response. So reading the
    pool gives what stopping the decoder would give, at the same FLOPs. Seconds are shared by tokens.
    """
    window, num_warmup = config.confidence_window, min(config.deepconf_warmup, len(responses))
    tokens = [confidence.compute_token_confidence(response.get_statistics()) for response in responses]
    lowest = [confidence.compute_lowest_group_confidence(values, window) for values in tokens]
    threshold = float(np.percentile(lowest[:num_warmup], 100 * (1 - config.deepconf_keep)))
    whole, stopped_lengths = list(range(num_warmup)), {}
    num_read = num_warmup
    while num_read < len(responses) and not _has_consensus(
        [responses[index] for index in whole], [lowest[index] for index in whole]
    ):
        length = confidence.find_early_stop(tokens[num_read], window, threshold)
        if length is None:
            whole.append(num_read)
        else:
            stopped_lengths[num_read] = length
        num_read += 1
    chosen = _choose([responses[index] for index in whole], [_log_weight(lowest[index], threshold) for index in whole])
    return Reading(whole[chosen], num_read, stopped_lengths)


def _has_consensus(responses: Sequence[PooledResponse], weights: Sequence[float]) -> bool:
    """Return whether one answer has the share `CONSENSUS` of the weights."""
    winners = vote([response.answer for response in responses], [math.log(max(weight, 1e-300)) for weight in weights])
    total = math.fsum(weight for one, weight in zip(responses, weights, strict=True) if one.answer is not None)
    return bool(winners) and math.fsum(weights[index] for index in winners) >= CONSENSUS * total


def _log_weight(value: float, threshold: float) -> float:
    """Return the log of a confidence as weight of a vote, −∞ below the threshold. Confidences are above 0."""
    return math.log(max(value, 1e-300)) if value >= threshold else -math.inf


def _choose(responses: Sequence[PooledResponse], log_weights: Sequence[float] | None = None) -> int:
    """Return the index of the first response with the winning answer. Without an answer: of the largest weight."""
    winners = vote([response.answer for response in responses], log_weights)
    if winners:
        return winners[0]
    return 0 if log_weights is None else max(range(len(responses)), key=lambda index: log_weights[index])


VOTES: dict[str, ReadPool] = {
    "self_consistency": read_self_consistency,
    "adaptive_consistency": read_adaptive_consistency,
    "dirichlet_consistency": read_dirichlet_consistency,
    "confidence_vote": read_confidence_vote,
    "self_certainty": read_self_certainty,
    "deepconf_tail": read_deepconf_tail,
    "deepconf_bottom": read_deepconf_bottom,
    "deepconf_online": read_deepconf_online,
}
# Methods that read statistics of the distributions, and those of them that need the whole vocabulary.
STATISTICS_VOTES = ("self_certainty", "deepconf_tail", "deepconf_bottom", "deepconf_online")
WHOLE_DISTRIBUTION_VOTES = ("self_certainty",)


# --- traces and costs -----------------------------------------------------------------------------------


def vote_in_pool(
    pool: ResponsePool,
    name: str,
    size: int | None,
    *,
    config: BaselineConfig | None = None,
    max_flops: float = 0.0,
    method_name: str | None = None,
) -> list[Trace]:
    """Return the traces of a vote of `VOTES`.

    Args:
        size: N, how many responses the method may read. None: as many as fit into `max_flops`.
        max_flops: budget per problem, the prompt included.
        method_name: name in the traces (default: <name>_<size>).
    """
    config = config or BaselineConfig()
    method_name = method_name or f"{name}_{size}"
    traces = []
    for entry in pool.entries:
        if entry.error:
            traces.append(build_pool_error_trace(pool, entry, method_name, entry.error, entry.policy_prefill_cost))
            continue
        num_responses = size or min(
            count_responses_in_budget(entry, name, config, pool.policy, max_flops), len(entry.responses)
        )
        responses = entry.responses[:num_responses]
        reading = VOTES[name](responses, config)
        cost = compute_reading_cost(entry, reading, pool.policy)
        traces.append(build_pool_trace(pool, entry, method_name, responses[reading.chosen], cost))
    return traces


def count_responses_in_budget(
    entry: PoolEntry, name: str, config: BaselineConfig, policy: Policy, max_flops: float
) -> int:
    """Return how many responses a method draws at a budget, one more than there are if the pool is too small.

    The first response is always drawn. Another one is drawn while it is expected to fit, at the mean cost of those
    before, unless the method itself has stopped.
    """
    for size in range(1, len(entry.responses) + 1):
        reading = VOTES[name](entry.responses[:size], config)
        spent = compute_reading_cost(entry, reading, policy).flops
        mean = (spent - entry.policy_prefill_cost.flops) / reading.num_read
        if reading.num_read < size or size == MAX_READ or spent + mean > max_flops:
            return size
    return len(entry.responses) + 1


def compute_reading_cost(entry: PoolEntry, reading: Reading, policy: Policy) -> Cost:
    """Return the cost of what was read: the prompt, and each response as far as it was drawn."""
    cost = entry.policy_prefill_cost
    for index, response in enumerate(entry.responses[: reading.num_read]):
        length = reading.stopped_lengths.get(index)
        cost += response.generation_cost if length is None else _cut_cost(entry, response, length, policy)
    return cost


def _cut_cost(entry: PoolEntry, response: PooledResponse, length: int, policy: Policy) -> Cost:
    """Return the cost of the first tokens of a response."""
    counter = FlopCounter()
    counter.add_flops("response", policy.size, "decode", len(entry.prompt_ids) - 1, length)
    seconds = response.generation_cost.seconds * length / len(response.response_ids)
    return replace(counter.get_cost("response"), seconds=seconds)
