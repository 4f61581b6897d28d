"""The trained checkpoint of a run that is exported, and whether its files are whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nabla_trl.evaluation.results import load_results
from nabla_trl.evaluation.rows import Row
from nabla_trl.models.loading import ADAPTER_CONFIG_FILE, read_adapter_info
from nabla_trl.training.checkpoints import (
    ADAPTER_WEIGHTS_FILE,
    CONFIG_FILE,
    find_trained_weights,
    get_policy_label,
    list_trained_methods,
    read_training_record,
    require_keys,
)
from nabla_trl.utils.fields import read_yaml
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import is_same_model

_MODEL_CARD_KEYS = ("traces", "command")


_FACT_KEYS = ("policy", "reward", "reward_kind", "task", "command", "versions")


@dataclass(frozen=True)
class Checkpoint:
    """One trained checkpoint and the run that made it.

    Attributes:
        method: sft, reward-weighted, dpo, rloo or grpo.
        folder: its weights and tokenizer.
        training: train.json: method, tuning, beta, steps, flops and so on.
        config: the run's configuration, in its last call, which measured.
        rows: the run's result rows; those of this checkpoint begin with its prefix.
        facts: the run's facts (`nabla_trl.report.text`).
        others: prefixes of the run's other checkpoints.
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
        """The model that training began from."""
        return self.facts["policy"]

    @property
    def is_adapter(self) -> bool:
        return self.checkpoint_dir.name == "adapter"

    @property
    def training_config_path(self) -> Path:
        """The configuration of the call that trained it."""
        return self.checkpoint_dir.parent / CONFIG_FILE

    @property
    def row_prefix(self) -> str:
        return get_row_prefix(self.method)

    @property
    def dtype(self) -> str:
        """The dtype that the run evaluated in."""
        return self.run_config.get("dtype", "float32")

    def select_comparable_rows(self) -> list[Row]:
        """The rows of this checkpoint and of methods on the base."""
        return [row for row in self.rows if not row.method.startswith(self.other_prefixes)]


def get_row_prefix(method: str) -> str:
    """What the names of a trained checkpoint's rows begin with."""
    return get_policy_label(method) + "_"


def find_checkpoint(run_dir: Path, method: str | None) -> Checkpoint:
    """The trained checkpoint of a run; `method` says which where there are several.

    Raises:
        ValueError: no results, none of this checkpoint, no configuration, nothing trained, several and none named, or
            notes that lack something.
    """
    rows, facts = load_results(run_dir)
    names = list_trained_methods(run_dir)
    if not names:
        raise ValueError(f"{run_dir} holds no trained weights: run recipes/distill.py with a training stage first")
    if method is None and len(names) > 1:
        raise ValueError(
            f"{run_dir} holds several trained checkpoints: choose one by --trained, of {', '.join(names)}"
        )
    chosen = method or names[0]
    if chosen not in names:
        raise ValueError(f"{run_dir} holds no checkpoint {chosen!r}: there is {', '.join(names)}")
    if not any(row.method.startswith(get_row_prefix(chosen)) for row in rows):
        raise ValueError(f"{run_dir} holds no rows of {chosen}: evaluate it first, a card needs figures")
    for folder in (run_dir, run_dir / "trained" / chosen):
        if not (folder / CONFIG_FILE).is_file():
            raise ValueError(f"{folder} holds no {CONFIG_FILE}: what it was made with would not be known")
    weights = find_trained_weights(run_dir, chosen)
    others = tuple(get_row_prefix(name) for name in names if name != chosen)
    training = require_keys(
        _MODEL_CARD_KEYS, read_training_record(run_dir, chosen), run_dir / "trained" / chosen / "train.json"
    )
    require_keys(_FACT_KEYS, facts, run_dir / "facts.json")
    return Checkpoint(run_dir, chosen, weights, training, read_yaml(run_dir / CONFIG_FILE), rows, facts, others)


def check_weight_files(checkpoint: Checkpoint) -> None:
    """Refuse weights that no model need be loaded for.

    Raises:
        ValueError: a file that is missing, empty or cut, non-finite weights, an adapter without effect or of another
            base.
    """
    folder = checkpoint.checkpoint_dir
    if checkpoint.is_adapter:
        if not (folder / ADAPTER_CONFIG_FILE).is_file():
            raise ValueError(f"{folder} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
        base = read_adapter_info(str(folder)).base_model
        if not is_same_model(base, checkpoint.base_policy):
            raise ValueError(
                f"adapter {folder} was made for {base}, not for the run's policy {checkpoint.base_policy}"
            )
    files = [folder / ADAPTER_WEIGHTS_FILE] if checkpoint.is_adapter else sorted(folder.glob("*.safetensors"))
    if not files or not files[0].is_file():
        raise ValueError(f"{folder} holds no weights: nothing was trained, or its saving was cut short")
    moved = count = 0
    for file in files:
        for name, weight in _iterate_weights(file):
            count += 1
            if not weight.isfinite().all():
                raise ValueError(f"{file} holds weights that are not finite ({name}): the training diverged")
            moved += "lora_A" not in name and bool(weight.any())
    if not count:
        raise ValueError(f"{folder} holds files of weights without any: its saving was cut short")
    if checkpoint.is_adapter and not moved:
        raise ValueError(f"adapter {folder} is inert: its matrices B are all zero, the training changed nothing")


def _iterate_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {format_error(error)}") from error
