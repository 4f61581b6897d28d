"""The README: its first Python snippet runs, and every option of its commands exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nabla_trl.cli.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def list_commands() -> list[tuple[str, list[str]]]:
    """The commands nabla-trl in README's shell blocks, with their flags."""
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    lines = [line.partition("#")[0] for line in shell.splitlines() if line.startswith("nabla-trl ")]
    return [(line.split()[1], re.findall(r"(--[\w.]+)", line)) for line in lines]


def test_the_first_snippet_prints_a_refined_response(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    [snippet, *_] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    first, *revisions = capsys.readouterr().out.splitlines()
    assert " -> " in first and revisions and all(" -> " in line for line in revisions)


@pytest.mark.parametrize(("command", "flags"), list_commands())
def test_the_options_of_a_command_exist(command: str, flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    assert set(flags) <= known


def test_there_are_commands() -> None:
    assert {"solve", "audit", "export", "serve"} <= {command for command, _ in list_commands()}
