"""Traces as a data set: a folder that `load_dataset` and plain trainers read, its card, and the push."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from datasets import load_dataset
from huggingface_hub import DatasetCard

from nabla_trl import read_traces
from nabla_trl.cli.main import main
from nabla_trl.exporting.trace_card import TRACE_COLUMNS
from nabla_trl.pipeline import trace_dataset
from nabla_trl.pipeline.trace_dataset import export_traces, push_traces
from nabla_trl.pipeline.traces import generate_traces
from nabla_trl.traces.schema import SCHEMA, Trace

ROOT = Path(__file__).parents[2]
QUESTIONS = [{"question": question, "answer": "1"} for question in ("9-5*4+7*2-6", "1+8-2*9+5", "7-4+2*3")]
MODELS = {"policy": str(ROOT / "data/tiny/policy"), "reward": str(ROOT / "data/tiny/reward")}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = {"max_rounds": 3, "max_new_tokens": 48, "candidate_min_p": 0.02}
    generate_traces(QUESTIONS, **MODELS, config=config, output_dir=folder, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_traces(run_dir, tmp_path_factory.mktemp("out") / "traces", license="mit")


def test_every_configuration_loads_and_the_traces_are_the_same(exported: Path, run_dir: Path, tmp_path: Path) -> None:
    card = DatasetCard.load(exported / "README.md")
    names = [config["config_name"] for config in card.data.to_dict()["configs"]]
    assert names == ["traces", "sft", "preference"] and card.data.license == "mit"
    loaded = {name: load_dataset(str(exported), name, split="train", cache_dir=str(tmp_path)) for name in names}
    assert loaded["traces"].column_names == SCHEMA.names == list(TRACE_COLUMNS)
    assert len(loaded["sft"]) == len(QUESTIONS) and len(loaded["preference"]) > 0
    assert load_dataset(str(exported), split="train", cache_dir=str(tmp_path)).column_names == ["input_ids", "labels"]
    original, copied = read_traces(run_dir / "traces"), read_traces(exported / "traces")
    assert [list_values(trace) for trace in copied] == [list_values(trace) for trace in original]


def list_values(trace: Trace) -> dict[str, Any]:
    return {field.name: getattr(trace, field.name) for field in fields(trace) if field.compare}


def test_the_card_says_what_is_in_the_folder_and_how_it_was_made(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    for name in SCHEMA.names:
        assert f"| `{name}` |" in text
    for words in (
        "License: mit",
        "`policy`",
        "`reward`",
        '"candidate_min_p": "0.02"',
        "FLOPs",
        "tokens, policy/decode",
    ):
        assert words in text, words
    assert f"| `traces` | {len(QUESTIONS)} |" in text
    assert str(ROOT) not in text.partition("Settings:")[0]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["SFTTrainer", "DPOTrainer"])
def test_the_code_on_the_card_trains(trainer: str, exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.S)
    [code] = [block for block in blocks if trainer in block]
    options = "max_steps=1, use_cpu=True, bf16=False, report_to='none', save_strategy='no'"
    code = re.sub(r'(output_dir="\w+")', rf"\1, {options}", code.replace("POLICY", MODELS["policy"]))
    code = code.replace('split="train"', f'split="train", cache_dir="{tmp_path}"')
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["trainer"].state.global_step == 1 and namespace["trainer"].state.log_history[-1]["train_loss"] > 0


def test_what_cannot_be_a_data_set(run_dir: Path, exported: Path, tmp_path: Path, caplog) -> None:
    worlds.refused(lambda: export_traces(run_dir, exported), "not an empty folder")
    traces = read_traces(run_dir / "traces")
    failed = [replace(trace, error="out of memory") for trace in traces]
    worlds.refused(lambda: export_traces(failed, tmp_path / "a"), "all 3 traces have an error", "out of memory")
    start = [replace(trace, revisions=[], response_ids=trace.initial_ids, predicted_gain=[]) for trace in traces]
    folder = export_traces([*failed[:1], *start[1:]], tmp_path / "b")
    text = (folder / "README.md").read_text()
    assert "There is no `preference`" in text and "No license is set" in text and not (folder / "preference").exists()
    assert "| problems left out, as they could not be run | 1 |" in text and "no rows for preference" in caplog.text
    assert not list(tmp_path.glob("*.tmp"))


class FakeApi:
    """The hub's client, which writes down what it is asked for."""

    calls: list[tuple[Any, ...]]
    error: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        return {"name": "me"}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append((repo_id, options))

    def upload_folder(self, *, repo_id: str, repo_type: str, folder_path: Path, **options: Any) -> str:
        text = (Path(folder_path) / "README.md").read_text()
        self.calls.append((repo_id, repo_type, sorted(path.name for path in Path(folder_path).iterdir()), text))
        return f"https://huggingface.co/datasets/{repo_id}"


def test_a_push_writes_the_same_folder_to_a_data_set_repository(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    FakeApi.calls, FakeApi.error = [], None
    monkeypatch.setattr(trace_dataset, "HfApi", FakeApi)
    assert push_traces(run_dir, "me/traces", private=True) == "https://huggingface.co/datasets/me/traces"
    (repo_id, options), (_, repo_type, names, text) = FakeApi.calls
    assert repo_id == "me/traces" and options == {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert repo_type == "dataset" and names == ["README.md", "preference", "sft", "traces"]
    assert 'load_dataset("me/traces", "sft"' in text and 'snapshot_download("me/traces", repo_type="dataset")' in text
    worlds.refused(lambda: push_traces(run_dir, "you/traces"), "me may write")
    FakeApi.error = ConnectionError("no route to the hub")
    kept = tmp_path / "kept"
    worlds.refused(
        lambda: push_traces(run_dir, "me/traces", output_dir=kept), "is ready, but was not pushed", "no route"
    )
    assert (kept / "README.md").exists()


def test_the_command_exports_and_pushes_traces(run_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    FakeApi.calls, FakeApi.error = [], None
    monkeypatch.setattr(trace_dataset, "HfApi", FakeApi)
    command = ["export", "--traces", "--run_dir", str(run_dir), "--output_dir", str(tmp_path / "out")]
    assert main([*command, "--push_to_hub", "me/traces", "--license", "mit"]) == 0
    out = capsys.readouterr().out
    assert f"traces of {run_dir}: {tmp_path / 'out'}" in out
    assert "pushed: https://huggingface.co/datasets/me/traces" in out
    assert main([*command, "--merge", "--private"]) != 0
    error = capsys.readouterr().err
    assert "merge belong to a checkpoint" in error and "private needs push_to_hub" in error
    assert main([*command[:3], str(tmp_path / "nothing"), *command[4:], "--push_to_hub", "you/it"]) != 0
    error = capsys.readouterr().err
    assert "holds no traces" in error and "is not an empty folder" in error and "me may write" in error
