"""A trace for people, as an answer being refined (rich), and for programs, as one JSON object.

On a terminal a replaced token is struck out, the new one is bold and the regenerated rest is coloured; elsewhere
the same is written with marks, `[-old-]{+new+}`, and without any control character.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from nabla_trl.traces.schema import Revision, Trace
from nabla_trl.utils.formatting import si

Decode = Callable[[list[int]], str]  # ids to text, special tokens left out

WIDTH = 100  # columns used at most: longer lines are hard to read
CONTEXT = 160  # characters shown of what a revision kept; the final response is shown whole
_REORDERING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


@dataclass(frozen=True)
class Change:
    """The text of a proposal and of what it branched off: kept + old + ... became kept + new + rest.

    `old` or `new` is empty where the token is special (an end token). The pieces are cut from decoded prefixes, as a
    token's text depends on what stands before it; of a character that `new` only begins, `new` is the whole.
    """

    kept: str
    old: str
    new: str
    rest: str


def change(revision: Revision, base: list[int], decode: Decode) -> Change:
    """What a revision changed in the response ids `base` that it was proposed against."""
    at = revision.position
    before, with_old = decode(base[:at]), decode(base[: at + 1])
    with_new, whole = decode([*base[:at], revision.new]), decode([*base[:at], *revision.suffix])
    kept = _shared(before, with_old, with_new, whole)
    token = _shared(with_new, whole)
    if token == kept and decode([revision.new]):
        token += 1
    return Change(before[:kept], with_old[kept:], whole[kept:token], whole[token:])


def _shared(*texts: str) -> int:
    """How many characters the texts have in common at their beginning."""
    ends = (index for index, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    return next(ends, min(map(len, texts)))


def trace_json(trace: Trace, decode: Decode) -> dict[str, Any]:
    """A trace as JSON values: its fields, with texts beside the ids of responses and revisions.

    A reward that is not finite becomes None.
    """
    found = {**asdict(trace), "initial": decode(trace.initial_ids)}
    found["reward_initial"], found["reward"] = _finite(trace.reward_initial), _finite(trace.reward)
    found["revisions"] = [_revision_json(revision, change(revision, base, decode)) for revision, base in trace.bases()]
    return found


def _revision_json(revision: Revision, made: Change) -> dict[str, Any]:
    rewards = {"reward_before": _finite(revision.reward_before), "reward_after": _finite(revision.reward_after)}
    texts = {"old_text": made.old, "new_text": made.new, "suffix_text": made.new + made.rest}
    return {**asdict(revision), "suffix": list(revision.suffix), **rewards, **texts}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def show_trace(trace: Trace, question: str, decode: Decode, console: Console) -> None:
    """Print how an answer was refined: the first response, each accepted revision, the answer and what it cost."""
    for block in View(decode, console).blocks(trace, question):
        for line in block:
            console.print(line, soft_wrap=True, highlight=False)


class View:
    """Blocks of lines, each cut to the console's width; `marks` stand in for colours where there are none."""

    def __init__(self, decode: Decode, console: Console):
        self.decode, self.console = decode, console
        self.width = min(console.width, WIDTH)
        self.marks = not console.is_terminal or console.color_system is None

    def blocks(self, trace: Trace, question: str) -> Iterator[list[Text]]:
        yield [*self.wrap(Text.assemble(("question  ", "bold"), _printable(question)), ""), Text()]
        yield self.response("first response", f"reward {trace.reward_initial:.3f}", trace.initial_ids)
        accepted = rejected = 0
        for revision, base in trace.bases():
            if not revision.accepted:
                rejected += 1
                continue
            yield self.rejected(rejected)
            accepted, rejected = accepted + 1, 0
            yield self.revision(accepted, revision, base)
        yield self.rejected(rejected)
        yield self.response("final response", gain(trace.reward_initial, trace.reward), trace.response_ids)
        yield self.summary(trace, accepted)

    def response(self, title: str, note: str, ids: list[int]) -> list[Text]:
        return [*self.head(title, note), *self.whole(ids), Text()]

    def whole(self, ids: list[int]) -> list[Text]:
        return self.wrap(Text(_printable(self.decode(ids)) or "(empty)"))

    def revision(self, number: int, revision: Revision, base: list[int]) -> list[Text]:
        title = f"revision {number} at position {revision.position}"
        head = self.head(title, gain(revision.reward_before, revision.reward_after))
        return [*head, *self.change(revision, base), Text()]

    def change(self, revision: Revision, base: list[int]) -> list[Text]:
        """What a revision made of `base`, with the exchanged token marked."""
        made = change(revision, base, self.decode)
        kept = _printable(made.kept)
        text = Text("… " + kept[-CONTEXT:] if len(kept) > CONTEXT else kept)
        self.mark(text, "[-", _token(made.old, revision.position == len(base) - 1), "-]", "strike red")
        self.mark(text, "{+", _token(made.new, len(revision.suffix) == 1), "+}", "bold green")
        if made.new.endswith("\n"):
            text.append("\n")
        text.append(_printable(made.rest), "cyan")
        return self.wrap(text)

    def mark(self, text: Text, left: str, token: str, right: str, style: str) -> None:
        text.append(f"{left}{token}{right}" if self.marks else token, style)

    def rejected(self, count: int) -> list[Text]:
        if not count:
            return []
        return [Text(f"{count} proposal{'s' if count > 1 else ''} rejected", "dim"), Text()]

    def summary(self, trace: Trace, accepted: int) -> list[Text]:
        answer = Text.assemble(("answer  ", "bold"), (_printable(trace.answer or "none found"), "bold green"))
        cost = f"{si(trace.cost.flops, 'FLOPs')}, {si(trace.cost.seconds, 's')}"
        lines = [
            answer,
            Text(f"reward  {_change(trace.reward_initial, trace.reward)}"),
            Text(f"cost    {cost}"),
            Text(f"search  {accepted} of {len(trace.revisions)} proposals accepted; ended by: {trace.stop}"),
        ]
        if not trace.finished:
            lines.append(Text("The response is cut off: it reached the limit on tokens before an end.", "yellow"))
        return [part for line in lines for part in self.wrap(line, "")]

    def head(self, title: str, note: str) -> list[Text]:
        """A title on the left and a note on the right; below each other where there is no room."""
        gap = self.width - len(title) - len(note)
        return self.wrap(Text.assemble((title, "bold"), " " * gap if gap > 1 else "\n", note), "")

    def wrap(self, text: Text, indent: str = "  ") -> list[Text]:
        lines = text.wrap(self.console, self.width - len(indent), overflow="fold")
        for line in lines:
            line.rstrip()
        return [Text(indent).append_text(line) if line else line for line in lines]


def gain(before: float, after: float) -> str:
    return f"reward {_change(before, after)}"


def _change(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def _token(text: str, last: bool) -> str:
    """A token that can be seen: spaces and line breaks as signs, special tokens by name."""
    if not text:
        return "⟨end⟩" if last else "⟨special⟩"
    if text.isspace():
        return text.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥")
    return _printable(text)


def _printable(text: str) -> str:
    """Without characters that would move the cursor, colour or reorder what follows; line breaks and tabs stay."""
    return "".join(
        one if one in "\n\t" or not (unicodedata.category(one) in ("Cc", "Cs") or one in _REORDERING) else "\ufffd"
        for one in text.replace("\r\n", "\n")
    )
