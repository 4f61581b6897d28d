"""A YAML mapping as the fields of dataclasses, with its mistakes named in one line. No torch, no trl here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

_TYPE_DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def option(default: Any, help_text: str) -> Any:
    """Return a dataclass field with a default value and its text for `--help`."""
    return field(default=default, metadata={"help": help_text})


def required_option(help_text: str) -> Any:
    """Return a dataclass field without a default value, with its text for `--help`."""
    return field(metadata={"help": help_text})


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ValueError: no such file, no YAML, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read {path}: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options, one 'name: value' on a line")
    return content


def coerce_fields(
    values: Mapping[Any, Any], dataclasses: Iterable[type[Any]], *, source: str | Path
) -> dict[str, Any]:
    """Option values converted to the types of the dataclasses' fields (a float's `1` becomes 1.0).

    Fields of other types than bool, int, float, str, lists of these, and either or None, are passed on as they are.

    Raises:
        ValueError: an unknown key, or a value of another type; `where` begins the message.
    """
    hints: dict[str, Any] = {}
    for one in dataclasses:
        resolved = get_type_hints(one)
        hints |= {name: resolved[name] for name, field in one.__dataclass_fields__.items() if field.init}
    fitted = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{source}: unknown key {key!r}{format_suggestion(str(key), hints)}")
        try:
            fitted[key] = _coerce_value(value, hints[key])
        except TypeError as error:
            raise ValueError(f"{source}: {key} must be {error}, not {value!r}") from None
    return fitted


def _coerce_value(value: Any, hint: Any) -> Any:
    """`value` as a `hint`; TypeError says what it must be."""
    if get_origin(hint) in (Union, UnionType):
        others = [one for one in get_args(hint) if one is not NoneType]
        if len(others) > 1 or (value is None and NoneType in get_args(hint)):
            return value
        hint = others[0]
    if get_origin(hint) is list:
        return _coerce_list(value, get_args(hint)[0])
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return _coerce_float(value)
    if hint not in _TYPE_DESCRIPTIONS or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    raise TypeError(_TYPE_DESCRIPTIONS[hint] + (" (in quotes)" if hint is str else ""))


def _coerce_list(value: Any, hint: Any) -> list[Any]:
    try:
        if not isinstance(value, list):
            raise TypeError(_TYPE_DESCRIPTIONS.get(hint, "values"))
        return [_coerce_value(one, hint) for one in value]
    except TypeError as error:
        raise TypeError(f"a list, each {error}") from None


def _coerce_float(value: int | str) -> float:
    try:
        return float(value)  # YAML reads 1e-3, which has no point, as text
    except ValueError:
        raise TypeError(_TYPE_DESCRIPTIONS[float]) from None


def format_suggestion(name: str, valid_names: Iterable[str]) -> str:
    """ " (did you mean X?)" where a known name is close to a misspelt one; else nothing."""
    match = get_close_matches(name, valid_names, n=1)
    return f" (did you mean {match[0]}?)" if match else ""
