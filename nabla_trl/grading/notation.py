r"""Write answers in one notation: ASCII digits, LaTeX commands for symbols, no layout. In linear time."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_PLAIN_NUMBER = re.compile(r"[-+]?(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
_LAYOUT = " \t\r\n*_`~\u00a0"  # space and Markdown emphasis around an answer

_DASHES = dict.fromkeys(map(ord, "−–—‒―﹣"), "-")
_SYMBOLS = {
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp "},
    **{"≡": r"\equiv ", "≤": r"\leq ", "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx "},
    **{"∞": r"\infty ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus "},
    **{"⇒": r"\implies ", "→": r"\to ", "⇔": r"\iff ", "∠": r"\angle ", "∥": r"\parallel ", "⊥": r"\perp "},
    **{"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}"},
    **{"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda "},
    **{
        "⟨": "(",
        "⟩": ")",
        "¢": " cents",
        "°": r"^\circ ",
        "º": r"^\circ ",
        "“": '"',
        "”": '"',
        "‘": "'",
        "’": "'",
        "′": "'",
        "…": r"\ldots ",
    },
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
}
_SYMBOL_TABLE = {ord(symbol): text for symbol, text in _SYMBOLS.items()}
_SUPERSCRIPT_TABLE = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUBSCRIPT_TABLE = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+")
_VULGAR_FRACTION = re.compile("[¼½¾⅐-⅞]")
_ROOT = re.compile(r"([√∛])\s?(?:\(([^()√∛]{1,200})\)|(\d+(?:\.\d+)?|\\[a-z]+|[A-Za-z]))")

_COMMAND_NAMES = {
    **{"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "le": "leq", "leqslant": "leq", "ge": "geq"},
    **{"geqslant": "geq", "ne": "neq", "rightarrow": "to", "Rightarrow": "implies", "varnothing": "emptyset"},
    **{"Leftrightarrow": "iff", "land": "wedge", "lor": "vee"},
    **dict.fromkeys(("textnormal", "textrm", "textbf", "textit", "textsf", "mbox", "mathrm", "mathbf"), "text"),
    **dict.fromkeys(("mathit", "mathsf", "hbox"), "text"),
}
_COMMAND_TEXTS = {
    **{"lt": "<", "gt": ">", "degree": r"^\circ ", "textdegree": r"^\circ "},
    **{
        "langle": "(",
        "rangle": ")",
        "lbrace": r"\{",
        "rbrace": r"\}",
        "lvert": "|",
        "rvert": "|",
        "lbrack": "[",
        "rbrack": "]",
    },
    **dict.fromkeys(("quad", "qquad", "thinspace", "enspace", "space"), " "),
    **dict.fromkeys(("displaystyle", "textstyle", "limits", "left", "right", "mleft", "mright", "middle"), ""),
    **dict.fromkeys((f"{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")), ""),
}
_COMMAND = re.compile(r"\\\\|\\(left|right)\s*\.|\\([A-Za-z]+)(\s*)|\\([,;:!>~ ])\s*|~|\{,\}")
# "4\,200", "4 200" with a space that does not break, and "4{,}200", which becomes "4,200".
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;: ]|[~\u00a0\u2009\u202f])\s?\d{3})+(?!\d)", re.ASCII)
_SPACED_NUMBER = re.compile(r"[-+]?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?", re.ASCII)
_ASCII_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])(?: (?=[a-z\d/+*-]))?")
_ASCII_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s?(?:(\d+(?:\.\d+)?)|\(([^()]{1,200})\))")
_MODULUS = re.compile(r"\(\s?\\?(?:mod|bmod)\s+([^()\s]{1,20})\s?\)|\\pmod\s?(\w)")
_WRAPPED_LETTER = re.compile(r"\\text\s?\{\s?([A-Za-z])\s?\}")
_DEGREES = re.compile(r"\^\s?\{?\s?\\circ\s?\}?")
_PERCENT = re.compile(r"\s?(?:\\?%|\\text\s?\{\s?(?:percent(?:age)?|pct)\s?\}|\b(?:percent(?:age)?|pct)\b)")


@lru_cache(maxsize=1 << 16)
def normalize_answer(answer: str) -> str:
    r"""Return an answer in one notation, so that equal answers in other writing are often the same text.

    Unicode digits, dashes and mathematical symbols become ASCII or LaTeX. Layout (`\left`, `\displaystyle`, spacing),
    outer `$…$`, currency signs, Markdown, a unary plus and closing punctuation disappear. Space becomes single.

    Args:
        answer: what `extract_answer` returns, or a gold answer.

    Returns:
        The text, which is empty if nothing of the answer is left.
    """
    if _PLAIN_NUMBER.fullmatch(answer):
        return answer.removeprefix("+")
    text = trim_answer(rewrite_symbols(answer))
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", re.sub(r"\\?[$£€¥]", "", text))
    text = _rewrite_commands(text)
    text = _ASCII_ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", _ASCII_PI.sub(r"\\pi ", text))
    text = _PERCENT.sub("%", rewrite_modulus(text))
    text = re.sub(r"\^\\circ\s?", r"^\\circ ", _DEGREES.sub(r"^\\circ ", text))
    text = trim_answer(" ".join(text.split())).rstrip("\\ ")
    if _SPACED_NUMBER.fullmatch(text):
        text = text.replace(" ", "")
    text = re.sub(r"^=\s?(?=[^=\s])", "", text)
    text = re.sub(r"^\+\s?(?=[\d.])", "", text)
    return re.sub(r"(?<=\d)\.$", "", text)


def join_thousands(text: str) -> str:
    r"""Return a text in which `4\,200`, `4{,}200` and 4 200 with a space that does not break are 4200."""
    return _SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text.replace("{,}", ","))


def rewrite_modulus(text: str) -> str:
    r"""Write `(mod 5)` and `\pmod 5` as `\pmod{5}`."""
    return _MODULUS.sub(lambda match: rf"\pmod{{{match[1] or match[2]}}}", text)


def rewrite_symbols(text: str) -> str:
    """Replace Unicode digits, dashes and mathematical symbols by ASCII or LaTeX. Letters of any script stay."""
    if text.isascii():
        return text
    text = _SPACED_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match[0]), text).translate(_DASHES)
    text = _SUPERSCRIPTS.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPT_TABLE)}}}", text)
    text = _SUBSCRIPTS.sub(lambda match: f"_{{{match[0].translate(_SUBSCRIPT_TABLE)}}}", text)
    text = _VULGAR_FRACTION.sub(_rewrite_vulgar_fraction, text).translate(_SYMBOL_TABLE)
    text = _ROOT.sub(lambda match: rf"\sqrt{'[3]' if match[1] == '∛' else ''}{{{match[2] or match[3]}}}", text)
    text = unicodedata.normalize("NFKC", text).translate(_DASHES)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)


def _rewrite_vulgar_fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _rewrite_commands(text: str) -> str:
    if "\\" not in text and "~" not in text and "{,}" not in text:
        return text
    text = join_thousands(re.sub(r",\\!\s*(?=\d{3})", ",", text))
    text = _COMMAND.sub(_rewrite_command, text)
    if not _WRAPPED_LETTER.fullmatch(text.strip()):
        text = _WRAPPED_LETTER.sub(r" \1 ", text)
    return text


def _rewrite_command(match: re.Match[str]) -> str:
    if match[1]:  # \left. and \right. print nothing
        return ""
    if name := match[2]:
        if name in _COMMAND_TEXTS:
            return _COMMAND_TEXTS[name]
        return f"\\{_COMMAND_NAMES.get(name, name)}{match[3]}"
    if match[4]:
        return "" if match[4] == "!" else " "
    return {"~": " ", "{,}": ","}.get(match[0], match[0])  # a doubled backslash ends a line and stays


def trim_answer(answer: str) -> str:
    r"""Remove outer space, Markdown emphasis, `$…$`, `\(…\)`, `\[…\]` and closing punctuation from an answer."""
    previous = None
    while answer != previous:
        previous = answer
        answer = _strip_closing_punctuation(answer)
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = answer[len(left) : -len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner and left not in inner:
                answer = inner
    return answer


def _strip_closing_punctuation(answer: str) -> str:
    r"""Remove outer space, emphasis and closing punctuation, but not the point of `\right.`, which is a bracket."""
    answer = answer.strip(_LAYOUT)
    kept = answer.rstrip(_LAYOUT + ".,;:")
    return kept + "." if kept.endswith("\\right") and answer[len(kept) :].startswith(".") else kept


# --- thoughts ---------------------------------------------------------------------------------------

THINK_OPENING, THINK_CLOSING = "<think>", "</think>"

_TAG_EDGE = "begin|start|end|of"
_THINK_TAG = (
    r"[<\[◁]\|?(?P<slash>/?)(?:\w{1,20}:)?"
    rf"(?P<edges>(?:(?:{_TAG_EDGE})[_▁])*)(?:thinking|think|thoughts|thought)(?P<last>(?:[_▁](?:{_TAG_EDGE}))?)"
    r"\|?[>\]▷]"
)
_WHOLE_THINK_TAG = re.compile(_THINK_TAG, re.IGNORECASE)
_THOUGHT_MARKUP = re.compile(
    rf"{_THINK_TAG}"
    r"|<\|channel\|>(?P<channel>\w{0,30})[^<>|]{0,100}(?:<\|constrain\|>\w*)?<\|message\|>"
    r"|(?P<gemma><\|channel>\s*thought\b|<channel\|>)"
    r"|^(?P<granite>Here is my (?:thought process|response)):",
    re.IGNORECASE | re.MULTILINE,
)


def is_think_tag(text: str) -> bool:
    """Return whether a text is one tag that opens or closes a thought, such as `[/THINK]`."""
    return _WHOLE_THINK_TAG.fullmatch(text) is not None


def normalize_think_tags(text: str) -> str:
    """Return a text with `<think>` and `</think>` in place of all other tags around thoughts.

    - tags that name a thought: `<thinking>`, `<thought>`, `<seed:think>`, `[THINK]`, `<|START_THINKING|>`, `◁think▷`
    - the channels of gpt-oss: every channel but `final` is a thought
    - the thought channel of Gemma: `<|channel>thought` … `<channel|>`
    - the phrases of Granite: "Here is my thought process:" and "Here is my response:", each on a line
    """
    return _THOUGHT_MARKUP.sub(_normalize_tag, text)


def _normalize_tag(match: re.Match[str]) -> str:
    if match["channel"] is not None:
        closes = match["channel"].lower() == "final"
    elif match["gemma"]:
        closes = match["gemma"] == "<channel|>"
    elif match["granite"]:
        closes = match["granite"].lower().endswith("response")
    else:
        closes = bool(match["slash"]) or "end" in (match["edges"] + match["last"]).lower()
    return THINK_CLOSING if closes else THINK_OPENING
