"""Passwords in URLs are hidden wherever a text is shown or stored."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import worlds

from nabla_trl.models.vllm_backend import HttpClient
from nabla_trl.utils.formatting import format_error, hide_userinfo
from nabla_trl.utils.identity import claim_settings


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("http://user:secret@host:80/v1", "http://***@host:80/v1"),
        (
            "--url=https://secret@host --url git+ssh://u:secret@h/p.git",
            "--url=https://***@host --url git+ssh://***@h/p.git",
        ),
        ("http://u:se@cret@host/a@b", "http://***@host/a@b"),
        ("http://host/path?mail=a@b", "http://host/path?mail=a@b"),
        ("a@b.c and http://host", "a@b.c and http://host"),
        ("http://u:s/e#c?r'e\"t@host/v1", "http://***@host/v1"),
        ("http:/user:secret@host", "http:/***@host"),  # as pathlib writes a URL
        ("//user:secret@host", "//***@host"),
        ("http://host:8000/a@b, http://[::1]:80/a@b", "http://host:8000/a@b, http://[::1]:80/a@b"),
        ("hf://datasets/a/b@main/c, logratio:org/a@main,b", "hf://datasets/a/b@main/c, logratio:org/a@main,b"),
    ],
)
def test_userinfo_is_hidden_and_nothing_else(text: str, hidden: str) -> None:
    assert hide_userinfo(text) == hidden
    assert hide_userinfo({"a": [text, 3], "b": {"c": text}}) == {"a": [hidden, 3], "b": {"c": hidden}}
    assert format_error(ValueError(text)) == hidden


@pytest.mark.parametrize("text", ["a" * 300_000, "//a:" * 50_000, "http://a:" * 30_000])
def test_userinfo_is_searched_for_in_linear_time(text: str) -> None:
    began = time.process_time()
    hide_userinfo(text)
    assert time.process_time() - began < 5


def test_settings_and_messages_of_a_client_hold_no_password(tmp_path: Path) -> None:
    url = "http://user:secret@127.0.0.1:9"
    claim_settings(tmp_path / "s.json", {"policy": url})
    claim_settings(tmp_path / "s.json", {"policy": url})
    assert json.loads((tmp_path / "s.json").read_text()) == {"policy": "http://***@127.0.0.1:9"}
    assert "secret" not in worlds.refused(lambda: claim_settings(tmp_path / "s.json", {"policy": url + "0"}), "***@")
    client = HttpClient(url, retries=0)
    assert client.url == "http://127.0.0.1:9"
    with pytest.raises(ConnectionError) as raised:
        client.request_json("/v1/models")
    assert "secret" not in str(raised.value)
    worlds.refused(lambda: HttpClient("ftp://user:secret@host"), "ftp://***@host")
    for wrong in ("user:secret@host:80", "http://user:sec/ret@host", "http://user:secret#@host:port"):
        assert "sec" not in worlds.refused(lambda wrong=wrong: HttpClient(wrong), "***@host")
