"""Small text files: written completely or not at all, and checked when they are read."""

from __future__ import annotations

import codecs
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nabla_trl.utils.formatting import format_error


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader never sees half of it. Several processes may write the same file at once.

    Raises:
        OSError: if the file cannot be written, for example to a full disk. The error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process id is not enough: processes on several machines, or in containers, may share a folder.
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
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


def read_json_file(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        ValueError: if the file is not JSON or holds another JSON value.
    """
    return _parse_json_object(path.read_bytes(), str(path))


def read_jsonl_file(path: Path, *, complete_lines_only: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the JSON object of every line that is not blank.

    Args:
        complete_lines_only: leave out a last line without a line break. Another process may still be writing it.

    Raises:
        ValueError: if a line is not JSON or holds another JSON value. The message names the line.
    """
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines[:-1] if complete_lines_only else lines, start=1):
        if line.strip():
            yield number, _parse_json_object(line, f"{path}, line {number}")


def _parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # JSON allows half of a surrogate pair, which no other text does
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # not UTF-8 or JSON, too many digits or brackets
        raise ValueError(f"{where} is not JSON: {format_error(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} does not hold a JSON object")
    return value
