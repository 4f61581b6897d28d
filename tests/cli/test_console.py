"""The refinement view: what is struck out, what is new, and that nothing else gets to the terminal."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from nabla_trl.cli.console import compute_text_change, print_trace, trace_to_json
from nabla_trl.models.flops import Cost
from nabla_trl.traces.schema import Revision, Trace

END = 0


def decode(ids: list[int]) -> str:
    """Characters by their code point; END is special."""
    return "".join(chr(index) for index in ids if index != END)


def utf8(ids: list[int]) -> str:
    """One token per byte: a character may need several tokens."""
    return bytes(index for index in ids if index != END).decode("utf-8", errors="replace")


def ids_of(text: str) -> list[int]:
    return [*map(ord, text), END]


def trace_of(first: str, *proposals: tuple[int, str, bool]) -> Trace:
    """Proposals (position, suffix, accepted), each a round of its own; the reward counts the accepted ones."""
    base, reward, revisions = ids_of(first), 0.0, []
    for number, (at, suffix, accepted) in enumerate(proposals):
        new, after = ids_of(suffix), reward + (1 if accepted else -1)
        revisions.append(Revision(number, at, base[at], new[0], tuple(new), reward, after, accepted, 1e6))
        if accepted:
            base, reward = base[:at] + new, after
    trace = Trace(
        problem_id="question/0",
        task="custom",
        method="nabla",
        seed=0,
        prompt="<|user|>?",
        response=decode(base),
        prompt_ids=[1],
        initial_ids=ids_of(first),
        response_ids=base,
        reward_initial=0.0,
        reward=reward,
        answer="9",
        gold=None,
        correct=None,
        revisions=revisions,
        cost=Cost(1.2e9, 0.25, {"policy/decode": 3}),
        stop_reason="max_rounds",
        finished=True,
        meta={"policy": "p"},
    )
    trace.validate()
    return trace


def shown(trace: Trace, *, terminal: bool = False, width: int = 80) -> str:
    console = Console(
        file=io.StringIO(),
        force_terminal=terminal,
        color_system="standard" if terminal else None,
        width=width,
        legacy_windows=False,
    )
    print_trace(trace, "1+2?", decode, console)
    return console.file.getvalue()


STORY = trace_of("1+2=4;#4", (4, "3;#3", False), (0, "1+2=5;#5", False), (4, "3;#9", True), (6, "#7", True))


def test_the_story_in_plain_lines():
    lines = [line for line in shown(STORY).splitlines() if line]
    head = "first response" + " " * 54 + "reward 0.000"
    assert lines[:4] == ["question  1+2?", head, "  1+2=4;#4", "2 proposals rejected"]
    assert lines[4].startswith("revision 1 at position 4 ") and lines[4].endswith(" reward 0.000 → 1.000")
    assert lines[5] == "  1+2=[-4-]{+3+};#9"
    assert lines[7] == "  1+2=3;[-#-]{+#+}7"
    assert lines[8].startswith("final response ") and lines[9] == "  1+2=3;#7"
    assert lines[10:] == [
        "answer  9",
        "reward  0.000 → 2.000",
        "cost    1.2 GFLOPs, 250 ms",
        "search  2 of 4 proposals accepted; ended by: max_rounds",
    ]


def test_styles_take_the_place_of_marks_on_a_terminal():
    text = shown(STORY, terminal=True)
    assert "[-" not in text and "{+" not in text
    struck = re.findall(r"\x1b\[[0-9;]*\b9\b[0-9;]*m(.*?)\x1b\[0m", text)
    assert struck == ["4", "#"]


def test_special_tokens_are_named_where_they_are_exchanged_and_hidden_elsewhere():
    # the end is replaced by ";", then a ";" by the end
    text = shown(trace_of("12", (2, ";3", True), (2, "", True)))
    assert "  12[-⟨end⟩-]{+;+}3\n" in text
    assert "  12[-;-]{+⟨end⟩+}\n" in text
    assert text.count("⟨") == 2


def test_white_space_that_is_exchanged_can_be_seen():
    text = shown(trace_of("a b", (1, "\nc", True), (1, "\td", True)))
    assert "a[-␣-]{+⏎+}\n  c\n" in text and "a[-⏎-]{+⇥+}d" in text


def test_nothing_can_drive_the_terminal():
    text = shown(trace_of("a\x1b[31m\x07\x9b1m\r\u202eb", (1, "\x1b]0;x\x07\tz", True)))
    assert all(character == "\n" or character.isprintable() for character in text)


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("terminal", [False, True])
def test_long_and_wide_text_stays_within_the_columns(width, terminal):
    trace = trace_of("ab " * 100 + "x" * 300 + "数" * 100, (650, "好" * 90 + " end", True))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown(trace, terminal=terminal, width=width))
    assert max(map(cell_len, plain.splitlines())) <= width
    assert plain.count("好") == 180  # in the revision and in the final response


def test_markup_in_a_response_is_shown_as_it_is():
    assert "[bold]:smile:[/bold]" in shown(trace_of("[bold]:smile:[/bold]"))


def test_a_response_that_was_cut_off_says_so():
    assert "cut off" in shown(replace(STORY, finished=False)) and "cut off" not in shown(STORY)
    assert "none found" in shown(replace(STORY, answer=None))


def test_pieces_of_a_change_make_the_proposal():
    trace = trace_of("1+2=4;#4", (4, "3;#3", False), (4, "5", True), (0, "0", True))
    for revision, base in trace.replay_revisions():
        change = compute_text_change(revision, base, decode)
        proposal = base[: revision.position] + list(revision.suffix)
        assert change.prefix + change.new_token + change.suffix == decode(proposal)
        assert change.prefix + change.old_token == decode(base[: revision.position + 1])


def test_a_character_of_several_tokens_is_not_torn_apart():
    base, new = list("aé".encode()), list("aß!".encode())
    # é and ß begin with the same byte and differ in the second, é and 数 in the first
    same = Revision(0, 2, base[2], new[2], tuple(new[2:]), 0.0, 1.0, True, 0.0)
    change = compute_text_change(same, base, utf8)
    assert (change.prefix, change.old_token, change.new_token, change.suffix) == ("a", "é", "ß", "!")
    other = Revision(0, 1, base[1], "数".encode()[0], tuple("数!".encode()), 0.0, 1.0, True, 0.0)
    change = compute_text_change(other, base, utf8)
    assert (change.prefix, change.new_token, change.suffix) == ("a", "数", "!")


def test_json_holds_the_whole_trace_and_texts():
    bad = replace(STORY, reward=math.nan)
    result = json.loads(json.dumps(trace_to_json(bad, decode), allow_nan=False))
    assert result["reward"] is None and result["initial"] == "1+2=4;#4"
    assert result["cost"] == {"flops": 1.2e9, "seconds": 0.25, "tokens": {"policy/decode": 3}}
    assert {name for name in vars(STORY)} <= set(result)
    third = result["revisions"][2]
    assert third["suffix"] == ids_of("3;#9") and third["accepted"] is True
    assert (third["old_text"], third["new_text"], third["suffix_text"]) == ("4", "3", "3;#9")
