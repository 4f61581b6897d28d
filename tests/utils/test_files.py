"""Small files: a reader sees the old one or the new one, and what is no JSON object is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import worlds

from nabla_trl.utils.files import (
    parse_json,
    read_json_file,
    read_jsonl_file,
    read_yaml,
    refuse_unreadable,
    write_atomic,
)


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


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "stands for more than 100000 values, line 6"),
        ("a: &a [*a]", "refers to something that it is part of"),
        ("a: " + "[" * 5000, "nests more than 50 levels"),
        ("a: " + "9" * 5000, "a number has 5000 digits"),
        ("a: 1\nb: 2\na: 3", "a mapping has a key twice"),
        ("a: 2020-99-99", "cannot be read as YAML"),
        ("a: \x00", "special characters are not allowed"),
        ("a: b\n" * 300_000, "larger than"),
    ],
)
def test_yaml_that_would_cost_memory_or_mean_nothing_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    worlds.refused(lambda: read_yaml(tmp_path / "c.yaml"), "c.yaml", words)


def test_aliases_and_merged_keys_of_ordinary_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("\ufeffa: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\nc: *a\n", encoding="utf-8")
    assert read_yaml(tmp_path / "c.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "a key twice"),
        ('{"a": ' + "9" * 400 + "}", "400 digits"),
        ('{"a":' * 60 + "1" + "}" * 60, "50 levels"),
        ("[" * 100_000, "nests too deeply"),
        ('{"a": "\\ud800"}', "surrogates"),
    ],
)
def test_json_that_breaks_other_code_is_refused(text: str, words: str) -> None:
    worlds.refused(lambda: parse_json(text), words)


def test_errors_of_any_kind_become_one_line() -> None:
    def read(error: BaseException) -> None:
        with refuse_unreadable("shard 3"):
            raise error

    worlds.refused(lambda: read(KeyError("a\nb")), "shard 3: ")
    worlds.refused(lambda: read(OSError(2, "No such file")), "shard 3: No such file")
    worlds.refused(lambda: read(ValueError("shard 3 is old")), "shard 3 is old")
    with pytest.raises(KeyboardInterrupt):
        read(KeyboardInterrupt())
