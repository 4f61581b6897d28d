"""Templates of checkpoints and tasks: rendered as transformers does, within bounds, and with one date a run."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import trl
import worlds

from nabla_trl.tasks import templates
from nabla_trl.tasks.templates import (
    DATE_FILE,
    get_template_date,
    list_variables,
    pin_template_date,
    render_chat,
    render_columns,
    use_recorded_date,
)

TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?  "},
    {"role": "assistant", "content": "It is 4.", "reasoning_content": "Two and two.", "thinking": "Two and two."},
    {"role": "user", "content": "And 3 + 3?"},
]
LONG_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def _no_date_is_left() -> object:
    yield
    pin_template_date(None)


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_chat_templates_write_what_transformers_writes(step: int) -> None:
    tokenizer = worlds.char_tokenizer()
    tokenizer.bos_token = "<s>"
    checked = 0
    for path in TEMPLATES[::step]:
        template = path.read_text(encoding="utf-8")
        for chat in (CHAT, CHAT[1:], CHAT[1:3]):
            variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
            try:
                expected = tokenizer.apply_chat_template(
                    chat, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except Exception:
                continue
            variables |= {"messages": chat, "add_generation_prompt": True}
            assert render_chat(template, variables) == expected, path.name
            checked += 1
    assert checked > 150 / step


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'x' * 10**9 }}", ["512 MB"]),
        ("{{ ''|center(10**9) }}", ["512 MB"]),
        ("{{ '%1000000000d' % 1 }}", ["512 MB"]),
        (
            "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
            ["512 MB"],
        ),
        ("{% for i in range(10**9) %}{% endfor %}", ["Range too big"]),
        (LONG_LOOP, ["more than 1 s", "stopped"]),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", ["more than 8,388,608 characters"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["nested too deeply"]),
        ("{{ " + "(" * 99999, ["nested too deeply"]),
        ("{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}", []),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", []),
        ("{{ namespace(__class__=1) }}", ["underscore"]),
        ("{% if %}", ["Expected an expression"]),
        ("{{ raise_exception('no such\nrole') }}", ["no such role"]),
    ],
)
def test_a_template_out_of_bounds_ends_in_one_line(
    template: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "TIMEOUT_SECONDS", 1.0)
    began = time.monotonic()
    worlds.refused(lambda: render_chat(template, {"messages": []}), *words)
    assert time.monotonic() - began < 30
    assert render_chat("{{ 1 + 1 }}", {}) == "2"


def test_a_template_that_hangs_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TIMEOUT_SECONDS", 0.5)
    template = LONG_LOOP + "{# again #}"
    began = time.monotonic()
    for number in range(20):
        worlds.refused(lambda number=number: render_chat(template, {"n": number}), "stopped")
    assert time.monotonic() - began < 9


def test_templates_of_tasks_have_the_same_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TIMEOUT_SECONDS", 1.0)
    assert render_columns("{{ a }} + {{ b }}", {"a": 1, "b": "x"}) == "1 + x"
    assert list_variables("{{ a }} {{ b.c }} {% set d = 1 %}{{ d }}") == ["a", "b"]
    worlds.refused(lambda: render_columns("{{ a }}", {}), "'a' is undefined")
    worlds.refused(lambda: render_columns(LONG_LOOP, {}), "more than 1 s")
    worlds.refused(lambda: list_variables("{{ 'x' * 10**10 }}{{ "), "unexpected")
    assert list_variables("{{ 'x' * 10**10 }}") == []  # read, but never computed


def test_threads_and_forks_get_their_own_answers() -> None:
    with ThreadPoolExecutor(8) as executor:
        texts = list(executor.map(lambda number: render_chat("{{ n }}", {"n": number}), range(64)))
    assert texts == [str(number) for number in range(64)]
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        os.write(write_end, render_chat("{{ 'child' }}", {}).encode())
        os._exit(0)
    assert render_chat("{{ 'parent' }}", {}) == "parent"
    os.waitpid(child, 0)
    assert os.read(read_end, 9) == b"child"
    os.close(read_end), os.close(write_end)


def test_a_worker_that_was_killed_is_replaced() -> None:
    render_chat("x", {})
    worker = templates._slot.worker
    assert worker is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert render_chat("{{ 'é\ud800' }}", {}) == "é\ud800"


# --- the date ---------------------------------------------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y %H:%M:%S') }}"


def test_all_templates_of_a_run_print_one_date(tmp_path: Path) -> None:
    pin_template_date("2024-07-26")
    assert render_chat(DATED, {}) == "26 Jul 2024 00:00:00"
    pin_template_date(None)
    first = render_chat(DATED, {})
    time.sleep(1.1)
    assert render_chat(DATED, {}) == first
    worlds.refused(lambda: pin_template_date("yesterday"), "template_date", "'yesterday'")


def test_a_resumed_run_goes_on_with_the_recorded_date(tmp_path: Path) -> None:
    use_recorded_date(tmp_path)
    render_chat("{{ 1 }}", {})
    assert not (tmp_path / DATE_FILE).exists()  # no template prints it
    first = render_chat(DATED, {})
    recorded = json.loads((tmp_path / DATE_FILE).read_text())["template_date"]
    assert datetime.fromisoformat(recorded).strftime("%d %b %Y %H:%M:%S") == first
    time.sleep(1.1)
    use_recorded_date(tmp_path)
    assert render_chat(DATED, {}) == first and os.listdir(tmp_path) == [DATE_FILE]
    worlds.refused(lambda: use_recorded_date(tmp_path, "2024-07-26"), "template_date", recorded, "2024-07-26")
    use_recorded_date(tmp_path / "other", "2024-07-26")
    assert get_template_date() == "2024-07-26" and (tmp_path / "other" / DATE_FILE).exists()
    (tmp_path / DATE_FILE).write_text('{"template_date": "soon"}')
    worlds.refused(lambda: use_recorded_date(tmp_path), DATE_FILE, "'soon'")


def test_processes_of_a_run_agree_on_the_date(tmp_path: Path) -> None:
    use_recorded_date(tmp_path)
    (tmp_path / DATE_FILE).write_text('{"template_date": "2024-01-02"}')  # another process was first
    assert get_template_date() == "2024-01-02"
