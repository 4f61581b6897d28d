"""Options as dataclass fields: their help, groups of which one is chosen, and values from YAML. No torch, no trl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from nabla_trl.utils.faults import Checks, Faults
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.renamed import describe_new_key

_TYPE_DESCRIPTIONS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

MemberT = TypeVar("MemberT")
ClassT = TypeVar("ClassT")


def option(default: Any, help_text: str, *, common: bool = False) -> Any:
    """Return a dataclass field with a default value and its text for `--help`.

    Args:
        default: a list is copied for each instance.
        common: `--help` shows it. Other options are shown by `--help-all` only.
    """
    metadata = {"help": help_text, "common": common}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def required_option(help_text: str) -> Any:
    """Return a dataclass field without a default value, with its text for `--help`."""
    return field(metadata={"help": help_text})


def split_names(names: str | Iterable[str]) -> list[str]:
    """Return the names of one or several texts, in which commas or spaces separate them."""
    texts = [names] if isinstance(names, str) else names
    return [name for text in texts for name in text.replace(",", " ").split()]


def name_unknown_options(dataclass: type[ClassT]) -> type[ClassT]:
    """Decorate a dataclass so that an unknown keyword is a ValueError with the option's new name or the most similar.

    Without it Python raises a TypeError, which names the keyword alone.
    """
    init: Any = dataclass.__init__
    names = {field.name for field in fields(dataclass)}  # type: ignore[arg-type]

    @wraps(init)
    def checked_init(self: Any, *args: Any, **options: Any) -> None:
        checks = Checks()
        checks.call(check_option_names, options, dataclass)
        valid_options = {name: value for name, value in options.items() if name in names}
        for name, group in get_option_groups(dataclass).items():
            with checks.collect():
                if name in options:
                    valid_options[name] = group.default  # in case the next line raises an error
                    valid_options[name] = group.build(options[name])
        checks.call(init, self, *args, **valid_options)
        checks.raise_faults()

    setattr(dataclass, "__init__", checked_init)  # noqa: B010  # an assignment is an error to mypy
    return dataclass


def check_option_names(options: Iterable[str], dataclass: type) -> None:
    """Refuse names that are no options of a dataclass."""
    names = [field.name for field in fields(dataclass)]
    every_name = f": {dataclass.__name__} has {', '.join(names)}"
    mistakes = []
    for name in options:
        if name not in names:
            hint = describe_new_key(name, names) or _describe_owner(name, dataclass) or format_suggestion(name, names)
            mistakes.append(f"unknown option {name!r}{hint or every_name}")
    if mistakes:
        raise Faults(*mistakes)


def _describe_owner(name: str, dataclass: type) -> str:
    """Return how an option of a group's member is written, and an empty text if no group has it."""
    for group_name, group in get_option_groups(dataclass).items():
        for member in group.members.values():
            if name in _get_init_names(member):
                return f": it is an option of {group_name}, as in {group_name}={{{name!r}: …}}"
    return ""


def merge_options(base: Mapping[str, Any], overrides: Mapping[str, Any], dataclass: type) -> dict[str, Any]:
    """Return options with overrides. Those of a group are merged with the group's, unless its member changes.

    Args:
        base: options by name.
        overrides: options by name. One of a group may be written as "solver.step_size".

    Raises:
        ValueError: an unknown option, which the message names with the most similar one.
    """
    groups = get_option_groups(dataclass)
    plain: dict[str, Any] = {}
    layers: dict[str, list[Any]] = {}
    for name, value in overrides.items():
        group_name, _, option_name = name.partition(".")
        if option_name and group_name in groups:
            layers.setdefault(group_name, []).append({option_name: value})
        elif name in groups:
            layers.setdefault(name, []).insert(0, value)
        else:
            plain[name] = value
    checks = Checks()
    checks.call(check_option_names, plain, dataclass)
    merged = {}
    for name, values in layers.items():
        with checks.collect():
            merged[name] = groups[name].merge(base.get(name), *values)
            groups[name].build(merged[name])
    checks.raise_faults()
    return {**base, **plain, **merged}


class OptionGroup(Generic[MemberT]):
    """A dataclass field that holds one of several option dataclasses, the members, each with a class attribute `name`.

    Assign an instance, a name, or a mapping such as {"name": "ste", "steps": 20}. Reading the field gives the
    instance. The first member is the default.
    """

    def __init__(self, *members: type[MemberT], help_text: str):
        self.members: dict[str, Any] = {member.name: member for member in members}  # type: ignore[attr-defined]
        self.default = members[0]()
        self.help_text = help_text

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> MemberT:
        return self.default if instance is None else vars(instance)[self.name]

    def __set__(self, instance: Any, value: MemberT | str | Mapping[str, Any]) -> None:
        vars(instance)[self.name] = self.build(value)

    def build(self, value: MemberT | str | Mapping[str, Any]) -> Any:
        """Return a member. A mapping without a name is of the default member.

        Raises:
            ValueError: unknown name or option, or an option of another type or out of range.
        """
        if isinstance(value, tuple(self.members.values())):
            member: Any = value
            value = {"name": member.name, **{name: getattr(member, name) for name in _get_init_names(type(member))}}
        options = self.merge(value)
        name = options.pop("name")
        self.check_options(name, options, "name: {}")
        return self.members[name](**coerce_fields(options, [self.members[name]], source=f"{self.name} {name}"))

    def merge(self, *layers: Any) -> dict[str, Any]:
        """Return the name and options of several sources. Later sources win, and a change of name drops options.

        Args:
            layers: what `build` takes, or None. A mapping without a name keeps the name of the earlier sources.

        Raises:
            ValueError: unknown name, or another type.
        """
        merged: dict[str, Any] = {"name": self.default.name}  # type: ignore[attr-defined]
        for layer in layers:
            if layer is None:
                continue
            if type(layer) in self.members.values():
                layer = {"name": layer.name, **vars(layer)}
            elif not isinstance(layer, Mapping):
                layer = {"name": layer}
            name = layer.get("name", merged["name"])
            if not isinstance(name, str) or name not in self.members:
                similar = get_close_matches(str(name), self.members, n=1)
                hint = f" (did you mean {similar[0]}?)" if similar else ""
                raise Faults(
                    f"{self.name} must be one of {', '.join(self.members)}, not {name!r}{hint}",
                    replacements={str(name): similar[0]} if similar else {},
                )
            merged = {**(merged if name == merged["name"] else {}), **layer, "name": name}
        return merged

    def check_options(self, name: str, options: Iterable[str], how_to_choose: str) -> None:
        """Refuse options that a member does not have.

        Args:
            how_to_choose: text with a place for the name of the member that has the option, such as "--solver {}".
        """
        names = [field.name for field in fields(self.members[name])]
        mistakes = []
        for key in options:
            if key not in names:
                owner = next((other for other, member in self.members.items() if key in _get_init_names(member)), None)
                names_text = f"it has {', '.join(names) or 'none'}"
                if owner:
                    hint = f": {names_text}; {key} belongs to {owner}: add {how_to_choose.format(owner)}"
                else:
                    suggestion = f"{format_suggestion(str(key), names)}: {names_text}"
                    hint = describe_new_key(str(key), [self.name]) or suggestion
                mistakes.append(f"{self.name} {name} has no option {key!r}{hint}")
        if mistakes:
            raise Faults(*mistakes)


def get_option_groups(dataclass: type) -> dict[str, OptionGroup[Any]]:
    """Return the fields of a dataclass that are an `OptionGroup`, by name."""
    return {name: value for name, value in vars(dataclass).items() if isinstance(value, OptionGroup)}


def _get_init_names(dataclass: type) -> list[str]:
    return [field.name for field in fields(dataclass) if field.init]


def coerce_fields(
    values: Mapping[Any, Any], dataclasses: Iterable[type[Any]], *, source: str | Path, checks: Checks | None = None
) -> dict[str, Any]:
    """Return option values in the types of the dataclasses' fields (1 for a float becomes 1.0).

    Values of bool, int, float and str fields are converted, also in a list or with None. Others stay as they are.
    A mapping for a text option becomes a JSON object, as `--reward` and `--chat_template_kwargs` read it. A text for a
    list of texts becomes its only item.

    Args:
        source: begins the message of an error, such as the name of the file.
        checks: collects what is wrong, and the other values are returned.

    Raises:
        ValueError: an unknown key, or a value of another type, without `checks`.
    """
    hints: dict[str, Any] = {}
    for dataclass in dataclasses:
        resolved = get_type_hints(dataclass)
        hints |= {name: resolved[name] for name in _get_init_names(dataclass)}
    coerced, mistakes = {}, []
    for key, value in values.items():
        if key not in hints:
            mistakes.append(f"unknown key {format_error(repr(key), 80)}{_describe_key(str(key), hints)}")
            continue
        try:
            coerced[key] = _coerce_value(value, hints[key])
        except TypeError as error:
            mistakes.append(f"{key} must be {error}, not {format_error(repr(value), 80)}")
    faults = [f"{source}: {mistake}" for mistake in mistakes]
    if faults and checks is None:
        raise Faults(*faults)
    if checks is not None:
        checks.add(faults)
    return coerced


def _describe_key(key: str, valid_names: Iterable[str]) -> str:
    """Return what an unknown key is called now, or how it is written, or the most similar key, or an empty text."""
    names = list(valid_names)
    group, _, option_name = key.partition(".")
    if option_name and group in names:  # the spelling of the command line
        return f": write {group}: {{{option_name}: …}}"
    return describe_new_key(key, names) or format_suggestion(key, names)


def _coerce_value(value: Any, hint: Any) -> Any:
    """Return a value in the type of a hint. TypeError says what it must be."""
    if get_origin(hint) in (Union, UnionType):
        types = [member for member in get_args(hint) if member is not NoneType]
        if len(types) > 1 or (value is None and NoneType in get_args(hint)):
            return value
        hint = types[0]
    if get_origin(hint) is list:
        return _coerce_list(value, get_args(hint)[0])
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3, which has no point, as text
        except (ValueError, OverflowError):  # an integer of more digits than a float can hold
            raise TypeError(_TYPE_DESCRIPTIONS[float]) from None
    if hint is str and isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if hint not in _TYPE_DESCRIPTIONS or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    raise TypeError(_TYPE_DESCRIPTIONS[hint] + (" (in quotes)" if hint is str else ""))


def _coerce_list(value: Any, hint: Any) -> list[Any]:
    try:
        if hint is str and isinstance(value, str):
            return [value]
        if not isinstance(value, list):
            raise TypeError(_TYPE_DESCRIPTIONS.get(hint, "values"))
        return [_coerce_value(item, hint) for item in value]
    except TypeError as error:
        raise TypeError(f"a list, each {error}") from None


def format_suggestion(name: str, valid_names: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean X?)", X after a prefix, if a valid name is close to the name, else an empty text."""
    match = get_close_matches(name, valid_names, n=1)
    return f" (did you mean {prefix}{match[0]}?)" if match else ""


def check_whole_number(name: str, value: Any, minimum: int | None = None) -> None:
    """Refuse a value that is no whole number, or below a minimum. Numbers of NumPy are whole numbers, too."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be a whole number, not {format_error(repr(value), 60)}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_choices(kind: str, names: Iterable[str], choices: Sequence[str]) -> None:
    """Refuse names that are no choices.

    Args:
        kind: what the names are of, such as "stage".
    """
    checks = Checks()
    for name in names:
        if name not in choices:
            similar = get_close_matches(str(name), choices, n=1)
            hint = f" (did you mean {similar[0]}?)" if similar else ""
            checks.add(
                [f"unknown {kind} {name!r}{hint}: choose from {', '.join(choices)}"],
                {str(name): similar[0]} if similar else {},
            )
    checks.raise_faults()
