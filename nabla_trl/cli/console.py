"""A trace for people, as an answer being refined (rich), and for programs, as one JSON object.

On a terminal a replaced token is struck out, the new one is bold and the regenerated rest is coloured; elsewhere
the same is written with marks, `[-old-]{+new+}`, and without any control character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nabla_trl.traces.schema import Revision, Trace
from nabla_trl.utils.formatting import finite_or_none, format_si

Decode = Callable[[list[int]], str]  # ids to text, special tokens left out

MAX_WIDTH = 100  # columns used at most: longer lines are hard to read
MAX_PREFIX_CHARACTERS = 160  # characters shown of what a revision kept; the final response is shown whole
_BIDI_CONTROLS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True)
class TextChange:
    """The text of a proposal and of what it branched off: kept + old + ... became kept + new + rest.

    `old` or `new` is empty where the token is special (an end token). The pieces are cut from decoded prefixes, as a
    token's text depends on what stands before it; of a character that `new` only begins, `new` is the whole.
    """

    prefix: str
    old_token: str
    new_token: str
    suffix: str


def compute_text_change(revision: Revision, base_ids: list[int], decode: Decode) -> TextChange:
    """What a revision changed in the response ids `base` that it was proposed against."""
    at = revision.position
    before, with_old = decode(base_ids[:at]), decode(base_ids[: at + 1])
    with_new, whole = decode([*base_ids[:at], revision.new_token]), decode([*base_ids[:at], *revision.suffix])
    kept = _common_prefix_length(before, with_old, with_new, whole)
    token = _common_prefix_length(with_new, whole)
    if token == kept and decode([revision.new_token]):
        token += 1
    return TextChange(before[:kept], with_old[kept:], whole[kept:token], whole[token:])


def _common_prefix_length(*texts: str) -> int:
    """How many characters the texts have in common at their beginning."""
    ends = (index for index, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    return next(ends, min(map(len, texts)))


def trace_to_json(trace: Trace, decode: Decode) -> dict[str, Any]:
    """A trace as JSON values: its fields, with texts beside the ids of responses and revisions.

    A reward that is not finite becomes None.
    """
    found = {**asdict(trace), "initial": decode(trace.initial_ids)}
    found["reward_initial"], found["reward"] = (
        finite_or_none(trace.reward_initial),
        finite_or_none(trace.reward),
    )
    found["revisions"] = [
        _revision_to_json(revision, compute_text_change(revision, base, decode))
        for revision, base in trace.replay_revisions()
    ]
    return found


def _revision_to_json(revision: Revision, text_change: TextChange) -> dict[str, Any]:
    rewards = {
        "reward_before": finite_or_none(revision.reward_before),
        "reward_after": finite_or_none(revision.reward_after),
    }
    texts = {
        "old_text": text_change.old_token,
        "new_text": text_change.new_token,
        "suffix_text": text_change.new_token + text_change.suffix,
    }
    return {**asdict(revision), "suffix": list(revision.suffix), **rewards, **texts}


def print_trace(trace: Trace, question: str, decode: Decode, console: Console) -> None:
    """Print how an answer was refined: the first response, each accepted revision, the answer and what it cost."""
    for block in TraceFormatter(decode, console).format_trace(trace, question):
        for line in block:
            console.print(line, soft_wrap=True, highlight=False)


class TraceFormatter:
    """Blocks of lines, each cut to the console's width; `marks` stand in for colours where there are none."""

    def __init__(self, decode: Decode, console: Console):
        self.decode, self.console = decode, console
        self.width = min(console.width, MAX_WIDTH)
        self.use_marks = not console.is_terminal or console.color_system is None

    def format_trace(self, trace: Trace, question: str) -> Iterator[list[Text]]:
        yield [*self.wrap_text(Text.assemble(("question  ", "bold"), _make_printable(question)), ""), Text()]
        yield self.format_response("first response", f"reward {trace.reward_initial:.3f}", trace.initial_ids)
        accepted = rejected = 0
        for revision, base in trace.replay_revisions():
            if not revision.accepted:
                rejected += 1
                continue
            yield self.format_rejected_count(rejected)
            accepted, rejected = accepted + 1, 0
            yield self.format_revision(accepted, revision, base)
        yield self.format_rejected_count(rejected)
        yield self.format_response(
            "final response", format_reward_change(trace.reward_initial, trace.reward), trace.response_ids
        )
        yield self.format_summary(trace, accepted)

    def format_response(self, title: str, note: str, token_ids: list[int]) -> list[Text]:
        return [*self.format_heading(title, note), *self.format_text(token_ids), Text()]

    def format_text(self, token_ids: list[int]) -> list[Text]:
        return self.wrap_text(Text(_make_printable(self.decode(token_ids)) or "(empty)"))

    def format_revision(self, number: int, revision: Revision, base_ids: list[int]) -> list[Text]:
        title = f"revision {number} at position {revision.position}"
        head = self.format_heading(title, format_reward_change(revision.reward_before, revision.reward_after))
        return [*head, *self.format_change(revision, base_ids), Text()]

    def format_change(self, revision: Revision, base_ids: list[int]) -> list[Text]:
        """What a revision made of `base`, with the exchanged token marked."""
        made = compute_text_change(revision, base_ids, self.decode)
        kept = _make_printable(made.prefix)
        text = Text("… " + kept[-MAX_PREFIX_CHARACTERS:] if len(kept) > MAX_PREFIX_CHARACTERS else kept)
        self.append_marked(
            text, "[-", _format_token(made.old_token, revision.position == len(base_ids) - 1), "-]", "strike red"
        )
        self.append_marked(text, "{+", _format_token(made.new_token, len(revision.suffix) == 1), "+}", "bold green")
        if made.new_token.endswith("\n"):
            text.append("\n")
        text.append(_make_printable(made.suffix), "cyan")
        return self.wrap_text(text)

    def append_marked(self, text: Text, left: str, token: str, right: str, style: str) -> None:
        text.append(f"{left}{token}{right}" if self.use_marks else token, style)

    def format_rejected_count(self, count: int) -> list[Text]:
        if not count:
            return []
        return [Text(f"{count} proposal{'s' if count > 1 else ''} rejected", "dim"), Text()]

    def format_summary(self, trace: Trace, num_accepted: int) -> list[Text]:
        answer = Text.assemble(("answer  ", "bold"), (_make_printable(trace.answer or "none found"), "bold green"))
        cost = f"{format_si(trace.cost.flops, 'FLOPs')}, {format_si(trace.cost.seconds, 's')}"
        lines = [
            answer,
            Text(f"reward  {_format_change(trace.reward_initial, trace.reward)}"),
            Text(f"cost    {cost}"),
            Text(
                f"search  {num_accepted} of {len(trace.revisions)} proposals accepted; ended by: {trace.stop_reason}"
            ),
        ]
        if not trace.finished:
            lines.append(Text("The response is cut off: it reached the limit on tokens before an end.", "yellow"))
        return [part for line in lines for part in self.wrap_text(line, "")]

    def format_heading(self, title: str, note: str) -> list[Text]:
        """A title on the left and a note on the right; below each other where there is no room."""
        gap = self.width - len(title) - len(note)
        return self.wrap_text(Text.assemble((title, "bold"), " " * gap if gap > 1 else "\n", note), "")

    def wrap_text(self, text: Text, indent: str = "  ") -> list[Text]:
        lines = text.wrap(self.console, self.width - len(indent), overflow="fold")
        for line in lines:
            line.rstrip()
        return [Text(indent).append_text(line) if line else line for line in lines]


def format_reward_change(before: float, after: float) -> str:
    return f"reward {_format_change(before, after)}"


def _format_change(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def _format_token(text: str, is_last: bool) -> str:
    """A token that can be seen: spaces and line breaks as signs, special tokens by name."""
    if not text:
        return "⟨end⟩" if is_last else "⟨special⟩"
    if text.isspace():
        return text.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return _make_printable(text)


def _make_printable(text: str) -> str:
    """Without characters that would move the cursor, colour or reorder what follows; line breaks and tabs stay."""
    return "".join(
        one if one in "\n\t" or not (unicodedata.category(one) in ("Cc", "Cs") or one in _BIDI_CONTROLS) else "\ufffd"
        for one in text.replace("\r\n", "\n")
    )
