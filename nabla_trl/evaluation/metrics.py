"""pass@k, maj@k and avg@n of n independent samples per problem, without bias. Numpy only.

All say what k samples drawn anew would give, averaged over every choice of k of the n that are there, and not over one
choice in some order:

- pass@k = 1 − C(n−c, k) / C(n, k), c of the n being right: the chance that k samples hold a right one (Chen et al.,
  arXiv 2107.03374, equation 1). Nothing picks it out: it bounds what a perfect reward could do.
- maj@k: the chance that the commonest answer of k samples is right (self-consistency, Wang et al., arXiv 2203.11171);
  equally common answers share it, as the order of samples is chance. Samples without an answer don't vote.
- avg@n = c / n, the accuracy of one sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from nabla_trl.evaluation.grids import arrange_by_problem, check_rows
from nabla_trl.evaluation.method import get_num_samples, split_label
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.utils.statistics import Interval, mean_interval

BASE_POLICY = "base"  # how the policy without a label is called


def compute_pass_at_k(num_correct: int, n: int) -> np.ndarray:
    """[n]: pass@1 … pass@n, of n samples of which `right` are."""
    return np.array([1 - math.comb(n - num_correct, k) / math.comb(n, k) for k in range(1, n + 1)])


def compute_maj_at_k(samples: Sequence[tuple[str | None, bool]]) -> np.ndarray:
    """[n]: maj@1 … maj@n of n samples, each an answer (None: it has none) and whether it is right.

    Counts the choices of k samples in which a right answer leads with m votes, tied with t others, at the weight
    1/(t + 1); choices are counted as coefficients of a polynomial in x (samples chosen) and y (answers tied).
    """
    votes: dict[str, int] = {}
    right: dict[str, bool] = {}
    for answer, correct in samples:
        if answer is not None:
            key = normalize_answer(answer)
            votes[key] = votes.get(key, 0) + 1
            right.setdefault(key, correct)
    n, silent = len(samples), len(samples) - sum(votes.values())
    found = np.zeros(n + 1)
    for winner in (key for key, correct in right.items() if correct):
        others = [count for key, count in votes.items() if key != winner]
        for m in range(1, votes[winner] + 1):
            ways = _count_choices(others, silent, m, n)
            share = (ways / np.arange(1, len(ways) + 1)[:, None]).sum(axis=0)
            found[m:] += math.comb(votes[winner], m) * share[: n + 1 - m]
    return found[1:] / np.array([math.comb(n, k) for k in range(1, n + 1)], dtype=np.float64)


def _count_choices(counts: Sequence[int], num_unanswered: int, max_votes: int, n: int) -> np.ndarray:
    """[ties + 1, n + 1]: in how many ways x samples of these answers are chosen so that none has over `most` votes
    and as many as the row says have just that; any number of the `silent` ones."""
    ways = np.zeros((sum(count >= max_votes for count in counts) + 1, n + 1))
    ways[0, : num_unanswered + 1] = [math.comb(num_unanswered, x) for x in range(num_unanswered + 1)]
    for count in counts:
        before, ways = ways, np.zeros_like(ways)
        for chosen in range(min(count, max_votes) + 1):
            tied = int(chosen == max_votes)
            ways[tied:, chosen:] += math.comb(count, chosen) * before[: len(before) - tied, : n + 1 - chosen]
    return ways


def list_k_values(n: int) -> list[int]:
    """The k that are told of n samples: powers of two, and n."""
    return sorted({*(2**power for power in range(n.bit_length()) if 2**power <= n), n})


def estimate_sample_metrics(rows: Sequence[Mapping]) -> dict[str, Interval]:
    """pass@<k>.<policy>, maj@<k>.<policy> and avg@<n>.<policy> from the rows of samples_n; others are not read.

    A policy is the label of its methods, the base policy `base`. Where it has several samples_n, the largest counts.
    Samples with an error, or that could not be graded, are wrong. Intervals are over problems, seeds averaged.

    Raises:
        ValueError: rows that are incomplete, repeated or of several tasks, or without their samples.
    """
    own = [row for row in rows if get_num_samples(row["method"])]
    if not own:
        return {}
    check_rows(own)
    if bare := next((row for row in own if not isinstance(row.get("samples"), list)), None):
        raise ValueError(f"a row of {bare['method']} holds no samples (problem {bare['problem']!r})")
    by_policy: dict[str, list[Mapping]] = {}
    for row in own:
        by_policy.setdefault(split_label(row["method"])[0] or BASE_POLICY, []).append(row)
    found: dict[str, Interval] = {}
    for policy, all_rows in by_policy.items():
        n = max(get_num_samples(row["method"]) for row in all_rows)
        found |= _estimate_policy_metrics(policy, n, [row for row in all_rows if get_num_samples(row["method"]) == n])
    return found


def group_sample_metrics(
    summary: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, dict[int, Mapping[str, float]]]]:
    """Policy -> "pass", "maj" and "avg" -> k -> its entry, of a summary that holds what was `measured`."""
    found: dict[str, dict[str, dict[int, Mapping[str, float]]]] = {}
    for name, one in summary.items():
        match = re.fullmatch(r"(pass|maj|avg)@(\d+)\.(\w+)", name)
        if match:
            found.setdefault(match[3], {}).setdefault(match[1], {})[int(match[2])] = one
    return found


def _estimate_policy_metrics(policy: str, n: int, rows: Sequence[Mapping]) -> dict[str, Interval]:
    problems = tuple(dict.fromkeys(row["problem"] for row in rows))
    method = rows[0]["method"]
    seeds, cells = arrange_by_problem(method, {(row["problem"], row["seed"]): row for row in rows}, problems)
    curves = np.array([_compute_row_curves(row, n) for row in cells]).reshape(len(problems), len(seeds), 2, n)
    found = {}
    for place, name in enumerate(("pass", "maj")):
        for k in list_k_values(n):
            found[f"{name}@{k}.{policy}"] = mean_interval(curves[:, :, place, k - 1])
    return found | {f"avg@{n}.{policy}": mean_interval(curves[:, :, 0, 0])}


def _compute_row_curves(row: Mapping, n: int) -> tuple[np.ndarray, np.ndarray]:
    """pass@k and maj@k of one row for k = 1 … n; a row whose samples failed has none right."""
    samples = [(answer, bool(correct)) for answer, correct in row["samples"]]
    samples += [(None, False)] * (n - len(samples))
    return compute_pass_at_k(sum(correct for _, correct in samples), n), compute_maj_at_k(samples)
