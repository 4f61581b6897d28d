"""Traces: what a method did to one problem, on disk as parquet shards, and as rows for the trainers.

Sequences stay token ids from the prompt's template to the trainer's rows; texts are for people. A shard is
written whole (temporary file, fsync, rename), so a folder holds finished shards or nothing, whatever
happens to the process. `datasets.load_dataset("parquet", data_files=...)` reads the shards as they are: the
columns are the fields of `Trace`, with `cost` spread over `flops`, `seconds` and `tokens`; `tokens` and
`meta` are JSON objects in string columns, since their keys differ from run to run. A shard that was written
before a column of `_LATER` was added lacks it, and is read with the field empty.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nabla_trl.models.flops import Cost
from nabla_trl.traces.schema import FORMAT_VERSION, SCHEMA, VERSION_KEY, Revision, Trace
from nabla_trl.utils.files import fsync_folder

EVAL_TRACES_DIR = "held_out"  # folder of the traces of an evaluation's search, beside its rows


_COST_COLUMNS = ("flops", "seconds", "tokens")
_OPTIONAL_COLUMNS = ("pull", "answer_strict", "correct_strict", "verdict")  # columns that a shard may lack
_KEY_COLUMNS = ("problem_id", "seed", "method")


class TraceWriter:
    """Write traces as shards `traces-<rank>-<chunk>.parquet` of `chunk_size` traces; a context manager.

    Each process needs a `rank` of its own. Numbering goes on from the shards already there, and no shard is
    ever changed. Leaving the `with` block writes what is pending, also after an exception or Ctrl-C.
    Temporary files that a killed process of the same rank left behind are removed at the start.
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
        """Take one trace, and write a shard once `chunk_size` of them are pending (OSError as for `flush`).

        ValueError if the trace contradicts itself or does not fit the columns; it is not taken then.
        """
        trace.validate()
        try:  # converted here and not in `flush`, so that one bad trace can't take a whole chunk with it
            row = pa.RecordBatch.from_pylist([_to_row(trace)], schema=SCHEMA)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{trace.describe()} does not fit the trace columns: {error}") from error
        self._pending.append(row)
        if len(self._pending) >= self.chunk_size:
            self.flush()

    def flush(self) -> None:
        """Write the pending traces as one shard, on disk when this returns.

        OSError names the file that could not be written (disk full, ...): earlier shards are untouched, the
        pending traces stay pending, and `flush` can be called again.
        """
        if not self._pending:
            return
        path = self.folder / f"{self._prefix}{self._next_chunk:05d}.parquet"
        if path.exists():
            raise FileExistsError(f"{path} was written by another process; give each process its own rank")
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            _write_table(pa.Table.from_batches(self._pending).combine_chunks(), temporary)
            os.replace(temporary, path)
        except OSError as error:
            advice = f"{error.strerror or error}; earlier shards are kept, make room and run again"
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
    """All traces of a folder (or of one shard, or of several), sorted by problem id, seed and method.

    `columns`: names of the `Trace` fields to read, faster where texts or revisions aren't needed; problem id,
    seed and method are always read, and the fields left out hold empty values. Raises ValueError for a shard
    that can't be read, for an unknown column, and for the first (problem, seed, method) found twice.
    """
    stored = None if columns is None else _expand_columns(columns)
    rows = [row for path in _list_shards(path_or_paths) for row in _read_table(path, stored).to_pylist()]
    traces = sorted((_from_row(row) for row in rows), key=_get_trace_key)
    for before, after in pairwise(traces):
        if _get_trace_key(before) == _get_trace_key(after):
            raise ValueError(f"{after.describe()} is there twice; remove one of the shards that hold it")
    return traces


def read_finished_meta(folder: str | Path) -> dict[tuple[str, int], dict[str, str]]:
    """`meta` of every trace in the folder by problem id and seed, error rows included; empty without a folder.

    Reads these three columns only. Methods are not told apart: keep one folder per method.
    """
    done: dict[tuple[str, int], dict[str, str]] = {}
    for path in _list_shards(folder) if Path(folder).exists() else []:
        table = _read_table(path, ["problem_id", "seed", "meta"])
        keys = zip(table["problem_id"].to_pylist(), table["seed"].to_pylist(), strict=True)
        done |= dict(zip(keys, map(json.loads, table["meta"].to_pylist()), strict=True))
    return done


def _get_trace_key(trace: Trace) -> tuple[str, int, str]:
    return trace.problem_id, trace.seed, trace.method


def _to_row(trace: Trace) -> dict[str, Any]:
    row = dict(vars(trace))
    cost = row.pop("cost")
    row["revisions"] = [vars(revision) for revision in trace.revisions]
    row |= {"flops": cost.flops, "seconds": cost.seconds, "tokens": json.dumps(cost.tokens)}
    row["meta"] = json.dumps(trace.meta, ensure_ascii=False)
    return row


def _from_row(row: dict[str, Any]) -> Trace:
    """A trace from stored columns; the fields of columns that were not read stay empty."""
    row = _empty_row() | row
    row["revisions"] = [Revision(**{**entry, "suffix": tuple(entry["suffix"])}) for entry in row["revisions"]]
    row["cost"] = Cost(row.pop("flops"), row.pop("seconds"), json.loads(row.pop("tokens")))
    row["meta"] = json.loads(row["meta"])
    return Trace(**row)


def _empty_row() -> dict[str, Any]:
    texts = dict.fromkeys(("task", "prompt", "response", "stop"), "")
    lists: dict[str, Any] = {name: [] for name in ("prompt_ids", "initial_ids", "response_ids", "revisions", "pull")}
    rewards = dict.fromkeys(("reward_initial", "reward"), math.nan)
    unknown = dict.fromkeys(("answer", "gold", "correct", "error", "answer_strict", "correct_strict", "verdict"))
    cost = {"flops": 0.0, "seconds": 0.0, "tokens": "{}"}
    return {**texts, **lists, **rewards, **unknown, **cost, "finished": False, "meta": "{}"}


def _expand_columns(columns: Sequence[str]) -> list[str]:
    known = [field.name for field in fields(Trace)]
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(f"no such trace column: {', '.join(unknown)}; known: {', '.join(known)}")
    wanted = dict.fromkeys((*_KEY_COLUMNS, *columns))
    return [column for name in wanted for column in (_COST_COLUMNS if name == "cost" else (name,))]


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
            if version == FORMAT_VERSION and _has_known_schema(file.schema_arrow):
                return file.read(columns if columns is None else [c for c in columns if c in file.schema_arrow.names])
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged trace shard ({reason}); delete it and run again") from error
    raise ValueError(f"{path}: not a trace shard of format {FORMAT_VERSION} (its format: {version})")


def _has_known_schema(schema: pa.Schema) -> bool:
    return schema.equals(
        pa.schema([one for one in SCHEMA if one.name in schema.names or one.name not in _OPTIONAL_COLUMNS])
    )


def _write_table(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
