"""Passwords in URLs are hidden wherever a text is shown or stored."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import worlds

from nabla_trl.models.vllm_backend import HttpClient
from nabla_trl.utils.formatting import format_error, hide_userinfo, pluralize
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
        ("http://host/v1?token=abc&n=1", "http://host/v1?token=***&n=1"),
        ("'https://h/d.jsonl?X-Amz-Signature=ab%2F&x=1#k'", "'https://h/d.jsonl?X-Amz-Signature=***&x=1#k'"),
        ("https://h/v1?api_key=a;sig=b http://h?tokens=3", "https://h/v1?api_key=***;sig=*** http://h?tokens=3"),
        ("--hub_token x --api-key 'a b' --seed 1", "--hub_token *** --api-key *** --seed 1"),
        ("--hub-token=x --eos_token y --max_new_tokens 3", "--hub-token=*** --eos_token y --max_new_tokens 3"),
        ("push with hf_abcdefghijklmnopqrst now", "push with hf_*** now"),
        ("hf://datasets/a/b@main/c, logratio:org/a@main,b", "hf://datasets/a/b@main/c, logratio:org/a@main,b"),
    ],
)
def test_userinfo_is_hidden_and_nothing_else(text: str, hidden: str) -> None:
    assert hide_userinfo(text) == hidden
    assert hide_userinfo({"a": [text, 3], "b": {"c": text}}) == {"a": [hidden, 3], "b": {"c": hidden}}
    assert format_error(ValueError(text)) == hidden


def test_secrets_of_a_mapping_are_hidden_by_their_keys() -> None:
    options = {"hub_token": "x", "api_key": "y", "eos_token": "z", "token": None, "max_new_tokens": 3}
    assert hide_userinfo(options) == options | {"hub_token": "***", "api_key": "***"}


def test_a_count_agrees_with_its_noun() -> None:
    assert [pluralize(n, "problem") for n in (0, 1, 2)] == ["0 problems", "1 problem", "2 problems"]
    assert pluralize(1, "problem is", "problems are") == "1 problem is"


@pytest.mark.parametrize(
    "text", ["a" * 300_000, "?a=" * 90_000, " --token" * 40_000, "//a:" * 50_000, "http://a:" * 30_000]
)
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
