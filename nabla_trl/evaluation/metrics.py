"""pass@k, maj@k and avg@n of n independent samples per problem, without bias. Numpy only.

Each metric estimates what k new samples would give. It averages over every choice of k of the n samples, not over one
choice in some order:

- pass@k = 1 − C(n−c, k) / C(n, k), where c of the n samples are right, is the probability that k samples contain a
  right one (Chen et al., arXiv 2107.03374, equation 1). It bounds what a perfect reward could select.
- maj@k is the probability that the most common answer of k samples is right (self-consistency, Wang et al., arXiv
  2203.11171). Equally common answers share it, as the order of samples is chance. Samples without answer do not vote.
- avg@n = c / n is the accuracy of one sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nabla_trl.evaluation.grids import arrange_by_problem, check_rows
from nabla_trl.evaluation.method import Method
from nabla_trl.evaluation.rows import Row
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.utils.statistics import Interval, proportion_interval

BASE_POLICY = "base"  # name of the policy without a label


def compute_pass_at_k(num_correct: int, n: int) -> np.ndarray:
    """Return pass@1 … pass@n of n samples, as an array of shape [n]."""
    return np.array([1 - math.comb(n - num_correct, k) / math.comb(n, k) for k in range(1, n + 1)])


def compute_maj_at_k(samples: Sequence[tuple[str | None, bool]]) -> np.ndarray:
    """Return maj@1 … maj@n of n samples, as an array of shape [n].

    The choices of k samples are counted in which a right answer leads with m votes, tied with t others. They weigh
    1/(t + 1). The counts are coefficients of a polynomial in x (samples chosen) and y (answers tied).

    Args:
        samples: the answer of each sample (None: no answer), and whether it is right.
    """
    votes: dict[str, int] = {}
    correct_by_answer: dict[str, bool] = {}
    for answer, correct in samples:
        if answer is not None:
            key = normalize_answer(answer)
            votes[key] = votes.get(key, 0) + 1
            correct_by_answer.setdefault(key, correct)
    n, num_unanswered = len(samples), len(samples) - sum(votes.values())
    counts = np.zeros(n + 1)
    for winner in (key for key, correct in correct_by_answer.items() if correct):
        others = [count for key, count in votes.items() if key != winner]
        for m in range(1, votes[winner] + 1):
            choices = _count_choices(others, num_unanswered, m, n)
            shared = (choices / np.arange(1, len(choices) + 1)[:, None]).sum(axis=0)
            counts[m:] += math.comb(votes[winner], m) * shared[: n + 1 - m]
    return counts[1:] / np.array([math.comb(n, k) for k in range(1, n + 1)], dtype=np.float64)


def _count_choices(counts: Sequence[int], num_unanswered: int, max_votes: int, n: int) -> np.ndarray:
    """Return in how many ways x samples can be chosen so that no answer has over `max_votes` votes.

    Args:
        counts: samples of each answer.
        num_unanswered: samples without an answer, of which any number may be chosen.

    Returns:
        [ties + 1, n + 1]: row t counts the choices in which t answers have exactly `max_votes` votes.
    """
    ways = np.zeros((sum(count >= max_votes for count in counts) + 1, n + 1))
    ways[0, : num_unanswered + 1] = [math.comb(num_unanswered, x) for x in range(num_unanswered + 1)]
    for count in counts:
        before, ways = ways, np.zeros_like(ways)
        for chosen in range(min(count, max_votes) + 1):
            tied = int(chosen == max_votes)
            ways[tied:, chosen:] += math.comb(count, chosen) * before[: len(before) - tied, : n + 1 - chosen]
    return ways


def list_k_values(n: int) -> list[int]:
    """Return the k that are reported of n samples: powers of two, and n."""
    return sorted({*(2**power for power in range(n.bit_length()) if 2**power <= n), n})


def estimate_sample_metrics(rows: Sequence[Row]) -> dict[str, Interval]:
    """Return pass@<k>.<policy>, maj@<k>.<policy> and avg@<n>.<policy> from the rows of samples_n.

    A policy is the label of its methods, and `base` for the base policy. If a policy has several samples_n, the
    largest n counts. Samples with an error, or that could not be graded, are wrong. Intervals are over problems, the
    seeds averaged first.

    Raises:
        ValueError: rows that are incomplete, repeated or of several tasks, or without their samples.
    """
    sample_rows = [row for row in rows if Method.parse(row.method).num_samples]
    if not sample_rows:
        return {}
    check_rows(sample_rows)
    if empty := next((row for row in sample_rows if row.samples is None), None):
        raise ValueError(f"a row of {empty.method} holds no samples (problem {empty.problem!r})")
    methods = sorted({Method.parse(row.method) for row in sample_rows}, key=lambda method: method.num_samples)
    largest = {method.policy: method for method in methods}
    metrics: dict[str, Interval] = {}
    for policy in dict.fromkeys(Method.parse(row.method).policy for row in sample_rows):
        metrics |= _estimate_policy_metrics(largest[policy], sample_rows)
    return metrics


def _estimate_policy_metrics(method: Method, rows: Sequence[Row]) -> dict[str, Interval]:
    cells = {(row.problem, row.seed): row for row in rows if row.method == str(method)}
    problems = tuple(dict.fromkeys(problem for problem, _ in cells))
    seeds, arranged = arrange_by_problem(str(method), cells, problems)
    n, policy = method.num_samples, method.policy or BASE_POLICY
    curves = np.array([_compute_row_curves(row, n) for row in arranged]).reshape(len(problems), len(seeds), 2, n)
    metrics = {
        f"{name}@{k}.{policy}": proportion_interval(curves[:, :, index, k - 1], trials_per_cell=n / k)
        for index, name in enumerate(("pass", "maj"))
        for k in list_k_values(n)
    }
    return metrics | {f"avg@{n}.{policy}": proportion_interval(curves[:, :, 0, 0], trials_per_cell=n)}


def _compute_row_curves(row: Row, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pass@k and maj@k of one row for k = 1 … n. A row whose samples failed has no right one."""
    samples: list[tuple[Any, bool]] = [(answer, bool(correct)) for answer, correct in row.samples or ()]
    samples += [(None, False)] * (n - len(samples))
    return compute_pass_at_k(sum(correct for _, correct in samples), n), compute_maj_at_k(samples)


def group_sample_metrics(
    summary: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, dict[int, Mapping[str, float]]]]:
    """Return policy -> "pass", "maj" and "avg" -> k -> the entry of a summary."""
    groups: dict[str, dict[str, dict[int, Mapping[str, float]]]] = {}
    for name, entry in summary.items():
        match = re.fullmatch(r"(pass|maj|avg)@(\d+)\.(\w+)", name)
        if match:
            groups.setdefault(match[3], {}).setdefault(match[1], {})[int(match[2])] = entry
    return groups
