"""Result rows to problem × seed grids, and grids to intervals. Numpy only.

Every interval is a 95% percentile bootstrap over *problems*: problems are what a claim generalises to, seeds
only make each problem's score less noisy. So the seeds of one problem are averaged first and problems are
resampled whole (Efron and Tibshirani 1993, chapters 6 and 13; Koehn 2004 for the paired form).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any

import numpy as np

NUM_RESAMPLES = 10_000
CONFIDENCE_LEVEL = 0.95
SIGNIFICANCE_LEVEL = 0.05  # largest p-value of a difference that is called one
BOOTSTRAP_SEED = 20_260_101


@dataclass(frozen=True)
class Interval:
    """A value with its 95% interval; `seeds` and `problems` are 0 where they do not apply."""

    value: float
    low: float
    high: float
    num_seeds: int = 0
    num_problems: int = 0

    @classmethod
    def exact(cls, value: float, num_seeds: int = 0, num_problems: int = 0) -> Interval:
        """A figure without sampling error (a count, a clock)."""
        return cls(float(value), float(value), float(value), num_seeds, num_problems)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float]:
        """The five keys of a summary.json entry."""
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
    """Which side of zero a difference is on: ahead, behind, or empty where that is not sure."""
    # Both must agree: on a handful of problems a percentile interval alone is too sure of itself.
    if p_value >= SIGNIFICANCE_LEVEL:
        return ""
    return "ahead" if low > 0 else "behind" if high < 0 else ""


def mean_interval(matrix: np.ndarray) -> Interval:
    """Mean over problems of the mean over seeds, with its bootstrap interval.

    `matrix` is problems × seeds (one seed is fine). NaN cells are left out, and problems that hold only NaN.
    Raises ValueError if no number is left.
    """
    matrix = np.atleast_2d(np.asarray(matrix, dtype=np.float64))
    matrix = matrix[np.isfinite(matrix).any(axis=1)]
    if not matrix.size:
        raise ValueError("no number to average: every cell is missing")
    means = np.nanmean(np.where(np.isfinite(matrix), matrix, np.nan), axis=1)
    low, high = _compute_percentile_interval(means.mean(), resample_means(means[:, None])[:, 0])
    return Interval(float(means.mean()), low, high, num_seeds=matrix.shape[1], num_problems=len(means))


def wilson_interval(proportion: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share among `count` independent trials, cheap enough for every refresh (Wilson 1927)."""
    z = 1.959964
    centre, scale = proportion + z * z / (2 * count), 1 + z * z / count
    reach = z * math.sqrt(
        max(0.0, proportion * (1 - proportion)) / count + (z / (2 * count)) ** 2
    )  # rounding may pass 1
    return max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale)


def paired_difference(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> PairedDifference:
    """Mean of a − b over the same problems, seeds averaged within each; `seeds` is the smaller of the counts.

    `a` and `b` map a problem to its values by seed. Raises ValueError naming problems that only one side has.
    """
    mean_a, mean_b = _compute_common_means(a, b)
    gaps = mean_a - mean_b
    low, high = _compute_percentile_interval(gaps.mean(), resample_means(gaps[:, None])[:, 0])
    seeds = min(len(next(iter(a.values()))), len(next(iter(b.values()))))
    return PairedDifference(float(gaps.mean()), low, high, seeds, len(gaps), p_value=sign_flip_p_value(gaps))


def clustered_mean(values: np.ndarray, problems: np.ndarray, num_problems: int) -> Interval | None:
    """Mean over items, with its interval over the problems that the items belong to; None without items.

    Args:
        values: [n], such as 1 for a hit and 0 for a miss.
        problems: [n] index of each item's problem, below `count`; a problem may have any number of items.
    """
    if not len(values):
        return None
    sums = _sum_by_problem([np.ones(len(values)), np.asarray(values, dtype=np.float64)], problems, num_problems)

    def mean(means: np.ndarray) -> np.ndarray:
        return np.clip(means[:, 1] / means[:, 0], np.min(values), np.max(values))  # rounding may end a hair outside

    return _bootstrap_statistic(mean, sums)


def clustered_correlation(x: np.ndarray, y: np.ndarray, problems: np.ndarray, num_problems: int) -> Interval | None:
    """Pearson's correlation over items, with its interval over their problems; None where x or y does not vary.

    Arguments as in `clustered_mean`.
    """
    if not len(x) or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    a, b = ((values - values.mean()) / values.std() for values in (x, y))  # so that sums of squares keep their digits
    sums = _sum_by_problem([np.ones(len(a)), a, b, a * a, b * b, a * b], problems, num_problems)

    def correlation(means: np.ndarray) -> np.ndarray:
        number, mean_a, mean_b, square_a, square_b, product = means.T
        variances = (square_a - mean_a**2 / number) * (square_b - mean_b**2 / number)
        return np.clip((product - mean_a * mean_b / number) / np.sqrt(variances), -1, 1)

    return _bootstrap_statistic(correlation, sums)


def _sum_by_problem(columns: Sequence[np.ndarray], problems: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(problems, column, minlength=count) for column in columns], axis=1)


def _bootstrap_statistic(statistic: Callable[[np.ndarray], np.ndarray], sums: np.ndarray) -> Interval:
    """A statistic of problems' sums (problems, k), of which the first is the number of items."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may draw no item, or items that do not vary
        value = float(statistic(sums.mean(axis=0)[None])[0])
        draws = statistic(resample_means(sums))
    low, high = (
        _compute_percentile_interval(value, draws[np.isfinite(draws)]) if np.isfinite(draws).any() else (value, value)
    )
    return Interval(value, low, high, num_problems=int((sums[:, 0] > 0).sum()))


def performance_gap_recovered(
    trained: Mapping[str, Sequence[float]],
    ceiling: Mapping[str, Sequence[float]],
    base: Mapping[str, Sequence[float]],
) -> Interval | None:
    """(part − base) / (whole − base) with its bootstrap interval; None where the whole's gain may be zero.

    Without that guard a resample with a gain near zero would make the ratio mean nothing.
    """
    gain = paired_difference(ceiling, base)
    if gain.low <= 0:
        return None
    part_means, base_means = _compute_common_means(trained, base)
    whole_means, _ = _compute_common_means(ceiling, base)
    gains = np.stack([part_means - base_means, whole_means - base_means], axis=1)
    top, bottom = resample_means(gains).T
    # a few resamples may still divide by a gain of zero or less: they belong at the far ends
    ratios = np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.copysign(np.inf, top))
    value = gains[:, 0].mean() / gains[:, 1].mean()
    low, high = _compute_percentile_interval(value, ratios)
    return Interval(float(value), low, high, gain.num_seeds, gain.num_problems)


def sign_flip_p_value(gaps: np.ndarray) -> float:
    """Two-sided p-value of "the mean gap is zero": how often random signs give a mean at least as far off.

    Never below 1/(RESAMPLES + 1), as the observed signs count among the draws (Phipson and Smyth 2010).
    """
    # gaps are multiples of 1/seeds, so ties with the observed sum are common and must survive rounding
    reach = abs(gaps.sum()) - 1e-5 * np.abs(gaps).sum()
    sums = _multiply(_draw_random_signs(len(gaps)), gaps)
    return (int((np.abs(sums) >= reach).sum()) + 1) / (NUM_RESAMPLES + 1)


def resample_means(columns: np.ndarray) -> np.ndarray:
    """(problems, k) -> (RESAMPLES, k): means over problems drawn with replacement, alike for all columns."""
    centre = columns.mean(axis=0)  # taken off first, so that float32 rounds the spread and not the level
    spread = columns - centre
    scale = np.maximum(np.abs(spread).max(axis=0), np.finfo(np.float64).tiny)
    sums = [_multiply(_draw_resample_counts(len(columns)), column) for column in (spread / scale).T]
    means = centre + scale * np.stack(sums, axis=1) / len(columns)
    # a mean of exactly 0 comes out as ±1e-9, and an interval that ends at 0 must not seem to leave it out
    return np.where(np.abs(means) < 1e-6 * scale, 0.0, means)


@lru_cache(maxsize=2)
def _draw_resample_counts(problems: int) -> np.ndarray:
    """(RESAMPLES, problems) float32: how often each resample drew each problem; 40 kB per problem."""
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    counts = np.empty((NUM_RESAMPLES, problems), dtype=np.float32)
    for row in counts:
        row[:] = np.bincount(rng.integers(0, problems, problems), minlength=problems)
    return counts


@lru_cache(maxsize=2)
def _draw_random_signs(problems: int) -> np.ndarray:
    """(RESAMPLES, problems) float32 of random −1 and +1."""
    draws = np.random.default_rng(BOOTSTRAP_SEED).integers(0, 2, (NUM_RESAMPLES, problems), dtype=np.int8)
    return draws.astype(np.float32) * 2 - 1


def _multiply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    # not `@`: its threads cost fifty times the product itself when other processes hold the cores
    return np.einsum("rp,p->r", matrix, vector.astype(np.float32))


def _compute_percentile_interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    # "nearest" never interpolates towards an infinite ratio
    low, high = np.quantile(draws, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2], method="nearest")
    return min(float(low), float(value)), max(float(high), float(value))  # equal scores differ by rounding alone


def _compute_common_means(
    a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    odd = sorted(a.keys() ^ b.keys())
    if odd:
        raise ValueError(f"paired difference: {len(odd)} problems are on one side only ({_join_names(odd)})")
    if not a:
        raise ValueError("paired difference: no problems")
    return np.array([np.mean(a[key]) for key in a]), np.array([np.mean(b[key]) for key in a])


def _join_names(names: Sequence[str], max_names: int = 3) -> str:
    return ", ".join(map(repr, names[:max_names])) + (", …" if len(names) > max_names else "")
