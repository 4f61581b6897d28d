"""Small text files: written whole or not at all, and read as what they should hold."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nabla_trl.utils.formatting import format_error


def write_atomic(path: Path, text: str) -> None:
    """Write beside the file, then rename: a reader never sees half of it, and processes may write at once.

    Raises:
        OSError: it cannot be written (disk full, …); names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:  # one of a full disk says no name
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        draft.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a new name durable: it is the folder that holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file is not JSON, or holds something else.
    """
    return _parse_json_object(path.read_bytes(), str(path))


def read_jsonl_file(path: Path, *, complete_lines_only: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and JSON object of every line that is not blank.

    Args:
        whole: only lines with their line break: another process may be in the middle of its last one, and of a
            character there.

    Raises:
        ValueError: a line that is not JSON, or holds something else; it is named.
    """
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines[:-1] if complete_lines_only else lines, start=1):
        if line.strip():
            yield number, _parse_json_object(line, f"{path}, line {number}")


def _parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data.decode("utf-8"))
        if b"\\ud" in data.lower():  # half of a surrogate pair is a character for JSON, but for nobody else
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, numbers without end, brackets without end
        raise ValueError(f"{where} is not JSON: {format_error(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} does not hold a JSON object")
    return content
