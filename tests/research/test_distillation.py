"""The recipe that compares distillations: what a run means, and a whole comparison on a few problems."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import worlds

from nabla_trl.traces.storage import read_traces


def recipe() -> Any:
    return importlib.import_module("distillation")


def test_a_run_is_a_method_a_divergence_and_a_budget() -> None:
    parse = recipe().Run.parse
    assert parse("sft", 0.5).name == "sft-0.5T"
    assert parse("soft-targets:reverse_kl@0.25", 0.5).name == "soft-targets-reverse_kl-0.25T"
    assert parse("on-policy-distillation", 2).divergence == "reverse_kl"
    worlds.refused(lambda: parse("sfft", 1.0), "unknown method 'sfft'", "expert-iteration")
    worlds.refused(lambda: parse("rloo:forward_kl", 1.0), "rloo has no divergence")


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
        "soft-targets-forward_kl-0.02T",
        "expert-iteration-0.02T",
        "on-policy-distillation-reverse_kl-0.02T",
    ]
    assert all(0.014e12 < record["training_flops"] < 0.026e12 for record in records)
    stored = sum(trace.cost.flops for trace in read_traces(tmp_path / "traces"))
    assert [record["search_flops"] for record in records] == [stored, 0, 0] and 0 < stored < 1.1 * 12 * 1.9e8
    monkeypatch.setattr(module, "train", None)
    module.main(command.split())
    assert json.loads((tmp_path / "distillation.json").read_text()) == records
