"""README and docs/: Python snippets run, and the options of every command exist."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nabla_trl import enable_progress
from nabla_trl.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Folders that snippets read. A snippet runs in an empty folder with links to them: what it writes is thrown away.
INPUTS = ("data", "recipes")


def read_blocks(page: Path, language: str) -> list[str]:
    """Return the contents of the page's fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def list_commands() -> list[tuple[str, str, list[str]]]:
    """Return page, command and flags of every `nabla-trl` command in a shell block."""
    commands = []
    for page in PAGES:
        shell = "\n".join(read_blocks(page, "sh")).replace("\\\n", " ")
        lines = [line.partition(" #")[0] for line in shell.splitlines()]
        calls = [line[line.index("nabla-trl ") :] for line in lines if re.match(r"(\w+=\S* )*nabla-trl ", line)]
        commands += [(page.name, call.split()[1], re.findall(r"\s(--[\w.]+)", call)) for call in calls]
    return commands


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Iterator[Path]:
    for folder in INPUTS:
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("nabla_trl").level
    yield tmp_path
    enable_progress()  # a snippet may have silenced this process
    logging.getLogger("nabla_trl").setLevel(level)


def test_the_first_snippet_of_the_readme_prints_a_refined_response(scratch, capsys) -> None:
    exec(compile(read_blocks(ROOT / "README.md", "python")[0], "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "[-" in out and "-]{+" in out and " -> " in out and "ended by" in out


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if read_blocks(page, "python")], ids=str)
def test_the_snippets_of_a_page_run_one_after_another(page: Path, scratch) -> None:
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in read_blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize(("page", "command", "flags"), list_commands())
def test_the_options_of_a_command_exist(page: str, command: str, flags: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    known = set(re.findall(r"--[\w.]+", capsys.readouterr().out))
    assert set(flags) <= known


def test_there_are_commands() -> None:
    assert {"solve", "audit", "export", "serve"} <= {command for _, command, _ in list_commands()}
