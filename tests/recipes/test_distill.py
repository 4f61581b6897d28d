"""The main recipe and the trace command as a user runs them: whole, killed, resumed, and fed nonsense."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from datasets import load_dataset

from nabla_trl.cli.main import main as run_command
from nabla_trl.cli.parsing import UsageError, run_main
from nabla_trl.cli.quiet import log_to_folder
from nabla_trl.distill import main
from nabla_trl.evaluation.rows import read_rows
from nabla_trl.evaluation.runner import Evaluation
from nabla_trl.tasks.digit_chains import make_digit_chain_problems
from nabla_trl.traces.storage import read_traces

ROOT = Path(__file__).parents[2]
MODELS = ["--policy", "data/tiny/policy", "--reward", "logratio:data/tiny/clean"]
SEARCH = ["--max_new_tokens", "48", "--min_p", "0.02", "--candidate_min_p", "0.02", "--max_rounds", "3"]
METHODS = "greedy,best_of_1,best_of_16,nabla,control,nabla@0.2,control@0.2,reward_model_sampling,sft_greedy"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(*command: str) -> str:
    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    return out


def arguments(folder: Path, *options: str) -> list[str]:
    sizes = [
        "--max_train_problems",
        "24",
        "--max_eval_problems",
        "8",
        "--max_audit_problems",
        "8",
        "--audit_samples",
        "8",
    ]
    steps = ["--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--warmup_steps", "0"]
    small = ["--output_dir", str(folder), *sizes, *steps, "--eval_methods", METHODS, "--seeds", "0"]
    return ["--config", "recipes/tiny/logratio.yaml", *small, *options]


def distill_here(folder: Path, *options: str) -> None:
    """The recipe in this process, which is quicker to be refused by."""
    main(arguments(folder, *options))


def traces(folder: Path) -> list[str]:
    where = ["--dataset", "digit_chains", "--output_dir", str(folder), "--max_problems", "40", "--batch_size", "4"]
    return ["traces", *MODELS, *where, *SEARCH]


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the settings name models relative to it
    yield
    log_to_folder(None)  # else warnings of later tests go to the folder of this one


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    out = run("recipes/distill.py", *arguments(folder))
    assert "audit: too few problems to tell if the reward ranks: AUC 1.00" in out, "4 problems"
    return folder


def test_the_recipe_writes_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for method in METHODS.split(","):
        for figure in ("accuracy", "flops", "seconds"):
            entry = summary[f"{figure}.{method}"]
            assert entry["low"] <= entry["value"] <= entry["high"] and entry["problems"] == 8
    assert summary["paired.nabla-control"]["problems"] == 8
    assert {"seconds.setup", "seconds.total", "flops.training.sft", "break_even.sft_greedy-best_of_16"} <= set(summary)
    report = (finished / "report.md").read_text()
    assert "reward_model_sampling" in report
    for name in ("accuracy_flops", "accuracy_seconds"):
        assert (finished / "plots" / f"{name}.png").stat().st_size > 1000
    assert len((finished / "rows.jsonl").read_text().splitlines()) == 8 * len(METHODS.split(","))


def test_traces_load_with_datasets_and_are_all_there(finished):
    files = sorted(map(str, (finished / "traces").glob("*.parquet")))
    table = load_dataset("parquet", data_files=files, split="train", cache_dir=str(finished / "cache"))
    assert len(table) == 24 == len(read_traces(finished / "traces"))
    assert set(table["correct"]) <= {True, False}


def test_the_adapter_is_not_inert(finished):
    from nabla_trl.models.loading import load_policy

    load_policy(str(ROOT / "data/tiny/policy"), adapter=str(finished / "trained/sft/adapter"))


def test_the_config_of_a_run_gives_the_same_run_again(finished, tmp_path, capsys):
    """Flags and file together, as `--config` takes them: the traces of that folder are taken for its own."""
    shutil.copytree(finished, tmp_path / "again", dirs_exist_ok=True)
    options = ["--config", str(tmp_path / "again/config.yaml"), "--output_dir", str(tmp_path / "again")]
    main([*options, "--stages", "traces,train"])
    out = capsys.readouterr().out
    assert "24 problems are already done" in out and "train sft: already done" in out


def test_two_processes_make_the_traces_of_one(finished, tmp_path):
    """No problem twice, none missing, and every trace the same."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/multi_cpu.yaml"]
    port = ["--main_process_port", "0"]
    run(*launch, *port, "recipes/distill.py", *arguments(tmp_path, "--stages", "traces", "--max_audit_problems", "0"))
    shards = {path.name.split("-")[1] for path in (tmp_path / "traces").glob("*.parquet")}
    assert shards == {"00000", "00001"}, "both processes wrote"
    ours, theirs = (
        {trace.problem_id: trace for trace in read_traces(folder / "traces")} for folder in (tmp_path, finished)
    )
    assert len(read_traces(tmp_path / "traces")) == len(ours) == 24
    for name, trace in theirs.items():
        assert (ours[name].initial_ids, ours[name].response_ids) == (trace.initial_ids, trace.response_ids)
        assert [(r.round, r.position, r.suffix, r.accepted) for r in ours[name].revisions] == [
            (r.round, r.position, r.suffix, r.accepted) for r in trace.revisions
        ]


def test_training_that_changes_nothing_is_refused(finished, tmp_path):
    shutil.copytree(finished / "traces", tmp_path / "traces")
    with pytest.raises(ValueError, match="training changed nothing"):
        distill_here(tmp_path, "--stages", "train", "--warmup_steps", "50", "--max_steps", "1")
    assert not (tmp_path / "trained/sft/adapter").exists()
    distill_here(tmp_path, "--stages", "train", "--warmup_steps", "0", "--max_steps", "2")
    adapter = tmp_path / "trained/sft/adapter/adapter_config.json"
    assert adapter.exists(), "a failed attempt must not stand in the way"


def test_finished_stages_are_skipped(finished, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")}
    rows = (finished / "rows" / "rows-00000.jsonl").read_bytes()
    distill_here(finished, "--stages", "traces,train,evaluate")
    out = capsys.readouterr().out
    assert "24 problems are already done" in out and "train sft: already done" in out
    assert (finished / "rows" / "rows-00000.jsonl").read_bytes() == rows
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.parquet")} == stamps


def list_contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def test_other_settings_on_the_same_folder_are_refused(finished):
    before = list_contents(finished)
    with pytest.raises(ValueError, match=r"beta '0.5' \(was '1.0'\)"):
        distill_here(finished, "--beta", "0.5", "--stages", "traces")
    assert list_contents(finished) == before


def test_a_finished_adapter_does_not_answer_for_other_training(finished):
    before = list_contents(finished)
    with pytest.raises(ValueError, match=r"learning_rate '1e-06' \(was '0.002'\)"):
        distill_here(finished, "--stages", "train", "--learning_rate", "1e-6")
    assert list_contents(finished) == before


def test_an_evaluation_of_another_kind_leaves_the_folder_as_it_was(finished):
    before = list_contents(finished)
    with pytest.raises(ValueError, match="holds rows of other settings"):
        Evaluation(finished, {"policy": "another"}, [])
    assert list_contents(finished) == before


def test_seeds_and_methods_can_be_added(finished):
    before = (finished / "rows" / "rows-00000.jsonl").read_text()
    distill_here(finished, "--stages", "evaluate", "--seeds", "0", "1", "--eval_methods", "greedy,best_of_1")
    after = (finished / "rows" / "rows-00000.jsonl").read_text()
    assert after.startswith(before)
    added = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert {(row["method"], row["seed"]) for row in added} == {("best_of_1", 1)}


def test_a_reward_that_cannot_be_audited_does_not_stop_the_run(tmp_path):
    lines = [json.dumps({"question": f"{i}+{i}-1*2+3-1"}) for i in range(5)]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n")
    options = ["--stages", "traces", "--dataset", str(tmp_path / "asked.jsonl"), "--eval_dataset", "digit_chains"]
    distill_here(tmp_path / "out", *options)
    audited = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert "could not be audited: the audit needs problems with a gold answer" in audited["conclusion"]
    assert len(read_traces(tmp_path / "out" / "traces")) == 5
    (tmp_path / "asked.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ValueError, match="holds a trace of another problem"):
        distill_here(tmp_path / "out", *options)


def comparable(folder: Path) -> list[tuple]:
    return [
        (trace.problem_id, trace.response_ids, [(r.position, r.suffix, r.accepted) for r in trace.revisions])
        for trace in read_traces(folder / "traces")
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("whole")
    assert run_command(traces(folder)) == 0
    return comparable(folder)


@pytest.mark.parametrize("blow", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_traces_that_are_interrupted_go_on_where_they_stopped(blow, tmp_path, undisturbed):
    process = start("-m", "nabla_trl.cli.main", *traces(tmp_path))
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("traces/*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(blow)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if blow == signal.SIGINT else -9), err[-1000:]
    done = sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("traces/*.parquet"))
    assert 0 < done < 40, "interrupted too late to show anything"
    again = traces(tmp_path)
    if blow == signal.SIGINT:
        last = err.splitlines()[-1]
        assert last.startswith(f"stopped at traces: {done} of 40; to go on: nabla-trl traces ")
        again = shlex.split(last)[last.split().index("nabla-trl") + 1 :]
    assert run_command(again) == 0
    assert comparable(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "traces,cook"], "unknown stage 'cook'"),
        (["--stages", ","], "stages must be distinct values, at least one"),
        (["--seeds", "1", "1"], "seeds must be distinct"),
        (["--eval_methods", "greedy", "nabla@0.3"], "add best_of_16"),
        (["--shared_flops", "1e9", "--acceptance", "metropolis"], "metropolis samples are biased"),
        (["--policy", "nowhere/at-all"], "nowhere/at-all"),
        (["--reward", "data/tiny/clean"], "is a causal LM"),
        (["--dataset", "no-such-task"], "unknown task 'no-such-task'"),
    ],
)
def test_nonsense_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        distill_here(tmp_path / "out", *options)
    assert "\n" not in str(caught.value)


def test_eight_faults_of_eight_kinds_are_one_refusal(tmp_path):
    """Options, methods, models, data, groups, β, the machine, the folder and what reports: nothing is written."""
    (tmp_path / "file").touch()
    options = ["--stages", "traces", "train", "--max_ruonds", "3", "--eval_methods", "greedy,nabla@0.3"]
    options += ["--eval_dataset", str(tmp_path / "nope.jsonl"), "--reward", "data/tiny/clean", "--beta", "1e9"]
    options += ["--train_methods", "rloo,rloo-less", "--num_generations", "7", "--max_new_tokens", "4000"]
    options += ["--dtype", "bfloat16"]
    options += ["--per_device_train_batch_size", "8", "--test_fraction", "2"]
    options += ["--report_to", "no_such_service", "--push_to_hub", "true", "--solver.steps", "3"]
    with pytest.raises(UsageError) as caught:
        distill_here(tmp_path / "file" / "out", *options)
    lines = caught.value.lines
    for words in (
        "unknown option --max_ruonds (did you mean --max_rounds?)",
        "steps belongs to ste: add --solver ste",
        "add best_of_16 to the methods",
        "cannot read",
        "data/tiny/clean is a causal LM",
        "beta must be from",
        "are not whole groups of num_generations 7",
        "unknown training method 'rloo-less' (did you mean rloo?)",
        "max_new_tokens 4000 is more than data/tiny/policy can write",
        "test_fraction must be between 0 and 1",
        "report_to no_such_service is unknown",
        "push_to_hub needs hub_model_id",
        f"{tmp_path / 'file'} is a file",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert os.listdir(tmp_path) == ["file"]


def test_a_refusal_is_one_line_without_a_traceback(tmp_path, capsys):
    assert run_main(main, arguments(tmp_path / "out", "--stages", "traces,cook")) == 2
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1].startswith("error: unknown stage 'cook'")
    assert "Traceback" not in err


def test_problems_trained_on_cannot_be_held_out(tmp_path):
    lines = [json.dumps({"question": f"{i}+{i}-1*2+3-1", "answer": "1"}) for i in range(9)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "other.jsonl").write_text(lines[4] + "\n")
    files = ["--dataset", str(tmp_path / "mine.jsonl"), "--eval_dataset", str(tmp_path / "other.jsonl")]
    with pytest.raises(ValueError, match=r"1 held-out problem is also trained on"):
        distill_here(tmp_path / "out", *files)


def first_run(folder: Path, *options: str) -> None:
    """What a new user types: models and a file, no configuration."""
    problems = make_digit_chain_problems("train", 10, 0)
    if not (folder / "mine.jsonl").exists():
        rows = [json.dumps({"question": problem.question, "answer": problem.answer}) for problem in problems]
        (folder / "mine.jsonl").write_text("\n".join(rows))
    models = ["--policy", "data/tiny/policy", "--reward", "data/tiny/reward", "--max_new_tokens", "48"]
    where = ["--dataset", str(folder / "mine.jsonl"), "--output_dir", str(folder / "out"), "--max_rounds", "2"]
    main([*models, *where, "--max_audit_problems", "0", "--eval_methods", "greedy", "--seeds", "0", *options])


def test_a_first_run_needs_models_and_a_file(tmp_path, capsys):
    """No configuration, no splits, no GPU, bfloat16 asked for."""
    first_run(tmp_path, "--stages", "traces,evaluate", "--bf16", "true")
    out = capsys.readouterr().out
    assert "mine.jsonl has no splits: 8 problems to train on, 2 held out (by a hash of each question" in out
    where = "running on 1 × CPU process: float32, search in batches of 64 problems, training in batches of 8 rows × 1"
    assert f"{where} with bf16\n" in out
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert (config["batch_size"], config["per_device_train_batch_size"], config["dtype"]) == (64, 8, "float32")
    held_out = {row.problem for row in read_rows(tmp_path / "out/rows/rows-00000.jsonl")}
    assert len(held_out) == 2 and not held_out & {t.problem_id for t in read_traces(tmp_path / "out/traces")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval_split", "validation"], "one file without splits, so there is no eval_split 'validation'"),
        (["--test_fraction", "1"], "test_fraction must be between 0 and 1"),
        (["--reward", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_a_first_run_that_is_refused_leaves_no_folder(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        first_run(tmp_path, *options)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["mine.jsonl"])


def test_held_out_problems_without_gold_answers_are_refused(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"question": "1+1+1+1+1+1"}\n')
    with pytest.raises(ValueError, match="no problem has a gold answer"):
        distill_here(tmp_path / "out", "--eval_dataset", str(tmp_path / "mine.jsonl"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    types = {"fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED", "cpu": "NO", "single_gpu": "NO"}
    nodes = 2 if path.stem.endswith("multi_node") else 1
    kind = types.get(path.stem.removesuffix("_multi_node"), "MULTI_GPU")
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == kind and config.num_machines == nodes
    assert config.num_processes == (1 if kind == "NO" else 2 if nodes == 1 else 16)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    """A probe, a checkpoint and a generation in each step: what one process waits for, the other must come to."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/multi_cpu.yaml"]
    save = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--logging_steps", "1"]
    probe = ["--max_callback_problems", "8", "--callback_steps", "2", "--stop_on_overoptimization", "true"]
    options = [
        "--train_methods",
        "sft",
        "rloo",
        "--stages",
        "traces,train",
        "--max_audit_problems",
        "0",
        *save,
        *probe,
    ]
    run(*launch, "--main_process_port", "0", "recipes/distill.py", *arguments(tmp_path, *options))
    for method in ("sft", "rloo"):
        home = tmp_path / "trained" / method
        steps = {json.loads(line)["step"] for line in (home / "log.jsonl").read_text().splitlines()}
        assert steps == {0, 1, 2, 3, 4} and (home / "adapter" / "adapter_config.json").exists()
        assert json.loads((home / "train.json").read_text())["processes"] == 2
