"""Result rows as grids: complete, whatever their order, and refused by name where they do not belong together."""

import numpy as np
import pytest

from nabla_trl.evaluation.grids import build_grids, compute_mean_reward_by_round
from nabla_trl.evaluation.rows import Row
from nabla_trl.utils import statistics


def row(method="greedy", problem="p0", seed=0, **changes):
    values = {"task": "chains", "correct": True, "reward": 1.0, "flops": 2e6, "seconds": 0.01}
    return Row(method=method, problem=problem, seed=seed, **values | changes)


def test_a_failed_or_ungraded_row_counts_as_wrong():
    rows = [row(problem="p0"), row(problem="p1", error="boom"), row(problem="p2", correct=None), row(problem="p3")]
    grid = build_grids(rows)["greedy"]
    assert grid.columns["accuracy"].ravel().tolist() == [1, 0, 0, 1]
    assert (grid.num_errors, grid.num_ungraded) == (1, 1)


def test_grids_do_not_depend_on_the_order_of_rows_within_a_method():
    rows = [row("nabla", f"p{p}", s, flops=10 * p + s) for p in range(3) for s in range(2)]
    one = build_grids(rows)["nabla"]
    other = build_grids([rows[i] for i in (3, 0, 5, 2, 1, 4)])["nabla"]
    assert {key: list(value) for key, value in one.get_problem_values("flops").items()} == {
        key: list(value) for key, value in other.get_problem_values("flops").items()
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no result rows"),
        ([row(), row()], "two rows for method 'greedy', problem 'p0', seed 0"),
        ([row(), row("nabla"), row("nabla", "p1")], "no row for method 'greedy', problem 'p1', seed 0: finish"),
        ([row("nabla", "p0", 0), row("nabla", "p1", 1)], r"method 'nabla', problem 'p0', seed 1 and 1 more"),
        ([row(), row(problem="p1", task="amc")], "rows of 2 tasks \\('amc', 'chains'\\)"),
    ],
)
def test_bad_rows_are_refused_by_name(rows, message):
    with pytest.raises(ValueError, match=message):
        build_grids(rows)


def test_a_reward_list_that_ended_early_is_carried_forward():
    lists = {"p0": [0.0, 4.0], "p1": [2.0, 2.0, 6.0], "p2": []}
    rows = [row("nabla", name, reward_by_round=curve) for name, curve in lists.items()]
    curve = compute_mean_reward_by_round(build_grids(rows)["nabla"])
    assert [one.value for one in curve] == [1, 3, 5]
    assert compute_mean_reward_by_round(build_grids([row()])["greedy"]) == []


def test_a_divergence_is_optional_row_by_row():
    """Rows of runs that did not measure it load as before; where some have it, the mean is over those."""
    old, mixed = (build_grids(rows)["greedy"] for rows in ([row()], [row(kl=2.0), row(problem="p1", kl=None)]))
    assert np.isnan(old.columns["kl"]).all()
    assert statistics.mean_interval(mixed.columns["kl"]).value == 2.0
