"""Intervals cover what they promise, pairs are compared as pairs, and incomplete rows are refused by name."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import format_interval


def by_problem(matrix):
    return {f"p{number}": values for number, values in enumerate(np.asarray(matrix, dtype=float))}


def difficulties(rng, problems):
    """Chances of a right answer that differ much between problems, as they do in practice. Mean 0.5."""
    return rng.beta(0.4, 0.4, problems)


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_covers_the_true_accuracy(seeds):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        chance = difficulties(rng, 100)
        interval = statistics.proportion_interval(rng.random((100, seeds)) < chance[:, None])
        hits += interval.low <= 0.5 <= interval.high
        assert (interval.num_seeds, interval.num_problems) == (seeds, 100)
    assert 0.90 <= hits / 200 <= 0.99


def test_paired_interval_covers_the_true_difference_and_null_p_values_are_not_small():
    rng = np.random.default_rng(2)
    covered, small, null_small = 0, 0, 0
    for _ in range(200):
        chance = difficulties(rng, 100)[:, None]
        ours = rng.random((100, 3)) < 0.8 * chance + 0.2
        twin, theirs = (rng.random((100, 3)) < chance for _ in range(2))
        interval = statistics.paired_difference(by_problem(ours), by_problem(theirs))
        covered += interval.low <= 0.1 <= interval.high
        small += interval.p_value < 0.05
        null_small += statistics.paired_difference(by_problem(twin), by_problem(theirs)).p_value < 0.05
    assert 0.90 <= covered / 200 <= 0.99
    assert small / 200 > 0.8
    assert null_small / 200 < 0.10


def test_interval_has_the_width_of_the_normal_theory():
    values = np.random.default_rng(3).normal(size=(400, 1))
    interval = statistics.mean_interval(values)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.05)
    assert interval.value == pytest.approx(values.mean())


def test_pairing_removes_what_the_problems_have_in_common():
    rng = np.random.default_rng(4)
    common = rng.normal(size=(100, 1)) * 10
    a, b = common + rng.normal(size=(100, 1)) * 0.1 + 0.2, common
    assert statistics.paired_mean_difference(by_problem(a), by_problem(b)).low > 0
    assert statistics.mean_interval(a).low < 0 < statistics.mean_interval(b).high


def test_swapping_the_sides_changes_the_sign_only():
    rng = np.random.default_rng(5)
    a, b = (by_problem(rng.random((50, 2))) for _ in range(2))
    one, other = statistics.paired_difference(a, b), statistics.paired_difference(b, a)
    assert one.value == pytest.approx(-other.value)
    assert one.low == pytest.approx(-other.high, abs=1e-3)
    assert one.p_value == other.p_value


def test_sides_may_have_different_seeds_but_not_different_problems():
    a, b = by_problem(np.ones((4, 3))), by_problem(np.zeros((4, 1)))
    assert statistics.paired_difference(a, b).num_seeds == 1
    with pytest.raises(ValueError, match=r"one side only .*'p3'"):
        statistics.paired_difference(a, {name: one for name, one in b.items() if name != "p3"})
    with pytest.raises(ValueError, match="no problems"):
        statistics.paired_difference({}, {})


@pytest.mark.parametrize("gaps", [[1, 0, -1, 2, 1, 3, 0, 2], [0.5, 0.5, -0.5, 1.0, 0.5, 0.5, 0.0, 0.5]])
def test_sign_flips_match_their_full_enumeration(gaps):
    gaps = np.array(gaps, dtype=float)
    signs = np.array(list(itertools.product([-1, 1], repeat=len(gaps))))
    exact = (np.abs(signs @ gaps) >= abs(gaps.sum()) - 1e-9).mean()
    assert statistics.sign_flip_p_value(gaps) == pytest.approx(exact, abs=0.015)


def test_methods_that_agree_everywhere_do_not_differ():
    same = by_problem(np.eye(10)[:, :2])
    interval = statistics.paired_difference(same, same)
    assert (interval.value, interval.p_value, interval.side) == (0, 1, "")
    # As Tango's interval of no discordant pair in 10.
    limit = statistics.wilson_interval(0.0, 10)[1]
    assert (interval.low, interval.high) == pytest.approx((-limit, limit))


def test_share_of_gain():
    base = np.zeros((60, 1))
    whole = np.r_[np.ones((30, 1)), np.zeros((30, 1))]
    half = np.r_[np.ones((15, 1)), np.zeros((45, 1))]
    interval = statistics.performance_gap_recovered(*map(by_problem, (half, whole, base)))
    assert interval.value == pytest.approx(0.5)
    assert 0.2 < interval.low < 0.5 < interval.high < 0.8
    everything = statistics.performance_gap_recovered(*map(by_problem, (whole, whole, base)))
    assert 0.6 < everything.low < 1 == everything.value < everything.high < 1.7
    assert statistics.performance_gap_recovered(*map(by_problem, (half, base, base))) is None


def test_missing_numbers_are_left_out_and_nothing_left_is_an_error():
    interval = statistics.mean_interval([[1, math.nan], [math.nan, math.nan], [3, 5]])
    assert (interval.value, interval.num_problems) == (2.5, 2)
    with pytest.raises(ValueError, match="no number"):
        statistics.mean_interval([[math.nan]])


def test_large_values_keep_their_digits():
    interval = statistics.mean_interval([[1e15], [1e15 + 8]])
    assert (interval.low, interval.value, interval.high) == pytest.approx(
        (1e15 - 46.8, 1e15 + 4, 1e15 + 54.8), abs=0.5
    )


# --- few problems -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "problems"), [(0, 4), (4, 4), (1, 3), (270, 300)])
def test_one_seed_gives_wilsons_interval_over_problems(hits, problems):
    scores = (np.arange(problems) < hits)[:, None]
    interval = statistics.proportion_interval(scores)
    reference = stats.binomtest(hits, problems).proportion_ci(method="wilson")
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_more_seeds_narrow_an_interval_but_never_beyond_independent_answers():
    rng = np.random.default_rng(20)
    scores = rng.random((50, 4)) < 0.3
    one, four = statistics.proportion_interval(scores[:, :1]), statistics.proportion_interval(scores)
    assert four.high - four.low < 0.7 * (one.high - one.low)
    low, high = statistics.wilson_interval(four.value, scores.size)
    assert four.low <= low and high <= four.high
    same = statistics.proportion_interval(np.tile([1.0, 0.0], (50, 1)))  # half right everywhere: no variance
    assert (same.low, same.high) == pytest.approx(statistics.wilson_interval(0.5, 100))


def test_seeds_that_agree_count_once():
    scores = np.repeat(np.arange(40)[:, None] < 10, 3, axis=1)
    assert statistics.proportion_interval(scores).low == pytest.approx(
        statistics.proportion_interval(scores[:, :1]).low
    )


@pytest.mark.parametrize("problems", [4, 10, 30])
def test_intervals_of_few_problems_cover_the_truth(problems):
    rng = np.random.default_rng(problems)
    shares = differences = 0
    for _ in range(300):
        chance = rng.uniform(0.1, 0.7, (problems, 1))
        ours, theirs = rng.random((problems, 2)) < chance + 0.2, rng.random((problems, 2)) < chance
        share = statistics.proportion_interval(theirs)
        difference = statistics.paired_difference(by_problem(ours), by_problem(theirs))
        shares += share.low <= 0.4 <= share.high
        differences += difference.low <= 0.2 <= difference.high
    assert shares / 300 > 0.92 and differences / 300 > 0.92


def test_four_problems_that_all_agree_leave_room_for_doubt():
    ones, zeros = by_problem(np.ones((4, 1))), by_problem(np.zeros((4, 1)))
    difference = statistics.paired_difference(ones, zeros)
    assert 0.2 < difference.low < 0.5 and difference.high == 1 and difference.side == ""
    ratio = statistics.performance_gap_recovered(ones, ones, zeros)
    assert ratio.low < 0.5 and ratio.high > 2


def test_a_single_problem_says_nothing_of_the_error_of_a_mean():
    interval = statistics.mean_interval([[2.0, 3.0]])
    assert (interval.value, interval.low, interval.high) == (2.5, -math.inf, math.inf)
    assert interval.to_dict() == {"value": 2.5, "low": None, "high": None, "seeds": 2, "problems": 1}
    assert format_interval(interval.to_dict()) == "2.500 [?, ?]"


def test_proportions_beyond_their_range_are_refused():
    with pytest.raises(ValueError, match="from 0 to 1"):
        statistics.proportion_interval([[1.5]])
    with pytest.raises(ValueError, match="from -1 to 1"):
        statistics.difference_interval(np.array([2.0]))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 20, 299])
def test_quantiles_are_students(degrees):
    assert statistics.get_t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=2e-3)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((0.01, 0.2, 0.01), "ahead"),
        ((-0.2, -0.01, 0.01), "behind"),
        ((-0.01, 0.02, 0.5), "no difference of 0.05 or more"),
        ((-0.1, 0.2, 0.5), "too few problems to tell"),
    ],
)
def test_a_difference_in_words(ends, words):
    assert statistics.describe_difference(*ends) == words


def test_a_side_needs_both_the_interval_and_the_p_value():
    sides = [
        statistics.classify_difference(*one)
        for one in ((0.1, 0.2, 0.01), (-0.2, -0.1, 0.01), (0.1, 0.2, 0.05), (-0.1, 0.1, 0.01))
    ]
    assert sides == ["ahead", "behind", "", ""]


# --- items of problems ------------------------------------------------------------------------------------


def test_one_item_per_problem_is_the_interval_over_problems():
    values = np.random.default_rng(7).random(50)
    interval = statistics.clustered_proportion(values, np.arange(50), 50)
    plain = statistics.proportion_interval(values[:, None])
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (plain.value, plain.low, plain.high), abs=1e-6
    )


def test_items_of_one_problem_are_not_independent():
    hits, problems = np.repeat([0.0, 1.0], 500), np.repeat(np.arange(20), 50)
    together, apart = (
        statistics.clustered_proportion(hits, of, count) for of, count in ((problems, 20), (np.arange(1000), 1000))
    )
    assert together.high - together.low > 5 * (apart.high - apart.low)
    assert together.value == apart.value == 0.5
    assert (together.num_problems, statistics.clustered_proportion(hits[:60], problems[:60], 20).num_problems) == (
        20,
        2,
    )


def test_intervals_of_items_cover_the_true_share_and_correlation():
    rng = np.random.default_rng(8)
    shares = correlations = 0
    for _ in range(100):
        sizes = rng.integers(0, 6, 60)
        problems, count = np.repeat(np.arange(60), sizes), sizes.sum()
        common = rng.normal(size=60)[problems]
        share = statistics.clustered_proportion(common + rng.normal(size=count) > 0, problems, 60)
        x = common + rng.normal(size=count)
        pearson = statistics.clustered_correlation(x, x + 2**0.5 * rng.normal(size=count), problems, 60)
        shares += share.low <= 0.5 <= share.high
        correlations += pearson.low <= 0.5**0.5 <= pearson.high
    assert shares >= 88 and correlations >= 88


def test_correlation_of_items_is_pearsons():
    rng = np.random.default_rng(9)
    x, y, problems = rng.normal(size=40) + 1e6, rng.normal(size=40) * 1e-3, rng.integers(0, 8, 40)
    interval = statistics.clustered_correlation(x, y + 1e-3 * (x - 1e6), problems, 8)
    assert interval.value == pytest.approx(np.corrcoef(x, y + 1e-3 * (x - 1e6))[0, 1])
    assert interval.low < interval.value < interval.high <= 1
    exact = statistics.clustered_correlation(x, -2 * x, problems, 8)
    assert (exact.value, exact.low, exact.high) == pytest.approx((-1, -1, -1), abs=1e-3)


def test_nothing_is_said_of_no_items_or_of_what_does_not_vary():
    none = np.zeros(0)
    assert statistics.clustered_proportion(none, none.astype(int), 3) is None
    assert statistics.clustered_correlation(none, none, none.astype(int), 3) is None
    assert statistics.clustered_correlation(np.ones(4), np.arange(4.0), np.arange(4), 4) is None
    same = statistics.clustered_proportion(np.ones(4), np.array([1, 1, 1, 1]), 3)
    assert (same.value, same.high, same.num_problems) == (1, 1, 1)
    assert same.low == pytest.approx(statistics.wilson_interval(1.0, 1)[0])


def test_gains_and_losses_of_items_are_compared_with_zero():
    problems = np.repeat(np.arange(30), 2)
    gains = np.tile([1.0, 0.0], 30)
    ahead = statistics.clustered_difference(gains, problems, 30)
    assert ahead.value == 0.5 and 0.3 < ahead.low < ahead.high < 0.7
    behind = statistics.clustered_difference(-gains, problems, 30)
    assert (behind.low, behind.high) == pytest.approx((-ahead.high, -ahead.low))


def test_two_losses_in_a_hundred_do_not_exclude_zero():
    gaps = -np.r_[np.ones(2), np.zeros(98)]
    assert statistics.difference_interval(gaps).high > 0 > statistics.difference_interval(-gaps).low


def test_thirds_that_cancel_do_not_exclude_zero():
    """As float64 numbers 1 − 2/3 and 1/3 differ, and their resampled sums end at 1e-18 in place of 0."""
    gaps = np.r_[np.full(6, 1 - 2 / 3), np.full(1, -1 / 3), np.zeros(3)]
    means = statistics.resample_means(gaps[:, None])
    assert (means == 0).sum() == (np.abs(means) < 1e-9).sum() > 0
    assert statistics.sign_flip_p_value(gaps) == statistics.sign_flip_p_value(np.round(gaps * 3))


# --- scipy as the reference -------------------------------------------------------------------------------


def test_intervals_of_means_are_students():
    values = np.random.default_rng(10).normal(size=8)
    interval = statistics.mean_interval(values[:, None])
    reference = stats.ttest_1samp(values, 0.0).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), rel=2e-3)


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.3])
def test_p_values_are_those_of_scipys_permutation_test(shift):
    gaps = np.round(np.random.default_rng(11).normal(shift, 1, size=60) * 3) / 3
    reference = stats.permutation_test((gaps,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0)
    assert statistics.sign_flip_p_value(gaps) == pytest.approx(reference.pvalue, abs=0.015)


def test_correlation_intervals_are_those_of_scipys_bootstrap():
    x = np.random.default_rng(12).normal(size=(2, 100))
    x[1] += x[0]
    interval = statistics.clustered_correlation(*x, np.arange(100), 100)
    reference = stats.bootstrap(
        tuple(x),
        lambda a, b: stats.pearsonr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=4_000,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high), abs=0.02)


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (1, 2), (270, 300), (7, 7)])
def test_wilson_intervals_are_those_of_scipy(hits, trials):
    reference = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    assert statistics.wilson_interval(hits / trials, trials) == pytest.approx(
        (reference.low, reference.high), abs=1e-12
    )
