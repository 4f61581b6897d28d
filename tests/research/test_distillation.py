"""The recipe that compares distillations: what a run means, and a whole comparison on a few problems."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import worlds

from nabla_trl import load_policy, load_problems
from nabla_trl.exporting.checkpoint import find_checkpoint
from nabla_trl.gradient.objectives import Sample
from nabla_trl.reward_training.data import write_samples
from nabla_trl.search.config import SearchConfig, SharedBudget
from nabla_trl.traces.storage import read_traces
from nabla_trl.training.peft import LoraArguments


def recipe() -> Any:
    return importlib.import_module("distillation")


def test_a_run_is_a_method_a_divergence_and_a_budget() -> None:
    parse = recipe().Run.parse
    assert parse("sft", 0.5).name == "sft-0.5T"
    assert parse("soft-targets:reverse_kl@0.25", 0.5).name == "soft-targets-reverse_kl-0.25T"
    assert parse("on-policy-distillation", 2).divergence == "reverse_kl"
    worlds.refused(lambda: parse("sfft", 1.0), "unknown method 'sfft'", "expert-iteration")
    worlds.refused(lambda: parse("rloo:forward_kl", 1.0), "rloo has no divergence")
    worlds.refused(lambda: parse("soft-targets:kl", 1.0), "divergence must be one of forward_kl, reverse_kl, not 'kl'")
    for budget in ("much", "0", "-1", "nan", "inf"):
        worlds.refused(lambda budget=budget: parse(f"sft@{budget}", 1.0), f"above 0, not {budget}")


def test_accuracies_are_compared_with_the_policy_itself_on_the_same_problems() -> None:
    def make_record(name: str, accuracy: int) -> dict[str, Any]:
        greedy = {str(number): float(number < accuracy) for number in range(40)}
        sampled = {problem: value / 2 for problem, value in greedy.items()}
        interval = {"value": accuracy / 40, "low": 0.0, "high": 1.0}
        flops = {"training_flops": 2e12, "search_flops": 1e12}
        return {"run": name, **flops, "greedy": interval, "sampled": interval, "values": [greedy, sampled]}

    records = [make_record("base", 10), make_record("sft", 30), make_record("rloo", 11)]
    _, _, base, sft, rloo = recipe().format_results(records, 4).splitlines()
    assert "p =" not in base and "| 2.00 | 3.00 | 0.250 [0.000, 1.000] |" in base
    assert "+0.500 [" in sft and "+0.250 [" in sft and sft.count("p = 0.000") == 2
    assert "+0.025 [" in rloo and rloo.count("p = 1.000") == 2  # adjusted for four comparisons


def test_stored_answers_are_graded_and_the_prompt_is_charged_once(tmp_path: Path) -> None:
    module, policy = recipe(), load_policy("data/tiny/policy")
    problems = load_problems("digit_chains", split="train", max_problems=3)
    samples = [
        Sample(problem, policy.encode(problem), policy.tokenizer.encode(f"#### {answer}", add_special_tokens=False))
        for problem in problems[:2]
        for answer in (problem.answer, "x")
    ]
    write_samples(tmp_path / "round-0.0.jsonl", samples)
    options = {"output_dir": "", "policy": "", "reward": "", "dataset": "digit_chains", "answers_dir": str(tmp_path)}

    def read(max_train_problems: int) -> list[Any]:
        args = module.DistillationArguments(**options, max_train_problems=max_train_problems)
        traces: list[Any] = module.DistillationStudy(
            args, LoraArguments(), SearchConfig(), SharedBudget()
        ).read_answers(policy)
        return traces

    traces = read(2)
    assert [(trace.seed, trace.correct) for trace in traces] == [(0, True), (1, False)] * 2
    assert traces[0].cost.tokens == {
        "policy/prefill": len(traces[0].prompt_ids) - 1,
        "policy/decode": len(traces[0].response_ids),
    }
    assert list(traces[1].cost.tokens) == ["policy/decode"]
    worlds.refused(lambda: read(3), "round-0.0.jsonl has no answers to 1 of 3 training problems")


@pytest.mark.slow
def test_runs_cost_what_they_may_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = "--max_train_problems 12 --max_eval_problems 6 --training_tflops 0.02 --train_batch_size 8"
    sizes += " --shared_flops 1.9e8"
    command = f"--config recipes/tiny/distillation.yaml --output_dir {tmp_path} {sizes} --runs soft-targets "
    command += "expert-iteration on-policy-distillation"
    module = recipe()
    module.main(command.split())
    records = json.loads((tmp_path / "distillation.json").read_text())
    assert [record["run"] for record in records] == [
        "base",
        "soft-targets-forward_kl-0.02T",
        "expert-iteration-0.02T",
        "on-policy-distillation-reverse_kl-0.02T",
    ]
    assert all(0.014e12 < record["training_flops"] < 0.026e12 for record in records[1:])
    stored = sum(trace.cost.flops for trace in read_traces(tmp_path / "traces"))
    assert [record["search_flops"] for record in records] == [0, stored, 0, 0] and 0 < stored < 1.1 * 12 * 1.9e8
    assert all(len(values) == 6 for record in records for values in record["values"])
    checkpoint = find_checkpoint(tmp_path / "on-policy-distillation-reverse_kl-0.02T", None)
    assert {row.method for row in checkpoint.rows} == {
        *("greedy", "on_policy_distillation_greedy", "samples_4", "on_policy_distillation_samples_4"),
    }
    monkeypatch.setattr(module, "train", None)
    module.main(command.split())
    assert json.loads((tmp_path / "distillation.json").read_text()) == records
