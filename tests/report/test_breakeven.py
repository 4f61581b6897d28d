"""`nabla-trl breakeven`: numbers that can be worked out on paper, from every kind of source."""

import json
import math
import re

import pytest
import worlds

from nabla_trl.cli.main import main
from nabla_trl.evaluation.results import store_results
from nabla_trl.evaluation.rows import format_rows
from nabla_trl.report.breakeven import compute_breakeven, describe_breakeven
from nabla_trl.report.prices import Price

PROBLEMS = 60
# method -> problems solved (the first so many), FLOPs and seconds per query
WORLD = {
    "greedy": (20, 10.0, 1.0),
    "best_of_16": (50, 110.0, 3.0),
    "nabla": (50, 60.0, 5.0),
    "best_of_32": (60, 210.0, 6.0),
    "sft_greedy": (50, 10.0, 1.0),
}
SFT = {"label": "sft", "method": "sft", "beta": 1.0, "tuning": "lora", "train_flops": 5000.0, "train_seconds": 40.0}
FACTS = {
    "title": "A run",
    "command": "distill",
    "policy": "p",
    "reward": "r",
    "task": "t",
    "reward_kind": "scalar",
    "trained": [SFT],
    "reward_train_flops": 50_000.0,
}


def make_rows(world=WORLD, problems=range(PROBLEMS)):
    return [
        worlds.result_row(method, number, correct=number < right, flops=flops + number % 2 - 0.5, seconds=seconds)
        for method, (right, flops, seconds) in world.items()
        for number in problems
    ]


@pytest.fixture
def folder(tmp_path):
    store_results(tmp_path / "run", make_rows(), FACTS)
    return tmp_path / "run"


def values(pairs, unit="flops", with_reward=False):
    found = {}
    for pair in pairs:
        result = (pair.by_unit_with_reward if with_reward else pair.by_unit)[unit]
        found[pair.baseline] = result.outcome if result.queries is None else result.queries.value
    return found


def test_an_evaluation_names_its_trainings(folder):
    pairs = compute_breakeven(folder)
    assert {pair.trained for pair in pairs} == {"sft_greedy"}
    flops = values(pairs)
    assert flops.pop("greedy") == "never" and flops == pytest.approx(
        {"best_of_16": 50, "best_of_32": 25, "nabla": 100}
    )
    seconds = values(pairs, "seconds")
    assert seconds.pop("greedy") == "never"
    assert seconds == pytest.approx({"best_of_16": 20, "best_of_32": 8, "nabla": 10})
    assert values(pairs, with_reward=True)["nabla"] == pytest.approx(1100)
    assert set(values(pairs, "seconds", with_reward=True).values()) == {"not known"}, "of the reward"
    assert set(values(pairs, "dollars").values()) == {"not known"}
    assert {pair.baseline for pair in pairs if pair.is_less_accurate} == {"best_of_32"}


def test_the_baseline_of_equal_accuracy_that_costs_least_is_named(folder):
    [sentence] = describe_breakeven(compute_breakeven(folder))
    assert sentence == (
        "sft_greedy (0.833) pays against nabla (0.833), the cheapest baseline that is as accurate within chance: "
        "after 100 [100, 100] queries by FLOPs, 10 [10, 10] queries by seconds. With the training of the reward: "
        "after 1,100 [1,100, 1,100] queries by FLOPs."
    )


@pytest.mark.parametrize(
    ("world", "words"),
    [
        ({"nabla": (60, 60.0, 5.0), "sft_greedy": (20, 10.0, 1.0)}, "never pays: every baseline is more accurate"),
        ({"nabla": (50, 8.0, 0.5), "sft_greedy": (50, 10.0, 1.0)}, "does not pay.*: a query costs no less"),
        (
            {"nabla": (10, 60.0, 5.0), "sft_greedy": (50, 10.0, 1.0)},
            "the most accurate baseline, which is less accurate",
        ),
        ({"nabla": (50, 6000.0, 500.0), "sft_greedy": (50, 10.0, 1.0)}, "after the first query by FLOPs"),
    ],
)
def test_every_way_to_pay_or_not_has_words(world, words):
    pairs = compute_breakeven(make_rows(world), training=Price(5000.0, 40.0))
    assert re.search(words, describe_breakeven(pairs)[0])


def test_the_reason_is_that_of_a_unit_whose_costs_are_known():
    """A log of lm-eval knows no FLOPs."""
    world = {"nabla": (50, math.nan, 0.5), "sft_greedy": (50, math.nan, 1.0)}
    [sentence] = describe_breakeven(compute_breakeven(make_rows(world), training=Price(5000.0, 40.0)))
    assert sentence.endswith("a query costs no less.")


def test_options_win_over_the_facts_and_leave_the_rest(folder):
    pairs = compute_breakeven(folder, training=Price(flops=10_000.0), dollars_per_gpu_hour=3600.0)
    assert values(pairs)["nabla"] == pytest.approx(200) and values(pairs, "seconds")["nabla"] == pytest.approx(10)
    assert values(pairs, "dollars")["nabla"] == pytest.approx(10)


@pytest.mark.parametrize("rate", [0.0, -2.5, float("nan")])
def test_the_price_of_a_gpu_hour_is_positive(folder, rate):
    with pytest.raises(ValueError, match="dollars_per_gpu_hour must be positive"):
        compute_breakeven(folder, dollars_per_gpu_hour=rate)


def test_rows_of_several_files_meet_on_the_problems_that_both_have(tmp_path):
    trained = tmp_path / "trained.jsonl"
    trained.write_text(format_rows(make_rows({"sft_greedy": WORLD["sft_greedy"]}, range(20, 80))))
    base = tmp_path / "base.jsonl"
    base.write_text(format_rows(make_rows({"nabla": WORLD["nabla"]})))
    [pair] = compute_breakeven([trained, base], training=Price(flops=5000.0))
    assert pair.num_problems == 40 and pair.by_unit["flops"].queries.value == pytest.approx(100)
    assert pair.by_unit["seconds"].outcome == "not known"
    other = tmp_path / "other.jsonl"
    other.write_text(format_rows(make_rows({"nabla": WORLD["nabla"]}, range(100, 120))))
    with pytest.raises(ValueError, match="no problem in common: sft_greedy has 'p20', 'p21', …, nabla has 'p100'"):
        compute_breakeven([trained, other])
    with pytest.raises(ValueError, match="several sources hold rows of nabla"):
        compute_breakeven([base, other])
    renamed = compute_breakeven([trained, f"base={base}"], training=Price(flops=5000.0))
    assert [pair.baseline for pair in renamed] == ["base_nabla"]


def test_a_log_of_mean_costs_has_no_interval(tmp_path):
    for name, flops in (("tuned", 10.0), ("searched", 60.0)):
        (tmp_path / name).mkdir()
        samples = [{"doc_id": number, "metrics": ["acc"], "acc": number < 9} for number in range(10)]
        (tmp_path / name / "samples_gsm8k_now.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
        costs = {"gsm8k": {"flops_per_answer": flops, "seconds_per_answer": 0.0}}
        results = {"config": {"nabla": {"method": "greedy", "costs": costs}}}
        (tmp_path / name / "results_now.json").write_text(json.dumps(results))
    sources = [f"tuned={tmp_path / 'tuned'}", f"searched={tmp_path / 'searched'}"]
    [pair] = compute_breakeven(sources, trained=["tuned"], training=Price(flops=5000.0, seconds=3.0))
    result = pair.by_unit["flops"]
    assert result.queries.value == pytest.approx(100) and math.isinf(result.queries.high)
    assert pair.by_unit["seconds"].outcome == "not known", "seconds that are all zero were not measured"
    assert "after 100 [?, ?] queries by FLOPs" in describe_breakeven([pair])[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trained": ["dpo_greedy"]}, "no rows of dpo_greedy: choose from greedy"),
        ({"trained": ["nabla"], "baselines": ["nabla"]}, "nabla cannot be trained method and baseline at once"),
    ],
)
def test_methods_that_are_not_there_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        compute_breakeven(make_rows(), **options)


def test_without_a_trained_policy_one_must_be_named():
    rows = make_rows({name: WORLD[name] for name in ("greedy", "nabla")})
    with pytest.raises(ValueError, match="name a trained method: the rows hold greedy, nabla"):
        compute_breakeven(rows)


def test_the_command_prints_and_writes_all_numbers(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "breakeven.json"
    arguments = ["breakeven", str(folder), "--dollars_per_gpu_hour", "2.5", "--output_file", str(output)]
    assert main([*arguments, "--baselines", "nabla", "best_of_32"]) == 0
    printed = capsys.readouterr().out
    assert "100 [100, 100] ≈" in printed and "25 [25, 25] †" in printed and "with the reward" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if "[" in line and not line.startswith(("sft", "Qu")))
    content = json.loads(output.read_text())
    assert [pair["baseline"] for pair in content] == ["nabla", "best_of_32"]
    assert content[0]["by_unit"]["flops"]["queries"]["value"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name at least one source"),
        (["nowhere"], "nowhere: no such file or folder"),
        (["nowhere", "--train_flops", "-1"], "train_flops must be a finite number of at least 0"),
        (["nowhere", "--dollars_per_gpu_hour", "0"], "dollars_per_gpu_hour must be positive"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert main(["breakeven", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_all_wrong_amounts_are_said_at_once(capsys):
    wrong = {"train_flops": "-1", "reward_train_seconds": "nan", "dollars_per_gpu_hour": "0"}
    assert (
        main(["breakeven", "nowhere", *(word for name, value in wrong.items() for word in (f"--{name}", value))]) == 2
    )
    error = capsys.readouterr().err
    assert all(f"{name} must be" in error for name in wrong)
