"""The report says what the numbers say: names, intervals, results both ways, missing parts, real figures."""

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import worlds
from rich.console import Console

from nabla_trl.evaluation.method import list_methods
from nabla_trl.report import text as report
from nabla_trl.report.conclusions import (
    REWARD_MODEL_SAMPLING_NOTE,
    evaluate_targets,
    format_accuracy,
    write_conclusions,
)
from nabla_trl.report.summary import summarize
from nabla_trl.utils.formatting import format_count, format_seconds, format_si

PROBLEMS, SEEDS = 60, 2
# method -> share of the problems it solves, FLOPs per problem
WORLD = {
    "greedy": (0.40, 4e6),
    "self_consistency_16": (0.45, 60e6),
    **{f"best_of_{n}": (0.4 + 0.06 * k, 6e6 * n) for k, n in enumerate((1, 2, 4, 8, 16, 32))},
    "control@0.33": (0.45, 30e6),
    "nabla@0.33": (0.70, 31e6),
    "control": (0.50, 60e6),
    "nabla": (0.80, 61e6),
    "sft_greedy": (0.70, 4e6),
    "sft_best_of_1": (0.50, 4e6),
    "sft_best_of_8": (0.85, 48e6),
    "reward_model_sampling": (0.95, 6e6),
}
TRADE = "Train-time vs test-time compute"
SINGLE = ("greedy", "sft_greedy", "dpo_greedy")
SFT = {"label": "sft", "method": "sft", "beta": 1.0, "tuning": "lora", "train_flops": 9.2e9, "train_seconds": 61.5}
KL = {"best_of_1": 0.0, "best_of_2": 0.193, "best_of_8": 1.204, "sft_best_of_1": 0.75, "sft_best_of_8": 1.95}
FACTS = {
    "title": "Chains",
    "command": "accelerate launch recipes/distill.py --config recipes/tiny/distill.yaml",
    "policy": "tiny-policy",
    "reward": "clean/policy",
    "task": "digit_chains",
    "reward_kind": "log-ratio",
    "versions": {"torch": "2.13"},
    "seeds": [0, 1],
    "trained": [SFT],
    "setup_seconds": 100.0,
    "total_seconds": 250.0,
    "audit": {"conclusion": "Sound.", "auc": 0.97, "best_of_n_accuracy": {2: {"value": 0.5, "low": 0.4, "high": 0.6}}},
    "show_targets": True,
    "files": {"rows": "rows.jsonl"},
    "notes": ["A note."],
}


def make_rows(world=WORLD, without=()):
    """A method solves the easiest problems first, whatever the seed: pairs differ by design, not by luck."""
    rows = []
    for method, (share, flops) in world.items():
        if method in without:
            continue
        for number in range(PROBLEMS):
            for seed in range(1 if method in SINGLE else SEEDS):
                right = (number * 37 % PROBLEMS) < share * PROBLEMS - 1e-9
                rounds = [0.0, share] if method.startswith(("nabla", "control")) else []
                row = worlds.result_row(
                    method,
                    number,
                    task="digit_chains",
                    seed=seed,
                    correct=right,
                    reward=math.nan if method == "greedy" else share,
                    kl=KL.get(method),
                    flops=flops,
                    seconds=flops / 1e9,
                    reward_by_round=rounds,
                )
                rows.append(row)
    return rows


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = make_rows()
    rows[0] = replace(rows[0], error="prompt longer than the context")
    report.write_report_files(folder, rows, FACTS)
    return folder


@pytest.fixture(scope="module")
def summary():
    return summarize(make_rows(), FACTS)


def section(folder, heading):
    return (folder / "report.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table(text):
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def results(rows, facts=FACTS):
    return [line[-1] for line in evaluate_targets(summarize(rows, facts))]


def test_strict_accuracy_stands_beside_where_it_differs(tmp_path):
    rows = make_rows({"greedy": (0.4, 4e6), "nabla": (0.8, 61e6)})
    rows = [replace(row, correct_strict=row.correct) for row in rows]
    report.write_report_files(tmp_path, rows, FACTS)
    assert "strict" not in (tmp_path / "report.md").read_text()
    index = next(index for index, row in enumerate(rows) if row.method == "nabla" and row.correct)
    strict = {"correct_strict": False, "answer_strict": None, "answer": "3", "gold": "3", "tail": "so 3"}
    rows[index] = replace(rows[index], **strict, match_result="correct")
    index = next(index for index, row in enumerate(rows) if not row.correct)
    rows[index] = replace(rows[index], match_result="timeout")
    found = report.write_report_files(tmp_path, rows, FACTS)
    lines = {line["method"]: line for line in table(section(tmp_path, "Results"))}
    assert lines["greedy"]["strict accuracy"] == lines["greedy"]["accuracy"]
    assert lines["nabla"]["strict accuracy"].startswith("0.792") and lines["nabla"]["accuracy"].startswith("0.800")
    text = (tmp_path / "report.md").read_text()
    assert f"1 of {len(rows)} responses are read in two ways: `extraction.jsonl`" in text
    assert "Of the comparisons with gold answers 1 timed out: they count as wrong." in text
    screen = io.StringIO()
    report.print_summary_table(found, Console(file=screen, width=80))
    assert max(map(len, screen.getvalue().splitlines())) <= 80 and "…" not in screen.getvalue()
    assert "strict" in screen.getvalue() and "0.792" in screen.getvalue()


def test_a_search_is_compared_with_what_has_its_budget():
    names = ["nabla@best_of_8", "control@best_of_8", "best_of_8", "weighted_best_of_8", "tot@best_of_8", "tot@0.5"]
    found = summarize(make_rows(dict.fromkeys([*names, "best_of_16"], (0.5, 1e6))), FACTS)
    against = {name.partition("-")[2] for name in found if name.startswith("paired.nabla@best_of_8-")}
    assert against == {*names[1:5], "best_of_16"}


def test_summary_holds_the_agreed_names(summary):
    for method in WORLD:
        assert {f"accuracy.{method}", f"flops.{method}", f"seconds.{method}"} <= summary.keys()
    pairs = ["nabla@0.33-control@0.33", "nabla-control", "nabla@0.33-best_of_16", "nabla-best_of_16"]
    pairs += ["nabla-greedy", "sft_greedy-greedy", "sft_greedy-nabla", "sft_best_of_8-best_of_8"]
    pairs += ["nabla-reward_model_sampling", "best_of_32-best_of_1"]
    assert {f"paired.{pair}" for pair in pairs} <= summary.keys()
    others = {
        "seconds.setup",
        "seconds.total",
        "pgr_nabla.sft_greedy",
        "pgr_best.sft_greedy",
        "reward.nabla",
        "kl.sft_best_of_1",
    }
    others |= {"flops.training.sft", "seconds.training.sft"}
    assert others <= summary.keys()
    assert "reward.greedy" not in summary


def test_summary_entries_are_well_formed_json(written):
    summary = json.loads((written / "summary.json").read_text())
    for name, one in summary.items():
        assert list(one) == ["value", "low", "high", "seeds", "problems"], name
        assert one["low"] <= one["value"] <= one["high"], name
    assert summary["accuracy.nabla"]["seeds"] == SEEDS
    assert summary["accuracy.greedy"]["seeds"] == 1
    assert summary["accuracy.nabla"]["problems"] == PROBLEMS
    total = {"value": 250.0, "low": 250.0, "high": 250.0, "seeds": 0, "problems": 0}
    assert summary["seconds.total"] == total


def test_summary_equals_plain_means_of_the_rows(summary):
    rows = make_rows()
    for method in WORLD:
        own = [row for row in rows if row.method == method]
        assert summary[f"accuracy.{method}"]["value"] == pytest.approx(np.mean([row.correct for row in own]))
        assert summary[f"flops.{method}"]["value"] == pytest.approx(np.mean([row.flops for row in own]))
    assert summary["paired.nabla-greedy"]["value"] == pytest.approx(0.4)
    assert summary["pgr_nabla.sft_greedy"]["value"] == pytest.approx(0.75)


def test_dollars_are_left_out_where_seconds_are_not_known():
    rows = [replace(row, seconds=math.nan) if row.method == "greedy" else row for row in make_rows()]
    summary = summarize(rows, FACTS | {"dollars_per_gpu_hour": 3600.0})
    assert "accuracy.greedy" in summary and not {"seconds.greedy", "dollars.greedy"} & summary.keys()
    assert summary["dollars.nabla"]["value"] == pytest.approx(summary["seconds.nabla"]["value"])


def test_break_even_pays_the_training_back(summary):
    queries = summary["break_even.sft_greedy-best_of_16"]["value"]
    assert 9.2e9 + queries * 4e6 == pytest.approx(queries * 96e6)
    assert "break_even.sft_greedy-greedy" not in summary


def test_every_accuracy_stands_beside_its_interval(written):
    rows = table(section(written, "Results"))
    assert [one["method"] for one in rows] == list_methods(json.loads((written / "summary.json").read_text()))
    for one in rows:
        assert re.fullmatch(r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", one["accuracy"]), one
    for heading in ("Conclusions", "Targets", "Over-optimization of the reward", TRADE):
        text = re.sub(r"\[[^]]*\]", "[]", section(written, heading))
        text = re.sub(r"p [=<] \d\.\d+|\| AUC within problems \| .*|arXiv [\d.]+", "", text)
        assert not re.findall(r"\d\.\d{3}(?! \[\])", text), heading


def test_an_error_row_is_counted_and_shown(written):
    greedy = table(section(written, "Results"))[0]
    assert (greedy["method"], greedy["errors"]) == ("greedy", "1")
    assert greedy["accuracy"].startswith("0.383 ")  # 24 of 60, less the one that failed
    assert "1 ended in an error" in (written / "report.md").read_text()


def test_targets_reached_and_not_reached_follow_the_numbers():
    assert results(make_rows()) == ["too few to tell", "reached", "too few to tell", "too few to tell"]
    far = {**WORLD, "nabla@0.33": (0.95, 31e6), "sft_greedy": (1.0, 4e6), "reward_model_sampling": (0.9, 6e6)}
    assert results(make_rows(far)) == ["reached"] * 4
    swapped = {**WORLD, "nabla@0.33": (0.45, 31e6), "control@0.33": (0.70, 30e6), "sft_greedy": (0.5, 4e6)}
    assert results(make_rows(swapped)) == ["NOT reached"] * 4
    dear = {**WORLD, "nabla@0.33": (0.9, 40e6), "nabla": (0.9, 61e6)}
    assert results(make_rows(dear))[0] == "not measured", "no run was within the budget of the target"
    just_short = {**WORLD, "nabla@0.33": (0.63, 31e6), "best_of_16": (0.65, 96e6)}
    assert results(make_rows(just_short))[0] == "too few to tell"


def test_the_run_that_is_judged_is_chosen_by_cost_not_by_accuracy():
    lucky = {**WORLD, "nabla@0.1": (0.9, 9e6), "nabla@0.33": (0.5, 31e6)}
    measured, result = evaluate_targets(summarize(make_rows(lucky), FACTS))[0][1:]
    assert measured.startswith("nabla@0.33 ")
    assert result == "NOT reached"


def test_an_unequal_or_missing_control_decides_nothing():
    unequal = {**WORLD, "control@0.33": (0.2, 15e6)}
    lines = evaluate_targets(summarize(make_rows(unequal), FACTS))
    assert lines[1][2] == "not measured"
    assert "budgets were not equal" in lines[1][1]
    lines = evaluate_targets(summarize(make_rows(without=["control@0.33", "control", "best_of_16", "greedy"]), FACTS))
    assert [line[2] for line in lines] == ["not measured"] * 4
    assert "missing: best_of_16" in lines[0][1]
    assert "missing: greedy" in lines[2][1]


def test_without_a_gain_no_share_of_it_is_claimed():
    flat = {**WORLD, "nabla": (0.40, 61e6)}
    summary = summarize(make_rows(flat), FACTS)
    assert "pgr_nabla.sft_greedy" not in summary
    assert evaluate_targets(summary)[2][2] == "not measured"


@pytest.mark.parametrize(
    ("skill", "words"), [(0.95, "the baseline wins"), (0.2, "nabla wins"), (0.8, "neither is ahead")]
)
def test_a_log_ratio_reward_names_its_baseline(skill, words):
    rows = make_rows({**WORLD, "reward_model_sampling": (skill, 6e6)})
    last = write_conclusions(summarize(rows, FACTS), FACTS)[-1]
    assert last.startswith(REWARD_MODEL_SAMPLING_NOTE)
    assert words in last


def test_baseline_missing_or_not_called_for():
    rows = make_rows(without=["reward_model_sampling"])
    summary = summarize(rows, FACTS)
    assert "missing: reward_model_sampling" in write_conclusions(summary, FACTS)[-1]
    scalar = write_conclusions(summary, {**FACTS, "reward_kind": "scalar"})
    assert not any("obvious baseline" in line for line in scalar)


def test_overoptimization_is_reported(summary):
    assert report.NO_OVEROPTIMIZATION in report.describe_overoptimization(summary)
    turned = summarize(make_rows({**WORLD, "best_of_32": (0.45, 192e6)}), FACTS)
    assert "accuracy falls with more FLOPs: best_of_32" in report.describe_overoptimization(turned)
    assert report.NO_OVEROPTIMIZATION not in report.describe_overoptimization(turned)


def test_page_shows_tables_figures_and_provenance(written):
    page = (written / "report.md").read_text()
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert len(images) == 6
    for image in images:
        data = (written / image).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1080, 720)
        assert len(data) > 15_000  # an empty frame has a third of that
    assert FACTS["command"] in section(written, "Provenance")
    assert "torch: 2.13" in section(written, "Provenance")
    assert "`rows.jsonl`" in section(written, "Files")
    assert "sft (lora, β = 1), 9.2 GFLOPs in 61.5 s" in section(written, TRADE)
    assert not list(written.rglob("*.tmp*"))


def test_what_is_not_there_is_named_and_its_old_figure_removed(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "break_even.png").write_bytes(b"of an earlier run")
    few = make_rows(without=[name for name in WORLD if name not in ("greedy", "best_of_16")])
    report.write_report_files(tmp_path, few, {**FACTS, "audit": None})
    assert sorted(path.stem for path in (tmp_path / "plots").iterdir()) == ["accuracy_flops", "accuracy_seconds"]
    absent = section(tmp_path, "Plots").split("Not drawn, because rows or facts are missing: ")[1]
    assert "Reward over rounds" in absent and "Break-even" in absent and "Accuracy against FLOPs" not in absent
    assert section(tmp_path, TRADE).strip() == "Missing: no trained policy was evaluated."
    assert "nabla" in section(tmp_path, "Conclusions").split("Missing, and so not compared: ")[1]
    assert "not audited" in section(tmp_path, "Over-optimization of the reward")


def test_nothing_is_written_from_rows_or_facts_that_are_refused(tmp_path):
    rows = make_rows()
    with pytest.raises(ValueError, match="no row for method 'reward_model_sampling', problem 'p59', seed 1"):
        report.write_report_files(tmp_path / "a", rows[:-1], FACTS)
    with pytest.raises(ValueError, match="facts lack policy"):
        report.write_report_files(tmp_path / "a", rows, {key: one for key, one in FACTS.items() if key != "policy"})
    with pytest.raises(ValueError, match=r"facts hold values that cannot be read: seeds \(7\)"):
        report.write_report_files(tmp_path / "a", rows, FACTS | {"seeds": 7})
    with pytest.raises(ValueError, match=r"unknown key audit\.verdict: it is now audit\.conclusion"):
        report.write_report_files(tmp_path / "a", rows, FACTS | {"audit": {"verdict": "Sound."}})
    assert not (tmp_path / "a").exists()


def test_terminal_table_fits_and_shows_every_method(summary):
    screen = io.StringIO()
    report.print_summary_table(summary, Console(file=screen, width=80))
    lines = screen.getvalue().splitlines()
    assert len(lines) == len(WORLD) + 1
    assert max(map(len, lines)) <= 80
    for method, line in zip(list_methods(summary), lines[1:], strict=True):
        assert line.startswith(method + " ")
        assert format_accuracy(summary, method) in line


def test_samples_alone_are_a_report_too(tmp_path):
    """Nothing is chosen from them, so no method has an accuracy; their errors are told all the same."""
    rows = make_rows({"samples_4": (0.0, 4e6)})
    rows = [replace(row, samples=[["1", True], ["2", False], ["2", False], [None, False]]) for row in rows]
    rows[0] = replace(rows[0], samples=[], error="too long")
    found = report.write_report_files(tmp_path, rows, FACTS)
    text = (tmp_path / "report.md").read_text()
    assert section(tmp_path, "Results").strip().startswith("Missing: no method that gives one answer was evaluated.")
    assert '<table class="headline">' not in (tmp_path / "report.html").read_text()
    assert f"1 method on {PROBLEMS} held-out problems" in text and f"Of {len(rows)} rows, 1 ended in an error" in text
    screen = io.StringIO()
    report.print_summary_table(found, Console(file=screen, width=80))
    heads, *lines = screen.getvalue().splitlines()
    assert heads.split() == ["samples", "of", "k", "pass@k", "[95%]", "maj@k", "[95%]"]
    assert [line.split()[:2] for line in lines] == [["base", "1"], ["base", "2"], ["base", "4"]]


def test_si():
    texts = [format_si(1.2e8, "FLOPs"), format_si(0.0113, "s"), format_si(999_900), format_si(0, "s")]
    assert texts == ["120 MFLOPs", "11.3 ms", "1 M", "0 s"]


def test_numbers_of_things_and_times_are_in_units_of_people():
    counts = [0.3, 3, 33.3, 718.4, 1797, 9999.4, 9999.6, 56_512, 999_600, 2.5e6, 1e9, 1.5e15]
    texts = ["0.3", "3", "33", "718", "1,797", "9,999", "10,000", "56,500", "1 million", "2.5 million", "1 billion"]
    assert [format_count(count) for count in counts] == [*texts, "1,500 trillion"]
    times = [0.0264, 61.5, 197.3, 5400, 9000, 4e6]
    assert [format_seconds(time) for time in times] == ["26.4 ms", "61.5 s", "3.29 min", "90 min", "2.5 h", "1,111 h"]


def test_report_loads_no_heavy_library():
    code = (
        "import sys, nabla_trl.report.text; assert not {'torch', 'matplotlib'} & sys.modules.keys();"
        "import nabla_trl.report.plots.figures; assert not {'torch', 'matplotlib.pyplot'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
