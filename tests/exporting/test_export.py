"""export: what an exported folder holds, that it loads as the trained model, and what is refused before and after."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from nabla_trl import NablaReasoner
from nabla_trl.cli.main import main
from nabla_trl.evaluation.grids import build_grids
from nabla_trl.evaluation.results import store_results
from nabla_trl.evaluation.rows import RowStore, build_row
from nabla_trl.exporting import export
from nabla_trl.exporting.checkpoint import Checkpoint, find_checkpoint
from nabla_trl.exporting.export import ExportResult, export_checkpoint
from nabla_trl.exporting.model_card import Provenance, build_model_card, find_base_license
from nabla_trl.models.flops import Cost
from nabla_trl.models.loading import load_policy
from nabla_trl.traces.build import build_response_trace, build_trace_meta, get_package_versions
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter
from nabla_trl.training.checkpoints import hash_traces
from nabla_trl.utils import statistics

WEIGHTS = "adapter_model.safetensors"
PROBLEMS, SEEDS = 6, (0, 1)


# --- a run, result by hand ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and better/: models on disk."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("base", 0), ("better", 2)):
        worlds.save(folder / name, worlds.tiny_model(seed=seed))
    return folder


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one adapter, not to be changed."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", world)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """The run's adapter, exported with merged weights."""
    return export_checkpoint(find_checkpoint(finished, None), tmp_path_factory.mktemp("out") / "exported", merge=True)


def make_run(run: Path, world: Path, methods: tuple[str, ...] = ("sft",), *, full: bool = False) -> Path:
    """What recipes/distill.py leaves: weights, train.json, rows, facts, traces and config.yaml."""
    base, tokenizer = world / "base", worlds.char_tokenizer()
    tokenizer.chat_template = worlds.TEMPLATE.replace("<|assistant|>", "<|assistant|>#")  # not the base's
    rows = RowStore(run / "rows", "hash")
    policy = load_policy(str(base))
    rows.append(build_row(trace, "hash") for trace in graded(policy, "greedy"))
    for index, method in enumerate(methods):
        folder = run / "trained" / method
        model = AutoModelForCausalLM.from_pretrained(base)
        if full:
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.add_(0.05)
            model.save_pretrained(folder / "model")
        else:
            adapt(model, seed=index).save_pretrained(folder / "adapter")
        tokenizer.save_pretrained(folder / ("model" if full else "adapter"))
        tuning = "full" if full else "lora"
        training = {
            "method": method,
            "tuning": tuning,
            "beta": 0.5,
            "rows": 5,
            "skipped": {"unfinished": 1},
            "steps": 9,
        }
        training |= {"tokens": 400, "flops": 2.5e9, "seconds": 3.25, "loss": 0.5, "trace_flops": 7e9}
        training |= {"trace_seconds": 1.0, "processes": 1}
        training |= {"traces_hash": f"hash of {method}", "command": f"recipes/distill.py --train_methods {method}"}
        (folder / "train.json").write_text(json.dumps(training))
        (folder / "config.yaml").write_text(yaml.safe_dump({"policy": str(base), "learning_rate": 0.1}))
        for name in ("greedy", "best_of_8"):
            row_name = f"{method.replace('-', '_')}_{name}"
            rows.append(build_row(trace, "hash") for trace in graded(policy, row_name, wrong=1))
    facts = {"title": "t", "command": "accelerate launch recipes/distill.py", "policy": str(base), "task": "sums"}
    facts |= {"reward": f"logratio:{world / 'better'}", "reward_kind": "log-ratio", "versions": get_package_versions()}
    store_results(run, rows.read(), facts)
    with TraceWriter(run / "traces") as writer:
        for trace in graded(policy, "nabla", seeds=(0,)):
            writer.add(trace)
    (run / "config.yaml").write_text(yaml.safe_dump({"policy": str(base), "dataset": "sums", "eval_split": "test"}))
    return run


def adapt(model: Any, *, seed: int = 0, trained: bool = True, **options: Any) -> PeftModel:
    """The model with an adapter that changes it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"target_modules": ["q_proj", "down_proj"], **options}
        config = LoraConfig(r=2, task_type="CAUSAL_LM", **options)
        wrapped = get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if trained and "lora_B" in name:
                weight.data.normal_()
    return wrapped


def graded(policy: Any, method: str, *, wrong: int = 3, seeds: tuple[int, ...] = SEEDS) -> Iterator[Trace]:
    """Traces of a method with so many wrong ones for every seed."""
    for seed in seeds:
        for number, problem in enumerate(worlds.tiny_problems([f"{n}+1" for n in range(PROBLEMS)])):
            trace = build_response_trace(
                policy,
                replace(problem, task="sums", answer="1"),
                method=method,
                seed=seed,
                prompt_ids=policy.encode(problem),
                response_ids=[number, 14, policy.tokenizer.eos_token_id],
                reward=float(number),
                cost=Cost(1e6, 0.25, {"policy/decode": 3}),
                meta=build_trace_meta(policy, "r", "c"),
            )
            yield replace(trace, correct=number >= wrong)


def logits(model: Any, text: str = "1+2") -> Tensor:
    ids = worlds.char_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits


# --- what is exported ----------------------------------------------------------------------------------


def test_the_folder_holds_all_that_is_needed(exported: ExportResult, finished: Path) -> None:
    folder = exported.output_dir
    result = {"README.md", "config.yaml", "provenance.json", "custom_generate", "merged"}
    weights = {"adapter_config.json", WEIGHTS}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == result | weights | tokenizer
    assert (folder / "config.yaml").read_bytes() == (finished / "trained/sft/config.yaml").read_bytes()
    assert (folder / WEIGHTS).read_bytes() == (finished / "trained/sft/adapter" / WEIGHTS).read_bytes()
    record = json.loads((folder / "provenance.json").read_text())
    assert record["traces_hash"] == "hash of sft" and record["training"]["beta"] == 0.5
    assert not list(folder.parent.glob("*.tmp"))


def test_others_may_read_all_of_it(exported: ExportResult) -> None:
    modes = {path.stat().st_mode & 0o777 for path in exported.output_dir.rglob("*") if path.is_file()}
    assert modes == {(exported.output_dir / "config.yaml").stat().st_mode & 0o777}


def test_every_way_to_load_it_gives_the_trained_model(exported: ExportResult, finished: Path, world: Path) -> None:
    trained = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world / "base"), finished / "trained/sft/adapter"
    )
    folder = str(exported.output_dir)
    ways = {
        "policy": load_policy(folder).model,
        "merged": load_policy(f"{folder}/merged").model,
        "transformers": AutoModelForCausalLM.from_pretrained(folder),
        "transformers, merged": AutoModelForCausalLM.from_pretrained(f"{folder}/merged"),
    }
    for model in ways.values():
        torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)
    assert (logits(trained) - logits(load_policy(str(world / "base")).model)).abs().max() > 0.1


def test_it_keeps_its_own_chat_template(exported: ExportResult, world: Path) -> None:
    problem = worlds.tiny_problems()[0]
    base, policy = load_policy(str(world / "base")), load_policy(str(exported.output_dir))
    hash_sign = worlds.TOKENS.index("#")
    assert policy.encode(problem) == [*base.encode(problem), hash_sign]
    assert AutoTokenizer.from_pretrained(exported.output_dir).chat_template == policy.tokenizer.chat_template


def test_the_check_says_how_far_apart(exported: ExportResult) -> None:
    result = exported.provenance
    assert set(result.logit_differences) == {"folder", "adapter by PEFT", "merged"}
    assert max(result.logit_differences.values()) <= exported.logit_tolerance < result.max_logit_change
    assert result.logit_differences["folder"] == 0  # the same computation


def test_a_shipped_policy_can_be_refined_further(exported: ExportResult, world: Path) -> None:
    options: dict[str, Any] = {"reward": f"logratio:{world / 'better'}", "max_rounds": 3, "max_new_tokens": 8}
    reasoner = NablaReasoner.from_pretrained(str(exported.output_dir), **options)
    trace = reasoner.solve("1+2")
    apart = NablaReasoner.from_pretrained(str(world / "base"), adapter=str(exported.output_dir), **options)
    apart.policy.tokenizer.chat_template = reasoner.policy.tokenizer.chat_template
    assert trace.error is None and trace.response_ids == apart.solve("1+2").response_ids
    assert trace.meta["policy"] == str(exported.output_dir)


def test_the_folder_generates_as_its_reasoner_solves(
    exported: ExportResult, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the adapter beside the base's weights, as transformers loads the folder, and the reward by its name."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder, reward = str(exported.output_dir), f"logratio:{world / 'better'}"
    options: dict[str, Any] = {"max_rounds": 3, "max_new_tokens": 8}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "1+2"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids, call = inputs["input_ids"], {"tokenizer": tokenizer, "reward": reward, "seed": 4}
    output = model.generate(ids, custom_generate=folder, trust_remote_code=True, **call, **options)
    solved = NablaReasoner.from_pretrained(folder, reward=reward, **options).solve("1+2", seed=4)
    assert output[0].tolist() == [*solved.prompt_ids, *solved.response_ids]


def test_an_adapter_can_stand_on_a_shipped_one(exported: ExportResult, tmp_path: Path) -> None:
    first = load_policy(str(exported.output_dir))
    adapt(load_policy(str(exported.output_dir)).model, seed=5).save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "second/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(exported.output_dir)
    both = load_policy(str(tmp_path / "second"))  # its tokenizer is the first adapter's
    assert both.tokenizer.chat_template == first.tokenizer.chat_template
    assert (logits(both.model) - logits(first.model)).abs().max() > 0.1


def test_a_pushed_adapter_loads_by_its_id(
    exported: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as a download leaves it; offline here."""
    repo, commit = tmp_path / "models--me--model", "0" * 40
    shutil.copytree(exported.output_dir, repo / "snapshots" / commit, ignore=shutil.ignore_patterns("merged"))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ours, theirs = load_policy("me/model"), load_policy(str(exported.output_dir))
    assert torch.equal(logits(ours.model), logits(theirs.model)) and ours.name == "me/model"
    assert type(ours.model.model.layers[0].self_attn.q_proj) is torch.nn.Linear  # merged
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template


@pytest.mark.parametrize("command", ["solve", "eval"])
def test_commands_take_it_as_policy(command: str, exported: ExportResult, world: Path, tmp_path: Path, capsys) -> None:
    models = [
        "--policy",
        str(exported.output_dir),
        "--reward",
        f"logratio:{world / 'better'}",
        "--max_new_tokens",
        "4",
    ]
    if command == "solve":
        assert main(["solve", "1+2", *models, "--max_rounds", "1"]) == 0
    else:
        problems = tmp_path / "p.jsonl"
        problems.write_text('{"question": "1+1", "answer": "2"}\n')
        out = ["--dataset", str(problems), "--output_dir", str(tmp_path / "out"), "--eval_methods", "greedy"]
        assert main(["eval", *models, *out]) == 0
    assert capsys.readouterr().out


def test_full_weights_are_the_model_itself(world: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", world, full=True)
    (run / "trained/sft/model/training_args.bin").write_bytes(b"x")  # of the trainer, of no use to a reader
    result = export_checkpoint(find_checkpoint(run, None), tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(run / "trained/sft/model")
    assert torch.equal(logits(load_policy(str(result.output_dir)).model), logits(trained))
    assert (
        set(result.provenance.logit_differences) == {"folder"}
        and not (result.output_dir / "training_args.bin").exists()
    )
    card = ModelCard.load(result.output_dir / "README.md")
    assert card.data.library_name == "transformers" and "PeftModel" not in card.text
    worlds.refused(
        lambda: export_checkpoint(find_checkpoint(run, None), tmp_path / "other", merge=True), "nothing to merge"
    )


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_of_a_tied_weight_is_exported_as_it_was_trained(target: str, tmp_path: Path) -> None:
    worlds.save(tmp_path / "base", worlds.tiny_model("qwen2", tied=True))
    run = make_run(tmp_path / "run", tmp_path)
    trained = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["q_proj", target])
    for name, weight in trained.named_parameters():
        if "lora_embedding_" in name:
            weight.data.normal_(std=0.1)
    trained.save_pretrained(run / "trained/sft/adapter")
    result = export_checkpoint(find_checkpoint(run, None), tmp_path / "out", merge=True)
    assert set(result.provenance.logit_differences) == {"folder", "adapter by PEFT", "merged"}
    for model in (
        load_policy(str(result.output_dir)).model,
        AutoModelForCausalLM.from_pretrained(result.output_dir / "merged"),
    ):
        torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_weights_have_the_runs_dtype(dtype: str, run: Path, tmp_path: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text() + f"dtype: {dtype}\n")
    result = export_checkpoint(find_checkpoint(run, None), tmp_path / "out", merge=True)
    weights = load_file(result.output_dir / "merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert (
        result.provenance.dtype == dtype
        and max(result.provenance.logit_differences.values()) <= result.logit_tolerance
    )


def test_one_of_several_checkpoints(world: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", world, ("sft", "reward-weighted"))
    worlds.refused(lambda: find_checkpoint(run, None), "--train_method", "reward-weighted, sft")
    worlds.refused(lambda: find_checkpoint(run, "dpo"), "'dpo'", "reward-weighted, sft")
    result = export_checkpoint(find_checkpoint(run, "reward-weighted"), tmp_path / "out")
    card = ModelCard.load(result.output_dir / "README.md")
    assert "| **reward_weighted_greedy** |" in card.text and "sft" not in card.text
    weights = [load_file(folder / WEIGHTS) for folder in (result.output_dir, run / "trained/reward-weighted/adapter")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def change_training(run: Path, **changes: Any) -> None:
    note = run / "trained/sft/train.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | changes))


def test_a_checkpoint_that_no_traces_were_needed_for(run: Path, tmp_path: Path) -> None:
    """The run's traces may be another method's."""
    change_training(run, traces_hash=None, trace_flops=0.0)
    result = export_checkpoint(find_checkpoint(run, None), tmp_path / "out")
    card = (result.output_dir / "README.md").read_text()
    assert (
        result.provenance.traces_hash is None and "Traces: none" in card and "FLOPs of the training traces" not in card
    )


def test_the_card_tells_the_beta_of_the_search_where_training_has_none(run: Path, tmp_path: Path) -> None:
    change_training(run, beta=None)
    assert (
        "none was set"
        in (export_checkpoint(find_checkpoint(run, None), tmp_path / "one").output_dir / "README.md").read_text()
    )
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"beta": 0.25}))
    assert (
        "0.25 in the search"
        in (export_checkpoint(find_checkpoint(run, None), tmp_path / "two").output_dir / "README.md").read_text()
    )


def test_the_hash_of_traces_sees_every_shard(run: Path) -> None:
    before = hash_traces(run)
    with TraceWriter(run / "traces", rank=1) as writer:
        for trace in graded(load_policy(find_checkpoint(run, None).base_policy), "nabla", seeds=(7,)):
            writer.add(trace)
    assert before is not None and hash_traces(run) not in (None, before)


# --- the card -----------------------------------------------------------------------------------------


def test_the_card_has_the_runs_own_figures(exported: ExportResult, finished: Path) -> None:
    card = ModelCard.load(exported.output_dir / "README.md")
    grids = build_grids(find_checkpoint(finished, None).rows)
    results = {result.metric_name: result for result in card.data.eval_results}
    assert set(results) == {"accuracy of sft_greedy", "accuracy of sft_best_of_8"}
    for name, result in results.items():
        accuracy = statistics.proportion_interval(grids[name.removeprefix("accuracy of ")].columns["accuracy"])
        assert result.metric_value == pytest.approx(accuracy.value, abs=1e-4) == pytest.approx(5 / 6, abs=1e-4)
        assert result.metric_args["low"] == pytest.approx(accuracy.low, abs=1e-4)
        assert result.metric_args["high"] == pytest.approx(accuracy.high, abs=1e-4)
        assert (result.dataset_name, result.dataset_split, result.metric_args["problems"]) == (
            "sums",
            "test",
            PROBLEMS,
        )
    low, high = (result.metric_args[name] for name in ("low", "high"))
    assert f"| **sft_greedy** | 0.833 [{low:.3f}, {high:.3f}] |" in card.text
    assert "| greedy | 0.500 [" in card.text and "+0.333" in card.text


def test_the_card_says_where_it_comes_from(exported: ExportResult, finished: Path, world: Path) -> None:
    card = ModelCard.load(exported.output_dir / "README.md")
    assert card.data.library_name == "peft" and {"custom_generate", "lora", "sft"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder: the hub takes no such name
    assert card.data.license == "unknown" and "License: not known" in card.text
    for words in (
        "2.5 G",
        "FLOPs of training",
        "1 M",
        ": 0.5.",
        "unfinished 1",
        str(world / "base"),
        "revision not known",
    ):
        assert words in card.text, words
    for words in (
        "sha256 hash of sft",
        "Trained by: `recipes/distill.py --train_methods sft` with",
        "Measured by: `accelerate launch recipes/distill.py`.",
        "7 G",
        f"logratio:{world / 'better'}",
        "custom_generate=",
        "exported/merged",
        "6 of them",
    ):
        assert words in card.text, words


def test_the_code_of_the_card_runs(
    exported: ExportResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.chdir(exported.output_dir.parent)  # the card names the folder
    blocks = (exported.output_dir / "README.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.partition("```")[0] for block in blocks).replace("QUESTION", "1+2")
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    response = namespace["ids"][0, namespace["inputs"]["input_ids"].shape[1] :]
    written = namespace["tokenizer"].decode(response, skip_special_tokens=True)
    assert written and capsys.readouterr().out == written + "\n"


def test_the_card_has_a_table_of_independent_samples(run: Path) -> None:
    checkpoint = find_checkpoint(run, None)
    greedy = [row for row in checkpoint.rows if row.method == "sft_greedy"]
    samples = (("1", True), ("1", True), ("2", False), ("3", False))
    rows = [replace(row, method="sft_samples_4", samples=samples) for row in greedy]
    rows += [replace(row, method="samples_2", samples=samples[1:3]) for row in greedy]
    result = Provenance("me/model", None, None, None, "float32", False, 1.0, {"folder": 0.0})
    for all_rows in ([*checkpoint.rows, *rows], rows):
        lines = str(build_model_card(replace(checkpoint, rows=all_rows), result)).splitlines()
        header = lines.index("| policy | samples n | one sample | pass@n | maj@n |")
        sft, base = (re.sub(r" \[[^]]*\]", "", line) for line in lines[header + 2 : header + 4])
        assert sft == "| **sft** | 4 | 0.500 | 1.000 | 1.000 |" and base == "| base | 2 | 0.500 | 1.000 | 0.500 |"
    assert "one sample" not in str(build_model_card(checkpoint, result))


def test_a_base_on_the_hub_is_linked(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = find_checkpoint(run, None)
    hub = replace(
        checkpoint, facts={**checkpoint.facts, "policy": "org/model", "task": "gsm8k"}, run_config={"dataset": "gsm8k"}
    )
    result = Provenance("me/model", "abc123", "apache-2.0", None, "float32", False, 1.0, {"folder": 0.0})
    head = ModelCard(str(build_model_card(hub, result))).data
    assert (head.base_model, head.license, head.datasets) == ("org/model", "apache-2.0", ["openai/gsm8k"])
    assert head.to_dict()["base_model_relation"] == "adapter"
    assert "4 bits" not in str(build_model_card(hub, result)) and "PeftModel" in str(build_model_card(hub, result))
    quantized = replace(hub, training={**hub.training, "tuning": "qlora"})
    assert "quantized to 4 bits in training" in str(build_model_card(quantized, result))
    assert {result.dataset_type for result in head.eval_results} == {"openai/gsm8k"}


def test_the_license_is_the_bases_unless_named(tmp_path: Path) -> None:
    assert find_base_license(str(tmp_path)) is None and find_base_license("nobody/no-such-model") is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# m\n")
    assert find_base_license(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("# no metadata\n")
    assert find_base_license(str(tmp_path)) is None


def test_a_card_admits_what_is_no_gain(run: Path, tmp_path: Path) -> None:
    rows = find_checkpoint(run, None).rows
    rows = [replace(row, correct=row.problem == "q0") for row in rows]
    store_results(run, rows, json.loads((run / "facts.json").read_text()))
    result = export_checkpoint(find_checkpoint(run, None), tmp_path / "out")
    assert (
        "not measured to be above the base's:** too few problems to tell."
        in (result.output_dir / "README.md").read_text()
    )


# --- refusals: nothing is left behind -----------------------------------------------------------------


def adapter_file(run: Path) -> Path:
    return run / "trained/sft/adapter" / WEIGHTS


def truncate(run: Path) -> None:
    file = adapter_file(run)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(run: Path) -> None:
    adapter_file(run).write_bytes(b"")


def no_weights(run: Path) -> None:
    save_file({}, adapter_file(run), metadata={"format": "pt"})


def no_file(run: Path) -> None:
    adapter_file(run).unlink()


def inert(run: Path) -> None:
    weights = load_file(adapter_file(run))
    save_file({n: w * ("lora_A" in n) for n, w in weights.items()}, adapter_file(run), metadata={"format": "pt"})


def not_finite(run: Path) -> None:
    weights = load_file(adapter_file(run))
    next(weight for name, weight in weights.items() if "lora_B" in name)[0, 0] = math.nan
    save_file(weights, adapter_file(run), metadata={"format": "pt"})


def half_of_it(run: Path) -> None:
    weights = load_file(adapter_file(run))
    save_file({n: w for n, w in weights.items() if "layers.0" in n}, adapter_file(run), metadata={"format": "pt"})


def not_trained(run: Path) -> None:
    shutil.rmtree(run / "trained")


def not_saved(run: Path) -> None:
    shutil.rmtree(run / "trained/sft/adapter")


def no_results(run: Path) -> None:
    (run / "rows.jsonl").unlink()


def no_rows_of_it(run: Path) -> None:
    lines = (run / "rows.jsonl").read_text().splitlines(keepends=True)
    (run / "rows.jsonl").write_text("".join(line for line in lines if '"sft_' not in line))


def no_config(run: Path) -> None:
    (run / "trained/sft/config.yaml").unlink()


def no_training_told(run: Path) -> None:
    (run / "trained/sft/train.json").write_text('{"method": "sft", "beta": 0.5}')


def no_facts(run: Path) -> None:
    (run / "facts.json").write_text("{}")


def other_vocabulary(run: Path) -> None:
    permuted, _ = worlds.permuted_tokenizer(worlds.char_tokenizer())
    permuted.save_pretrained(run / "trained/sft/adapter")


def _other_base(run: Path, **shape: Any) -> None:
    """The run's policy is another model than the adapter's."""
    other = run / "other"
    worlds.tiny_model(**shape).save_pretrained(other)
    worlds.char_tokenizer().save_pretrained(other)
    facts = json.loads((run / "facts.json").read_text())
    (run / "facts.json").write_text(json.dumps({**facts, "policy": str(other)}))


def other_name(run: Path) -> None:
    _other_base(run, seed=5)


def other_shape(run: Path) -> None:
    _other_base(run, width=64)
    note = run / "trained/sft/adapter/adapter_config.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "base_model_name_or_path": str(run / "other")}))


REFUSED: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (truncate, (WEIGHTS, "damaged")),
    (empty, (WEIGHTS, "damaged")),
    (no_weights, ("without any",)),
    (no_file, ("holds no weights",)),
    (inert, ("inert", "changed nothing")),
    (not_finite, ("not finite", "lora_B")),
    (half_of_it, ("does not fit", "in one of them only")),
    (not_trained, ("no trained weights", "recipes/distill.py")),
    (not_saved, ("neither adapter/ nor model/",)),
    (no_results, ("rows.jsonl",)),
    (no_rows_of_it, ("no rows of sft",)),
    (no_config, ("config.yaml",)),
    (no_training_told, ("train.json lacks tuning", "another version")),
    (no_facts, ("facts.json lacks policy",)),
    (other_vocabulary, ("tokenizers", "differ", "another vocabulary")),
    (other_name, ("was trained on", "other")),
    (other_shape, ("cannot put adapter", "other")),
]


@pytest.mark.parametrize(("spoil", "words"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_a_spoilt_run_is_refused(
    spoil: Callable[[Path], None], words: tuple[str, ...], run: Path, tmp_path: Path
) -> None:
    spoil(run)
    worlds.refused(lambda: export_checkpoint(find_checkpoint(run, None), tmp_path / "out"), *words)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(("change", "words"), [("nothing", "changed nothing"), ("nan", "not finite")])
def test_spoilt_full_weights_are_refused(change: str, words: str, world: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", world, full=True)
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    if change == "nan":
        model.lm_head.weight.data[0, 0] = math.nan
    model.save_pretrained(run / "trained/sft/model")
    worlds.refused(lambda: export_checkpoint(find_checkpoint(run, None), tmp_path / "out"), words)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_full_folder_is_refused_and_an_empty_one_filled(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    checkpoint = find_checkpoint(finished, None)
    worlds.refused(lambda: export_checkpoint(checkpoint, tmp_path), str(tmp_path), "not an empty folder")
    worlds.refused(lambda: export_checkpoint(checkpoint, tmp_path / "mine.txt"), "mine.txt", "not an empty folder")
    (tmp_path / "new").mkdir()
    assert export_checkpoint(checkpoint, tmp_path / "new").output_dir == tmp_path / "new"
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "new"}


def test_a_reload_that_differs_is_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the file had been damaged on its way."""

    def copy(checkpoint: Checkpoint, draft: Path) -> None:
        original(checkpoint, draft)
        weights = load_file(draft / WEIGHTS)
        save_file({n: w * 1.01 for n, w in weights.items()}, draft / WEIGHTS, metadata={"format": "pt"})

    original = export._copy_files
    monkeypatch.setattr(export, "_copy_files", copy)
    worlds.refused(
        lambda: export_checkpoint(find_checkpoint(finished, None), tmp_path / "out"),
        "logits differ",
        "nothing was exported",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_in_the_middle_leaves_nothing(
    error: BaseException, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(checkpoint: Checkpoint, provenance: Provenance) -> ModelCard:
        raise error

    monkeypatch.setattr(export, "build_model_card", build)
    with pytest.raises(type(error)):
        export_checkpoint(find_checkpoint(finished, None), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_export_are_cleaned(finished: Path, tmp_path: Path) -> None:
    """Only those to the same folder, from this machine, of processes that are gone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        host = socket.gethostname()
        gone = ["out.4194305.tmp", f"out.{host}-4194305.tmp", f"out.{host}-{os.getpid()}.tmp"]
        kept = [f"out.{host}-{running.pid}.tmp", "out.elsewhere-4194305.tmp", "out2.4194305.tmp", "out.notes.tmp"]
        for name in gone + kept:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_text("half")
        export_checkpoint(find_checkpoint(finished, None), tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"out", *kept}
        assert running.stdin is not None
        running.stdin.close()


def test_a_relative_base_becomes_absolute(
    run: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the folder loads from any directory, and the card says what to give elsewhere."""
    monkeypatch.chdir(world)
    file = run / "trained/sft/adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "base"}))
    for name in ("facts.json", "config.yaml"):
        (run / name).write_text((run / name).read_text().replace(str(world / "base"), "base"))
    result = export_checkpoint(find_checkpoint(run, None), tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(logits(model), logits(load_policy("out").model), rtol=1e-4, atol=1e-4)
    base = str(world / "base")
    assert json.loads((result.output_dir / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    card = (result.output_dir / "README.md").read_text()
    assert f'AutoModelForCausalLM.from_pretrained("{base}")' in card
    assert f"The base of the adapter is the folder `{base}`" in card and "set `base_model_name_or_path` there" in card


@pytest.mark.parametrize("name", ["", "merged"])
def test_a_pipeline_generates_as_the_reasoner_solves(
    name: str, exported: ExportResult, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chats, alone and in a batch. The method is chosen in the call, or at loading.

    transformers takes weights and tokenizer of the base for the folder of an adapter, so its tokenizer is named.
    """
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.path", list(sys.path))
    folder, reward = str(exported.output_dir), f"logratio:{world / 'better'}"
    options: dict[str, Any] = {"max_rounds": 3, "max_new_tokens": 8, "temperature": 0.9}
    reasoner = NablaReasoner.from_pretrained(f"{folder}/{name}", reward=reward, **options)
    chats = [[{"role": "user", "content": question}] for question in ("1+2", "3*4-5")]
    call: dict[str, Any] = {"custom_generate": folder, "trust_remote_code": True}
    pipe = pipeline("text-generation", model=f"{folder}/{name}", tokenizer=f"{folder}/{name}", device="cpu")
    if not name:
        call["tokenizer"] = pipe.tokenizer
    for batch_size in (1, 2):
        made = pipe(chats, batch_size=batch_size, reward=reward, **options, **call)
        texts = [response[0]["generated_text"][-1]["content"] for response in made]
        solved = reasoner.solve(["1+2", "3*4-5"])[:batch_size]  # a row alone is question 0
        expected = [reasoner.policy.decode(trace.response_ids) for trace in solved]
        assert texts[: len(expected)] == expected
    if name:
        shutil.copytree(f"{folder}/{name}", tmp_path / "model")
        shutil.copytree(f"{folder}/custom_generate", tmp_path / "model/custom_generate")
        loaded = pipeline("text-generation", model=str(tmp_path / "model"), device="cpu", trust_remote_code=True)
        assert loaded(chats, batch_size=2, reward=reward, **options) == made
    plain = pipe(chats[0], do_sample=False, max_new_tokens=8, return_full_text=False)
    assert plain[0]["generated_text"] != texts[0]


def test_a_quantized_base_is_refused(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = export.load_policy

    def load(name: str, **options: Any) -> Any:
        policy = original(name, **options)
        policy.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        return policy

    monkeypatch.setattr(export, "load_policy", load)
    worlds.refused(
        lambda: export_checkpoint(find_checkpoint(finished, None), tmp_path / "out", merge=True), "quantized"
    )


# --- the command and the hub --------------------------------------------------------------------------


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The hub's client, which writes down what it is asked for."""
    calls: list[tuple[Any, ...]] = []

    class FakeApi:
        def whoami(self) -> dict[str, Any]:
            return {"name": "me", "orgs": [{"name": "us", "roleInOrg": "write"}]}

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
            calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(export, "HfApi", FakeApi)
    return calls


def test_the_command_exports(finished: Path, tmp_path: Path, capsys, pushed: list) -> None:
    assert main(["export", "--run_dir", str(finished), "--output_dir", str(tmp_path / "out"), "--license", "mit"]) == 0
    out = capsys.readouterr().out
    assert (
        f"sft of {finished}: {tmp_path / 'out'}" in out and "logits differ" in out and "license: not known" not in out
    )
    assert "license: mit" in (tmp_path / "out/README.md").read_text() and pushed == []


@pytest.mark.parametrize("private", [True, False])
def test_a_push_comes_after_the_check(private: bool, finished: Path, tmp_path: Path, capsys, pushed: list) -> None:
    flags = ["--push-to-hub", "me/model", "--merge", *(["--private"] if private else [])]
    assert main(["export", "--run_dir", str(finished), "--output_dir", str(tmp_path / "out"), *flags]) == 0
    assert "pushed: https://huggingface.co/me/model" in capsys.readouterr().out
    assert [call[:2] for call in pushed] == [("create", "me/model"), ("upload", "me/model")]
    assert pushed[0][2] == {"private": private or None, "exist_ok": True}
    assert {"README.md", WEIGHTS, "custom_generate", "merged"} <= set(pushed[1][2])
    assert 'from_pretrained("me/model"' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--push-to-hub", "me/model"], "a folder of this machine"),
        (["--push-to-hub", "a/b/c", "--merge"], "not a name on the Hub"),
        (["--push-to-hub", "you/model", "--merge"], "me may write to repositories of me, us"),
        (["--private"], "push_to_hub"),
        (["--train_method", "dpo"], "no checkpoint 'dpo'"),
        (["--dtype", "int3"], "dtype must be one of"),
    ],
)
def test_what_the_command_refuses(
    flags: list[str], words: str, finished: Path, tmp_path: Path, capsys, pushed: list
) -> None:
    assert main(["export", "--run_dir", str(finished), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1
    assert pushed == [] and not list(tmp_path.iterdir())


def test_a_push_that_fails_keeps_the_folder(finished: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    class Offline:
        def whoami(self) -> dict[str, Any]:
            return {"name": "me"}

        def create_repo(self, repo_id: str, **options: Any) -> None:
            raise ConnectionError("no route to the hub")

    monkeypatch.setattr(export, "HfApi", Offline)
    flags = ["--push-to-hub", "me/model", "--merge"]
    assert main(["export", "--run_dir", str(finished), "--output_dir", str(tmp_path / "out"), *flags]) == 1
    err = capsys.readouterr().err
    assert "is ready, but was not pushed to me/model: no route to the hub" in err
    assert load_policy(str(tmp_path / "out")).name == str(tmp_path / "out")
