"""Names of models, hub ids or paths: whether two mean the same, and what to say where one cannot be loaded."""

from __future__ import annotations

from pathlib import Path


def same_model(one: str, other: str) -> bool:
    """Two names are equal, or lead to the same file or folder."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def cannot_load(what: str, name: str, error: BaseException) -> str:
    where = "" if Path(name).exists() else " (no such folder here, so taken for a hub id)"
    return f"cannot load {what} from {name!r}{where}: {one_line(error)}"


def one_line(error: BaseException, width: int = 200) -> str:
    """An error's text on one line, cut at `width` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= width else f"{text[: width - 2]} …"
