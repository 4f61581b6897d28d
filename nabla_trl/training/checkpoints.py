"""Find the trained checkpoints of a run and read their records.

A run folder of recipes/distill.py holds:

    trained/<method>/train.json        record of the training (`nabla_trl.training.offline.TrainingResult`)
    trained/<method>/config.yaml       configuration of the training, as --config takes it
    trained/<method>/adapter/          a LoRA adapter and its tokenizer, or
    trained/<method>/model/            full weights and their tokenizer
    rows.jsonl, facts.json             what was measured (`nabla_trl.evaluation.results`)
    config.yaml                        configuration of the last call
    traces/*.parquet                   what was trained on, if anything
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nabla_trl.traces.storage import list_trace_files
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.identity import hash_files

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "config.yaml"
# What a report needs of train.json.
_TRAINING_KEYS = (
    *("tuning", "beta", "rows", "steps", "tokens", "skipped"),
    *("flops", "seconds", "trace_flops", "trace_seconds", "processes"),
)


def list_trained_methods(run_dir: Path) -> list[str]:
    """Return the methods that a run has finished training with."""
    return sorted(file.parent.name for file in run_dir.glob("trained/*/train.json"))


def find_trained_weights(run_dir: Path, method: str) -> Path:
    """Return the folder of a method's adapter or full model.

    Raises:
        ValueError: neither exists.
    """
    folder = run_dir / "trained" / method
    for name in ("adapter", "model"):
        if (folder / name).is_dir():
            return folder / name
    raise ValueError(f"{folder} holds neither adapter/ nor model/: nothing was trained, or its saving was cut short")


def read_training_record(run_dir: Path, method: str) -> dict[str, Any]:
    """Return the record of a method's training, with the cost of its traces.

    Raises:
        ValueError: the file is not JSON, lacks a key, or has a value of another type.
    """
    path = run_dir / "trained" / method / "train.json"
    record = require_keys(_TRAINING_KEYS, read_json_file(path), path)
    numbers = [name for name in _TRAINING_KEYS if name not in ("tuning", "beta", "skipped")]
    wrong = [name for name in numbers if not _is_amount(record[name])]
    wrong += ["beta"] * (record["beta"] is not None and not _is_amount(record["beta"]))
    wrong += ["tuning"] * (not isinstance(record["tuning"], str))
    wrong += ["skipped"] * (not isinstance(record["skipped"], dict))
    wrong += ["processes"] * ("processes" not in wrong and record["processes"] < 1)
    if wrong:
        raise ValueError(f"{path} has values of another type or range: {', '.join(wrong)}")
    return record


def _is_amount(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def hash_traces(run_dir: Path) -> str | None:
    """Return the sha256 hash of the run's trace files in the order of their names, or None without traces."""
    files = list_trace_files(run_dir)
    return hash_files(files, length=64) if files else None


def require_keys(names: Sequence[str], content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the content of a JSON file.

    Raises:
        ValueError: it lacks some of the keys.
    """
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it was changed, or written by another version")
    return content


def get_policy_label(train_method: str) -> str:
    """Return the label of the policy that a method trained: reward-weighted -> reward_weighted."""
    return train_method.replace("-", "_")
