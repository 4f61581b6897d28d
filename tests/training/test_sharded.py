"""Sharded training on CPUs: weights are really divided, and the result is that of one process with the same batch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nabla_trl.models.loading import load_policy

ROOT = Path(__file__).parents[2]
SIZES = ["--max_train_problems", "8", "--max_eval_problems", "4", "--max_audit_problems", "0", "--seeds", "0"]
STEPS = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1"]
SEARCH = ["--max_rounds", "3", "--min_p", "0.02", "--candidate_min_p", "0.02", "--max_new_tokens", "40"]
METHODS = ["sft", "dpo", "rloo"]
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

pytestmark = pytest.mark.slow


def run(folder: Path, *options: str, config: str = "", processes: int = 2) -> str:
    """Run the recipe, sharded over processes or (without a configuration of accelerate) in one process."""
    recipe = ["recipes/distill.py", "--config", "recipes/tiny/logratio.yaml", "--output_dir", str(folder)]
    command = [sys.executable]
    if config:
        # Without a GPU there is no mixed precision.
        text = (
            (ROOT / "recipes/accelerate" / config)
            .read_text()
            .replace("mixed_precision: bf16", 'mixed_precision: "no"')
        )
        file = folder.parent / config
        file.write_text(text)
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
        command += [
            *launch,
            "--num_processes",
            str(processes),
            "tests/sharded_launch.py",
            str(folder / "report.jsonl"),
        ]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [*command, *recipe, *SIZES, *STEPS, *SEARCH, "--eval_methods", "greedy", "--warmup_steps", "0", *options],
        cwd=ROOT,
        env=environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        text=True,
        capture_output=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    run(folder, "--stages", "traces")
    return folder


def copy_traces(traces: Path, folder: Path) -> Path:
    folder.mkdir()
    shutil.copytree(traces / "traces", folder / "traces")
    return folder


def read_weights(run_dir: Path, method: str) -> dict[str, torch.Tensor]:
    (file,) = (run_dir / "trained" / method).glob("*/*.safetensors")
    return load_file(file)


def read_losses(run_dir: Path, method: str) -> list[float]:
    lines = (run_dir / "trained" / method / "log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("config", ["fsdp2.yaml", pytest.param("deepspeed_zero3.yaml", marks=needs_deepspeed)])
def test_sharded_training_is_sharded_and_goes_on_bit_for_bit(
    config: str, tuning: str, traces: Path, tmp_path: Path
) -> None:
    options = ["--stages", "train", "--tuning", tuning, "--train_methods"]
    batch = ["--per_device_train_batch_size", "4", "--num_generations", "4"]
    whole = copy_traces(traces, tmp_path / "whole")
    run(whole, *options, *METHODS, *batch, config=config)
    reports = [json.loads(line) for line in (whole / "report.jsonl").read_text().splitlines()]
    assert len(reports) == 2 * len(METHODS), "each method in each process"
    for report in reports:
        if config == "fsdp2.yaml":
            assert report["dtensors"] == report["parameters"]
        else:
            assert report["ds_ids"] == report["parameters"]
        assert 0.4 < report["local_numel"] / report["numel"] < 0.65, report
    # A run that was stopped after the checkpoint of step 2 ends with the same weights.
    parts = copy_traces(whole, tmp_path / "parts")
    for method in METHODS:
        shutil.copytree(whole / "trained" / method, parts / "trained" / method)
        for name in ("adapter", "model", "trainer/checkpoint-4"):
            shutil.rmtree(parts / "trained" / method / name, ignore_errors=True)
        (parts / "trained" / method / "train.json").unlink()
    run(parts, *options, *METHODS, *batch, config=config)
    for method in METHODS:
        resumed, expected = read_weights(parts, method), read_weights(whole, method)
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[name], expected[name]) for name in resumed), method
    # One process with the same batches takes similar steps. Losses are averaged over processes in another way.
    single = copy_traces(traces, tmp_path / "single")
    run(single, *options, "sft", "--per_device_train_batch_size", "8")
    losses = read_losses(single, "sft")
    assert len(losses) == 4 and read_losses(whole, "sft") == pytest.approx(losses, rel=0.1)
    # What is written is a policy, and a tied head is written once.
    trained = whole / "trained/sft" / ("model" if tuning == "full" else "adapter")
    if tuning == "full":
        load_policy(str(trained))
        assert "lm_head.weight" not in read_weights(whole, "sft")
    else:
        load_policy(str(ROOT / "data/tiny/policy"), adapter=str(trained))
