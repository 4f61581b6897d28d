"""Intervals and permutation tests over problems. Numpy only.

Every interval is a 95% interval over *problems*. A claim generalizes to problems, while more seeds only make each
problem's score less noisy. So the seeds of one problem are averaged first. There is one kind of interval for each kind
of number, and progress lines, tables, reports and conclusions all use it:

- A mean of values from 0 to 1, such as an accuracy, has Wilson's score interval (Wilson 1927) for an effective number
  of independent answers. That number follows from how much the problems' scores vary (as in Korn and Graubard 1998).
  With one seed it is the number of problems.
- A paired difference of two such means has Newcombe's interval (Newcombe 1998, "MOVER"), which combines the Wilson
  intervals of the gains and of the losses.
- A mean of other values, such as FLOPs or rewards, has Student's t interval over problems.
- A correlation has a percentile bootstrap interval over problems (Efron and Tibshirani 1993, chapter 13).

The first two do not collapse where all problems agree: 0 of 4 right is 0.000 [0.000, 0.490].

`scipy.stats.permutation_test` and `scipy.stats.bootstrap`, the references in the tests, draw new resamples in every
call. These functions draw once for each number of problems, which makes them some fifty times faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

from nabla_trl.utils.formatting import finite_or_none, format_names

NUM_RESAMPLES = 10_000
CONFIDENCE_LEVEL = 0.95
SIGNIFICANCE_LEVEL = 0.05  # p-values below it are significant
RELEVANT_DIFFERENCE = 0.05  # of proportions: where an interval excludes it, no difference that matters is left
BOOTSTRAP_SEED = 20_260_101
INTERVAL_NOTE = (
    "Brackets hold 95% intervals over problems, after averaging the seeds of each problem: Wilson's for accuracies, "
    "Newcombe's for their differences, Student's t for other means."
)
_ROUNDING = 1e-12  # relative error of a float64 sum of problems' scores, with a margin
_NORMAL_QUANTILE = NormalDist().inv_cdf((1 + CONFIDENCE_LEVEL) / 2)
_SMALL_T_QUANTILES = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}  # by degrees of freedom


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval. `num_seeds` and `num_problems` are 0 where they do not apply.

    An end is infinite where nothing is known of it, as for the mean reward of a single problem.
    """

    value: float
    low: float
    high: float
    num_seeds: int = 0
    num_problems: int = 0

    @classmethod
    def exact(cls, value: float, num_seeds: int = 0, num_problems: int = 0) -> Interval:
        """Return the interval of a number without sampling error, such as a count."""
        return cls(float(value), float(value), float(value), num_seeds, num_problems)

    def to_dict(self) -> dict[str, Any]:
        """Return the five keys of an entry of summary.json. An infinite end is None."""
        counts = {"seeds": self.num_seeds, "problems": self.num_problems}
        return {"value": self.value, "low": finite_or_none(self.low), "high": finite_or_none(self.high), **counts}


@dataclass(frozen=True)
class PairedDifference(Interval):
    """A paired difference of means, with the two-sided p-value of a sign-flip permutation test."""

    p_value: float = math.nan

    @property
    def side(self) -> str:
        """Return on which side of zero the difference is, as `classify_difference` does."""
        return classify_difference(self.low, self.high, self.p_value)


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


def describe_difference(low: float, high: float, p_value: float) -> str:
    """Return in words what a difference of proportions shows: "ahead", "behind", or why neither can be said."""
    if side := classify_difference(low, high, p_value):
        return side
    if low > -RELEVANT_DIFFERENCE and high < RELEVANT_DIFFERENCE:
        return f"no difference of {RELEVANT_DIFFERENCE:g} or more"
    return "too few problems to tell"


def proportion_interval(matrix: np.ndarray, *, trials_per_cell: float = 1.0) -> Interval:
    """Return the mean over problems of the mean over seeds, with its Wilson interval.

    Args:
        matrix: [problems, seeds] values from 0 to 1. NaN cells are left out, and so are problems with NaN only.
        trials_per_cell: independent answers that one cell averages, such as N for the share of N samples.

    Raises:
        ValueError: if no number is left, or a value is not between 0 and 1.
    """
    means, num_cells, num_seeds = _average_seeds(matrix)
    _check_range(means, 0.0)
    weights = np.full(len(means), 1 / len(means))
    low, high = _compute_wilson_ends(means, weights, num_cells * trials_per_cell)
    return Interval(float(means.mean()), low, high, num_seeds, len(means))


def mean_interval(matrix: np.ndarray) -> Interval:
    """Return the mean over problems of the mean over seeds, with Student's t interval over problems.

    Args:
        matrix: [problems, seeds] of any values. NaN cells are left out, and so are problems with NaN only.

    Raises:
        ValueError: if no number is left.
    """
    means, _, num_seeds = _average_seeds(matrix)
    low, high = _compute_t_ends(means)
    return Interval(float(means.mean()), low, high, num_seeds, len(means))


def wilson_interval(proportion: float, count: float) -> tuple[float, float]:
    """Return the 95% interval of a proportion of `count` independent trials (Wilson 1927).

    `scipy.stats.binomtest` needs a whole number of successes and of trials. Here neither is whole.
    """
    half = _NORMAL_QUANTILE**2 / (2 * count)
    variance = max(0.0, proportion * (1 - proportion))  # rounding may make the proportion larger than 1
    reach = math.sqrt(2 * half * variance + half * half)
    low, complement = (max(0.0, (share + half - reach) / (1 + 2 * half)) for share in (proportion, 1 - proportion))
    return low, 1 - complement


def paired_difference(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]], *, trials_per_cell: float = 1.0
) -> PairedDifference:
    """Return the mean of a − b over the same problems, with Newcombe's interval, after averaging seeds.

    Args:
        a, b: the values of each problem by seed, from 0 to 1. The two may have different numbers of seeds. The
            result's `num_seeds` is the smaller one.
        trials_per_cell: as for `proportion_interval`.

    Raises:
        ValueError: if there are no problems, if only one side has a problem, which the message names, or if a value is
            not between 0 and 1.
    """
    means_a, means_b = _compute_common_means(a, b)
    num_seeds = min(len(next(iter(side.values()))) for side in (a, b))
    return difference_interval(means_a - means_b, trials_per_problem=num_seeds * trials_per_cell, num_seeds=num_seeds)


def difference_interval(gaps: np.ndarray, *, trials_per_problem: float = 1.0, num_seeds: int = 1) -> PairedDifference:
    """Return the mean of problems' differences, with Newcombe's interval.

    Args:
        gaps: [problems] differences of two proportions of the same problem, from −1 to 1.
        trials_per_problem: independent answers that one difference averages.

    Raises:
        ValueError: if a value is not between −1 and 1.
    """
    _check_range(gaps, -1.0)
    weights = np.full(len(gaps), 1 / len(gaps))
    low, high = _compute_newcombe_ends(gaps, weights, len(gaps) * trials_per_problem)
    return PairedDifference(float(gaps.mean()), low, high, num_seeds, len(gaps), p_value=sign_flip_p_value(gaps))


def paired_mean_difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> PairedDifference:
    """Return the mean of a − b of any values over the same problems, with Student's t interval, after averaging seeds.

    The arguments are those of `paired_difference`.

    Raises:
        ValueError: if there are no problems, or if only one side has a problem, which the message names.
    """
    means_a, means_b = _compute_common_means(a, b)
    gaps = means_a - means_b
    low, high = _compute_t_ends(gaps)
    num_seeds = min(len(next(iter(side.values()))) for side in (a, b))
    return PairedDifference(float(gaps.mean()), low, high, num_seeds, len(gaps), p_value=sign_flip_p_value(gaps))


def clustered_proportion(values: np.ndarray, problems: np.ndarray, num_problems: int) -> Interval | None:
    """Return the mean over items of values from 0 to 1, with its Wilson interval. Without items return None.

    Args:
        values: [items] such as 1 for a hit and 0 for a miss.
        problems: [items] index of each item's problem, below `num_problems`. A problem may have any number of items.

    Raises:
        ValueError: if a value is not between 0 and 1.
    """
    _check_range(values, 0.0)
    return _compute_clustered_interval(values, problems, num_problems, _compute_wilson_ends)


def clustered_difference(values: np.ndarray, problems: np.ndarray, num_problems: int) -> Interval | None:
    """Return the mean over items of differences from −1 to 1, with Newcombe's interval. Without items return None.

    The arguments and errors are those of `clustered_proportion`.
    """
    _check_range(values, -1.0)
    return _compute_clustered_interval(values, problems, num_problems, _compute_newcombe_ends)


def weighted_proportion_interval(means: np.ndarray, sizes: np.ndarray, num_trials: float) -> Interval:
    """Return the mean of problems' values from 0 to 1, weighted by their sizes, with its Wilson interval.

    Args:
        means: [problems]
        sizes: [problems] positive weights, such as numbers of compared pairs.
        num_trials: the most independent observations that the values can rest on.
    """
    low, high = _compute_wilson_ends(means, sizes / sizes.sum(), num_trials)
    return Interval(float(means @ sizes / sizes.sum()), low, high, num_problems=len(means))


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
    trained: Mapping[str, Sequence[float]], ceiling: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]
) -> Interval | None:
    """Return the performance gap recovered, (trained − base) / (ceiling − base), with its interval.

    The interval holds the ratios R for which Newcombe's intervals cannot tell trained − base from R·(ceiling − base)
    (Donner and Zou 2012). Return None if the interval of ceiling − base includes zero or less. The arguments are those
    of `paired_difference`.
    """
    gain, gap = paired_difference(trained, base), paired_difference(ceiling, base)
    if gap.low <= 0:
        return None
    trained_means, base_means = _compute_common_means(trained, base)
    ceiling_means, _ = _compute_common_means(ceiling, base)
    correlation = _correlate(trained_means - base_means, ceiling_means - base_means)
    low = _solve_ratio_end(gain, gap, correlation, is_low=True)
    high = _solve_ratio_end(gain, gap, correlation, is_low=False)
    return Interval(gain.value / gap.value, low, high, gap.num_seeds, gap.num_problems)


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


def adjust_p_values(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Return p-values adjusted for the number of comparisons (Holm 1979), under the same keys.

    The smallest of m p-values is multiplied by m, the next one by m − 1, and so on, and none falls below the one
    before it. If every difference is zero, at most one family of comparisons in twenty then has any adjusted p-value
    below 0.05, however the comparisons depend on each other. A p-value that is not a number stays as it is and does
    not count.
    """
    ordered = sorted((key for key, value in p_values.items() if not math.isnan(value)), key=p_values.__getitem__)
    adjusted, largest = dict(p_values), 0.0
    for rank, key in enumerate(ordered):
        largest = max(largest, min(1.0, p_values[key] * (len(ordered) - rank)))
        adjusted[key] = largest
    return adjusted


def adjust_differences(differences: Mapping[Any, PairedDifference]) -> dict[Any, PairedDifference]:
    """Return differences whose p-values, and so their `side`, are adjusted for their number (`adjust_p_values`)."""
    adjusted = adjust_p_values({key: difference.p_value for key, difference in differences.items()})
    return {key: replace(difference, p_value=adjusted[key]) for key, difference in differences.items()}


def ratio_of_means(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> Interval | None:
    """Return the ratio R of the means of a and b over the same problems, with its interval, after averaging seeds.

    The interval is Student's t of the mean of a − R·b, divided by the mean of b (the linearized ratio, Cochran 1977,
    chapter 6). Return None where the mean of b is not positive. The arguments and errors are those of
    `paired_difference`.
    """
    means_a, means_b = _compute_common_means(a, b)
    if not means_b.mean() > 0:
        return None
    ratio = float(means_a.mean() / means_b.mean())
    low, high = (end / float(means_b.mean()) for end in _compute_t_ends(means_a - ratio * means_b))
    num_seeds = min(len(next(iter(side.values()))) for side in (a, b))
    return Interval(ratio, ratio + low, ratio + high, num_seeds, len(means_a))


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


def _average_seeds(matrix: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Return [problems] the means over seeds, the number of cells that hold a number, and the number of seeds."""
    matrix = np.atleast_2d(np.asarray(matrix, dtype=np.float64))
    matrix = matrix[np.isfinite(matrix).any(axis=1)]
    if not matrix.size:
        raise ValueError("no number to average: every cell is missing")
    is_known = np.isfinite(matrix)
    return np.nanmean(np.where(is_known, matrix, np.nan), axis=1), int(is_known.sum()), matrix.shape[1]


def _check_range(values: np.ndarray, lowest: float) -> None:
    if len(values) and not (np.min(values) >= lowest - _ROUNDING and np.max(values) <= 1 + _ROUNDING):
        raise ValueError(f"an interval of proportions needs values from {lowest:g} to 1")


def _compute_t_ends(means: np.ndarray) -> tuple[float, float]:
    """Return the ends of Student's t interval of a mean of problems. A single problem says nothing of them."""
    if len(means) < 2:
        return -math.inf, math.inf
    center, half = float(means.mean()), get_t_quantile(len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5
    if half <= 4 * float(np.finfo(np.float64).eps) * np.abs(means).max():
        return center, center  # equal values, whose sum is rounded
    return center - half, center + half


def get_t_quantile(degrees: int) -> float:
    """Return the quantile of Student's t distribution that a two-sided 95% interval needs, to three digits."""
    if degrees in _SMALL_T_QUANTILES:
        return _SMALL_T_QUANTILES[degrees]
    z = _NORMAL_QUANTILE
    terms = (  # the expansion of Fisher and Cornish in 1 / degrees
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees**power for power, term in enumerate(terms, start=1))


def _compute_wilson_ends(means: np.ndarray, weights: np.ndarray, num_trials: float) -> tuple[float, float]:
    """Return the ends of the Wilson interval of a weighted mean of problems' values from 0 to 1.

    The interval is that of n independent trials, where p·(1 − p) / n is the variance of the mean, as the problems
    show it. Answers to the same problem depend on each other, so n lies between the number of problems and that of
    all answers. Few problems show their variance badly. So n gains over the number of problems only by what remains
    with Student's t in place of the normal quantile.

    Args:
        means: [problems]
        weights: [problems], with the sum 1.
        num_trials: number of all answers.
    """
    value = min(1.0, max(0.0, float(weights @ means)))
    num_equal_problems = 1 / float(weights @ weights)
    spread = value * (1 - value)
    if len(means) < 2 or spread < _ROUNDING:
        return wilson_interval(value, num_equal_problems)
    variance = float(weights**2 @ (means - value) ** 2)
    observed = spread / variance if variance > _ROUNDING * spread else math.inf
    adjusted = observed * (_NORMAL_QUANTILE / get_t_quantile(len(means) - 1)) ** 2
    size = min(max(num_trials, num_equal_problems), max(adjusted, min(observed, num_equal_problems)))
    return wilson_interval(value, size)


def _compute_newcombe_ends(gaps: np.ndarray, weights: np.ndarray, num_trials: float) -> tuple[float, float]:
    """Return the ends of Newcombe's interval of a weighted mean of problems' differences from −1 to 1.

    The difference is the mean gain minus the mean loss. Each has its Wilson interval, and Newcombe's method combines
    the distances to their ends. Arguments are those of `_compute_wilson_ends`.
    """
    gains, losses = np.maximum(gaps, 0.0), np.maximum(-gaps, 0.0)
    gain, loss = float(weights @ gains), float(weights @ losses)
    gain_low, gain_high = _compute_wilson_ends(gains, weights, num_trials)
    loss_low, loss_high = _compute_wilson_ends(losses, weights, num_trials)
    correlation = _correlate(gains, losses)
    below = _combine_distances(gain - gain_low, loss_high - loss, correlation)
    above = _combine_distances(gain_high - gain, loss - loss_low, correlation)
    return max(-1.0, gain - loss - below), min(1.0, gain - loss + above)


def _combine_distances(first: float, second: float, correlation: float) -> float:
    """Return the distance to the end of an interval of a difference, from those of its two parts."""
    return math.sqrt(max(0.0, first * first + second * second - 2 * correlation * first * second))


def _correlate(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation, 0 where one side does not vary."""
    if len(x) < 2 or np.ptp(x) < _ROUNDING or np.ptp(y) < _ROUNDING:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _solve_ratio_end(gain: Interval, gap: Interval, correlation: float, *, is_low: bool) -> float:
    """Return an end of the interval of gain / gap, where gap is certainly positive, by bisection.

    The low end is the ratio R at which the interval of gain − R·gap begins at zero.
    """
    reach = gain.value - gain.low if is_low else gain.high - gain.value

    def compute_excess(ratio: float) -> float:
        is_far_end = is_low == (ratio > 0)
        gap_reach = abs(ratio) * (gap.high - gap.value if is_far_end else gap.value - gap.low)
        distance = _combine_distances(reach, gap_reach, correlation if ratio > 0 else -correlation)
        return gain.value - ratio * gap.value + (-distance if is_low else distance)

    center = gain.value / gap.value
    low, high = (center - 1000, center) if is_low else (center, center + 1000)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if compute_excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def _compute_clustered_interval(
    values: np.ndarray,
    problems: np.ndarray,
    num_problems: int,
    compute_ends: Callable[[np.ndarray, np.ndarray, float], tuple[float, float]],
) -> Interval | None:
    """Return the mean over items with its interval over the items' problems. Without items return None."""
    if not len(values):
        return None
    columns = [np.ones(len(values)), np.asarray(values, dtype=np.float64)]
    counts, sums = _sum_by_problem(columns, problems, num_problems).T
    has_items = counts > 0
    counts, sums = counts[has_items], sums[has_items]
    low, high = compute_ends(sums / counts, counts / counts.sum(), len(values))
    return Interval(float(sums.sum() / counts.sum()), low, high, num_problems=len(counts))


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
