"""The refinement view: what is struck out, what is new, and that nothing else gets to the terminal."""

from __future__ import annotations

import io
import logging
import re
import sys
from dataclasses import replace

import pytest
from refined_traces import END, STORY, decode, trace_of
from rich.cells import cell_len
from rich.console import Console

from nabla_trl.cli.console import diff_texts, guard_terminal, print_trace
from nabla_trl.cli.parsing import run_main
from nabla_trl.traces.schema import Revision, Trace
from nabla_trl.traces.texts import compute_text_change
from nabla_trl.utils.formatting import format_error, make_printable
from nabla_trl.utils.progress import PrintableConsole, ProgressDisplay


def utf8(ids: list[int]) -> str:
    """One token per byte: a character may need several tokens."""
    return bytes(index for index in ids if index != END).decode("utf-8", errors="replace")


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


def test_the_story_in_plain_lines():
    lines = [line for line in shown(STORY).splitlines() if line]
    head = "first response" + " " * 54 + "reward 0.000"
    legend = "In revisions, [-this-] is gone and {+this+} is new."
    assert lines[:5] == ["question  1+2?", head, "  1+2=4;#4", legend, "2 proposals rejected"]
    del lines[3]
    assert lines[4].startswith("revision 1 at position 4 ") and lines[4].endswith(" reward 0.000 → 1.000")
    assert lines[5] == "  1+2=[-4-]{+3+};#[-4-]{+9+}"
    assert lines[7] == "  1+2=3;[-#9-]{+#7+}"
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
    assert struck == ["4", "4", "#9"]


def test_changes_are_marked_on_a_terminal_without_colors(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "1+2=[-4-]{+3+};#[-4-]{+9+}" in re.sub(r"\x1b\[[0-9;]*m", "", shown(STORY, terminal=True))


def test_a_new_suffix_shows_what_changed_in_it():
    parts = diff_texts(" the sum is 12, so 12.", " the sum is 13, so 13.")
    changes = [("gone", " 12"), ("new", " 13")]
    assert parts == [("same", " the sum is"), *changes, ("same", ", so"), *changes, ("same", ".")]
    assert diff_texts("1+2=3", "we add one") == [("gone", "1+2=3"), ("new", "we add one")], "little is the same"
    assert diff_texts("", "a b") == [("new", "a b")] and diff_texts("a b", "a b") == [("same", "a b")]
    long = " ".join(map(str, range(2_000)))
    assert diff_texts(long, long) == [("same", long)] and len(diff_texts(long, long + " x")) == 2


def test_a_pipe_gets_lines_and_tables_without_breaks(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest's workers may set it
    console = PrintableConsole(file=io.StringIO())
    print_trace(trace_of("ab " * 100, (3, "c " * 150, True)), "1+2? " * 60, decode, console)
    lines = console.file.getvalue().splitlines()
    assert "  " + ("ab " * 100).rstrip() in lines and max(map(len, lines)) > 300


def test_special_tokens_are_named_where_they_are_exchanged_and_hidden_elsewhere():
    # the end is replaced by ";", then a ";" by the end
    text = shown(trace_of("12", (2, ";3", True), (2, "", True)))
    assert "  12[-⟨end⟩-]{+;3+}\n" in text
    assert "  12[-;3-]{+⟨end⟩+}\n" in text
    assert text.count("⟨") == 2


def test_white_space_that_is_exchanged_can_be_seen():
    text = shown(trace_of("a b", (1, "\nc", True), (1, "\td", True)))
    assert "a[-␣-]{+⏎+}\n  [-b-]{+c+}\n" in text and "a[-⏎-]{+⇥+}[-c-]{+d+}" in text


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


# --- what is printed beside traces ------------------------------------------------------------------------

FOREIGN = "a\x1b[2J\x1b]0;title\x07b\rc\u202ed\u2066e\x9b1mf\x7f\u2028g\x00"
SHOWN = "a\ufffd[2J\ufffd]0;title\ufffdb\ufffdc\ufffdd\ufffde\ufffd1mf\ufffd\ufffdg\ufffd"


def test_what_moves_a_cursor_or_reorders_text_is_made_visible() -> None:
    assert make_printable(FOREIGN) == SHOWN
    assert make_printable("é\t1\n北京 👩\u200d🔬\r\n") == "é\t1\n北京 👩\u200d🔬\n"
    assert "\x1b" not in format_error(ValueError(FOREIGN)) and "\n" not in format_error(ValueError(FOREIGN))


def test_nothing_that_is_printed_or_logged_reaches_a_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    early = logging.StreamHandler(sys.stderr)
    log = logging.getLogger("nabla_trl.test")
    log.addHandler(early)
    try:
        with guard_terminal():
            print(FOREIGN)
            print("error:", FOREIGN, file=sys.stderr)
            log.warning("%s", FOREIGN)
            sys.stderr.write("\r 50%|█| 1/2")  # a progress bar of a library
            sys.stderr.write("\n\x1b[A")
    finally:
        log.removeHandler(early)
    out, err = capsys.readouterr()
    assert out == SHOWN + "\n"
    assert err.count(SHOWN) == 2 and err.endswith("\r 50%|█| 1/2\n\x1b[A")
    assert early.stream is sys.stderr  # put back


def test_errors_and_stops_of_commands_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: object) -> None:
        raise ValueError(FOREIGN)

    assert run_main(fail, [], resume_command="") == 1
    err = capsys.readouterr().err
    assert err == f"error: {make_printable(' '.join(FOREIGN.split()))}\n" and err[:-1].isprintable()


def test_consoles_show_styles_and_no_foreign_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with guard_terminal():
        console = PrintableConsole(file=sys.stdout, force_terminal=True, color_system="standard", width=99)
        console.print(FOREIGN, style="bold", highlight=False, markup=False)
    out = capsys.readouterr().out
    assert out.startswith("\x1b[1m") and out.count("\x1b") == 2 and not {"\x07", "\x9b", "\u202e", "\r"} & {*out}
    stream = io.StringIO()
    display = ProgressDisplay(FOREIGN, 2, console=PrintableConsole(file=stream, width=99))
    with display:
        display.add_items([("p", 1.0, 1e9)])
    assert "title" in stream.getvalue() and not {"\x1b", "\x07", "\r"} & {*stream.getvalue()}
