"""Files that were damaged or forged are read, or refused in one line, with bounded time and memory.

Each mutation is made from a seed, so a failure names the seed that repeats it. The slow test reads some 2,000 files.
"""

from __future__ import annotations

import io
import json
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pages
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from nabla_trl.cli.parsing import parse_dataclasses
from nabla_trl.evaluation.grids import build_grids
from nabla_trl.evaluation.results import load_results
from nabla_trl.evaluation.rows import RowStore, format_rows
from nabla_trl.evaluation.run_facts import RunStopwatch
from nabla_trl.evaluation.runner import get_budget_flops
from nabla_trl.models.loading.adapters import read_adapter_info
from nabla_trl.models.loading.tokenizers import load_tokenizer
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.report.html.viewer import TokenTable
from nabla_trl.report.summary import summarize
from nabla_trl.report.text import build_sections, check_facts
from nabla_trl.rewards.spec import parse_reward_spec, read_validated_limits
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.traces.storage import TraceWriter, read_finished_meta, read_traces
from nabla_trl.training.checkpoints import read_training_record
from nabla_trl.utils.identity import check_settings

MAX_SECONDS = 10.0  # of one file
MAX_MEGABYTES = 400  # by which all files together may raise the peak memory

WEIRD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    2**63,
    10**250,
    "",
    "text",
    "\x00",
    "x" * 5000,
    [],
    {},
    [[[]]],
    {"a": {"b": []}},
    float("nan"),
    float("inf"),
    "2020-01-01",
)
WEIRD_BYTES = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"\r",
    b'"',
    b"'",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 6000,
    b"0x",
    b"!!python/object:os.system ",
    b"&a [*a]",
    b"<<: *b",
    b"\\ud800",
    b"{{",
    b"{% for",
    b"\n---\n",
    b": ",
    b"- ",
    b",",
)


@dataclass(frozen=True)
class Kind:
    """A kind of file: a valid one, and the functions that read it.

    Attributes:
        write: writes a valid file, and what belongs to it, to a folder and returns the file.
        read: reads the file of a folder.
        encoding: how values can be swapped in it: "json", "jsonl", "yaml", "parquet" or "" (bytes only).
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    encoding: str = ""


def write_text(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text, encoding="utf-8")
        return folder / name

    return write


def write_json(name: str, value: Any) -> Callable[[Path], Path]:
    return write_text(name, json.dumps(value))


# --- kinds of files -----------------------------------------------------------------------------------

CSV_TEXT = 'q,a,l\n1+1,2,1\n"2,+2",4,2\nis it?,None,3\n'
TASK = {
    "path": "rows.csv",
    "question": "{{ q }} and more",
    "answer": "a",
    "level": "l",
    "parse": "integer",
    "few_shot": [{"question": "1?", "answer": "\\boxed{1}"}],
    "stop_strings": ["\n\n"],
    "test_fraction": 0.5,
}
CONFIG = {"solver": {"name": "ste", "steps": 3}, "max_rounds": 4, "beta": 0.5, "temperature": 1}
AUDIT = {"policy": "p", "reward": "r", "validated_limits": {"max_samples": 4, "max_rounds": 2}}
TRAINING = {
    "method": "sft",
    "tuning": "lora",
    "beta": 1.0,
    **dict.fromkeys(("rows", "steps", "tokens", "flops", "seconds", "trace_flops", "trace_seconds", "processes"), 2),
    "skipped": {},
}


def write_task(folder: Path) -> Path:
    (folder / "rows.csv").write_text(CSV_TEXT)
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    return folder / "task.yaml"


def write_csv(folder: Path) -> Path:
    write_task(folder)
    return folder / "rows.csv"


def write_results(folder: Path) -> Path:
    (folder / "facts.json").write_text(json.dumps(pages.FACTS))
    (folder / "rows.jsonl").write_text(
        format_rows([row for row in pages.make_rows() if row.method in ("greedy", "samples_4", "nabla")])
    )
    return folder / "rows.jsonl"


def write_facts(folder: Path) -> Path:
    write_results(folder)
    return folder / "facts.json"


def read_results(folder: Path) -> None:
    rows, facts = load_results(folder)
    check_facts(facts)
    grids, summary = build_grids(rows), summarize(rows, facts)
    build_sections(summary, rows, grids, facts, folder, {})


def write_store(folder: Path) -> Path:
    rows = [row for row in pages.make_rows() if row.method == "greedy"]
    (folder / "rows-00000.jsonl").write_text(format_rows(rows))
    (folder / "budgets.json").write_text(json.dumps({"greedy": sum(row.flops for row in rows) / len(rows)}))
    return folder / "budgets.json"


def write_shard(folder: Path) -> Path:
    with TraceWriter(folder) as writer:
        for trace in pages.make_traces():
            writer.add(trace)
    return folder / "traces-00000-00000.parquet"


def read_shard(folder: Path) -> None:
    read_finished_meta(folder)
    for trace in read_traces(folder):
        trace.list_incumbents()


def read_template(folder: Path) -> None:
    tokenizer = load_tokenizer("data/tiny/policy")
    tokenizer.chat_template = (folder / "chat_template.jinja").read_bytes().decode("utf-8", errors="surrogateescape")
    tokenize_prompt(tokenizer, Problem(id="a", question="1+1"))


def read_config(folder: Path) -> None:
    parse_dataclasses([SearchConfig], ["--config", str(folder / "config.yaml")], presets=PRESETS)


KINDS: dict[str, Kind] = {
    "config": Kind(write_text("config.yaml", yaml.safe_dump(CONFIG)), read_config, "yaml"),
    "task": Kind(write_task, lambda folder: load_problems(str(folder / "task.yaml")), "yaml"),
    "csv": Kind(write_csv, lambda folder: load_problems(str(folder / "task.yaml"))),
    "jsonl": Kind(
        write_text(
            "p.jsonl",
            '{"question": "1+1", "answer": "#### 2", "level": 1}\n{"messages": [{"role": "user", '
            '"content": "2+2"}], "answer": 4, "id": "b"}\n',
        ),
        lambda folder: load_problems(str(folder / "p.jsonl")),
        "jsonl",
    ),
    "rows": Kind(write_results, read_results, "jsonl"),
    "facts": Kind(write_facts, read_results, "json"),
    "budgets": Kind(write_store, lambda folder: get_budget_flops(RowStore(folder, ""), "greedy"), "json"),
    "clock": Kind(
        write_json("clock.json", {"total_seconds": 3.0, "setup_seconds": 1.0}),
        lambda folder: RunStopwatch(folder, 0.0, 0.0).total_seconds,
        "json",
    ),
    "shard": Kind(write_shard, read_shard, "parquet"),
    "tokens": Kind(
        write_json("tokens.json", {"tokenizer": "ab", "special": [0], "tokens": ["a", "b"]}),
        lambda folder: TokenTable.read(folder),
        "json",
    ),
    "adapter": Kind(
        write_json("adapter_config.json", {"base_model_name_or_path": "b", "task_type": "CAUSAL_LM", "r": 4}),
        lambda folder: read_adapter_info(str(folder)),
        "json",
    ),
    "reward": Kind(
        lambda folder: write_text("reward.json", Path("data/tiny/reward/reward.json").read_text())(folder),
        lambda folder: parse_reward_spec(str(folder)),
        "json",
    ),
    "audit": Kind(
        write_json("audit.json", AUDIT),
        lambda folder: read_validated_limits(folder / "audit.json", policy="p", reward="r"),
        "json",
    ),
    "template": Kind(
        lambda folder: write_text("chat_template.jinja", Path("data/tiny/policy/chat_template.jinja").read_text())(
            folder
        ),
        read_template,
    ),
    "training": Kind(
        lambda folder: write_json("train.json", TRAINING)(make_folder(folder / "trained" / "sft")),
        lambda folder: read_training_record(folder, "sft"),
        "json",
    ),
    "settings": Kind(
        write_json("settings.json", {"policy": "p", "beta": "1"}),
        lambda folder: check_settings(folder / "settings.json", {"policy": "p", "beta": "1"}),
        "json",
    ),
}


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


# --- mutations ----------------------------------------------------------------------------------------


def mutate(data: bytes, encoding: str, rng: random.Random) -> bytes:
    """Return the content of a file with one to three changes."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        can_swap = encoding and rng.random() < 0.5
        data = swap_value(data, encoding, rng) if can_swap else change_bytes(data, rng)
    return data


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    change = rng.randrange(6)
    if change == 0:  # truncated
        return data[:begin]
    if change == 1:  # bits flipped
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 4, 32)) if data else 0):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if change == 2:  # a part is missing
        return data[:begin] + data[min(end, begin + 200) :]
    if change == 3:  # a part is there twice: duplicate keys, rows and headers
        return data[:end] + data[begin:end] + data[end:]
    if change == 4:
        return rng.choice(WEIRD_BYTES) if rng.random() < 0.1 else data[:begin] + rng.choice(WEIRD_BYTES) + data[begin:]
    line = rng.choice(data.splitlines(keepends=True) or [b""])
    return data[:begin] + line + data[begin:]


def swap_value(data: bytes, encoding: str, rng: random.Random) -> bytes:
    """Return the file with a value of another type somewhere, or a missing or new key."""
    try:
        if encoding == "jsonl":
            lines = data.decode().splitlines()
            number = rng.randrange(len(lines))
            lines[number] = json.dumps(swap(json.loads(lines[number]), rng))
            return ("\n".join(lines) + "\n").encode()
        if encoding == "json":
            return json.dumps(swap(json.loads(data), rng)).encode()
        if encoding == "parquet":
            return swap_cell(data, rng)
        return yaml.safe_dump(swap(yaml.safe_load(data), rng)).encode()
    except Exception:  # an earlier change made it unreadable
        return change_bytes(data, rng)


def swap(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, change = rng.choice(keys), rng.random()
        value = value.copy()
        if change < 0.1:
            del value[key]
        elif change < 0.2 and isinstance(value, dict):
            value[rng.choice(("new", "", "format", "name"))] = value.pop(key)
        else:
            value[key] = swap(value[key], rng)
        return value
    return rng.choice(WEIRD_VALUES)


def swap_cell(data: bytes, rng: random.Random) -> bytes:
    """Return a shard with another value in one cell, or in the JSON of a cell. Schema and checksums are right."""
    table = pq.read_table(io.BytesIO(data))
    rows = table.to_pylist()
    row, name = rng.choice(rows), rng.choice(table.column_names)
    if name in ("tokens", "meta"):
        row[name] = rng.choice((json.dumps(swap(json.loads(row[name]), rng)), "{", "", None))
    elif isinstance(row[name], int | float):
        row[name] = rng.choice((-1, 0, 2**31 - 1, None, float("nan")))
    else:
        row[name] = rng.choice((None, [], "", "\x00", swap(row[name], rng)))
    changed, out = pa.Table.from_pylist(rows, schema=table.schema), io.BytesIO()
    pq.write_table(changed, out, write_page_checksum=True)
    return out.getvalue()


def try_file(name: str, seed: int, folder: Path) -> str:
    """Return "read" or the refusal of a mutated file. Any other error is a failure of the test."""
    kind, rng = KINDS[name], random.Random(f"{name}/{seed}")
    folder.mkdir(parents=True)
    file = kind.write(folder)
    file.write_bytes(mutate(file.read_bytes(), kind.encoding, rng))
    start = time.perf_counter()
    try:
        kind.read(folder)
        refusal = "read"
    except ValueError as error:
        refusal = str(error)
        assert type(error).__module__.split(".")[0] in ("builtins", "nabla_trl"), f"{name} {seed}: {type(error)}"
        assert refusal.strip(), f"{name} {seed}: no message"
        assert len(refusal) < 6000, f"{name} {seed}: {refusal[:200]}"
    except Exception as error:
        raise AssertionError(f"{name} {seed}: {type(error).__name__}: {error}") from error
    seconds = time.perf_counter() - start
    assert seconds < MAX_SECONDS, f"{name} {seed}: {seconds:.1f} s"
    return refusal


def try_files(seeds: range, tmp_path: Path) -> dict[str, int]:
    """Return how many files of each kind were read."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures, counts = [], dict.fromkeys(KINDS, 0)
    for name in KINDS:
        for seed in seeds:
            try:
                counts[name] += try_file(name, seed, tmp_path / name / str(seed)) == "read"
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, f"{len(failures)} files\n" + "\n".join(failures[:40])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MAX_MEGABYTES, f"peak memory has grown by {grown:.0f} MB"
    return counts


@pytest.mark.parametrize("name", KINDS)
def test_a_file_as_it_was_written_is_read(name: str, tmp_path: Path) -> None:
    KINDS[name].write(tmp_path)
    KINDS[name].read(tmp_path)


def test_a_hundred_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    counts = try_files(range(7), tmp_path)
    assert sum(counts.values()) < 7 * len(KINDS), "some must be refused"


@pytest.mark.slow
def test_two_thousand_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    counts = try_files(range(1000, 1130), tmp_path)
    assert 130 * len(KINDS) > 2000 and all(count < 130 for count in counts.values()), counts
    assert all(count for name, count in counts.items() if name != "settings"), counts
