"""Numbers, names and errors as short text, and whether libraries may print theirs."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Environment variable that --verbose sets, for this process and its children.
VERBOSE_VARIABLE = "NABLA_VERBOSE"
# Characters that change the order in which a terminal shows others (Unicode's Bidi_Control).
_BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
# https://user:password@host. A password may hold an @ of its own, so the last one before the path counts.
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/?#'\"<>]*@")
# Passwords with characters that a URL should not hold, and URLs that went through a path, which has single slashes. A
# number after the colon is a port. All lengths are bounded, so that a long text takes linear time.
_UNQUOTED_USERINFO = re.compile(
    r"((?:[A-Za-z][A-Za-z0-9+.-]{1,30}:[/\\]{1,2})|//)[^\s/\\?#:@\[]{0,64}:(?!\d{1,5}(?:[/?#,'\"\s]|$))\S{0,200}@"
)
# Names of secrets in flags and mappings, with TRL's eos_token and pad_token left alone, and in queries of URLs.
_SECRET_NAME = (
    r"(?:(?:[\w-]{1,20}[_-])?(?:hub|hf|access|auth|api|bearer|login|refresh)[_-])?token"
    r"|(?:[\w-]{1,20}[_-])?(?:api[_-]?key|secret|password|passwd)"
)
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"((?:^|\s)--(?:{_SECRET_NAME})(?:=|\s+))(?!--)(?:'[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE)
_SECRET_QUERY = re.compile(
    r"([?&#;][\w.-]{0,40}(?:token|key|secret|password|passwd|signature|credential|sig|auth)=)[^\s&#;'\"<>]+",
    re.IGNORECASE,
)
_KNOWN_TOKENS = re.compile(r"\b(hf_|sk-|ghp_)[A-Za-z0-9_-]{16,}")
_SI_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P", 6: "E", 7: "Z", 8: "Y"}
_LARGE_NUMBERS = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"))


def is_verbose(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether libraries may print what they like, which --verbose asks for."""
    return environ.get(VERBOSE_VARIABLE, "0") not in ("", "0")


def format_si(value: float, unit: str = "") -> str:
    """Return a number with three significant digits and an SI prefix: 1.2e8, "FLOPs" → "120 MFLOPs"."""
    value = float(f"{value:.3g}")
    if not math.isfinite(value):
        return f"{value} {unit}".rstrip()
    power = math.floor(math.log10(abs(value)) / 3) if value else 0
    power = min(max(power, min(_SI_PREFIXES)), max(_SI_PREFIXES))
    return f"{value / 1000.0**power:.3g} {_SI_PREFIXES[power]}{unit}".rstrip()


def format_count(value: float) -> str:
    """Return a number of things as people write it: 718.3 → "718", 56512 → "56,500", 2.5e6 → "2.5 million"."""
    if abs(value) < 9_999.5:
        return f"{value:.2g}" if abs(value) < 9.95 else f"{value:,.0f}"
    value = float(f"{value:.3g}")
    size, name = next(((size, name) for size, name in _LARGE_NUMBERS if abs(value) >= size), (1.0, ""))
    return f"{value / size:,.10g} {name}".rstrip()


def format_seconds(value: float) -> str:
    """Return a time with three significant digits in the unit that people use: 0.0264 → "26.4 ms", 5400 → "90 min"."""
    if value < 120:
        return format_si(value, "s")
    if value < 7200:
        return f"{value / 60:.3g} min"
    return f"{value / 3600:.3g} h" if value < 999.5 * 3600 else f"{value / 3600:,.0f} h"


def pluralize(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: 1, "problem" → "1 problem". The plural has an s unless it is given."""
    return f"{count} {singular if count == 1 else plural or singular + 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def format_interval(entry: Mapping[str, Any], number_format: str = ".3f") -> str:
    """Return a value and its interval, such as "0.957 [0.940, 0.972]". An end that is not known is written "?"."""
    low, high = ("?" if entry[end] is None else f"{entry[end]:{number_format}}" for end in ("low", "high"))
    return f"{entry['value']:{number_format}} [{low}, {high}]"


def format_names(names: Sequence[str], max_names: int = 3) -> str:
    """Return the first names in quotes, and an ellipsis if there are more."""
    return ", ".join(map(repr, names[:max_names])) + (", …" if len(names) > max_names else "")


def format_load_error(what: str, name: str, error: BaseException) -> str:
    """Return one line that says what cannot be loaded from a folder or the hub, and why."""
    where = "" if Path(name).exists() else " (no such folder here, so it is taken for a hub id)"
    return f"cannot load {what} from {name!r}{where}: {format_error(error)}"


def format_error(error: BaseException | str, max_chars: int = 200) -> str:
    """Return an error's text on one line, cut at `max_chars` characters. Without a text return the error's type.

    Control characters become replacement characters, because the text may hold parts of data and of templates.
    """
    text = make_printable(hide_userinfo(" ".join(str(error).split()))) or type(error).__name__
    return text if len(text) <= max_chars else f"{text[: max_chars - 2]} …"


def make_printable(text: str) -> str:
    """Replace characters that move the cursor, color text, reorder it or break lines. Line breaks and tabs stay."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join("\ufffd" if _is_control(character) else character for character in text.replace("\r\n", "\n"))


def _is_control(character: str) -> bool:
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDI_CONTROLS


def hide_userinfo(value: Any) -> Any:
    """Return a value in which passwords and tokens are "***", in texts, lists and mappings.

    These are user names and passwords of URLs, secrets in their queries (?token=…), the values of flags and of keys
    such as hub_token, and tokens that show what they are (hf_…). Texts that are stored, shown or sent pass through
    here: configurations, commands, settings, cards and errors.
    """
    if isinstance(value, str):
        text = _UNQUOTED_USERINFO.sub(r"\1***@", _USERINFO.sub(r"\1***@", value))
        for pattern in (_SECRET_QUERY, _SECRET_FLAG):
            text = pattern.sub(r"\1***", text)
        return _KNOWN_TOKENS.sub(r"\1***", text)
    if isinstance(value, Mapping):
        return {
            key: "***" if item and isinstance(item, str) and _SECRET_KEY.fullmatch(str(key)) else hide_userinfo(item)
            for key, item in value.items()
        }
    return [hide_userinfo(item) for item in value] if isinstance(value, list | tuple) else value


def finite_or_none(value: float | None) -> float | None:
    """Return a finite number as it is, and None for NaN and infinity, which JSON cannot write."""
    return value if value is not None and math.isfinite(value) else None
