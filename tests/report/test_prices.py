"""Break-even between two methods, with every way in which there is none."""

import pytest
import worlds

from nabla_trl.evaluation.grids import build_grids
from nabla_trl.report.prices import BreakEven, Price, compute_break_even, read_reward_price, read_training_costs


def costs(trained, baseline, seconds=1.0):
    """Two methods with these FLOPs per query, or FLOPs that alternate between problems."""
    flops = {"sft_greedy": trained, "nabla": baseline}
    pairs = {name: value if isinstance(value, tuple) else (value, value) for name, value in flops.items()}
    grids = build_grids(
        [
            worlds.result_row(
                name, number, correct=True, flops=float(pair[number % 2]), seconds=seconds * pair[number % 2]
            )
            for name, pair in pairs.items()
            for number in range(20)
        ]
    )
    return grids["sft_greedy"], grids["nabla"]


def test_what_is_saved_pays_for_the_training():
    result = compute_break_even(*costs(10, 30), "flops", 1000.0)
    assert result.outcome == "pays" and result.queries is not None and result.queries.value == 50


@pytest.mark.parametrize(
    ("trained", "baseline", "train_cost", "outcome"),
    [
        (30, 10, 1000.0, "never"),
        (10, 10, 1000.0, "never"),
        (10, (1, 22), 1000.0, "unsure"),
        (10, 30, 0.0, "at once"),
        (10, 30, 20.0, "at once"),
        (10, 30, None, "not known"),
        (float("nan"), 30, 1000.0, "not known"),
        (10, 0, 1000.0, "not known"),
    ],
)
def test_there_are_reasons_for_no_number(trained, baseline, train_cost, outcome):
    assert compute_break_even(*costs(trained, baseline), "flops", train_cost).outcome == outcome


def test_seconds_that_were_not_measured_are_not_known():
    grids = costs(10, 30, seconds=0.0)
    assert compute_break_even(*grids, "seconds", 5.0) == BreakEven("not known")
    assert compute_break_even(*grids, "dollars", 5.0, 2.0) == BreakEven("not known")
    assert compute_break_even(*costs(10, 30), "dollars", 5.0) == BreakEven("not known"), "a GPU hour has no price"


def test_dollars_follow_the_seconds_of_devices():
    price = Price(flops=1.0, seconds=10.0, device_seconds=20.0)
    assert price.get_amount("dollars", 360.0) == 2.0 and price.get_amount("dollars") is None
    assert (price + Price(flops=2.0)).get_amount("flops") == 3.0
    assert (price + Price(flops=2.0)).get_amount("seconds") is None, "a cost that is not known makes a sum unknown"
    result = compute_break_even(*costs(10, 30), "dollars", 2.0, 360.0)
    assert result.queries is not None and result.queries.value == pytest.approx(2.0 / (20 * 0.1))


@pytest.mark.parametrize("amount", [-1.0, float("nan"), float("inf")])
def test_a_price_is_a_number_of_at_least_zero(amount):
    for name in ("flops", "seconds", "device_seconds"):
        with pytest.raises(ValueError, match=f"a price must be .*, not {amount} {name}"):
            Price(**{name: amount})


def test_prices_are_read_from_the_facts_of_a_run():
    entry = {"label": "sft", "method": "sft", "beta": None, "tuning": "lora", "train_flops": 5.0, "train_seconds": 3.0}
    facts = {"trained": [entry | {"processes": 4}], "reward_train_flops": 7.0}
    assert read_training_costs(facts)["sft"].price == Price(5.0, 3.0, 12.0)
    assert read_reward_price(facts) == Price(7.0, None, None)
