"""Print a trace as text for people.

A color terminal shows what is gone struck out, what is new in bold, and what was sampled again and came out the same
in color. Without colors (no terminal, or NO_COLOR is set) marks take the place of styles, `[-old-]{+new+}`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

from rich.console import Console
from rich.text import Text

from nabla_trl.traces.schema import Revision, Trace
from nabla_trl.traces.texts import Decode, compute_text_change, format_token, name_special_tokens
from nabla_trl.utils.formatting import format_si, make_printable

MAX_WIDTH = 100  # columns, because longer lines are hard to read
MAX_DIFF_CELLS = 1_000_000  # pairs of words of two texts, beyond which they are not compared word by word
MIN_COMMON_SHARE = 0.5  # of the words, below which marks word by word would be hard to read
_CHANGE_STYLES = {"same": ("cyan", "{}"), "gone": ("strike red", "[-{}-]"), "new": ("bold green", "{{+{}+}}")}
MAX_PREFIX_CHARACTERS = 160  # of the unchanged text before a revision
# What progress bars of libraries write beside text: they go to the beginning of a line, or up some lines.
_BAR_MOVES = re.compile(r"\r?(?:\x1b\[A|\n)*")


class PrintableStream:
    """A text stream on which control characters become replacement characters.

    Whatever a program or a library prints may hold texts of models and data. A carriage return at the beginning of a
    text and the moves of progress bars pass. Our own consoles write to `raw_stream`, because they replace the control
    characters of texts themselves and style them afterwards (`PrintableConsole`).
    """

    def __init__(self, raw_stream: Any):
        self.raw_stream = raw_stream

    def write(self, text: str) -> int:
        """Write a text and return its length."""
        start = len(text) if _BAR_MOVES.fullmatch(text) else int(text.startswith("\r"))
        self.raw_stream.write(text[:start] + make_printable(text[start:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw_stream, name)


@contextmanager
def guard_terminal() -> Iterator[None]:
    """Replace control characters in all that is printed and logged on stdout and stderr."""
    streams = sys.stdout, sys.stderr
    guarded = tuple(PrintableStream(stream) for stream in streams)
    _redirect_logs(dict(zip(streams, guarded, strict=True)))
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        _redirect_logs(dict(zip(guarded, streams, strict=True)))


def _redirect_logs(new_streams: dict[Any, Any]) -> None:
    """Let log handlers that were made before write to other streams."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            # Some handlers look up sys.stderr for each line, and hold no stream.
            stream = vars(handler).get("stream")
            if isinstance(handler, logging.StreamHandler) and stream in new_streams:
                handler.setStream(new_streams[stream])


def print_trace(trace: Trace, question: str, decode: Decode, console: Console) -> None:
    """Print the first response, each accepted revision, the answer and its cost."""
    for block in TraceFormatter(decode, console).format_trace(trace, question):
        for line in block:
            console.print(line, soft_wrap=True, highlight=False)


class TraceFormatter:
    """Format the parts of a trace as lines that fit the console.

    Args:
        decode: converts token ids to text.
        console: gives the width, and marks are used if it has no colors.
    """

    def __init__(self, decode: Decode, console: Console):
        self.decode, self.console = decode, console
        self.width = min(console.width, MAX_WIDTH)
        self.text_width = self.width if console.is_terminal else console.width  # a pipe has no end of a line
        self.use_marks = not console.is_terminal or console.color_system is None or console.no_color

    def format_trace(self, trace: Trace, question: str) -> Iterator[list[Text]]:
        """Yield the parts of a trace as blocks of lines."""
        yield [*self.wrap_text(Text.assemble(("question  ", "bold"), make_printable(question)), ""), Text()]
        yield self.format_response("first response", f"reward {trace.reward_initial:.3f}", trace.initial_ids)
        if self.use_marks and any(revision.accepted for revision in trace.revisions):
            yield [*self.wrap_text(Text("In revisions, [-this-] is gone and {+this+} is new.", "dim"), ""), Text()]
        accepted = rejected = 0
        for revision, base_ids in trace.replay_revisions():
            if not revision.accepted:
                rejected += 1
                continue
            yield self.format_rejected_count(rejected)
            accepted, rejected = accepted + 1, 0
            title = f"revision {accepted} at position {revision.position}"
            change = format_reward_change(revision.reward_before, revision.reward_after)
            yield [*self.format_heading(title, change), *self.format_change(revision, base_ids), Text()]
        yield self.format_rejected_count(rejected)
        yield self.format_response(
            "final response", format_reward_change(trace.reward_initial, trace.reward), trace.response_ids
        )
        yield self.format_summary(trace, accepted)

    def format_response(self, title: str, note: str, token_ids: list[int]) -> list[Text]:
        """Return a heading and the text of a response."""
        return [*self.format_heading(title, note), *self.format_text(token_ids), Text()]

    def format_text(self, token_ids: list[int]) -> list[Text]:
        """Return the text of a response."""
        return self.wrap_text(Text(make_printable(self.decode(token_ids)) or "(empty)"))

    def format_change(self, revision: Revision, base_ids: list[int]) -> list[Text]:
        """Return the text of a revised response in which the changed token and all changes after it are marked."""
        change = compute_text_change(revision, base_ids, self.decode)
        prefix = make_printable(change.prefix)
        text = Text("… " + prefix[-MAX_PREFIX_CHARACTERS:] if len(prefix) > MAX_PREFIX_CHARACTERS else prefix)
        names = name_special_tokens(revision, base_ids)
        old, new = format_token(change.old_token, names[0]), format_token(change.new_token, names[1])
        old_suffix = self.decode(base_ids)[len(self.decode(base_ids[: revision.position + 1])) :]
        parts = diff_texts(make_printable(old_suffix), make_printable(change.suffix))
        while parts and parts[0][0] != "same" and not change.new_token.isspace():  # a space stands alone to be seen
            kind, part = parts.pop(0)
            old, new = (old + part, new) if kind == "gone" else (old, new + part)
        self._append_part(text, "gone", old)
        self._append_part(text, "new", new)
        if change.new_token.endswith("\n"):
            text.append("\n")
        for kind, part in parts:
            self._append_part(text, kind, part)
        return self.wrap_text(text)

    def _append_part(self, text: Text, kind: str, part: str) -> None:
        style, mark = _CHANGE_STYLES[kind]
        text.append(mark.format(part) if self.use_marks else part, style)

    def format_rejected_count(self, count: int) -> list[Text]:
        """Return a line with the number of rejected proposals, or nothing for zero."""
        if not count:
            return []
        return [Text(f"{count} proposal{'s' if count > 1 else ''} rejected", "dim"), Text()]

    def format_summary(self, trace: Trace, num_accepted: int) -> list[Text]:
        """Return lines with answer, reward, cost and the end of the search."""
        answer = make_printable(trace.answer or "none found")
        cost = f"{format_si(trace.cost.flops, 'FLOPs')}, {format_si(trace.cost.seconds, 's')}"
        proposals = f"{num_accepted} of {len(trace.revisions)} proposals accepted"
        lines = [
            Text.assemble(("answer  ", "bold"), (answer, "bold green")),
            *self._format_gold(trace),
            Text(f"reward  {_format_change(trace.reward_initial, trace.reward)}"),
            Text(f"cost    {cost}"),
            Text(f"search  {proposals}; ended by: {trace.stop_reason}"),
        ]
        if not trace.finished:
            lines.append(Text("The response is cut off: it reached --max_new_tokens before its end.", "yellow"))
        return [part for line in lines for part in self.wrap_text(line, "")]

    def _format_gold(self, trace: Trace) -> list[Text]:
        """Return a line with the gold answer and how the answer compares, nothing without a gold answer."""
        if trace.gold is None:
            return []
        words = {True: ("right", "green"), False: ("wrong", "red"), None: ("could not be compared", "yellow")}
        word, style = words[trace.correct]
        return [Text.assemble(f"gold    {make_printable(trace.gold)}: the answer is ", (word, style))]

    def format_heading(self, title: str, note: str) -> list[Text]:
        """Return a title on the left and a note on the right, on two lines if they do not fit on one."""
        gap = self.width - len(title) - len(note)
        return self.wrap_text(Text.assemble((title, "bold"), " " * gap if gap > 1 else "\n", note), "")

    def wrap_text(self, text: Text, indent: str = "  ") -> list[Text]:
        """Return the lines of a text, wrapped at the width of the console and indented."""
        lines = text.wrap(self.console, self.text_width - len(indent), overflow="fold")
        for line in lines:
            line.rstrip()
        return [Text(indent).append_text(line) if line else line for line in lines]


def diff_texts(old: str, new: str) -> list[tuple[str, str]]:
    """Return the parts of two texts in reading order, each with its kind: "same", "gone" or "new".

    Texts are compared by words. Texts of which little is the same, and very long ones, are one part each.
    """
    old_words, new_words = (re.findall(r"\s*(?:\w+|[^\w\s])|\s+", text) for text in (old, new))
    matcher = SequenceMatcher(None, old_words, new_words, autojunk=False)
    short = len(old_words) * len(new_words) <= MAX_DIFF_CELLS
    if not short or matcher.ratio() < MIN_COMMON_SHARE:
        parts = [("same", new)] if old == new else [("gone", old), ("new", new)]
    else:
        parts = []
        for tag, old_start, old_end, new_start, new_end in matcher.get_opcodes():
            if tag != "equal":
                parts.append(("gone", "".join(old_words[old_start:old_end])))
            parts.append(("same" if tag == "equal" else "new", "".join(new_words[new_start:new_end])))
    return [(kind, part) for kind, part in parts if part]


def format_reward_change(before: float, after: float) -> str:
    """Return a text such as "reward 0.120 → 0.870"."""
    return f"reward {_format_change(before, after)}"


def _format_change(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"
