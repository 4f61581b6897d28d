"""The trained checkpoint of a run that is exported, and whether its files are whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nabla_trl.evaluation.results import load_results
from nabla_trl.models.adapters import FILE, adapter_note
from nabla_trl.training.checkpoints import (
    CONFIG,
    WEIGHTS,
    _with,
    read_training,
    trained_label,
    trained_methods,
    trained_weights,
)
from nabla_trl.utils.fields import read_yaml
from nabla_trl.utils.formatting import one_line
from nabla_trl.utils.identity import same_model

_CARD = ("traces", "command")


_FACTS = ("policy", "reward", "reward_kind", "task", "command", "versions")


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

    run: Path
    method: str
    folder: Path
    training: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    others: tuple[str, ...]

    @property
    def policy(self) -> str:
        """The model that training began from."""
        return self.facts["policy"]

    @property
    def adapter(self) -> bool:
        return self.folder.name == "adapter"

    @property
    def made_with(self) -> Path:
        """The configuration of the call that trained it."""
        return self.folder.parent / CONFIG

    @property
    def prefix(self) -> str:
        return prefix(self.method)

    @property
    def dtype(self) -> str:
        """The dtype that the run evaluated in."""
        return self.config.get("dtype", "float32")

    def measured(self) -> list[dict[str, Any]]:
        """The rows of this checkpoint and of methods on the base."""
        return [row for row in self.rows if not row["method"].startswith(self.others)]


def prefix(method: str) -> str:
    """What the names of a trained checkpoint's rows begin with."""
    return trained_label(method) + "_"


def find_checkpoint(run: Path, method: str | None) -> Checkpoint:
    """The trained checkpoint of a run; `method` says which where there are several.

    Raises:
        ValueError: no results, none of this checkpoint, no configuration, nothing trained, several and none named, or
            notes that lack something.
    """
    rows, facts = load_results(run)
    names = trained_methods(run)
    if not names:
        raise ValueError(f"{run} holds no trained weights: run recipes/distill.py with a training stage first")
    if method is None and len(names) > 1:
        raise ValueError(f"{run} holds several trained checkpoints: choose one by --trained, of {', '.join(names)}")
    chosen = method or names[0]
    if chosen not in names:
        raise ValueError(f"{run} holds no checkpoint {chosen!r}: there is {', '.join(names)}")
    if not any(row["method"].startswith(prefix(chosen)) for row in rows):
        raise ValueError(f"{run} holds no rows of {chosen}: evaluate it first, a card needs figures")
    for folder in (run, run / "trained" / chosen):
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} holds no {CONFIG}: what it was made with would not be known")
    weights = trained_weights(run, chosen)
    others = tuple(prefix(name) for name in names if name != chosen)
    training = _with(_CARD, read_training(run, chosen), run / "trained" / chosen / "train.json")
    _with(_FACTS, facts, run / "facts.json")
    return Checkpoint(run, chosen, weights, training, read_yaml(run / CONFIG), rows, facts, others)


def check_files(checkpoint: Checkpoint) -> None:
    """Refuse weights that no model need be loaded for.

    Raises:
        ValueError: a file that is missing, empty or cut, non-finite weights, an adapter without effect or of another
            base.
    """
    folder = checkpoint.folder
    if checkpoint.adapter:
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} is not an adapter: it has no {FILE}")
        base = adapter_note(str(folder)).base
        if not same_model(base, checkpoint.policy):
            raise ValueError(f"adapter {folder} was made for {base}, not for the run's policy {checkpoint.policy}")
    files = [folder / WEIGHTS] if checkpoint.adapter else sorted(folder.glob("*.safetensors"))
    if not files or not files[0].is_file():
        raise ValueError(f"{folder} holds no weights: nothing was trained, or its saving was cut short")
    moved = count = 0
    for file in files:
        for name, weight in _weights(file):
            count += 1
            if not weight.isfinite().all():
                raise ValueError(f"{file} holds weights that are not finite ({name}): the training diverged")
            moved += "lora_A" not in name and bool(weight.any())
    if not count:
        raise ValueError(f"{folder} holds files of weights without any: its saving was cut short")
    if checkpoint.adapter and not moved:
        raise ValueError(f"adapter {folder} is inert: its matrices B are all zero, the training changed nothing")


def _weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {one_line(error)}") from error
