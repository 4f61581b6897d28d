"""Training against search on rows made by hand: every number can be worked out on paper."""

import math
from dataclasses import replace

import numpy as np
import pytest
import worlds

from nabla_trl.evaluation.grids import build_grids
from nabla_trl.report import compute_tradeoff
from nabla_trl.report import summary as summaries
from nabla_trl.report.compute_tradeoff import describe_best_for_budget
from nabla_trl.report.conclusions import evaluate_targets
from nabla_trl.report.summary import summarize
from nabla_trl.utils import statistics

PROBLEMS = 20
# method -> problems solved (the first so many), FLOPs per query, mean reward, KL
WORLD = {
    "greedy": (8, 10.0, 0.0, None),
    "best_of_1": (8, 10.0, 0.0, 0.0),
    "best_of_4": (12, 40.0, 1.0, 0.636),
    "nabla": (16, 30.0, 2.0, None),
    "reward_model_sampling": (20, 10.0, 3.0, None),
    "sft_greedy": (15, 10.0, 1.5, None),
    "sft_best_of_1": (14, 10.0, 1.4, 0.5),
    "sft_best_of_4": (20, 35.0, 2.5, 1.136),
    "dpo_greedy": (9, 12.0, 0.5, None),
    "distilled_greedy": (18, 10.0, 2.0, None),
}
SFT = {"label": "sft", "method": "sft", "beta": 0.5, "tuning": "lora", "train_flops": 1000.0, "train_seconds": 8.0}
DPO = SFT | {"label": "dpo", "method": "dpo", "train_flops": 3600.0, "train_seconds": None}
FACTS = {"reward_kind": "log-ratio", "trained": [SFT, DPO]}


def make_rows(world=WORLD):
    return [
        worlds.result_row(method, number, correct=number < right, kl=kl, reward=reward, flops=flops, seconds=flops)
        for method, (right, flops, reward, kl) in world.items()
        for number in range(PROBLEMS)
    ]


@pytest.fixture(scope="module")
def summary():
    return summarize(make_rows(), FACTS)


def without(*names):
    return {name: one for name, one in WORLD.items() if name not in names}


def page(world=WORLD, facts=FACTS):
    rows = make_rows(world)
    return compute_tradeoff.build_tradeoff_section(summarize(rows, facts), build_grids(rows), facts, {})


def cells(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0].split()[0] if len(line[0].split()) else line[1]: line for line in lines[2:]}


# --- numbers ------------------------------------------------------------------------------------------


def test_kinds():
    kinds = [summaries.get_method_kind(method) for method in WORLD]
    trained = ["trained", "trained", "trained + test-time", "trained", "trained"]
    assert kinds == ["base", "base", "test-time", "test-time", "other model", *trained]


def test_the_best_are_chosen_by_accuracy_then_cost(summary):
    assert summaries.find_best_test_time(summary) == "nabla", "sampling another model is not the policy's own search"
    assert summaries.find_best_trained(summary) == "distilled_greedy"
    tied = summarize(make_rows(WORLD | {"best_of_4": (16, 29.0, 1.0, None)}), FACTS)
    assert summaries.find_best_test_time(tied) == "best_of_4"
    assert (
        summaries.find_best_trained(summarize(make_rows(without("sft_greedy", "dpo_greedy", "distilled_greedy")), {}))
        is None
    )


def test_totals_hold_the_training_once(summary):
    assert compute_tradeoff.compute_total_flops(summary, "sft_best_of_4", 100) == 1000 + 3500
    assert compute_tradeoff.compute_total_flops(summary, "nabla", 100) == 3000
    assert math.isnan(compute_tradeoff.compute_total_flops(summary, "distilled_greedy", 100)), (
        "nobody knows what its training took"
    )


@pytest.mark.parametrize(
    ("queries", "expected"), [(1, [(10, "reward_model_sampling")]), (100, [(1000, "reward_model_sampling")])]
)
def test_a_better_model_to_sample_from_is_best_under_every_total(summary, queries, expected):
    assert [(one.total_flops, one.method) for one in compute_tradeoff.find_best_by_total(summary, queries)] == expected


def test_what_is_best_under_a_total():
    own = summarize(make_rows(without("reward_model_sampling")), FACTS)
    found = {
        queries: [(one.total_flops, one.method) for one in compute_tradeoff.find_best_by_total(own, queries)]
        for queries in (1, 100, 10**4)
    }
    assert found[1] == [(10, "greedy"), (30, "nabla"), (1035, "sft_best_of_4")]
    assert found[100] == [(1000, "greedy"), (2000, "sft_greedy"), (3000, "nabla"), (4500, "sft_best_of_4")]
    assert found[10**4] == [
        (100_000, "greedy"),
        (101_000, "sft_greedy"),
        (300_000, "nabla"),
        (351_000, "sft_best_of_4"),
    ]
    assert compute_tradeoff.find_best_at_equal_total(own, 1, "best_of_4") == "nabla"
    assert compute_tradeoff.find_best_at_equal_total(own, 1000, "best_of_4") == "sft_best_of_4"
    assert describe_best_for_budget(own, "best_of_4").endswith(
        "nabla for 1 and 100; sft_best_of_4 for 10,000 and 1 million"
    )
    assert describe_best_for_budget(own) == "", "best_of_16 was not run"


def test_break_even_is_training_over_what_a_query_saves(summary):
    found = {name: one["value"] for name, one in summary.items() if name.startswith("break_even.")}
    assert found == pytest.approx(
        {
            "break_even.sft_greedy-best_of_4": 1000 / 30,
            "break_even.sft_greedy-nabla": 1000 / 20,
            "break_even.sft_best_of_1-best_of_4": 1000 / 30,
            "break_even.sft_best_of_1-nabla": 1000 / 20,
            "break_even.sft_best_of_4-best_of_4": 1000 / 5,
            "break_even.dpo_greedy-best_of_4": 3600 / 28,
            "break_even.dpo_greedy-nabla": 3600 / 18,
        }
    )


def test_the_training_of_the_reward_has_rows_of_its_own():
    facts = FACTS | {"reward_train_flops": 9000.0}
    summary = summarize(make_rows(), facts)
    assert summary["flops.training.reward"]["value"] == 9000
    plain, full = (summary[f"{name}.sft_greedy-nabla"]["value"] for name in ("break_even", "break_even_with_reward"))
    assert full == pytest.approx(plain * (1000 + 9000) / 1000)
    text = "\n".join(compute_tradeoff.build_tradeoff_section(summary, build_grids(make_rows()), facts, {}))
    assert "| nabla, training of the reward included | " in text and "the reward itself: 9 kFLOPs" in text
    assert "training of the reward included" not in "\n".join(page())


def test_totals_with_the_reward_charge_every_method_that_reads_it():
    """Greedy decoding and another model need no reward. Best-of-1 reads none."""
    summary = summarize(make_rows(), FACTS | {"reward_train_flops": 9000.0})
    totals = {
        method: compute_tradeoff.compute_total_flops(summary, method, 0, with_reward=True)
        for method in WORLD
        if method != "distilled_greedy"
    }
    assert totals == {
        **dict.fromkeys(("greedy", "best_of_1", "reward_model_sampling"), 0),
        **dict.fromkeys(("best_of_4", "nabla"), 9000),
        **dict.fromkeys(("sft_greedy", "sft_best_of_1", "sft_best_of_4"), 10_000),
        "dpo_greedy": 12_600,
    }
    facts = {"reward_train_flops": 9000.0, "trained": [SFT]}
    text = "\n".join(page(without("reward_model_sampling"), facts))
    with_reward = text[text.index("for every method that needs the reward:") :]
    assert "| 100 | 12 kFLOPs | nabla |" in with_reward and "| 100 | 3 kFLOPs | nabla |" in text


def test_prices_are_told_in_seconds_and_dollars():
    """Seconds equal FLOPs in these rows. At 3600 dollars an hour a second of a device costs a dollar."""
    facts = {"reward_train_seconds": 4.0, "dollars_per_gpu_hour": 3600.0, "trained": [SFT | {"processes": 2}, DPO]}
    summary = summarize(make_rows(), facts)
    assert summary["dollars.nabla"]["value"] == pytest.approx(30)
    assert summary["dollars.training.sft"]["value"] == 16 and summary["dollars.training.reward"]["value"] == 4
    assert "dollars.training.dpo" not in summary, "its seconds are not known"
    found = {unit: summary[f"break_even_{unit}.sft_greedy-nabla"]["value"] for unit in ("seconds", "dollars")}
    assert found == pytest.approx({"seconds": 8 / 20, "dollars": 16 / 20})
    full = summary["break_even_dollars_with_reward.sft_greedy-nabla"]["value"]
    assert full == pytest.approx(20 / 20) and "break_even_with_reward.sft_greedy-nabla" not in summary
    text = "\n".join(page(facts=facts))
    assert "By FLOPs:" in text and "By seconds:" in text and "By dollars:" in text
    assert "sft: sft (lora, β = 0.5), 1 kFLOPs in 8 s, $16" in text


def test_the_interval_of_a_break_even_is_that_of_the_saving():
    rows = make_rows()
    rng = np.random.default_rng(0)
    rows = [replace(row, flops=row.flops + rng.uniform(-5, 5) * (row.method == "nabla")) for row in rows]
    summary, grids = summarize(rows, FACTS), build_grids(rows)
    saved = statistics.paired_mean_difference(
        grids["nabla"].get_problem_values("flops"), grids["sft_greedy"].get_problem_values("flops")
    )
    one = summary["break_even.sft_greedy-nabla"]
    assert (one["low"], one["value"], one["high"]) == (1000 / saved.high, 1000 / saved.value, 1000 / saved.low)
    assert one["low"] < one["value"] < one["high"]


def test_shares_of_the_way(summary):
    assert summary["pgr_best.sft_greedy"]["value"] == pytest.approx(7 / 8)
    assert summary["pgr_best.dpo_greedy"]["value"] == pytest.approx(1 / 8)
    assert summary["pgr_best.distilled_greedy"]["value"] == pytest.approx(10 / 8)
    assert summary["pgr_nabla.sft_greedy"] == summary["pgr_best.sft_greedy"], "nabla is the best here"
    assert evaluate_targets(summary)[3][2] == "reached"
    low = summarize(make_rows(without("sft_greedy", "distilled_greedy")), FACTS)
    measured, result = evaluate_targets(low)[3][1:]
    assert measured.startswith("12% [-42%, ") and result == "NOT reached"


def test_training_is_told_by_label(summary):
    assert summary["flops.training.sft"]["value"] == 1000 and summary["flops.training.dpo"]["value"] == 3600
    assert summary["seconds.training.sft"]["value"] == 8 and "seconds.training.dpo" not in summary
    pairs = {
        "sft_greedy-greedy",
        "sft_greedy-nabla",
        "nabla-greedy",
        "sft_greedy-dpo_greedy",
        "sft_best_of_4-best_of_4",
    }
    assert {f"paired.{pair}" for pair in pairs} <= summary.keys()


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ([{"label": "sft"}], ["lack method, beta"]),
        ([SFT, SFT], ["'sft', twice"]),
        ([SFT | {"label": "ppo"}], ["'ppo'", "none of distilled, sft"]),
    ],
)
def test_facts_of_training_that_are_not_whole_are_refused(trained, words):
    worlds.refused(lambda: summarize(make_rows(), {"trained": trained}), *words)


# --- words --------------------------------------------------------------------------------------------


def test_divergences_are_named_for_what_they_are(summary):
    words = {method: compute_tradeoff.format_kl(summary, method) for method in WORLD}
    assert words["best_of_1"] == "0" and words["best_of_4"] == "≤ 0.64"
    assert words["sft_best_of_1"] == "0.50 [0.50, 0.50] (estimate)"
    assert words["sft_best_of_4"] == "≤ 1.14 [1.14, 1.14] (estimate)"
    assert {words[method] for method in WORLD if WORLD[method][3] is None} == {"–"}


def test_the_table_sets_all_kinds_side_by_side():
    table = page()[2]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [line[1] for line in lines] == sorted([line[1] for line in lines], key=summaries.METHOD_KINDS.index)
    assert {line[0]: line[-1] for line in lines if line[1] != "base"} == {
        **dict.fromkeys(("best_of_4", "nabla", "reward_model_sampling"), "0"),
        **dict.fromkeys(("sft_greedy", "sft_best_of_1", "sft_best_of_4"), "1 kFLOPs"),
        **{"dpo_greedy": "3.6 kFLOPs", "distilled_greedy": "–"},
    }


def test_an_overtaking_in_cost_alone_is_marked():
    """dpo_greedy is less accurate than nabla by 14 of 20, and than best_of_4 by 10, sft_greedy by one."""
    world = WORLD | {"dpo_greedy": (2, 12.0, 0.5, None)}
    table = next(text for text in page(world) if text.startswith("| baseline"))
    crossings = {
        line[0].split()[0]: line[2:] for line in (row.strip("| ").split(" | ") for row in table.splitlines()[2:])
    }
    assert crossings["nabla"] == ["50 [50, 50] ≈", "200 [200, 200] †"]
    assert crossings["best_of_4"] == ["33 [33, 33] ≈", "129 [129, 129] †"]
    assert crossings["greedy"] == crossings["reward_model_sampling"] == ["never", "never"]
    better = page(WORLD | {"sft_greedy": (20, 10.0, 1.5, None), "best_of_4": (4, 40.0, 1.0, 0.636)})
    assert any("| 33 [33, 33] |" in text for text in better), "more accurate beyond chance: no mark"


def test_a_saving_that_may_be_nothing_decides_nothing():
    rows = make_rows()
    rows = [
        replace(row, flops=row.flops + (number % 20 == 0) * 20 * (row.method == "best_of_1"))
        for number, row in enumerate(rows)
    ]
    table = next(
        text
        for text in compute_tradeoff.build_tradeoff_section(summarize(rows, FACTS), build_grids(rows), FACTS, {})
        if text.startswith("| baseline")
    )
    assert "| best_of_1 | 0.400 [0.219, 0.613] | unsure | never |" in table


def test_what_is_missing_is_said():
    assert page(without(*(name for name in WORLD if "_" in name and name[:3] in ("sft", "dpo", "dis")))) == [
        "Missing: no trained policy was evaluated."
    ]
    unknown = page(facts={"reward_kind": "scalar"})
    assert "- sft: its training cost is not known" in unknown[1]
    assert "Missing: a trained policy's greedy decode, or the cost of training." in unknown
    assert any(
        text.startswith("Left out, because the FLOPs of training are not known: distilled_greedy, sft_greedy")
        for text in unknown
    )


def test_filtered_samples_are_told():
    plain, filtered = (page(facts=FACTS | {"sampling": {"temperature": 1.0, "min_p": p}})[3] for p in (0.0, 0.02))
    assert "sampled with min_p 0.02: the bound is on" in filtered and filtered.startswith(plain)
