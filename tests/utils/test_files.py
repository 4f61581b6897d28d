"""Small files: a reader sees the old one or the new one, and what is no JSON object is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import worlds

from nabla_trl.utils.files import read_json_file, read_jsonl_file, write_atomic


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "note.json"
    write_atomic(path, '{"a": 1}')
    assert read_json_file(path) == {"a": 1}

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*note.json'"):
        write_atomic(path, '{"a": 2}')
    assert read_json_file(path) == {"a": 1}


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[1]", "does not hold a JSON object")])
def test_what_is_no_object_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    path.write_text(text, encoding="utf-8")
    worlds.refused(lambda: read_json_file(path), str(path), words)


@pytest.mark.parametrize(
    "line",
    [
        b'{"a": ',
        b"[1]",
        '{"a": "é"}'.encode("latin-1"),
        b'{"a": "\\ud800"}',  # half a character
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5_000 + b"}",  # more digits than Python reads
    ],
    ids=["cut", "list", "latin-1", "surrogate", "deep", "digits"],
)
def test_a_line_that_is_no_object_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n' + line + b'\n{"a": 2}\n')
    worlds.refused(lambda: list(read_jsonl_file(path)), f"{path}, line 3")


def test_lines_are_read_with_or_without_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}\r\n\n{"a": 2}')
    assert list(read_jsonl_file(path)) == [(1, {"a": "😀"}), (3, {"a": 2})]
    assert list(read_jsonl_file(path, complete_lines_only=True)) == [(1, {"a": "😀"})]
