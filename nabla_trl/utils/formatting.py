"""Numbers and errors as short text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

_SI_PREFIXES = {-3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P", 6: "E", 7: "Z", 8: "Y"}


def format_si(value: float, unit: str = "") -> str:
    """Three significant digits and an SI prefix: 1.2e8, "FLOPs" -> "120 MFLOPs"."""
    value = float(f"{value:.3g}")
    power = math.floor(math.log10(abs(value)) / 3) if value else 0
    power = min(max(power, min(_SI_PREFIXES)), max(_SI_PREFIXES))
    return f"{value / 1000.0**power:.3g} {_SI_PREFIXES[power]}{unit}".rstrip()


def format_interval(entry: Mapping[str, float], number_format: str = ".3f") -> str:
    """A value and its interval: 0.957 [0.940, 0.972]."""
    return f"{entry['value']:{number_format}} [{entry['low']:{number_format}}, {entry['high']:{number_format}}]"


def format_load_error(what: str, name: str, error: BaseException) -> str:
    where = "" if Path(name).exists() else " (no such folder here, so taken for a hub id)"
    return f"cannot load {what} from {name!r}{where}: {format_error(error)}"


def format_error(error: BaseException, max_chars: int = 200) -> str:
    """An error's text on one line, cut at `width` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= max_chars else f"{text[: max_chars - 2]} …"


def finite_or_none(value: float | None) -> float | None:
    """Return a number as it is, and None for NaN, infinity and None: JSON has no other way to write them."""
    return value if value is not None and math.isfinite(value) else None
