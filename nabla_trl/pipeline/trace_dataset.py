"""Traces as a data set of the Hub, or as the same folder on this disk: rows for plain trainers, and a card."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from huggingface_hub import HfApi

from nabla_trl.exporting.export import check_export_folder, temporary_folder
from nabla_trl.exporting.trace_card import TraceCardFacts, build_trace_card
from nabla_trl.pipeline.datasets import TraceSource, collect_traces, to_preference_dataset, to_sft_dataset
from nabla_trl.pipeline.traces import SETTINGS_FILE
from nabla_trl.traces.storage import TRACES_DIR, TraceWriter, list_trace_files
from nabla_trl.traces.texts import TOKENS_FILE
from nabla_trl.training.reporting import check_hub_repository
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import format_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SHARD_SIZE = 10_000  # traces per parquet file

logger = logging.getLogger(__name__)


def export_traces(
    traces: TraceSource,
    output_dir: str | Path,
    *,
    license: str | None = None,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    name: str | None = None,
) -> Path:
    """Write traces as a data set that `datasets.load_dataset` reads, with a card.

    The folder has the configurations traces, sft and preference. Plain trainers of TRL take the rows of the last two.
    Traces of problems that could not be run are left out.

    Args:
        traces: traces, or the folder of a run.
        output_dir: folder to write, which must be empty or not exist.
        license: key of a license on the Hub, such as apache-2.0. None: the card leaves it open.
        tokenizer: the policy's, or its name, for the texts of the preference rows (see `to_preference_dataset`).
        name: id of the data set on the Hub, for the code on the card. None: the folder.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: there are no traces without an error, or `output_dir` is not empty.
        OSError: the folder cannot be written.
    """
    folder = Path(os.path.abspath(output_dir))
    check_export_folder(folder)
    found = collect_traces(traces)
    valid = [trace for trace in found if trace.error is None]
    if not valid:
        raise ValueError(f"all {len(found)} traces have an error, the first: {found[0].error}")
    builders: dict[str, Callable[[], Dataset]] = {
        "sft": lambda: to_sft_dataset(valid),
        "preference": lambda: to_preference_dataset(valid, tokenizer),
    }
    datasets: dict[str, Dataset] = {}
    left_out: dict[str, str] = {}
    for config, build in builders.items():
        try:
            datasets[config] = build()
        except ValueError as error:  # without a finished response, or without a decided proposal
            left_out[config] = format_error(error)
            logger.warning("%s: no rows for %s: %s", output_dir, config, left_out[config])
    facts = TraceCardFacts(
        name=name or str(folder),
        license=license,
        settings=_read_settings(traces),
        num_rows={"traces": len(valid), **{config: len(dataset) for config, dataset in datasets.items()}},
        left_out=left_out,
        num_errors=len(found) - len(valid),
    )
    with temporary_folder(folder) as draft:
        with TraceWriter(draft / TRACES_DIR, chunk_size=_SHARD_SIZE) as writer:
            for trace in valid:
                writer.add(trace)
        _copy_token_texts(traces, draft)
        for config, dataset in datasets.items():
            (draft / config).mkdir()
            pq.write_table(dataset.with_format("arrow")[:], draft / config / "train.parquet", compression="zstd")
        build_trace_card(valid, facts).save(draft / "README.md")
    return folder


def push_traces(
    traces: TraceSource,
    repo_id: str,
    *,
    license: str | None = None,
    private: bool = False,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    output_dir: str | Path | None = None,
) -> str:
    """Push traces to a data set repository of the Hub, as `export_traces` writes them, and return its URL.

    Args:
        repo_id: the repository, written NAME/DATASET.
        private: make the repository private if it is new.
        output_dir: also keep the folder here. None: it is deleted after the push.
        traces, license, tokenizer: as for `export_traces`.

    Raises:
        ValueError: nobody is logged in, the repository cannot be written to, or as `export_traces`. If the push itself
            fails, the folder `output_dir` stays.
    """
    check_hub_repository(repo_id, HfApi())
    with TemporaryDirectory() as scratch:
        path = output_dir or Path(scratch, "traces")
        folder = export_traces(traces, path, license=license, tokenizer=tokenizer, name=repo_id)
        return push_trace_folder(folder, repo_id, private=private)


def push_trace_folder(folder: Path, repo_id: str, *, private: bool) -> str:
    """Push a folder of `export_traces` to a data set repository of the Hub, and return its URL.

    Raises:
        ValueError: the push fails. The folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        url = api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Traces by nabla-trl"
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is ready, but was not pushed to {repo_id}: {format_error(error)}") from error
    return str(url)


def collect_trace_export_faults(checks: Checks, run_dir: str, output_dir: str, repo_id: str | None) -> None:
    """Collect what stands in the way of an export of traces, before any work."""
    checks.call(check_export_folder, Path(output_dir))
    with checks.collect():
        if not list_trace_files(Path(run_dir)):
            raise ValueError(f"{run_dir} holds no traces: name the folder of a run of nabla-trl traces or distill")
    if repo_id:
        with checks.collect():
            check_hub_repository(repo_id, HfApi())


def _read_settings(traces: TraceSource) -> dict[str, str]:
    path = Path(traces, SETTINGS_FILE) if isinstance(traces, str | Path) else None
    return read_json_file(path) if path is not None and path.exists() else {}


def _copy_token_texts(traces: TraceSource, draft: Path) -> None:
    """Copy tokens.json, with which the traces of the data set print as texts."""
    if isinstance(traces, str | Path):
        path = Path(traces, TRACES_DIR, TOKENS_FILE)
        if path.exists():
            shutil.copyfile(path, draft / TRACES_DIR / TOKENS_FILE)
