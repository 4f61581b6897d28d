"""Store traces as parquet shards.

A shard is written whole (temporary file, fsync, rename), so a folder holds finished shards or nothing, whatever
happens to the process. `datasets.load_dataset("parquet", data_files=...)` reads the shards as they are. The columns
are the fields of `Trace`, with `cost` spread over `flops`, `seconds` and `tokens`. The columns `tokens` and `meta`
hold JSON objects as text, since their keys differ from run to run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nabla_trl.models.flops import Cost
from nabla_trl.tasks.shards import check_same_settings, list_run_folders, read_shard_plan
from nabla_trl.traces.schema import (
    ADDED_COLUMNS,
    FORMAT_VERSION,
    SCHEMA,
    STORED_FIELDS,
    VERSION_KEY,
    Revision,
    SoftTargets,
    Trace,
)
from nabla_trl.traces.texts import make_folder_decoder
from nabla_trl.utils.files import fsync_folder, parse_json, refuse_unreadable
from nabla_trl.utils.formatting import format_error

TRACES_DIR = "traces"  # folder of the traces of a run
EVAL_TRACES_DIR = "eval_traces"  # folder of the traces of an evaluation's search, beside its rows

_COST_COLUMNS = ("flops", "seconds", "tokens")
_NULLABLE = dict.fromkeys(("answer_strict", "correct_strict", "match_result"))  # of the columns that may be null
_KEY_COLUMNS = ("problem_id", "seed", "method")


class TraceWriter:
    """Writer of traces as shards `traces-<rank>-<chunk>.parquet`, for use in a `with` block.

    Leaving the block writes the pending traces, also after an exception or Ctrl-C. Numbering continues after the
    shards in the folder, and no shard is ever changed. Temporary files that a killed process of the same rank left
    behind are removed at the start.

    Args:
        rank: number of the process. Each process needs its own.
        chunk_size: traces per shard.
    """

    def __init__(self, folder: str | Path, rank: int = 0, chunk_size: int = 256) -> None:
        if rank < 0 or chunk_size < 1:
            raise ValueError(f"rank {rank} must be at least 0 and chunk_size {chunk_size} at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.chunk_size = chunk_size
        self._prefix = f"traces-{rank:05d}-"
        for stale in self.folder.glob(f"{self._prefix}*.parquet.tmp"):
            stale.unlink()
        shards = self.folder.glob(f"{self._prefix}[0-9]*.parquet")
        self._next_chunk = max((int(path.stem.removeprefix(self._prefix)) for path in shards), default=-1) + 1
        self._pending: list[pa.RecordBatch] = []

    def add(self, trace: Trace) -> None:
        """Take one trace, and write a shard once `chunk_size` of them are pending.

        Raises:
            ValueError: the trace contradicts itself or does not fit the columns. It is not taken then.
            OSError: as for `flush`.
        """
        trace.validate()
        try:  # converted here and not in `flush`, so that one bad trace cannot take a whole chunk with it
            batch = pa.RecordBatch.from_pylist([_to_row(trace)], schema=SCHEMA)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{trace.describe()} does not fit the trace columns: {error}") from error
        self._pending.append(batch)
        if len(self._pending) >= self.chunk_size:
            self.flush()

    def flush(self) -> None:
        """Write the pending traces as one shard, which is on disk when this returns.

        Raises:
            OSError: the file that could not be written (disk full, …). Earlier shards are untouched, the pending
                traces stay pending, and `flush` can be called again.
        """
        if not self._pending:
            return
        path = self.folder / f"{self._prefix}{self._next_chunk:05d}.parquet"
        if path.exists():
            raise FileExistsError(f"{path} was written by another process; give each process its own rank")
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            table = pa.Table.from_batches(self._pending).combine_chunks()
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd", write_page_checksum=True)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            advice = f"{error.strerror or error}; earlier shards are kept, free disk space and run again"
            raise OSError(error.errno, advice, str(path)) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        self._pending, self._next_chunk = [], self._next_chunk + 1
        fsync_folder(self.folder)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, exception_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.flush()


def read_traces(path_or_paths: str | Path | Iterable[str | Path], columns: Sequence[str] | None = None) -> list[Trace]:
    """Return the traces of a folder, of one shard or of several, sorted by problem id, seed and method.

    Args:
        columns: names of the `Trace` fields to read, which is faster where texts or revisions are not needed. Problem
            id, seed and method are always read, and the other fields hold empty values. None reads every field.

    Raises:
        ValueError: a shard that cannot be read, an unknown column, or a (problem, seed, method) that occurs twice.
    """
    table_columns = None if columns is None else _expand_columns(columns)
    traces: list[Trace] = []
    for path in _list_shards(path_or_paths):
        table = _read_table(path, table_columns)
        with refuse_unreadable(f"{path}: damaged trace shard"):
            read = [_from_row(row) for row in table.to_pylist()]
        hashes = {trace.meta.get("tokenizer_hash") for trace in read}
        decoders = {tokenizer_hash: make_folder_decoder(path.parent, tokenizer_hash) for tokenizer_hash in hashes}
        traces += [replace(trace, decoder=decoders[trace.meta.get("tokenizer_hash")]) for trace in read]
    traces.sort(key=_get_trace_key)
    for before, after in pairwise(traces):
        if _get_trace_key(before) == _get_trace_key(after):
            raise ValueError(f"{after.describe()} is there twice; remove one of the shards that hold it")
    return traces


def read_finished_meta(folder: str | Path) -> dict[tuple[str, int], dict[str, str]]:
    """Return `meta` of every trace in the folder by problem id and seed, failed problems included.

    Only these three columns are read. Methods are not told apart, so keep one folder per method. A folder that does
    not exist gives an empty dict.
    """
    meta: dict[tuple[str, int], dict[str, str]] = {}
    for path in _list_shards(folder) if Path(folder).exists() else []:
        table = _read_table(path, ["problem_id", "seed", "meta"])
        keys = zip(table["problem_id"].to_pylist(), table["seed"].to_pylist(), strict=True)
        with refuse_unreadable(f"{path}: damaged trace shard"):
            meta |= dict(zip(keys, map(_parse_object, table["meta"].to_pylist()), strict=True))
    return meta


def list_trace_files(run_dir: Path) -> list[Path]:
    """Return the parquet files of a run's traces, and of shards that have folders of their own inside the run's."""
    pattern = f"{TRACES_DIR}/traces-*.parquet"
    return [file for folder in list_run_folders(run_dir) for file in sorted(folder.glob(pattern))]


def describe_missing_shards(run_dir: Path, problem_ids: Collection[str] | None = None) -> str:
    """Return which shards of `nabla-trl traces --shard` lack traces. Empty if none does, and without shards.

    Args:
        problem_ids: the problems that must have traces. None: all problems of the shards.

    Raises:
        ValueError: shards of different plans or settings, or a damaged file.
    """
    folders = list_run_folders(run_dir)
    names = sorted({path.name for folder in folders for path in folder.glob(f"{TRACES_DIR}/shards-*.json")})
    if not names:
        return ""
    check_same_settings(folders, f"{TRACES_DIR}.settings.json")
    done = {key for folder in folders for key in read_finished_meta(folder / TRACES_DIR)}
    parts = []
    for name in names:
        plan = read_shard_plan(folder / TRACES_DIR / name for folder in folders)
        assert plan is not None
        for seed in plan.seeds:
            needless = (key for key in plan.problems if problem_ids is not None and key[1] not in problem_ids)
            finished = {key for key in plan.problems if (key[1], seed) in done}.union(needless)
            if missing := plan.describe_missing(finished):
                parts.append(missing + (f" of seed {seed}" if len(names) > 1 else ""))
    return ", ".join(parts)


def _get_trace_key(trace: Trace) -> tuple[str, int, str]:
    return trace.problem_id, trace.seed, trace.method


def _to_row(trace: Trace) -> dict[str, Any]:
    row = {name: getattr(trace, name) for name in STORED_FIELDS}
    cost = row.pop("cost")
    row["revisions"] = [vars(revision) for revision in trace.revisions]
    row["soft_targets"] = [vars(targets) for targets in trace.soft_targets]
    row |= {"flops": cost.flops, "seconds": cost.seconds, "tokens": json.dumps(cost.tokens)}
    row["meta"] = json.dumps(trace.meta, ensure_ascii=False)
    return row


def _from_row(row: dict[str, Any]) -> Trace:
    """Return a trace from the columns that were read. Fields of other columns hold empty values."""
    texts = dict.fromkeys(("task", "prompt", "response", "stop_reason"), "")
    list_names = ("prompt_ids", "initial_ids", "response_ids", "revisions", "predicted_gain", "soft_targets")
    lists: dict[str, Any] = {name: [] for name in list_names}
    rewards = dict.fromkeys(("reward_initial", "reward"), math.nan)
    unknown = dict.fromkeys(("answer", "gold", "correct", "error"))
    cost = {"flops": 0.0, "seconds": 0.0, "tokens": "{}"}
    row = {**texts, **lists, **rewards, **unknown, **cost, "finished": False, "meta": "{}", **row}
    missing = [name for name, value in row.items() if value is None and name not in unknown | _NULLABLE]
    if missing:
        raise ValueError(f"no value of {', '.join(missing)}")
    row["revisions"] = [Revision(**{**entry, "suffix": tuple(entry["suffix"])}) for entry in row["revisions"]]
    row["soft_targets"] = [SoftTargets(**entry) for entry in row["soft_targets"]]
    row["cost"] = Cost(row.pop("flops"), row.pop("seconds"), _parse_object(row.pop("tokens")))
    row["meta"] = _parse_object(row["meta"])
    return Trace(**row)


def _parse_object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("a column holds no JSON object")
    return value


def _expand_columns(columns: Sequence[str]) -> list[str]:
    if unknown := [name for name in columns if name not in STORED_FIELDS]:
        raise ValueError(f"no such trace column: {', '.join(unknown)}; choose from: {', '.join(STORED_FIELDS)}")
    names = dict.fromkeys((*_KEY_COLUMNS, *columns))
    return [column for name in names for column in (_COST_COLUMNS if name == "cost" else (name,))]


def _list_shards(path_or_paths: str | Path | Iterable[str | Path]) -> list[Path]:
    if not isinstance(path_or_paths, (str, Path)):
        return [Path(file) for file in path_or_paths]
    path = Path(path_or_paths)
    if path.is_dir():
        return sorted(path.glob("traces-*.parquet"))
    if not path.exists():
        raise ValueError(f"{path}: no such folder or trace file")
    return [path]


def _read_table(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            version = (file.schema_arrow.metadata or {}).get(VERSION_KEY, b"none").decode()
            absent = {*ADDED_COLUMNS} - {*file.schema_arrow.names}
            schema = pa.schema([column for column in SCHEMA if column.name not in absent])
            if version == FORMAT_VERSION and file.schema_arrow.equals(schema):
                return file.read(None if columns is None else [name for name in columns if name not in absent])
    except Exception as error:  # Arrow raises errors of many kinds for a damaged file
        reason = format_error(error)
        raise ValueError(f"{path}: damaged trace shard ({reason}); delete it and run again") from error
    if version == "1":
        raise ValueError(
            f"{path}: a trace shard of format 1, but this version reads format {FORMAT_VERSION}: generate the traces "
            "again (CHANGELOG.md names the renamed columns)"
        )
    raise ValueError(f"{path}: not a trace shard of format {FORMAT_VERSION} (its format: {version})")
