"""Bootstrap intervals and permutation tests over problems. Numpy only.

Every interval is a 95% percentile bootstrap over *problems*. A claim generalizes to problems, while more seeds only
make each problem's score less noisy. So the seeds of one problem are averaged first, and problems are resampled whole
(Efron and Tibshirani 1993, chapters 6 and 13, and Koehn 2004 for paired differences).

`scipy.stats.bootstrap` and `scipy.stats.permutation_test`, the references in the tests, draw new resamples in every
call. These functions draw once for each number of problems, which makes them some fifty times faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from nabla_trl.utils.formatting import format_names

NUM_RESAMPLES = 10_000
CONFIDENCE_LEVEL = 0.95
SIGNIFICANCE_LEVEL = 0.05  # p-values below it are significant
BOOTSTRAP_SEED = 20_260_101
_ROUNDING = 1e-12  # relative error of a float64 sum of problems' scores, with a margin
_NORMAL_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval. `num_seeds` and `num_problems` are 0 where they do not apply."""

    value: float
    low: float
    high: float
    num_seeds: int = 0
    num_problems: int = 0

    @classmethod
    def exact(cls, value: float, num_seeds: int = 0, num_problems: int = 0) -> Interval:
        """Return the interval of a number without sampling error, such as a count."""
        return cls(float(value), float(value), float(value), num_seeds, num_problems)

    def to_dict(self) -> dict[str, float]:
        """Return the five keys of an entry of summary.json."""
        counts = {"seeds": self.num_seeds, "problems": self.num_problems}
        return {"value": self.value, "low": self.low, "high": self.high, **counts}


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A paired difference of means, with the two-sided p-value of a sign-flip permutation test."""

    p_value: float = math.nan


def to_json_values(value: Any) -> Any:
    """Return a dataclass as nested dicts, like `asdict`, with the keys of summary.json for every interval in it."""
    if isinstance(value, Interval):
        return value.to_dict()
    if is_dataclass(value):
        return {field.name: to_json_values(getattr(value, field.name)) for field in fields(value)}
    return {key: to_json_values(item) for key, item in value.items()} if isinstance(value, dict) else value


def classify_difference(low: float, high: float, p_value: float) -> str:
    """Return on which side of zero a difference is: "ahead", "behind", or an empty text if it is not significant."""
    # Both must agree, because a percentile interval over a handful of problems is too narrow.
    if p_value >= SIGNIFICANCE_LEVEL:
        return ""
    return "ahead" if low > 0 else "behind" if high < 0 else ""


def mean_interval(matrix: np.ndarray) -> Interval:
    """Return the mean over problems of the mean over seeds, with its bootstrap interval.

    Args:
        matrix: [problems, seeds]. NaN cells are left out, and so are problems with NaN only.

    Raises:
        ValueError: if no number is left.
    """
    matrix = np.atleast_2d(np.asarray(matrix, dtype=np.float64))
    matrix = matrix[np.isfinite(matrix).any(axis=1)]
    if not matrix.size:
        raise ValueError("no number to average: every cell is missing")
    means = np.nanmean(np.where(np.isfinite(matrix), matrix, np.nan), axis=1)
    low, high = _compute_percentile_interval(means.mean(), resample_means(means[:, None])[:, 0])
    return Interval(float(means.mean()), low, high, num_seeds=matrix.shape[1], num_problems=len(means))


def wilson_interval(proportion: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion of `count` independent trials (Wilson 1927).

    A progress display calls this function at every refresh. It takes 1 µs, and `scipy.stats.binomtest` 400 µs.
    `binomtest` also needs a whole number of successes, which a mean over seeds is not.
    """
    half = _NORMAL_QUANTILE**2 / (2 * count)
    variance = max(0.0, proportion * (1 - proportion))  # rounding may make the proportion larger than 1
    reach = math.sqrt(2 * half * variance + half * half)
    low, complement = (max(0.0, (share + half - reach) / (1 + 2 * half)) for share in (proportion, 1 - proportion))
    return low, 1 - complement


def paired_difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> PairedDifference:
    """Return the mean of a − b over the same problems, after averaging the seeds of each problem.

    Args:
        a, b: the values of each problem by seed. The two may have different numbers of seeds. The result's
            `num_seeds` is the smaller one.

    Raises:
        ValueError: if there are no problems, or if only one side has a problem, which the message names.
    """
    means_a, means_b = _compute_common_means(a, b)
    gaps = means_a - means_b
    low, high = _compute_percentile_interval(gaps.mean(), resample_means(gaps[:, None])[:, 0])
    num_seeds = min(len(next(iter(side.values()))) for side in (a, b))
    return PairedDifference(float(gaps.mean()), low, high, num_seeds, len(gaps), p_value=sign_flip_p_value(gaps))


def clustered_mean(values: np.ndarray, problems: np.ndarray, num_problems: int) -> Interval | None:
    """Return the mean over items, with its bootstrap interval over the items' problems. Without items return None.

    Args:
        values: [items] such as 1 for a hit and 0 for a miss.
        problems: [items] index of each item's problem, below `num_problems`. A problem may have any number of items.
    """
    if not len(values):
        return None
    sums = _sum_by_problem([np.ones(len(values)), np.asarray(values, dtype=np.float64)], problems, num_problems)
    return _bootstrap_statistic(lambda means: means[:, 1] / means[:, 0], sums)


def clustered_correlation(x: np.ndarray, y: np.ndarray, problems: np.ndarray, num_problems: int) -> Interval | None:
    """Return Pearson's correlation over items, with its bootstrap interval over the items' problems.

    Return None if x or y does not vary. See `clustered_mean` for the arguments.
    """
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    # Standardized values, because sums of squares of large values would lose their digits.
    a, b = ((values - values.mean()) / values.std() for values in (x, y))
    sums = _sum_by_problem([np.ones(len(a)), a, b, a * a, b * b, a * b], problems, num_problems)

    def compute_correlation(means: np.ndarray) -> np.ndarray:
        number, mean_a, mean_b, square_a, square_b, product = means.T
        variances = (square_a - mean_a**2 / number) * (square_b - mean_b**2 / number)
        # Clipped as in `numpy.corrcoef`, because of rounding where a resample hardly varies.
        return np.clip((product - mean_a * mean_b / number) / np.sqrt(variances), -1, 1)

    return _bootstrap_statistic(compute_correlation, sums)


def performance_gap_recovered(
    trained: Mapping[str, Sequence[float]],
    ceiling: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]],
) -> Interval | None:
    """Return the performance gap recovered, (trained − base) / (ceiling − base), with its bootstrap interval.

    Return None if the interval of ceiling − base includes zero or less. Resamples with a gap near zero would then make
    the ratio meaningless. The arguments are those of `paired_difference`.
    """
    gap = paired_difference(ceiling, base)
    if gap.low <= 0:
        return None
    trained_means, base_means = _compute_common_means(trained, base)
    ceiling_means, _ = _compute_common_means(ceiling, base)
    gains = np.stack([trained_means - base_means, ceiling_means - base_means], axis=1)
    numerators, denominators = resample_means(gains).T
    # A few resamples may still have a gap of zero or less. Their ratios belong to the far ends.
    positive = denominators > 0
    ratios = np.where(positive, numerators / np.where(positive, denominators, 1.0), np.copysign(np.inf, numerators))
    value = gains[:, 0].mean() / gains[:, 1].mean()
    low, high = _compute_percentile_interval(value, ratios)
    return Interval(float(value), low, high, gap.num_seeds, gap.num_problems)


def sign_flip_p_value(gaps: np.ndarray) -> float:
    """Return the two-sided p-value of "the mean gap is zero" by a permutation test with random signs.

    The p-value is the share of draws whose mean gap is at least as far from zero as the observed one. The observed
    signs count as a draw, so it is at least 1 / (NUM_RESAMPLES + 1) (Phipson and Smyth 2010).

    Args:
        gaps: [problems] differences of two methods.
    """
    # Gaps are multiples of 1 / seeds, so many draws equal the observed sum up to rounding.
    threshold = abs(gaps.sum()) - _ROUNDING * np.abs(gaps).sum()
    sums = np.einsum("rp,p->r", _draw_random_signs(len(gaps)), gaps)
    return (int((np.abs(sums) >= threshold).sum()) + 1) / (NUM_RESAMPLES + 1)


def resample_means(columns: np.ndarray) -> np.ndarray:
    """Return the means of resamples of problems, drawn with replacement and alike for all columns.

    Args:
        columns: [problems, k]

    Returns:
        [NUM_RESAMPLES, k]
    """
    counts = _draw_resample_counts(len(columns))
    # Not `@`: its threads cost fifty times the product itself while other processes use the cores.
    means = np.stack([np.einsum("rp,p->r", counts, column) for column in columns.T], axis=1) / len(columns)
    # Gaps of +1/3 and −1/3 do not quite cancel, and an interval that ends at 0 must not seem to exclude it.
    return np.where(np.abs(means) < _ROUNDING * np.abs(columns).max(axis=0), 0.0, means)


@lru_cache(maxsize=2)
def _draw_resample_counts(num_problems: int) -> np.ndarray:
    """Return [NUM_RESAMPLES, num_problems] how often each resample draws each problem. It takes 80 kB a problem."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    counts = np.empty((NUM_RESAMPLES, num_problems))
    for row in counts:
        row[:] = np.bincount(rng.integers(0, num_problems, num_problems), minlength=num_problems)
    return counts


@lru_cache(maxsize=2)
def _draw_random_signs(num_problems: int) -> np.ndarray:
    """Return [NUM_RESAMPLES, num_problems] random signs, −1 or 1. It takes 80 kB a problem."""
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, 2, (NUM_RESAMPLES, num_problems), dtype=np.int8)
    return draws.astype(np.float64) * 2 - 1


def _sum_by_problem(columns: Sequence[np.ndarray], problems: np.ndarray, num_problems: int) -> np.ndarray:
    """Return [num_problems, k] the sums of k columns [items] over the items of each problem."""
    return np.stack([np.bincount(problems, column, minlength=num_problems) for column in columns], axis=1)


def _bootstrap_statistic(compute_statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray) -> Interval:
    """Return a statistic [n] of means [n, k] with its interval. The first of the sums [problems, k] counts items."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may have no item, or items that do not vary
        value = float(compute_statistic(sums.mean(axis=0)[None])[0])
        draws = compute_statistic(resample_means(sums))
    draws = draws[np.isfinite(draws)]
    low, high = _compute_percentile_interval(value, draws) if len(draws) else (value, value)
    return Interval(value, low, high, num_problems=int((sums[:, 0] > 0).sum()))


def _compute_percentile_interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    # "nearest" never interpolates towards an infinite ratio.
    low, high = np.quantile(draws, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2], method="nearest")
    return min(float(low), float(value)), max(float(high), float(value))  # rounding may put the value outside


def _compute_common_means(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return [problems] the means over seeds of both sides, in the order of `a`."""
    unpaired = sorted(a.keys() ^ b.keys())
    if unpaired:
        raise ValueError(
            f"paired difference: {len(unpaired)} problems are on one side only ({format_names(unpaired)})"
        )
    if not a:
        raise ValueError("paired difference: no problems")
    means_a, means_b = (np.array([side[name] for name in a], dtype=np.float64).mean(axis=1) for side in (a, b))
    return means_a, means_b
