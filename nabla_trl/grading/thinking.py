"""Where thoughts begin and end in a text, whatever tags a model writes around them.

`normalize_think_tags` turns all of them into `<think>` and `</think>`:

- tags that name a thought: `<thinking>`, `<thought>`, `<seed:think>`, `[THINK]`, `<|START_THINKING|>`, `◁think▷`
- the channels of gpt-oss: every channel but `final` is a thought
- the thought channel of Gemma: `<|channel>thought` … `<channel|>`
- the phrases of Granite: "Here is my thought process:" and "Here is my response:", each on a line
"""

from __future__ import annotations

import re

OPENING, CLOSING = "<think>", "</think>"

_EDGE = "begin|start|end|of"
_TAG = (
    r"[<\[◁]\|?(?P<slash>/?)(?:\w{1,20}:)?"
    rf"(?P<edges>(?:(?:{_EDGE})[_▁])*)(?:thinking|think|thoughts|thought)(?P<last>(?:[_▁](?:{_EDGE}))?)"
    r"\|?[>\]▷]"
)
_WHOLE_TAG = re.compile(_TAG, re.IGNORECASE)
_MARKUP = re.compile(
    rf"{_TAG}"
    r"|<\|channel\|>(?P<channel>\w*)[^<>|]{0,100}(?:<\|constrain\|>\w*)?<\|message\|>"
    r"|(?P<gemma><\|channel>\s*thought\b|<channel\|>)"
    r"|^(?P<granite>Here is my (?:thought process|response)):",
    re.IGNORECASE | re.MULTILINE,
)


def is_think_tag(text: str) -> bool:
    """Return whether a text is one tag that opens or closes a thought, such as `[/THINK]`."""
    return _WHOLE_TAG.fullmatch(text) is not None


def normalize_think_tags(text: str) -> str:
    """Return a text with `<think>` and `</think>` in place of all other tags around thoughts."""
    return _MARKUP.sub(_normalize_tag, text)


def _normalize_tag(match: re.Match[str]) -> str:
    if match["channel"] is not None:
        closes = match["channel"].lower() == "final"
    elif match["gemma"]:
        closes = match["gemma"] == "<channel|>"
    elif match["granite"]:
        closes = match["granite"].lower().endswith("response")
    else:
        closes = bool(match["slash"]) or "end" in (match["edges"] + match["last"]).lower()
    return CLOSING if closes else OPENING
