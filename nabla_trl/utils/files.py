"""Small files: written completely or not at all, and checked when they are read."""

from __future__ import annotations

import codecs
import csv
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml

from nabla_trl.utils.formatting import format_error, pluralize

MAX_YAML_BYTES = 2**20  # a configuration or a description of a task. PyYAML reads about 100 kB per second
MAX_YAML_NODES = 100_000  # with every alias written out
MAX_DEPTH = 50  # of lists and mappings in each other
MAX_NUMBER_CHARS = 300  # of an integer: a longer one fits no float


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader never sees half of it. Several processes may write the same file at once.

    Raises:
        OSError: if the file cannot be written, for example to a full disk. The error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process id is not enough: processes on several machines, or in containers, may share a folder.
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:  # the error of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make the names of new files durable. The operating system stores names with the folder, not with the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def refuse_unreadable(what: str) -> Iterator[None]:
    """Turn any error of the block into a ValueError of one line, which begins with `what`.

    Libraries raise errors of many kinds for a damaged file, and other kinds with their next version. An error that
    begins with `what` already passes as it is. Keyboard interrupts and exits pass too.

    Raises:
        ValueError: the block raised an error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(what):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else format_error(error)
        raise ValueError(f"{what}: {reason}") from error


def read_json_file(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: if the file cannot be read, is not JSON, or holds another JSON value.
    """
    return _parse_json_object(_read_bytes(path), str(path))


def read_jsonl_file(path: Path, *, complete_lines_only: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the JSON object of every line that is not blank.

    Args:
        complete_lines_only: leave out a last line without a line break. Another process may still be writing it.

    Raises:
        ValueError: if the file cannot be read, or if a line is not JSON or holds another JSON value. The message names
            the line.
    """
    lines = _read_bytes(path).removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines[:-1] if complete_lines_only else lines, start=1):
        if line.strip():
            yield number, _parse_json_object(line, f"{path}, line {number}")


def read_csv_file(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and the rows of a CSV file with a header. Every cell stays the text that it is.

    Raises:
        ValueError: the file is no CSV, or a row has more or fewer cells than the header.
    """
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, strict=True)
        columns = next(lines, [])
        if len(set(columns)) < len(columns) or not columns:
            raise ValueError("its first line must name the columns, each once")
        rows: list[dict[str, str]] = []
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"line {lines.line_num} has {pluralize(len(cells), 'cell')}, and the header names {len(columns)}"
                )
            rows.append(dict(zip(columns, cells, strict=True)))
    return columns, rows


def read_json_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file that holds a list of JSON objects.

    Raises:
        ValueError: if the file cannot be read, is not JSON, or holds another JSON value.
    """
    with refuse_unreadable(str(path)):
        rows = parse_json(_read_bytes(path))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold a list of JSON objects")
    return rows


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: if it is not JSON, nests deeper than `MAX_DEPTH`, holds an integer of more than `MAX_NUMBER_CHARS`
            digits, half of a surrogate pair, or an object with a key twice. The message holds nothing of the text.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = json.loads(text, parse_int=_parse_integer, object_pairs_hook=_build_object)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if "\\u" in text:  # JSON allows half of a surrogate pair, which no other text does
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    check_depth(value)
    return value


def _parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {format_error(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} does not hold a JSON object")
    return value


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) < len(pairs):
        raise ValueError("an object has a key twice")
    return built


def check_depth(value: Any) -> None:
    """Refuse a JSON value that nests so deeply that printing, copying or comparing it could fail."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, list | dict)
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, list | dict)
        ]
        if not level:
            return
    raise ValueError(f"it nests more than {MAX_DEPTH} levels")


# --- YAML ---------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        ValueError: no such file, no YAML, not a mapping, or a value that `parse_yaml` refuses.
    """
    content = read_yaml_value(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options, one 'name: value' on a line")
    return content


def read_yaml_value(path: str | Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ValueError: no such file, no YAML, or a value that `parse_yaml` refuses.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ValueError(f"it is larger than {MAX_YAML_BYTES} bytes")
        return parse_yaml(data.decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else format_error(error)
        raise ValueError(f"cannot read {path}: {reason}") from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML document.

    Raises:
        ValueError: no YAML, a mapping with a key twice, more than `MAX_YAML_NODES` values (each alias counts as all
            that it stands for), an alias of something that it is part of, values that nest deeper than `MAX_DEPTH`, or
            an integer of more than `MAX_NUMBER_CHARS` digits. The message holds nothing of the text.
    """
    try:
        return _BoundedLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # PyYAML quotes keys and tags in its messages.
        problem = (error.problem or "not YAML").partition("'")[0].removesuffix(", but found ").strip() or "not YAML"
        raise ValueError(f"{problem}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(getattr(error, "reason", "") or "it is not YAML") from error
    except Exception as error:  # what PyYAML's constructors meet in a malformed date, number or tag
        raise ValueError("a value of it cannot be read as YAML") from error


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds on what a small file can expand to."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _refuse(f"it nests more than {MAX_DEPTH} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
        """Return how many nodes a node stands for with its aliases written out, and how deeply they nest."""
        if id(node) in known:
            size = known[id(node)]
            if size is None:
                _refuse("an alias refers to something that it is part of", node.start_mark)
            return size
        known[id(node)] = None
        count, depth = 1, 1
        if isinstance(node, yaml.CollectionNode):
            children = node.value
            if isinstance(node, yaml.MappingNode):
                children = [child for pair in node.value for child in pair]
            for child in children:
                child_count, child_depth = self._measure(child, known)
                count, depth = count + child_count, max(depth, child_depth + 1)
        if count > MAX_YAML_NODES:
            _refuse(f"it stands for more than {MAX_YAML_NODES} values", node.start_mark)
        if depth > MAX_DEPTH:
            _refuse(f"it nests more than {MAX_DEPTH} levels", node.start_mark)
        known[id(node)] = count, depth
        return count, depth

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [(key.tag, key.value) for key, _ in getattr(node, "value", ()) if isinstance(key, yaml.ScalarNode)]
        keys = [key for key in keys if key[0] != "tag:yaml.org,2002:merge"]
        if not hasattr(node, "is_merged") and len(set(keys)) < len(keys):
            _refuse("a mapping has a key twice", node.start_mark)
        node.is_merged = True  # PyYAML writes merged keys into the node, and may construct it again
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MAX_NUMBER_CHARS:
            _refuse(f"a number has {len(node.value)} digits", node.start_mark)
        return super().construct_yaml_int(node)


def _refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _BoundedLoader.construct_yaml_int)
