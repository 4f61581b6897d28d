"""Find the trained checkpoint of a run, and check its weight files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nabla_trl.evaluation.results import load_results
from nabla_trl.evaluation.rows import Row
from nabla_trl.models.loading import ADAPTER_CONFIG_FILE, is_name_in_memory, read_adapter_info
from nabla_trl.training.checkpoints import (
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    find_trained_weights,
    get_policy_label,
    list_trained_methods,
    read_training_record,
    require_keys,
)
from nabla_trl.utils.files import read_json_file, read_yaml
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import is_same_model

# Keys that a model card needs, of train.json and facts.json.
_RECORD_KEYS = ("traces_hash", "command")
_FACT_KEYS = ("policy", "reward", "reward_kind", "task", "command", "versions")


@dataclass(frozen=True)
class Checkpoint:
    """A trained checkpoint and its run.

    Attributes:
        run_dir: folder of the run.
        method: training method, such as sft or rloo.
        checkpoint_dir: folder with weights and tokenizer.
        training: content of train.json: method, tuning, beta, steps, flops and others.
        run_config: configuration of the run's last call, which evaluated. Empty: it was made from Python.
        rows: result rows of the run. Methods of this checkpoint begin with `row_prefix`.
        facts: facts of the run (see `nabla_trl.report.text`).
        other_prefixes: row prefixes of the run's other checkpoints.
    """

    run_dir: Path
    method: str
    checkpoint_dir: Path
    training: dict[str, Any]
    run_config: dict[str, Any]
    rows: list[Row]
    facts: dict[str, Any]
    other_prefixes: tuple[str, ...]

    @property
    def base_policy(self) -> str:
        """Return the name of the model that the training started from, or the folder of one that was in memory."""
        name: str = self.facts["policy"]
        if not is_name_in_memory(name):
            return name
        settings = read_json_file(self.checkpoint_dir.parent / "settings.json")
        return str(self.run_dir / Path(settings["policy"]).name)

    @property
    def is_adapter(self) -> bool:
        """Return whether the checkpoint is a LoRA adapter, not a full model."""
        return self.checkpoint_dir.name == "adapter"

    @property
    def row_prefix(self) -> str:
        """Return the beginning of the method names of this checkpoint's rows."""
        return get_row_prefix(self.method)

    @property
    def dtype(self) -> str:
        """Return the data type of the run's evaluation."""
        return self.run_config.get("dtype", "float32")


def get_row_prefix(method: str) -> str:
    """Return the beginning of the method names of a checkpoint's rows."""
    return get_policy_label(method) + "_"


def find_checkpoint(run_dir: Path, method: str | None) -> Checkpoint:
    """Return a trained checkpoint of a run.

    Args:
        run_dir: folder of a run of recipes/distill.py.
        method: training method. None takes the only checkpoint.

    Raises:
        ValueError: the run has no results, no such checkpoint, no rows or no configuration of it, several checkpoints
            for `method` None, or train.json or facts.json lack a key.
    """
    rows, facts = load_results(run_dir)
    methods = list_trained_methods(run_dir)
    if not methods:
        raise ValueError(f"{run_dir} holds no trained weights: run recipes/distill.py with a training stage first")
    if method is None and len(methods) > 1:
        raise ValueError(
            f"{run_dir} holds several trained checkpoints: choose one with --train_method, of {', '.join(methods)}"
        )
    method = method or methods[0]
    if method not in methods:
        raise ValueError(f"{run_dir} holds no checkpoint {method!r}: choose from {', '.join(methods)}")
    if not any(row.method.startswith(get_row_prefix(method)) for row in rows):
        raise ValueError(f"{run_dir} holds no rows of {method}: evaluate it first, because the card needs its results")
    train_dir = run_dir / "trained" / method
    if not (train_dir / CONFIG_FILE).is_file():
        raise ValueError(f"{train_dir} holds no {CONFIG_FILE}: its training configuration is not known")
    require_keys(_FACT_KEYS, facts, run_dir / "facts.json")
    return Checkpoint(
        run_dir=run_dir,
        method=method,
        checkpoint_dir=find_trained_weights(run_dir, method),
        training=require_keys(_RECORD_KEYS, read_training_record(run_dir, method), train_dir / "train.json"),
        run_config=read_yaml(run_dir / CONFIG_FILE) if (run_dir / CONFIG_FILE).is_file() else {},
        rows=rows,
        facts=facts,
        other_prefixes=tuple(get_row_prefix(other) for other in methods if other != method),
    )


def check_weight_files(checkpoint: Checkpoint) -> None:
    """Check the weight files without loading a model.

    Raises:
        ValueError: a file that is missing, empty or incomplete, weights that are not finite, or an adapter that
            changes nothing or belongs to another base model.
    """
    folder = checkpoint.checkpoint_dir
    if checkpoint.is_adapter:
        if not (folder / ADAPTER_CONFIG_FILE).is_file():
            raise ValueError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
        base = read_adapter_info(str(folder)).base_model
        if not is_same_model(base, checkpoint.base_policy):
            raise ValueError(
                f"adapter {folder} was trained on {base}, not on the run's policy {checkpoint.base_policy}"
            )
    files = [folder / ADAPTER_WEIGHTS_FILE] if checkpoint.is_adapter else sorted(folder.glob("*.safetensors"))
    if not files or not files[0].is_file():
        raise ValueError(f"{folder} holds no weights: nothing was trained, or saving was interrupted")
    num_weights = num_changed = 0
    for file in files:
        for name, weight in _iterate_weights(file):
            num_weights += 1
            if not weight.isfinite().all():
                raise ValueError(f"{file} holds weights that are not finite ({name}): the training diverged")
            num_changed += "lora_A" not in name and bool(weight.any())
    if not num_weights:
        raise ValueError(f"{folder} holds weight files without any weights: saving was interrupted")
    if checkpoint.is_adapter and not num_changed:
        raise ValueError(f"adapter {folder} is inert: its B matrices are all zero, so the training changed nothing")


def _iterate_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a mapping)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {format_error(error)}") from error
