"""The plan's memory is that of real trainings, and nothing is loaded to make it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from transformers import AutoConfig, AutoModelForCausalLM

from nabla_trl.cli.main import main
from nabla_trl.models.loading import load_policy
from nabla_trl.planning.memory import build_empty_model, count_params, measure_shape, plan_memory
from nabla_trl.planning.plan import Hardware, Workload, make_plan
from nabla_trl.search.config import SharedBudget
from nabla_trl.training.peft import LoraArguments

LORA = LoraArguments(lora_r=4)
WORKLOAD = Workload("sft", 100, 20, 40, 4, 4, 1.0)


def hardware(memory: float, num_devices: int = 1) -> Hardware:
    return Hardware(num_devices, memory, flops=1e12, bandwidth=1e11, utilization=0.5)


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_an_empty_model_has_the_size_of_the_real_one(architecture: str, bases: dict[str, str]) -> None:
    real = load_policy(bases[architecture])
    shape = measure_shape(bases[architecture], tuning="full", dtype="float32", lora=LORA)
    assert shape.size == real.size and shape.num_params == count_params(real.model)
    empty = build_empty_model(bases[architecture], dtype="float32")
    assert all(weight.is_meta for weight in empty.parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_activations_are_what_autograd_saves(architecture: str, bases: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases[architecture]).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model.base_model(input_ids=torch.zeros(2, 50, dtype=torch.long), use_cache=False)
    shape = measure_shape(bases[architecture], tuning="full", dtype="float32", lora=LORA)
    assert shape.saved_bytes == pytest.approx(sum(storages.values()) / 100, rel=0.15)


@pytest.mark.parametrize(
    ("family", "options", "kv_bytes"),
    [
        ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "expand": 2, "n_groups": 1}, 0),
        ("bloom", {"n_head": 4, "n_layer": 2}, 2 * 2 * 32 * 2),
        ("mixtral", {"num_local_experts": 4, "intermediate_size": 64, "head_dim": 8}, 2 * 2 * 2 * 8 * 2),
    ],
)
def test_layers_of_other_kinds(family: str, options: dict[str, Any], kv_bytes: int, tmp_path: Path) -> None:
    """Without attention, with position biases, and with expert weights that PEFT does not adapt without data."""
    size = {"vocab_size": 27, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": None}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if family == "mixtral" else {}
    AutoConfig.for_model(family, **size, **heads, **options).save_pretrained(tmp_path)
    for tuning in ("lora", "full"):
        shape = measure_shape(str(tmp_path), tuning=tuning, dtype="bfloat16", lora=LoraArguments())
        assert shape.kv_bytes == kv_bytes and shape.saved_bytes > 0
        assert (shape.adapter_params > 0) == (tuning == "lora")
    reward = f"logratio:{tmp_path}"
    assert main(["plan", "--policy", str(tmp_path), "--reward", reward, "--gpus", "2", "--memory", "80"]) == 0


def test_sharding_divides_what_is_trained(bases: dict[str, str]) -> None:
    shape = measure_shape(bases["llama"], tuning="full", dtype="float32", lora=LORA)
    common: dict[str, Any] = {
        "method": "dpo",
        "tuning": "full",
        "dtype": "float32",
        "batch_size": 2,
        "num_tokens": 60,
        "activation_checkpointing": False,
        "frozen_params": 0,
    }
    one = plan_memory(shape, sharding="ddp", num_processes=1, **common)
    four = plan_memory(shape, sharding="fsdp2", num_processes=4, **common)
    assert one.weights == one.gradients == one.reference == 4 * shape.num_params
    assert one.optimizer == 8 * shape.num_params
    assert (four.weights, four.optimizer) == (one.weights / 4, one.optimizer / 4)
    assert four.activations == one.activations, "a batch is per process"
    assert plan_memory(shape, sharding="ddp", num_processes=4, **common).gradients == 2 * one.gradients


def test_what_does_not_fit_is_said(bases: dict[str, str]) -> None:
    def plan(memory: float, devices: int = 1) -> tuple:
        options = {"dtype": "float32", "lora": LORA, "activation_checkpointing": True}
        return make_plan(bases["llama"], f"logratio:{bases['qwen3']}", WORKLOAD, hardware(memory, devices), **options)

    launches, costs = plan(1e9)
    assert [launch.sharding for launch in launches] == ["ddp", "ddp"]
    assert all(launch.max_batch_size > 10 for launch in launches)
    assert [cost.stage for cost in costs] == ["traces", "sft, lora", "sft, full"]
    assert costs[1].flops < costs[2].flops and all(0 < cost.hours < 1 for cost in costs)
    assert {launch.sharding for launch in plan(1e9, 8)[0]} == {"ddp", "fsdp2", "zero3"}
    assert all(launch.max_batch_size == 0 for launch in plan(1e5)[0])


def test_a_shared_budget_is_what_the_traces_cost(bases: dict[str, str]) -> None:
    def plan(shared_flops: float, memory: float = 1e9, num_problems: int = 100) -> tuple[float, float]:
        workload = replace(WORKLOAD, budget=SharedBudget(shared_flops, 50), num_problems=num_problems)
        options = {"dtype": "float32", "lora": LORA, "activation_checkpointing": True}
        cost = make_plan(bases["llama"], f"logratio:{bases['qwen3']}", workload, hardware(memory), **options)[1][0]
        return cost.flops, cost.hours

    assert plan(0.0, 1e6)[1] < math.inf, "nothing is shared"
    flops, hours = plan(1e9)
    assert flops == pytest.approx(100 * 1e9) and plan(2e9)[1] > hours
    assert 0 < plan(1.0)[0] < plan(0.0)[0], "first responses are drawn whatever they cost"
    assert math.isinf(plan(1e9, 1e6)[1]), "50 responses at a time do not fit"
    assert plan(1e9, 1e6, num_problems=1)[1] < math.inf, "no budget has more problems than there are"


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--policy", "data/tiny/policy", "--reward", "data/tiny/reward", "--gpus", "8", "--memory", "80"]
    assert main(["plan", *options, "--train_method", "rloo"]) == 0
    out = capsys.readouterr().out
    assert "rloo on 8 × 80 GB" in out and "| full | zero3 |" in out and "| traces |" in out
    assert main(["plan", *options, "--train_method", "best"]) == 2
    assert main(["plan", "--policy", "nowhere/at-all", *options[2:]]) == 2
    assert "nowhere/at-all" in capsys.readouterr().err


MEASUREMENT = """
import json, sys, threading, time
import psutil
from collections import Counter
from trl import SFTConfig
from pathlib import Path
from nabla_trl.traces.datasets import TrainingRows
from nabla_trl.training.offline import train_on_traces
from nabla_trl.training.peft import LoraArguments
policy, tuning, batch, length, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5])
def train(policy, batch, length, name):
    rows = [{"input_ids": [4] * length, "labels": [4] * length} for _ in range(batch)]
    config = SFTConfig(str(out / name), max_steps=2, per_device_train_batch_size=batch, use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True, max_length=None)
    train_on_traces("sft", policy, TrainingRows(rows, Counter()), out / name / "out", beta=1.0, tuning=tuning,
        lora=LoraArguments(lora_r=4), config=config, dtype="float32")
def resident():
    info = psutil.Process().memory_info()
    return info.rss - info.shared  # pages of files, such as the weights on disk, are no part of the plan
train(policy + "-small", 1, 16, "warm-up")  # imports and buffers of the libraries are no part of the plan
before, peak, done = resident(), [0], False
def watch():
    while not done:
        peak[0] = max(peak[0], resident())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
train(policy, batch, length, "run")
done = True
print(json.dumps({"bytes": peak[0] - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("batch", "length"), [(2, 128), (8, 256)])
def test_the_peak_of_a_training_is_as_planned(tuning: str, batch: int, length: int, tmp_path: Path) -> None:
    worlds.tiny_model("llama", width=512, layers=8, context=512, vocab=8000).save_pretrained(tmp_path / "policy")
    worlds.tiny_model("llama", vocab=8000).save_pretrained(tmp_path / "policy-small")
    for name in ("policy", "policy-small"):
        worlds.char_tokenizer().save_pretrained(tmp_path / name)
    shape = measure_shape(str(tmp_path / "policy"), tuning=tuning, dtype="float32", lora=LORA)
    plan = plan_memory(
        shape,
        method="sft",
        tuning=tuning,
        dtype="float32",
        sharding="ddp",
        num_processes=1,
        batch_size=batch,
        num_tokens=length,
        activation_checkpointing=False,
        frozen_params=0,
    )
    arguments = [str(tmp_path / "policy"), tuning, str(batch), str(length), str(tmp_path)]
    # glibc keeps what is freed, as fragments that an allocator of a GPU would use again.
    environ = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASUREMENT, *arguments]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600, env=environ)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])["bytes"]
    print(f"{tuning} {batch} x {length}: planned {plan.get_total() / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert 0.6 < measured / plan.get_total() < 1.4
