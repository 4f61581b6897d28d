"""Evaluation, report and audit from Python, with models in memory."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import worlds

from nabla_trl import (
    EvaluationResult,
    SearchConfig,
    audit_reward,
    disable_progress,
    enable_progress,
    evaluate,
    load_problems,
    load_reward,
    write_report,
)
from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.models.policy import Policy
from nabla_trl.pipeline.models import ModelPair
from nabla_trl.rewards.reward import Reward
from nabla_trl.utils import progress

CONFIG = {"max_rounds": 2, "max_new_tokens": 6}
ROWS = [{"question": f"{n}+{n}", "answer": str(2 * n % 10)} for n in range(1, 4)]


def by_length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def result(policy: Policy, scalar_reward: Reward) -> EvaluationResult:
    options: dict[str, Any] = {"seeds": [0], "config": CONFIG, "show_progress": False}
    return evaluate(ROWS, policy, scalar_reward, methods=["greedy", "best_of_2", "nabla", "control"], **options)


def test_a_result_prints_as_a_table_and_compares_methods(result: EvaluationResult) -> None:
    lines = str(result).splitlines()
    assert lines[0].split()[0] == "method" and {line.split()[0] for line in lines[1:]} >= {"greedy", "nabla"}
    assert result.methods[0] == "greedy" and len(result.rows) == 12 == len(result.to_dicts())
    difference = result.compare("nabla", "best_of_2")
    assert difference.low <= difference.value <= difference.high and 0 <= difference.p_value <= 1
    assert result.compare("greedy", "nabla", "flops").value < 0
    assert 0 <= result.get_accuracy("nabla").value <= 1 and result._repr_html_().startswith("<pre>")
    worlds.refused(lambda: result.compare("nabla", "best_of_3"), "no rows of best_of_3 (did you mean best_of_2?)")
    worlds.refused(lambda: result.compare("nabla", "greedy", "accurcy"), "accurcy", "accuracy")


def test_a_report_of_a_result_in_memory_needs_a_folder(result: EvaluationResult, tmp_path: Path) -> None:
    worlds.refused(lambda: write_report(result), "give write_report an output_dir")
    summary = write_report(result, tmp_path / "page", dollars_per_gpu_hour=2.0)
    assert (tmp_path / "page" / "report.html").exists() and summary["accuracy.nabla"]["problems"] == 3
    assert write_report(tmp_path / "page").keys() <= summary.keys()
    worlds.refused(lambda: write_report(tmp_path), "holds no rows.jsonl")
    worlds.refused(lambda: write_report(3), "the result of evaluate or the folder of one, not int")  # type: ignore[arg-type]


def test_a_folder_keeps_its_rows_and_refuses_other_settings(
    policy: Policy, scalar_reward: Reward, tmp_path: Path
) -> None:
    def run(**options: Any) -> EvaluationResult:
        shared = {"output_dir": tmp_path, "seeds": [0], "config": CONFIG, "show_progress": False}
        return evaluate(ROWS, policy, scalar_reward, **{**shared, **options})

    first = run(methods="greedy")
    again = run(methods="greedy,best_of_2")
    assert [row for row in again.rows if row.method == "greedy"] == first.rows and len(again.rows) == 6
    worlds.refused(lambda: run(methods="greedy", config={**CONFIG, "top_k": 3}), "top_k '3' (was '0')")


def test_trained_policies_are_compared_with_the_base(policy: Policy, scalar_reward: Reward) -> None:
    def run(**options: Any) -> EvaluationResult:
        shared: dict[str, Any] = {"seeds": [0], "config": CONFIG, "show_progress": False, "tokenizer": None}
        return evaluate(ROWS[:2], policy, scalar_reward, **shared, **options)

    other = worlds.tiny_policy(seed=4)
    result = run(methods="greedy,sft_greedy", trained_policies={"sft": other})
    assert result.methods == ["greedy", "sft_greedy"]
    worlds.refused(lambda: run(methods="sft_greedy", trained_policies={"sft": policy}), "is the policy itself")
    worlds.refused(lambda: run(trained_policies={"stf": other}), "unknown label 'stf'", "did you mean sft?")
    worlds.refused(lambda: run(methods="greedy,sft_greedy"), "sft_greedy needs a policy trained by sft")


def test_a_function_serves_best_of_n_and_the_control_alone(policy: Policy) -> None:
    def run(**options: Any) -> EvaluationResult:
        return evaluate(ROWS[:2], policy, by_length, seeds=[0], config=CONFIG, show_progress=False, **options)

    result = run(methods=["greedy", "best_of_2", "weighted_best_of_2", "control"])
    assert result.facts["reward_kind"] == "function" and "by_length" in result.facts["reward"]
    assert all(row.error is None for row in result.rows)
    message = worlds.refused(lambda: run(methods="nabla,best_of_16,nabla@0.5,qalign,paper"), "a function has none")
    assert message.count("a function has none") == 3 and "qalign follows" not in message


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], {}, ["there are no problems"]),
        ([{"question": "1+1"}], {}, ["no problem has a gold answer"]),
        (ROWS, {"seeds": []}, ["seeds must be distinct values"]),
        (ROWS, {"methods": "best_off_4"}, ["unknown method 'best_off_4'"]),
        (ROWS, {"methods": []}, ["no methods"]),
        (ROWS, {"shard": "0/2"}, ["shard needs output_dir"]),
        (ROWS, {"metods": "greedy"}, ["unknown option 'metods'"]),
    ],
)
def test_what_is_wrong_is_one_line(
    policy: Policy, scalar_reward: Reward, rows: Any, options: dict[str, Any], words: list[str]
) -> None:
    worlds.refused(lambda: evaluate(rows, policy, scalar_reward, config=CONFIG, **options), *words)


def test_progress_and_messages_are_silenced_as_those_of_libraries(
    policy: Policy, scalar_reward: Reward, capsys: Any, caplog: Any
) -> None:
    rows = [*ROWS, {"question": "9"}]  # without a gold answer
    options: dict[str, Any] = {"methods": "greedy", "seeds": [0], "config": CONFIG}
    logger = logging.getLogger("nabla_trl")
    disable_progress()
    logger.setLevel(logging.ERROR)
    try:
        evaluate(rows, policy, scalar_reward, **options)
        assert capsys.readouterr() == ("", "") and caplog.text == ""
    finally:
        enable_progress()
        logger.setLevel(logging.NOTSET)
    evaluate(rows, policy, scalar_reward, **options)
    out, err = capsys.readouterr()
    assert out == "" and "greedy: 3 of 3" in err and "1 problem without a gold answer left out" in caplog.text


# --- audit ------------------------------------------------------------------------------------------------


def test_an_audit_is_a_dict_and_of_a_function_without_the_gradient(policy: Policy, tmp_path: Path) -> None:
    """The gold answers are those of some samples, so that a random policy is right now and then."""
    config: dict[str, Any] = {"max_new_tokens": 3, "max_rounds": 2, "solver": "none"}
    rows = [{"question": f"{n}+{n}", "answer": "0"} for n in range(1, 7)]
    sampling = SearchConfig(**config).get_sampling()
    reward = load_reward(by_length, policy=policy)
    pool = draw_pool(load_problems(rows), 6, policy=policy, reward=reward, sampling=sampling, seed=0)
    for row, entry in zip(rows, pool.entries, strict=True):
        row["answer"] = next((response.answer for response in entry.responses if response.answer), "0")
    file = tmp_path / "audit.json"
    options: dict[str, Any] = {"samples": 6, "config": config, "output_file": file, "over_optimization": True}
    audit = audit_reward(rows, policy, by_length, **options)
    assert 0 < audit["accuracy"] < 1 and audit["gradient"] is None
    assert list(audit["over_optimization"]["curves"]) == ["control"]
    assert json.loads(file.read_text())["conclusion"] == audit["conclusion"]


def test_audits_that_cannot_be_are_refused(policy: Policy, scalar_reward: Reward) -> None:
    def run(reward: Any = scalar_reward, **options: Any) -> Any:
        return lambda: audit_reward(ROWS, policy, reward, **options)

    worlds.refused(run(samples=1), "at least 2")
    worlds.refused(run(samples="8"), "samples must be a whole number, not '8'")
    worlds.refused(run(gradient=True, gradient_at=["soft"]), "gradient_at must be direct")
    worlds.refused(run(gradient=True, gradient_at="soft"), "not 'soft'")
    worlds.refused(run(config={"max_new_tokens": 2}, samples=2, output_fil="x"), "did you mean", "output_fil")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": 3}, ["methods are names", "not 3"]),
        ({"seeds": ["a"]}, ["a seed must be a whole number, not 'a'"]),
        ({"seeds": 1.5}, ["a seed must be a whole number, not 1.5"]),
        ({"seeds": []}, ["seeds must be distinct values"]),
        ({"max_problems": 0}, ["max_problems must be at least 1"]),
        ({"max_problems": "3"}, ["max_problems must be a whole number"]),
        ({"method": "greedy"}, ["unknown option 'method' (did you mean methods?)"]),
        ({"baseline_config": {"step_delimitr": "x"}}, ["baseline_config", "did you mean step_delimiter?"]),
        ({"dtype": "bfloat16", "device": "cuda"}, ["dtype and device: nothing is loaded by name here"]),
    ],
)
def test_wrong_types_are_named(
    policy: Policy, scalar_reward: Reward, options: dict[str, Any], words: list[str]
) -> None:
    worlds.refused(lambda: evaluate(ROWS, policy, scalar_reward, **{"config": CONFIG, **options}), *words)


def test_loading_of_models_and_trained_policies_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(progress, "_ANNOUNCE_SECONDS", 0.0)
    ModelPair("data/tiny/policy", "data/tiny/reward").load_trained_policy("data/tiny/clean")
    err = capsys.readouterr().err
    assert "loading the policy data/tiny/policy …" in err and "loading the trained policy data/tiny/clean …" in err
