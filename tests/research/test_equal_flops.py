"""Methods at equal FLOPs, from rows made up so that the right conclusion is known."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import equal_flops
import pytest
import step_curve
import worlds

from nabla_trl.evaluation.rows import Row

ROOT = Path(__file__).parents[2]
SHARES = {
    "nabla@best_of_4": 0.9,
    "best_of_4": 0.6,
    "control@best_of_4": 0.88,
    "nabla@best_of_8": 0.95,
    "best_of_8": 0.8,
}


def rows(shares: dict[str, float] = SHARES, problems: int = 100, seeds: int = 2) -> list[Row]:
    """Methods that solve the first so many problems; best-of-N costs 10 N, others as much as their budget."""
    made = []
    for method, share in shares.items():
        size = int(method.rpartition("_")[2])
        for problem in range(problems):
            for seed in range(seeds):
                made.append(
                    Row(
                        method=method,
                        task="t",
                        problem=f"p{problem}",
                        seed=seed,
                        correct=problem < share * problems,
                        reward=share,
                        flops=10.0 * size * (0.9 if "@" in method else 1.0),
                        seconds=0.1,
                        proposals=4 if "@" in method else 0,
                        proposals_accepted=1 if "@" in method else 0,
                    )
                )
    return made


def names(results: list[equal_flops.MethodResult]) -> list[str]:
    return [result.method for result in results]


BUDGETS = {
    "best_of_4": ["nabla@best_of_4", "best_of_4", "control@best_of_4"],
    "best_of_8": ["nabla@best_of_8", "best_of_8"],
}


def test_each_budget_compares_the_main_method_with_all_others() -> None:
    low, high = equal_flops.compare_at_equal_flops(rows(), BUDGETS)
    assert (low.reference_method, low.budget_flops, high.budget_flops) == ("best_of_4", 40.0, 80.0)
    ours, best, control = low.results
    assert ours.accuracy_lead is None and (ours.budget_fraction, ours.proposals_per_problem, ours.rejection_rate) == (
        pytest.approx(0.9),
        4.0,
        0.75,
    )
    assert (
        best.accuracy_lead.value == pytest.approx(0.3) and best.rejection_rate is None and best.budget_fraction == 1.0
    )
    assert control.accuracy_lead.value == pytest.approx(0.02)
    assert names(low.list_baselines(beaten=True)) == ["best_of_4"]
    assert names(low.list_baselines(beaten=False)) == ["control@best_of_4"]
    assert names(high.list_baselines(beaten=True)) == ["best_of_8"] and not high.list_baselines(beaten=False)
    json.dumps([one.to_dict() for one in (low, high)], allow_nan=False)


def test_the_conclusion_names_what_is_not_beaten_and_the_cheapest_budget() -> None:
    made = rows()
    said = equal_flops.conclude_comparison(equal_flops.compare_at_equal_flops(made, BUDGETS), made)
    assert said[0].startswith("best_of_4: nabla@best_of_4 is not ahead beyond chance of control@best_of_4 (+0.020")
    assert said[1] == "best_of_8: nabla@best_of_8 is ahead of all 1 others, every interval above zero"
    assert "nabla@best_of_4 scores 0.900, best_of_8 0.800" in said[2] and "at 0.45 of its FLOPs" in said[2]
    worse = rows(SHARES | {"best_of_8": 1.0})
    assert (
        equal_flops.conclude_comparison(equal_flops.compare_at_equal_flops(worse, BUDGETS), worse)[2]
        == "at no budget is nabla as good as best_of_8"
    )


def test_the_page_holds_every_figure() -> None:
    made = rows()
    text = equal_flops.format_comparison_markdown(
        equal_flops.compare_at_equal_flops(made, BUDGETS), made, "A title", "a command"
    )
    assert text.startswith("# A title\n\n100 problems, up to 2 seeds")
    assert "    a command" in text and text.count("| method |") == 2
    assert "| nabla@best_of_4 | 0.900 [" in text and "| 75% |" in text


def test_a_method_without_rows_is_named() -> None:
    worlds.refused(
        lambda: equal_flops.compare_at_equal_flops(rows(), {"best_of_4": ["nabla@best_of_4", "paper@best_of_4"]}),
        "paper@best_of_4",
    )


# --- the step ----------------------------------------------------------------------------------------------


def test_the_curve_of_the_step_tells_hacking_from_help(tmp_path: Path) -> None:
    shares = {"nabla_lambda_0.1@best_of_8": 0.5, "nabla_lambda_1@best_of_8": 0.9, "nabla_lambda_10@best_of_8": 0.3}
    made = rows(shares)
    made = [replace(row, reward=float(row.method.split("_")[2].partition("@")[0])) for row in made]
    names = {float(name.split("_")[2].partition("@")[0]): name for name in shares}
    curve = step_curve.compute_reward_weight_curve(made, names)
    assert [point.reward_weight for point in curve] == [0.1, 1.0, 10.0]
    said = step_curve.conclude_reward_weight_curve(curve)
    assert said.startswith("accuracy is highest, 0.900, at λ = 1; at λ = 10 it is 0.300") and said.endswith("hacked")
    assert "at no λ tried" in step_curve.conclude_reward_weight_curve(curve[:2])
    assert step_curve.format_curve_table(curve).count("\n") == 4
    step_curve.plot_reward_weight_curve(tmp_path / "plots" / "step.png", curve, "t, 100 problems")
    assert (tmp_path / "plots" / "step.png").stat().st_size > 10_000
    worlds.refused(
        lambda: step_curve.compute_reward_weight_curve(made, {3.0: "nabla_lambda_3@best_of_8"}), "nabla_lambda_3"
    )


# --- the recipe -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return importlib.import_module("compare")


def test_the_recipe_compares_on_the_embedded_world(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    argv = [
        "--config",
        "recipes/tiny/compare.yaml",
        "--output_dir",
        str(tmp_path),
        "--max_problems",
        "4",
        "--seeds",
        "0",
    ]
    argv += ["--best_of_n", "2", "4", "--baselines", "control", "shuffled", "paper", "tot"]
    argv += ["--reward_weights", "0.3", "3", "--step_delimiter", ";"]
    recipe.main(argv)
    page = (tmp_path / "compare.md").read_text()
    assert page in capsys.readouterr().out
    assert "## The reward weight" in page and (tmp_path / "step.png").exists()
    budgets = json.loads((tmp_path / "compare.json").read_text())
    assert [budget["reference_method"] for budget in budgets] == ["best_of_2", "best_of_4"]
    for budget in budgets:
        families = [entry["method"].partition("@")[0].rstrip("0123456789") for entry in budget["results"]]
        assert families[:5] == ["nabla", "best_of_", "weighted_best_of_", "self_consistency_", "greedy"]
        assert families[5:] == ["control", "shuffled", "paper", "tot"]
        costs = {entry["method"]: entry["budget_fraction"] for entry in budget["results"]}
        assert all(cost < 1.4 for method, cost in costs.items() if not method.startswith("paper"))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "rows").iterdir()}
    recipe.main(argv)  # nothing is made again
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "rows").iterdir()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--best_of_n", "1"], "best_of_n must be rising numbers"),
        (["--best_of_n", "8", "4"], "best_of_n must be rising numbers"),
        (["--baselines", "beam"], "unknown baseline 'beam'"),
        (["--seeds", "0", "0"], "seeds must be distinct"),
        (["--reward_weights", "0"], "reward_weights must be distinct positive numbers"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(
    options: list[str], words: str, recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["--config", "recipes/tiny/compare.yaml", "--output_dir", str(tmp_path / "out"), *options]
    worlds.refused(lambda: recipe.main(argv), words)
    assert not (tmp_path / "out").exists()
