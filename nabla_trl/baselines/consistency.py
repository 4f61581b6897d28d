"""Votes that read a pool of samples without a reward: they stop early, or weigh votes by the policy's confidence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from nabla_trl.baselines.sampling import PooledResponse, ResponsePool, build_vote_traces
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.voting import vote
from nabla_trl.traces.schema import Trace

STOP_PROBABILITY = 0.95  # the threshold of the paper


def select_by_adaptive_consistency(pool: ResponsePool, max_responses: int) -> list[Trace]:
    """Return the most common answer, and stop drawing once its lead is safe (Aggarwal et al., arXiv 2305.11860).

    Responses are read one by one. The two most common answers have v1 and v2 votes. Reading stops when the first one
    is the majority of the two with a probability of 0.95 under a uniform prior, or after `max_responses`. Only the
    responses that were read are charged.
    """

    def select(responses: Sequence[PooledResponse]) -> tuple[PooledResponse, int]:
        num_read = count_responses_to_read([response.answer for response in responses])
        voters = vote([response.answer for response in responses[:num_read]])
        return responses[voters[0] if voters else 0], num_read

    return build_vote_traces(pool, max_responses, f"adaptive_consistency_{max_responses}", select)


def count_responses_to_read(answers: Sequence[str | None]) -> int:
    """Return after how many answers adaptive consistency stops."""
    votes: Counter[str] = Counter()
    for number, answer in enumerate(answers, 1):
        if answer is not None:
            votes[normalize_answer(answer)] += 1
        first, second = [*(count for _, count in votes.most_common(2)), 0, 0][:2]
        if first and compute_majority_probability(first, second) > STOP_PROBABILITY:
            return number
    return len(answers)


def compute_majority_probability(first: int, second: int) -> float:
    """Return P(p > 1/2) for p ~ Beta(first + 1, second + 1), by the equal binomial tail."""
    num_trials = first + second + 1
    return math.fsum(math.comb(num_trials, count) for count in range(first + 1)) / 2**num_trials


def select_by_confidence_vote(pool: ResponsePool, num_responses: int) -> list[Trace]:
    """Return the answer with the largest sum of confidences (Taubenfeld et al., CISC, arXiv 2502.06233).

    The confidence of a response is its likelihood per token, exp(log π(y|x)/T), which drawing it has computed. The
    paper's other confidences need another call of the model.
    """

    def select(responses: Sequence[PooledResponse]) -> tuple[PooledResponse, int]:
        voters = vote([response.answer for response in responses], [response.mean_logp for response in responses])
        return responses[voters[0] if voters else 0], len(responses)

    return build_vote_traces(pool, num_responses, f"confidence_vote_{num_responses}", select)
