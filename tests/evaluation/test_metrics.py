"""pass@k, maj@k and avg@n against every choice of k samples, written out."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import worlds

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.metrics import compute_maj_at_k, compute_pass_at_k
from nabla_trl.evaluation.rows import Row
from nabla_trl.report.summary import summarize

Sample = tuple[str | None, bool]


def every_choice(samples: list[Sample], k: int) -> tuple[float, float]:
    """Mean over all choices of k samples of: one is right; the commonest answer is right, ties shared."""
    held, voted = [], []
    for chosen in itertools.combinations(samples, k):
        held.append(any(right for _, right in chosen))
        votes = Counter(answer for answer, _ in chosen if answer is not None)
        top = max(votes.values(), default=0)
        leaders = [answer for answer, count in votes.items() if count == top]
        verdicts = dict(samples)
        voted.append(np.mean([verdicts[answer] for answer in leaders]) if leaders else 0.0)
    return float(np.mean(held)), float(np.mean(voted))


def some_samples(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    answers = [None, "1", "2", "3", "4"]
    right = {"1": True, "2": bool(rng.integers(2)), "3": False, "4": False, None: False}
    return [(answer, right[answer]) for answer in rng.choice(answers, size=rng.integers(1, 9))]


@pytest.mark.parametrize("seed", range(30))
def test_estimates_are_means_over_every_choice(seed: int) -> None:
    samples = some_samples(seed)
    n = len(samples)
    held, voted = compute_pass_at_k(sum(right for _, right in samples), n), compute_maj_at_k(samples)
    wanted = np.array([every_choice(samples, k) for k in range(1, n + 1)])
    np.testing.assert_allclose(held, wanted[:, 0], atol=1e-12)
    np.testing.assert_allclose(voted, wanted[:, 1], atol=1e-12)


def test_estimates_do_not_depend_on_the_order_and_stay_finite() -> None:
    samples = [("7", True)] * 300 + [("8", False)] * 310 + [(str(wrong), False) for wrong in range(100, 489)]
    held, voted = compute_pass_at_k(300, len(samples)), compute_maj_at_k(samples)
    np.testing.assert_allclose(voted, compute_maj_at_k(samples[::-1]))
    assert np.isfinite(held).all() and np.isfinite(voted).all()
    assert held[0] == pytest.approx(300 / 999) == pytest.approx(voted[0])
    assert voted[-1] == 0 and held[-1] == 1  # all of them together: 8 leads
    assert (np.diff(held) >= 0).all()


def test_writings_of_one_answer_vote_together() -> None:
    assert compute_maj_at_k([("$7$", True), ("7.", True), ("8", False)])[-1] == 1


def row(method: str, problem: str, seed: int, samples: list[Sample], error: str | None = None) -> Row:
    right = [correct for _, correct in samples]
    values = {"problem": problem, "seed": seed, "error": error, "samples": [list(sample) for sample in samples]}
    correct = sum(right) / len(right) if right else None
    return worlds.result_row(method, 0, correct=correct, reward=0.0, flops=1.0, seconds=1.0, **values)


def test_rows_of_samples_are_measured_by_policy_with_problems_as_the_unit() -> None:
    right, wrong = ("1", True), ("2", False)
    rows = [
        row("samples_4", "a", 0, [right, wrong, wrong, wrong]),
        row("samples_4", "a", 1, [right, right, right, wrong]),
        row("samples_4", "b", 0, [], error="too long"),
        row("samples_4", "b", 1, [wrong] * 4),
        row("sft_samples_2", "a", 0, [right, right]),
        row("sft_samples_2", "b", 0, [right, wrong]),
        row("samples_2", "a", 0, [wrong, wrong]),  # the larger number of samples counts
    ]
    found = metrics.estimate_sample_metrics(rows)
    assert set(found) == {
        *(f"{name}@{k}.base" for name in ("pass", "maj") for k in (1, 2, 4)),
        *(f"{name}@{k}.sft" for name in ("pass", "maj") for k in (1, 2)),
        "avg@4.base",
        "avg@2.sft",
    }
    assert found["avg@4.base"].value == pytest.approx((1 / 4 + 3 / 4) / 2 / 2)
    assert (found["avg@4.base"].num_problems, found["avg@4.base"].num_seeds) == (2, 2)
    assert found["pass@2.base"].value == pytest.approx((1 / 2 + 1) / 2 / 2)
    assert found["maj@4.base"].value == pytest.approx(1 / 2 / 2)
    assert found["pass@2.sft"].value == 1 and found["maj@2.sft"].value == pytest.approx(3 / 4)
    assert summarize(rows, {})["avg@2.sft"]["value"] == pytest.approx(3 / 4)


def test_an_unfinished_evaluation_is_refused() -> None:
    rows = [row("samples_2", "a", seed, [("1", True)] * 2) for seed in (0, 1)]
    with pytest.raises(ValueError, match="no row for method 'samples_2', problem 'b', seed 1"):
        metrics.estimate_sample_metrics([*rows, row("samples_2", "b", 0, [("1", True)] * 2)])
    with pytest.raises(ValueError, match="two rows"):
        metrics.estimate_sample_metrics([*rows, rows[0]])
    with pytest.raises(ValueError, match="a row of samples_2 holds no samples"):
        metrics.estimate_sample_metrics([rows[0], replace(rows[1], samples=None)])
