"""Training from Python and from the shell: traces and models in memory or by name, resumed, refused at once."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from peft import LoraConfig, get_peft_model

import nabla_trl
from nabla_trl.cli.commands.train import main as run_command
from nabla_trl.cli.main import main
from nabla_trl.cli.parsing import UsageError
from nabla_trl.exporting.checkpoint import check_weight_files, find_checkpoint
from nabla_trl.models.policy import Policy
from nabla_trl.pipeline.train import _split_config
from nabla_trl.planning.machine import Machine
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.loop import run_search
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter
from nabla_trl.training.peft import LoraArguments

CONFIG = {"use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3}
LORA = {"r": 4, "lora_alpha": 8}
pytestmark = pytest.mark.usefixtures("little_to_collect")


@pytest.fixture(scope="module")
def traces(policy: Policy, scalar_reward: Reward) -> list[Trace]:
    config = worlds.search_config(max_rounds=6, max_new_tokens=8)
    searched = run_search(worlds.tiny_problems(), policy=policy, reward=scalar_reward, config=config)
    for trace in searched:
        trace.finished = trace.finished or bool(trace.response_ids)
    return searched


def train(*args: Any, **options: Any) -> Any:
    return nabla_trl.train(*args, **{"config": CONFIG, "lora": LORA, **options})


def test_a_model_and_traces_in_memory_become_a_run(
    policy: Policy, traces: list[Trace], tmp_path: Path, caplog: Any
) -> None:
    """The model stays as it is, the adapter finds a copy of it, and the same call goes on or returns the record."""
    before = [weight.clone() for weight in policy.model.parameters()]
    with caplog.at_level(logging.INFO, logger="nabla_trl"):
        result = train("sft", policy.model, traces, tokenizer=policy.tokenizer, output_dir=tmp_path)
        again = train("sft", policy.model, traces, tokenizer=policy.tokenizer, output_dir=tmp_path)
    assert result == again and (result.method, result.steps, result.tuning) == ("sft", 2, "lora")
    assert "train sft: already done" in caplog.messages
    assert all(torch.equal(old, new) for old, new in zip(before, policy.model.parameters(), strict=True))
    assert not hasattr(policy.model, "peft_config")
    adapter = tmp_path / "trained/sft/adapter"
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    trained = nabla_trl.load_policy(base, adapter=str(adapter))
    assert trained.tokenizer_hash == policy.tokenizer_hash
    worlds.refused(
        lambda: train("sft", policy.model, traces[:1], tokenizer=policy.tokenizer, output_dir=tmp_path),
        "holds other traces than these",
    )
    twice = [traces[0], traces[0]]
    worlds.refused(
        lambda: train("sft", policy.model, twice, tokenizer=policy.tokenizer, output_dir=tmp_path / "twice"),
        "2 traces are of problem",
        "a seed of its own",
    )
    assert not (tmp_path / "twice").exists()
    worlds.refused(
        lambda: train(
            "sft",
            policy.model,
            traces,
            tokenizer=policy.tokenizer,
            output_dir=tmp_path,
            lora=LoraConfig(r=2, target_modules=["q_proj"]),
        ),
        "made with other settings",
        "lora_r '2' (was '4')",
    )


def test_a_function_is_enough_of_a_reward_for_online_training(policy: Policy, tmp_path: Path) -> None:
    calls: list[int] = []

    def count_fives(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [float(sum(ids) % 5) for ids in completion_ids]

    rows = [{"question": problem.question, "answer": "1"} for problem in worlds.tiny_problems()]
    config = {**CONFIG, "num_generations": 4, "max_steps": 2, "epsilon": 0.3}
    options = {"reward": count_fives, "search": {"max_new_tokens": 4, "beta": 0.5}, "tokenizer": policy.tokenizer}
    result = train("rloo", policy.model, rows, output_dir=tmp_path, config=config, **options)
    assert sum(calls) == 8 and (result.beta, result.method_metrics["responses"]) == (0.5, 8.0)
    settings = json.loads((tmp_path / "trained/rloo/settings.json").read_text())
    assert settings["epsilon"] == "0.3"


@pytest.mark.parametrize(
    ("method", "data", "options", "words"),
    [
        ("sfft", [], {}, ["unknown training method 'sfft' (did you mean sft?)"]),
        ("rloo", [{"question": "1+1"}], {}, ["rloo needs a reward to maximize"]),
        ("sft", [{"question": "1+1"}], {}, ["learns from traces, which generate_traces makes, and got dict"]),
        ("dpo", "nowhere", {}, ["nowhere holds no traces to train dpo on"]),
        (
            "sft",
            [],
            {"config": {"learning_rat": 1}},
            ["config: unknown key 'learning_rat' (did you mean learning_rate?)"],
        ),
        ("sft", [], {"config": {**CONFIG, "epsilon": 0.2}}, ["epsilon belongs to rloo and grpo"]),
        (
            "on-policy-distillation",
            [{"question": "1+1"}],
            {"search": {"solver": "none"}, "config": {**CONFIG, "online_reward": "verifier"}},
            ["solver none has none", "online_reward must be reward, not verifier", "needs a reward with a gradient"],
        ),
        (
            "on-policy-distillation",
            [{"question": "1+1"}],
            {},
            ["on-policy-distillation needs a reward with a gradient"],
        ),
        (
            "on-policy-distillation",
            [{"question": "1+1"}],
            {"reward": len, "search": {"solver": "ste"}},
            ["a function has none, so train by rloo or grpo", "solver ste has none"],
        ),
        ("sft", [], {"lora": {"rank": 4}}, ["lora: unknown key 'rank'"]),
        ("sft", [], {"dtyp": "float32"}, ["unknown option 'dtyp' (did you mean dtype?)"]),
        ("sft", [], {"lora": 3}, ["lora is LoraArguments, a mapping of its options or a LoraConfig, not 3"]),
        ("sft", [], {"adapter": "x"}, ["train takes no adapter"]),
        ("sft", [], {"split_": "x"}, ["unknown option 'split_' (did you mean split?)"]),
        ("sft", [], {"max_rounds": 2}, ["it is an option of the search, as in search={'max_rounds': …}"]),
        (3, [], {}, ["unknown training method 3"]),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_no_folder(
    method: str, data: Any, options: dict[str, Any], words: list[str], tmp_path: Path, bases: dict[str, str]
) -> None:
    message = worlds.refused(
        lambda: train(method, bases["llama"], data, output_dir=tmp_path / "new", **options), *words
    )
    assert "unknown training method" not in message or "problems" not in message  # a wrong second reason
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["plain", pytest.param("peft", marks=pytest.mark.slow)])
def test_what_was_trained_from_a_model_in_memory_is_evaluated_and_exported(
    kind: str, policy: Policy, scalar_reward: Reward, traces: list[Trace], tmp_path: Path
) -> None:
    """The adapter belongs to the copy of the model in the folder of the run."""
    model: Any = deepcopy(policy.model).to(torch.bfloat16)
    if kind == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    run = tmp_path / "run"
    train("sft", model, traces, tokenizer=policy.tokenizer, output_dir=run, config={**CONFIG, "bf16": True})
    rows = [{"question": problem.question, "answer": "1"} for problem in worlds.tiny_problems()]
    options: dict[str, Any] = {"seeds": [0], "config": {"max_new_tokens": 4}, "show_progress": False}
    names = {"tokenizer": policy.tokenizer, "output_dir": run}
    nabla_trl.evaluate(rows, model, scalar_reward, methods="greedy,sft_greedy", **names, **options)
    checkpoint = find_checkpoint(run, "sft")
    check_weight_files(checkpoint)
    assert Path(checkpoint.base_policy).parent == run
    other: Any = worlds.tiny_model(seed=7)
    other.name_or_path = str(tmp_path)
    words = ["was made for", str(checkpoint.base_policy)]
    adapter = str(run / "trained/sft/adapter")
    worlds.refused(lambda: nabla_trl.load_policy(other, policy.tokenizer, adapter=adapter), *words)
    if kind == "peft":
        result = nabla_trl.export(run, tmp_path / "exported", merge=True)
        assert nabla_trl.load_policy(str(result.output_dir / "merged")).tokenizer_hash == policy.tokenizer_hash


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [("bfloat16", {}, True), ("bfloat16", {"tuning": "full"}, False), ("float32", {}, False)],
)
def test_an_adapter_of_a_policy_in_bfloat16_is_trained_in_mixed_precision(
    dtype: str, given: dict[str, Any], expected: bool
) -> None:
    machine = Machine("cpu", memory=1e9, has_bfloat16=False, num_processes=1, num_gpus=0)
    _, trainer, _, _ = _split_config({"use_cpu": True, **given}, Path("out"), machine, dtype)
    assert trainer.bf16 is expected


def test_all_faults_of_a_training_are_one_refusal_before_anything_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    """Options, methods, models, data, traces, β, groups, memory, the folder and what reports: nothing is written."""
    (tmp_path / "file").touch()
    command = ["--traces_dir", str(tmp_path), "--output_dir", str(tmp_path / "file" / "out"), "--max_ruonds", "3"]
    command += ["--policy", "data/tiny/policy", "--reward", "data/tiny/clean", "--max_new_tokens", "4000"]
    command += ["--dataset", str(tmp_path / "nope.jsonl"), "--train_methods", "sft", "rlooo", "grpo", "--beta", "1e9"]
    command += ["--per_device_train_batch_size", "8", "--num_generations", "7", "--sft_selection", "samples"]
    command += [
        "--report_to",
        "no_such_service",
        "--push_to_hub",
        "true",
        "--solver.steps",
        "3",
        "--label_smoothing",
        "1",
    ]
    monkeypatch.setattr("nabla_trl.models.loading.pretrained.load_model", None)
    with pytest.raises(UsageError) as caught:
        run_command(command)
    lines = caught.value.lines
    for words in (
        "unknown option --max_ruonds (did you mean --max_rounds?)",
        "unknown training method 'rlooo' (did you mean rloo?)",
        "steps belongs to ste: add --solver ste",
        "beta must be from",
        "holds no traces to train sft on",
        "nope.jsonl: No such file",
        "data/tiny/clean is a causal LM",
        "max_new_tokens 4000 is more than data/tiny/policy can write",
        "are not whole groups of num_generations 7",
        "sft_selection samples takes samples of π*",
        "label_smoothing belongs to dpo",
        "report_to no_such_service is unknown",
        "push_to_hub needs hub_model_id",
        f"{tmp_path / 'file'} is a file",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_traces_of_another_tokenizer_are_refused_before_anything_is_written(
    traces: list[Trace], tmp_path: Path
) -> None:
    with TraceWriter(tmp_path / "run/traces", chunk_size=len(traces)) as writer:
        for trace in traces:
            writer.add(trace)
    worlds.refused(
        lambda: train("sft", "data/tiny/policy", tmp_path / "run", output_dir=tmp_path / "out"),
        "was made with another tokenizer",
    )
    assert not (tmp_path / "out").exists()


def test_soft_targets_are_recorded_and_trained_on_from_python(
    policy: Policy, scalar_reward: Reward, traces: list[Trace], tmp_path: Path
) -> None:
    """Traces without them are refused before anything is written. The divergence is a setting of these methods."""
    shared: dict[str, Any] = {"tokenizer": policy.tokenizer, "output_dir": tmp_path / "out"}
    worlds.refused(
        lambda: train("soft-targets", policy.model, traces, **shared),
        "soft-targets needs refined distributions in the traces",
    )
    assert not (tmp_path / "out").exists()
    config = worlds.search_config(max_rounds=2, max_new_tokens=6, soft_target_top_k=4)
    recorded = run_search(worlds.tiny_problems(), policy=policy, reward=scalar_reward, config=config)
    result = train("soft-targets", policy.model, recorded, **shared)
    assert result.rows == sum(len(trace.soft_targets) for trace in recorded) and result.beta is None
    settings = json.loads((tmp_path / "out/trained/soft-targets/settings.json").read_text())
    assert settings["divergence"] == "forward_kl"
    worlds.refused(
        lambda: train("soft-targets", policy.model, recorded, config={**CONFIG, "divergence": "reverse_kl"}, **shared),
        "divergence 'reverse_kl' (was 'forward_kl')",
    )


@pytest.mark.slow
def test_the_shell_trains_on_the_traces_of_a_folder(
    policy: Policy, traces: list[Trace], tmp_path: Path, capsys: Any
) -> None:
    """Policy and β are those of the traces. A method is added later, and finished ones are skipped."""
    worlds.save(tmp_path / "policy", policy.model, policy.tokenizer)
    with TraceWriter(tmp_path / "run/traces", chunk_size=len(traces)) as writer:
        for trace in traces:
            writer.add(trace)
    settings = {"policy": str(tmp_path / "policy"), "beta": "0.25"}
    (tmp_path / "run/traces.settings.json").write_text(json.dumps(settings))
    flags = ["--use_cpu", "true", "--bf16", "false", "--max_steps", "2", "--lora_r", "4", "--warmup_steps", "0"]
    command = ["train", "--traces_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "out"), *flags]
    assert main([*command, "--train_methods", "reward-weighted"]) == 0
    out = capsys.readouterr().out
    assert "train reward-weighted: learning_rate 0.0002" in out and "beta 1" not in out
    record = json.loads((tmp_path / "out/trained/reward-weighted/train.json").read_text())
    assert record["beta"] == 0.25 and record["rows"] > 0
    assert main([*command, "--train_methods", "reward-weighted", "sft"]) == 0
    out = capsys.readouterr().out
    assert "train reward-weighted: already done" in out and (tmp_path / "out/trained/sft/adapter").is_dir()
    assert main(["train", "--train_methods", "sft", *flags]) == 2
    assert "give --output_dir, or --traces_dir" in capsys.readouterr().err


def test_the_shell_names_everything_that_is_wrong_with_a_training_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--policy", f"{tmp_path}/no", "--dataset", f"{tmp_path}/no.jsonl", "--traces_dir", f"{tmp_path}/none"]
    wrong += ["--train_methods", "sft", "ppo", "grpo", "--num_generations", "1", "--lora_r", "0", "--dtype", "int4"]
    wrong += ["--report_to", "wandbb", "--learning_rate", "-1", "--per_device_train_batch_size", "0", "--beta", "0"]
    wrong += ["--max_length", "-4"]
    assert main(["train", *wrong, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    for word in (
        "ppo",
        "int4",
        "wandbb",
        "no.jsonl",
        "none holds no traces",
        "grpo needs a reward",
        f"{tmp_path}/no'",
    ):
        assert word in error
    for name in ("num_generations", "lora_r", "learning_rate", "per_device_train_batch_size", "beta", "max_length"):
        assert f"error: {name} must be " in error
    assert "13 faults" in error and not (tmp_path / "out").exists()
    assert main(["train"]) == 2
    assert "error: where to? give --output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_r": -2, "lora_dropout": 1.0, "lora_alpha": 0}, ("lora_r", "lora_dropout", "lora_alpha")),
        ({"lora_target_modules": []}, ("names no module",)),
    ],
)
def test_an_adapter_that_cannot_be_is_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    worlds.refused(lambda: LoraArguments(**options), *words)
