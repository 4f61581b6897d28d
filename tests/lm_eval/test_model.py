"""`lm_eval --model nabla` as a user runs it. Skipped where lm-eval is not installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from lm_eval_tasks import write_tasks

from nabla_trl.engine.logprobs import compute_token_logprobs
from nabla_trl.evaluation.results import load_results
from nabla_trl.lm_eval.harness import grade_log
from nabla_trl.models.loading import load_policy
from nabla_trl.tasks.registry import load_problems

pytest.importorskip("lm_eval.api", reason="lm-eval is not installed: pip install 'nabla-trl[lm-eval]'")

ROOT = Path(__file__).parents[2]
POLICY, REWARD = ROOT / "data/tiny/policy", ROOT / "data/tiny/reward"
LAST_NUMBER = (
    r'filter_list: [{name: last, filter: [{function: regex, regex_pattern: "#(\\d)"}, {function: take_first}]}]'
)


def run(folder: Path, tasks: str, model_args: str, *options: str) -> subprocess.CompletedProcess[str]:
    if not (folder / "data.jsonl").exists():
        problems = load_problems("digit_chains", split="test", max_problems=8)
        rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
        write_tasks(folder, rows, "tiny_chains", until=["++"], target="0", more=LAST_NUMBER)
    command = [sys.executable, "-m", "nabla_trl.lm_eval", "--model", "nabla", "--include_path", str(folder)]
    command += ["--model_args", f"policy={POLICY},reward={REWARD},{model_args}", "--tasks", tasks, *options]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)


def read_results(folder: Path) -> dict[str, Any]:
    [path] = folder.rglob("results_*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_methods_run_at_equal_flops_and_a_report_compares_them(tmp_path: Path) -> None:
    search = "candidate_min_p=0.02,log=log"
    for method in ("best_of_4", "nabla@best_of_4"):
        options = ["--apply_chat_template", "--batch_size", "auto", "--log_samples", "--output_path", method]
        result = run(tmp_path, "tiny_chains", f"method={method},{search}", *options)
        assert result.returncode == 0, result.stderr[-3000:]
        results = read_results(tmp_path / method)
        assert results["results"]["tiny_chains"]["exact_match,last"] > 0.3
        costs = results["config"]["nabla"]["costs"]["tiny_chains"]
        assert costs["answers"] == 8 and costs["flops_per_answer"] > 0 and results["config"]["nabla"]["seed"] == 1234
        assert grade_log(tmp_path / "log", tmp_path / method, method=method) == 8
    rows, _ = load_results(tmp_path / "log")
    means = [sum(row.flops for row in rows if row.method == name) for name in ("best_of_4", "nabla@best_of_4")]
    assert 0.6 < means[1] / means[0] < 1.1 and all(row.correct is not None for row in rows)
    result = run(tmp_path, "tiny_chains", f"method=best_of_4,beta=2,{search}")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(
        "error: log was made with other settings"
    )


@pytest.mark.slow
def test_multiple_choice_asks_for_the_policy_own_likelihoods(tmp_path: Path) -> None:
    result = run(tmp_path, "tiny_choice", "", "--log_samples", "--output_path", "out")
    assert result.returncode == 0, result.stderr[-3000:]
    [path] = (tmp_path / "out").rglob("samples_*.jsonl")
    policy = load_policy(str(POLICY))
    for sample in map(json.loads, path.read_text().splitlines()):
        for choice, [[likelihood, is_greedy]] in zip("37", sample["resps"], strict=True):
            ids = list(policy.tokenizer(f"{sample['doc']['question']}={choice}", add_special_tokens=True)["input_ids"])
            expected = compute_token_logprobs(policy, ids, 1)
            assert float(likelihood) == pytest.approx(expected.logprobs[-1], abs=1e-4)
            assert str(is_greedy) == str(expected.top[-1][0][0] == ids[-1])


def test_the_entry_point_names_the_registered_class() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'\[project.entry-points."lm_eval.models"\][^\n]*\nnabla = "(.+)"', text)
    assert match
    loaded = EntryPoint("nabla", match[1], "lm_eval.models").load()
    from lm_eval.api.registry import get_model

    assert get_model("nabla") is loaded
