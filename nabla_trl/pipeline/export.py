"""The stage export: a trained checkpoint as a folder, or a repository of the Hub, that others can load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nabla_trl.exporting.checkpoint import Checkpoint, check_weight_files, find_checkpoint
from nabla_trl.exporting.export import (
    ExportResult,
    check_export_folder,
    check_push_to_hub,
    export_checkpoint,
    push_exported_folder,
)
from nabla_trl.models.loading import get_dtype_name, trusting_remote_code
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.formatting import format_error


def export(
    run_dir: str | Path,
    output_dir: str | Path,
    *,
    train_method: str | None = None,
    merge: bool = False,
    license: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    trust_remote_code: bool | None = None,
) -> ExportResult:
    """Write a trained checkpoint to a folder: weights, tokenizer, training configuration and a model card.

    The folder is loaded again before it gets its name, and must give the logits of the trained model.

    Args:
        run_dir: folder of a run that has trained and evaluated a policy, or the folder of one adapter or model in it
            (RUN/trained/METHOD/adapter).
        output_dir: folder to write, which must be empty or not exist.
        train_method: training method of the checkpoint. None: the only checkpoint.
        merge: also write base model and adapter as one model, in merged/.
        license: license of the checkpoint, such as apache-2.0. None: that of the base model's card.
        dtype: data type of the check and of merged weights. None: that of the run's evaluation.
        device: device of the check. None: a GPU if there is one, else the CPU.
        push_to_hub: repository of the Hub to push the folder to, written NAME/MODEL.
        private: make the repository private if it is new.
        trust_remote_code: run code from the base model's repository (see `load_policy`).

    Returns:
        The folder, the results of its check, and the URL of the repository if it was pushed.

    Raises:
        ValueError: the run has no such checkpoint or no rows of it, `output_dir` is not empty, the exported folder
            gives other logits, or the folder is ready and could not be pushed.
    """
    if private and not push_to_hub:
        raise ValueError("private needs push_to_hub: nothing is pushed")
    with trusting_remote_code(trust_remote_code):
        checks = Checks()
        checkpoint = collect_export_faults(checks, run_dir, output_dir, train_method, push_to_hub, merge)
        checks.raise_faults()
        assert checkpoint is not None  # there are no faults
        result = export_checkpoint(
            checkpoint,
            Path(output_dir),
            merge=merge,
            license=license,
            dtype=None if dtype is None else get_dtype_name(dtype),
            device=device,
            model_name=push_to_hub,
        )
    if not push_to_hub:
        return result
    try:
        return replace(result, url=push_exported_folder(result.output_dir, push_to_hub, private=private))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{result.output_dir} is ready, but was not pushed to {push_to_hub}: {format_error(error)}"
        ) from error


def collect_export_faults(
    checks: Checks,
    run_dir: str | Path,
    output_dir: str | Path,
    train_method: str | None,
    push_to_hub: str | None,
    merge: bool,
) -> Checkpoint | None:
    """Collect what is wrong with an export, before any model is loaded. Return its checkpoint if there is one."""
    checks.call(check_export_folder, Path(output_dir))
    checkpoint = None
    with checks.collect():
        checkpoint = _find_checkpoint(Path(run_dir), train_method)
        checks.call(check_weight_files, checkpoint)
        if push_to_hub:
            check_push_to_hub(checkpoint, push_to_hub, merge=merge)
    return checkpoint


def _find_checkpoint(folder: Path, train_method: str | None) -> Checkpoint:
    """Return the checkpoint of a run's folder, or of the folder of its weights."""
    path = folder.resolve()
    if path.name in ("adapter", "model") and path.parent.parent.name == "trained":
        if train_method not in (None, path.parent.name):
            raise ValueError(f"{folder} is the checkpoint of {path.parent.name}, not of {train_method}")
        return find_checkpoint(path.parents[2], path.parent.name)
    return find_checkpoint(folder, train_method)
