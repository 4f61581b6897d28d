"""The trained checkpoints of a run: where they lie, what is known of them, and whether their files are whole.

A run folder, as recipes/distill.py leaves it:

    trained/<method>/train.json        what the training did
    trained/<method>/config.yaml       the configuration that it was made with, as --config takes it
    trained/<method>/adapter/          a LoRA adapter and its tokenizer; or
    trained/<method>/model/            full weights and their tokenizer
    rows.jsonl, facts.json             what was measured (`nabla_trl.evaluation.results`)
    config.yaml                        the configuration of the last call
    traces/*.parquet                   what was trained on, if anything
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nabla_trl.utils.files import read_json_file

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "config.yaml"
# What a report needs to know of a training and of a run, and what a card needs beyond that.
_COST_KEYS = ("flops", "seconds", "trace_flops", "trace_seconds", "processes")
_TRAINING_KEYS = ("tuning", "beta", "rows", "steps", "tokens", "skipped", *_COST_KEYS)


def list_trained_methods(run_dir: Path) -> list[str]:
    """The methods that a run has finished training with."""
    return sorted(note.parent.name for note in run_dir.glob("trained/*/train.json"))


def find_trained_weights(run_dir: Path, method: str) -> Path:
    """The folder of a method's adapter or whole model.

    Raises:
        ValueError: there is neither.
    """
    folder = run_dir / "trained" / method
    found = next((folder / name for name in ("adapter", "model") if (folder / name).is_dir()), None)
    if found is None:
        raise ValueError(
            f"{folder} holds neither adapter/ nor model/: nothing was trained, or its saving was cut short"
        )
    return found


def read_training_record(run_dir: Path, method: str) -> dict[str, Any]:
    """What a method's training did (`nabla_trl.training.offline.Trained`), and the cost of the traces it was made of.

    Raises:
        ValueError: it is not JSON, or lacks something.
    """
    path = run_dir / "trained" / method / "train.json"
    return _require_keys(_TRAINING_KEYS, read_json_file(path), path)


def hash_traces(run_dir: Path) -> str | None:
    """sha256 over the contents of the run's shards of traces in the order of their names; None without traces."""
    shards = sorted(run_dir.glob("traces/*.parquet"))
    found = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest() if shards else None


def _require_keys(names: Sequence[str], content: dict[str, Any], path: Path) -> dict[str, Any]:
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was changed, or written by another version")
    return content


def get_policy_label(train_method: str) -> str:
    """The label of the policy that a way of training made: reward-weighted -> reward_weighted."""
    return train_method.replace("-", "_")
