"""Votes over the answers of several responses to one problem."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nabla_trl.grading.equivalence import normalize_answer


def vote(answers: Sequence[str | None], log_weights: Sequence[float] | None = None) -> list[int]:
    """Return the indices of the responses whose answer has the largest sum of weights.

    Equal weights give self-consistency (Wang et al., arXiv 2203.11171). A tie goes to the answer seen first.

    Args:
        answers: answer of each response. A response without one does not vote.
        log_weights: log weight of each response, in nats. A response with −∞ does not vote. None: equal weights.

    Returns:
        Indices in rising order. Empty if no response votes.
    """
    if log_weights is None:
        log_weights = [0.0] * len(answers)
    groups: dict[str, list[int]] = {}
    for index, (answer, log_weight) in enumerate(zip(answers, log_weights, strict=True)):
        if answer is not None and log_weight > -math.inf:
            groups.setdefault(normalize_answer(answer), []).append(index)
    if not groups:
        return []
    # Relative to the largest weight, which then is 1 even where its logarithm is infinite.
    largest = max(log_weights[index] for indices in groups.values() for index in indices)

    def sum_weights(answer: str) -> float:
        values = (log_weights[index] for index in groups[answer])
        return math.fsum(1.0 if value == largest else math.exp(value - largest) for value in values)

    return groups[max(groups, key=sum_weights)]
