"""Command lines: dataclasses filled from a preset, a YAML file and flags, with all mistakes reported at once.

A later source wins over an earlier one: defaults, `--preset`, `--config FILE`, flags. The YAML file is checked against
the dataclasses before TRL's parser sees it, because TRL's parser takes any value for a default.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any, NoReturn, get_type_hints

from trl import TrlParser

from nabla_trl.cli.console import guard_terminal
from nabla_trl.cli.quiet import VERBOSE_HELP, prepare_environment, quiet_libraries
from nabla_trl.cli.telemetry import disable_telemetry
from nabla_trl.utils.faults import Checks, Faults
from nabla_trl.utils.fields import check_choices, coerce_fields, format_suggestion, get_option_groups
from nabla_trl.utils.files import read_yaml
from nabla_trl.utils.formatting import format_error, hide_userinfo, make_printable
from nabla_trl.utils.interrupts import StoppedBySignal, get_current_command, handle_stop_signals, is_main_process
from nabla_trl.utils.renamed import describe_new_flag

_OTHER_PROCESS_SECONDS = 60.0
Presets = Mapping[str, Mapping[str, Any]]


class UsageError(Faults):
    """A command that cannot be run: its command line, or what it names. Nothing was started."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the default of every option, and descriptions with their own line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == ""
        return action.help if silent or "(default" in (action.help or "") else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Show --max_rounds without its other spelling --max-rounds."""
        shown = copy(action)
        shown.option_strings = [flag for flag in action.option_strings if "-" not in flag.lstrip("-")]
        return super()._format_action_invocation(shown if shown.option_strings else action)


class _RaisingArgumentParser(argparse.ArgumentParser):
    """An argument parser that raises UsageError. argparse itself prints many lines and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _HelpAction(argparse.Action):
    """Print the help, with all options if `const` is true, and exit."""

    def __call__(self, parser: Any, *args: Any) -> None:
        parser.show_all_options = self.const
        parser.print_help()
        parser.exit()


class Parser(TrlParser, _RaisingArgumentParser):
    """TRL's parser with --config, --preset, groups of options, and a help of the common options.

    A field that is an `OptionGroup` becomes `--solver NAME` and a flag such as `--solver.steps` for each option of its
    members.

    Args:
        dataclasses: classes whose fields are the options. `metadata["help"]` explains them.
        presets: name -> option values, for `--preset` and the YAML key `preset`. Without presets there is no such
            option.
        common: options that `--help` shows, beside the required ones and fields with `metadata["common"]`. If it is
            None, `--help` shows every option of a dataclass that has no field with `metadata["common"]`.
        kwargs: as for `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        dataclasses: Sequence[type],
        *,
        presets: Presets | None = None,
        common: Collection[str] | None = None,
        **kwargs: Any,
    ):
        self.presets, self.common, self.show_all_options = presets or {}, common, False
        self.option_groups = {name: group for cls in dataclasses for name, group in get_option_groups(cls).items()}
        self._uncommon_dests: set[str] = set()
        self._owners: dict[str, str] = {}  # option -> what it belongs to, as in "rloo and grpo"
        self._checks: Checks | None = None  # of the command line that is being parsed
        self._incomplete_dests: set[str] = set()
        kwargs = {"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs, "add_help": False}
        super().__init__(list(dataclasses), **kwargs)  # type: ignore[arg-type]  # TrlParser is untyped for mypy
        self.add_argument("--config", metavar="FILE", help="YAML file of options. Flags win over it.")
        self.add_argument("--verbose", action="store_true", help=VERBOSE_HELP)
        if self.presets:
            names = ", ".join(self.presets)
            self.add_argument("--preset", metavar="NAME", help=f"Named options: {names}. File and flags win over it.")
        no_value: dict[str, Any] = {"nargs": 0, "action": _HelpAction, "dest": "help", "default": argparse.SUPPRESS}
        self.add_argument("-h", "--help", const=False, help="Show the most common options and exit.", **no_value)
        self.add_argument("--help-all", const=True, help="Show all options and exit.", **no_value)

    def _add_dataclass_arguments(self, dataclass: Any) -> None:
        """Add the options of a dataclass as a group of the help. Overrides transformers' method."""
        hints, groups = get_type_hints(dataclass), get_option_groups(dataclass)
        marks_common = self.common is not None or any(field.metadata.get("common") for field in fields(dataclass))
        section = self.add_argument_group(_get_title(dataclass))
        for field in fields(dataclass):
            if group := groups.get(field.name):
                members = "; ".join(f"{name}: {_get_title(member)}" for name, member in group.members.items())
                text = f"{group.help_text} {members} (default: {group.default.name})"
                section.add_argument(f"--{field.name}", metavar="NAME", default=argparse.SUPPRESS, help=text)
            elif field.init:
                self._add_field(section, field, field.name, hints[field.name], marks_common=marks_common)
        for name, group in groups.items():
            for member_name, member in group.members.items():
                member_section = self.add_argument_group(f"--{name} {member_name}: {_get_title(member)}")
                for field in fields(member):
                    if f"--{name}.{field.name}" in self._option_string_actions:
                        continue
                    flag = copy(field)
                    flag.default = flag.default_factory = MISSING
                    default = "" if "(default" in field.metadata["help"] else f" (default: {field.default})"
                    flag.metadata = {**field.metadata, "help": f"{field.metadata['help']}{default}"}  # type: ignore[assignment]
                    action = self._add_field(
                        member_section,
                        flag,
                        f"{name}.{field.name}",
                        get_type_hints(member)[field.name],
                        marks_common=True,
                    )
                    action.default, action.required = argparse.SUPPRESS, False
                    action.metavar = field.name.upper()

    def _add_field(self, section: Any, field: Field[Any], name: str, hint: Any, *, marks_common: bool) -> Any:
        """Add one field as an option and return its first argparse action."""
        field = copy(field)
        field.name, field.type = name, hint
        is_common = field.metadata.get("common") or name in (self.common or ())
        if owner := field.metadata.get("owner"):
            self._owners[name] = owner
        ours = ("common", "owner")
        field.metadata = {key: value for key, value in field.metadata.items() if key not in ours}  # type: ignore[assignment]
        count = len(self._actions)
        self._parse_dataclass_field(section, field)
        action = self._actions[count]
        if marks_common and not is_common and (not action.required or "." in name):
            self._uncommon_dests.add(name)
        return action

    def format_help(self) -> str:
        """Return the help text, without the less common options unless `show_all_options` is set."""
        if self.show_all_options:
            return super().format_help()
        hidden = [
            (action, action.help)
            for action in self._actions
            if action.dest in self._uncommon_dests and action.help is not argparse.SUPPRESS
        ]
        for action, _ in hidden:
            action.help = argparse.SUPPRESS
        text = super().format_help()
        for action, help_text in hidden:
            action.help = help_text
        count = len({action.dest for action, _ in hidden})
        return f"{text}\n{count} more options: {self.prog} --help-all\n" if count else text

    def parse_options(self, argv: Sequence[str], checks: Checks | None = None) -> tuple[Any, ...]:
        """Return the filled dataclasses in their order, then a namespace of the arguments added by hand.

        Args:
            checks: collects what is wrong, for a command that has more to check. The values are then as far as they
                can be understood, and must not be used for work. None: everything wrong is raised as one error.

        Raises:
            UsageError: an unknown flag, a missing or malformed argument, an unknown or ill-typed key of the file, an
                unknown preset, or a value that a dataclass refuses. The error names all of them.
            SystemExit: --help.
        """
        self._checks, self._incomplete_dests = Checks() if checks is None else checks, set()
        argv = self._replace_unknown_options(argv)
        config_file: str | None = None
        preset: str | None = None
        file_values: dict[str, Any] = {}
        with self._checks.collect():
            config_file, preset, file_values = _read_sources(
                argv, _RaisingArgumentParser(prog=self.prog, add_help=False)
            )
        preset_values = self._get_preset(file_values, preset) if self.presets else {}
        file_values = coerce_fields(file_values, self.dataclass_types, source=config_file or "", checks=self._checks)
        group_values = self._merge_groups(preset_values, file_values, config_file)
        defaults = {**preset_values, **file_values}
        self.set_defaults_with_config(
            **{name: value for name, value in defaults.items() if name not in self.option_groups}
        )
        namespace = self._parse_words(argv)
        values = vars(namespace)
        for name, group in self.option_groups.items():
            flags = {key.partition(".")[2]: values.pop(key) for key in list(values) if key.startswith(f"{name}.")}
            choice = {"name": values.pop(name)} if name in values else {}
            values[name] = group.default
            with self._checks.collect():
                merged = group.merge(group_values[name], {**choice, **flags})
                group.check_options(merged["name"], flags, f"--{name} {{}}")
                values[name] = group.build(merged)
        filled = [self._fill(dataclass, values) for dataclass in self.dataclass_types]
        if checks is None:
            self._checks.raise_faults(UsageError)
        self._checks = None
        return (*filled, namespace)

    def _fill(self, dataclass: type, values: dict[str, Any]) -> Any:
        """Take the values of a dataclass. If it refuses some, its object has them nevertheless."""
        assert self._checks is not None
        filled: Any = object.__new__(dataclass)
        with self._checks.collect():
            filled.__init__(**{field.name: values.pop(field.name, None) for field in fields(dataclass) if field.init})
        return filled

    def _merge_groups(
        self, preset_values: Mapping[str, Any], file_values: dict[str, Any], config_file: str | None
    ) -> dict[str, Any]:
        """Return the options of every group that preset and file set, and check those of the file."""
        assert self._checks is not None
        merged = {}
        for name, group in self.option_groups.items():
            merged[name] = group.merge(preset_values.get(name))
            with self._checks.collect(f"{config_file}: "):
                of_file = group.merge(preset_values.get(name), file_values.get(name))
                group.build(of_file)
                merged[name] = of_file
        return merged

    def _get_preset(self, file_values: dict[str, Any], flag: str | None) -> Mapping[str, Any]:
        """Return the options of the preset that the flag or, without it, the file names."""
        assert self._checks is not None
        file_preset = file_values.pop("preset", None)
        name = file_preset if flag is None else flag
        if name is None or str(name) in self.presets:
            return {} if name is None else self.presets[name]
        self._checks.call(check_choices, "preset", [str(name)], list(self.presets))
        return {}

    def _parse_words(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return the values of a command line. Wrong ones are noted, and the defaults returned in their place."""
        assert self._checks is not None
        namespace = argparse.Namespace()
        try:
            namespace, unexpected = self.parse_known_args(list(argv))
            self._checks.add(f"unexpected argument {word!r}" for word in unexpected)
        except UsageError as error:  # what argparse cannot go on from
            self._checks.add(error.lines)
        for action in self._actions:
            if argparse.SUPPRESS not in (action.dest, action.default) and not hasattr(namespace, action.dest):
                setattr(namespace, action.dest, action.default)
        return namespace

    def error(self, message: str) -> Any:
        """Raise UsageError, or note which arguments are missing, after which argparse goes on."""
        if self._checks is None or not message.startswith("the following arguments are required"):
            super().error(message)
        self._checks.add([message])

    def _match_argument(self, action: argparse.Action, arg_strings_pattern: str) -> int:
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError as error:
            if self._checks is None:
                raise
            self._checks.add([str(error)])
            self._incomplete_dests.add(action.dest)
            return 0

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.dest in self._incomplete_dests:
            return action.default
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            if self._checks is None:
                raise
            self._checks.add([str(error)])
            return action.default

    def _replace_unknown_options(self, argv: Sequence[str]) -> list[str]:
        """Note unknown flags. Return the words with the flags that are meant, or without the flag and its value."""
        assert self._checks is not None
        flags = [flag for action in self._actions for flag in action.option_strings]
        end = argv.index("--") if "--" in argv else len(argv)
        words: list[str] = []
        is_value_of_unknown = False
        for word in argv[:end]:
            flag, equals, value = word.partition("=")
            if not flag.startswith("--") or " " in flag or flag in flags:
                if not is_value_of_unknown or flag.startswith("--"):
                    words.append(word)
                is_value_of_unknown = False
                continue
            description = self._describe_flag(flag, flags)
            match = re.search(r"--([\w.-]+)( false)?", description)
            self._checks.add([f"unknown option {flag}{description}"], {flag: match[0]} if match else {})
            if match:
                words += [f"--{match[1]}{equals}{value}", *(["false"] if match[2] else [])]
            is_value_of_unknown = not match and not equals
        return [*words, *argv[end:]]

    def _describe_flag(self, flag: str, flags: Sequence[str]) -> str:
        """Return what an unknown flag is called now, or the most similar flag of its group, or an empty text."""
        names = {flag.removeprefix("--") for flag in flags}
        old_name = flag.removeprefix("--").replace("-", "_")
        group, _, grouped_name = old_name.partition(".")
        if grouped_name:
            in_group = [flag.partition(".")[2] for flag in flags if flag.startswith(f"--{group}.")]
            similar = format_suggestion(grouped_name, in_group, prefix=f"--{group}.")
            return similar or describe_new_flag(grouped_name, names)
        similar = describe_new_flag(old_name, names) or format_suggestion(flag, flags)
        owner = next((owner for name, owner in self._owners.items() if similar.endswith(f"--{name}?)")), "")
        return f"{similar.removesuffix('?)')}, of {owner}?)" if owner else similar


def parse_dataclasses(
    dataclasses: Sequence[type],
    argv: Sequence[str],
    *,
    presets: Presets | None = None,
    prog: str | None = None,
    common: Collection[str] | None = None,
) -> tuple[Any, ...]:
    """Return the dataclasses filled from `argv` (see `Parser`)."""
    return Parser(dataclasses, presets=presets, prog=prog, common=common).parse_options(argv)[: len(dataclasses)]


def collect_given_options(
    argv: Sequence[str], parsed_dataclasses: Iterable[Any], presets: Presets | None = None
) -> dict[str, Any]:
    """Return the options that a command line, its file and its preset set, by name. A YAML file can hold them.

    Args:
        parsed_dataclasses: the dataclasses filled from `argv`, which have the values of flags.
    """
    _, preset, values = _read_sources(argv, _RaisingArgumentParser(add_help=False))
    preset = preset or values.pop("preset", None)
    preset_values = (presets or {}).get(str(preset), {})
    owners = {field.name: filled for filled in parsed_dataclasses for field in fields(filled) if field.init}
    flags = [word.partition("=")[0].removeprefix("--").replace("-", "_") for word in argv if word.startswith("--")]
    flags = [flag if flag.partition(".")[0] in owners else flag.removeprefix("no_") for flag in flags]
    groups = {name: group for filled in owners.values() for name, group in get_option_groups(type(filled)).items()}
    for name, group in groups.items():
        chosen = getattr(owners[name], name)
        options = {flag.partition(".")[2] for flag in flags if flag.startswith(f"{name}.")}
        if options or name in flags or name in values or name in preset_values:
            # Options of another choice are a fault, which the parser has noted.
            flag_values = {option: getattr(chosen, option) for option in options if hasattr(chosen, option)}
            values[name] = group.merge(preset_values.get(name), values.get(name), {"name": chosen.name, **flag_values})
    values = {**preset_values, **values}
    for flag in flags:
        if flag in owners and flag not in groups:
            value = getattr(owners[flag], flag)
            values[flag] = value.value if isinstance(value, Enum) else value
    return values


def _read_sources(
    argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[str | None, str | None, dict[str, Any]]:
    """Return --config, --preset and the options of the file, which must be known before anything else is parsed."""
    parser.allow_abbrev = False
    parser.add_argument("--config")
    parser.add_argument("--preset")
    sources, _ = parser.parse_known_args(list(argv))
    return sources.config, sources.preset, {} if sources.config is None else read_yaml(sources.config)


def _get_title(dataclass: type) -> str:
    """Return the first line of a dataclass's docstring without its period, or its name if it has no docstring."""
    text = dataclass.__doc__ or ""
    return (
        dataclass.__name__
        if text.startswith(f"{dataclass.__name__}(")
        else text.strip().partition("\n")[0].rstrip(".")
    )


def run_main(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    resume_command: str | None = None,
    command: str = "",
) -> int:
    """Call a command's main and return its exit code. An error that a user can fix becomes one line on stderr.

    Telemetry of libraries is off (`disable_telemetry`).

    Args:
        argv: the arguments. None: those of the process.
        resume_command: the command that continues after a stop. None: the one that started this process. Empty: a
            stopped command cannot be continued.
        command: the command line for a shell, which is printed with misspelled names mended (default:
            `resume_command`).

    Returns:
        what main returns (0 for None), 2 after Faults, by which a command is refused before it starts, 1 after
        another ValueError or OSError, 130 after Ctrl-C, 143 after SIGTERM, and 141 if the reader of stdout has closed
        it.
    """
    disable_telemetry()
    if resume_command is None:
        resume_command = get_current_command()  # read now, because the launcher may end before a stop
    argv = sys.argv[1:] if argv is None else argv
    prepare_environment(argv)
    try:
        with guard_terminal(), handle_stop_signals() if resume_command else nullcontext():
            quiet_libraries()
            return main(argv) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise the last flush fails too
        return 141
    except (ValueError, OSError) as error:
        if isinstance(error, Faults) and not is_main_process():
            # The first process says the same, and its end is the end of the launch.
            time.sleep(_OTHER_PROCESS_SECONDS)
        _print_error(error, command or resume_command)
        return 2 if isinstance(error, Faults) else 1
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        print(f"error: {_describe_full_memory(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if is_main_process():
            position = (
                f" at {error.progress_text}" if isinstance(error, StoppedBySignal) and error.progress_text else ""
            )
            resume = f"; to go on: {hide_userinfo(resume_command)}" if resume_command else ""
            print(make_printable(f"stopped{position}{resume}"), file=sys.stderr)
        return 128 + (error.signal_number if isinstance(error, StoppedBySignal) else signal.SIGINT)


def _describe_full_memory(error: RuntimeError) -> str:
    """Return what PyTorch says about a device without memory, and what helps."""
    reason = format_error(error, 300)
    hint = "lower batch_size, per_device_train_batch_size or max_new_tokens, or use dtype bfloat16"
    return f"{reason} To fit: {hint} (nabla-trl plan estimates what fits). The same command then goes on"


def _print_error(error: ValueError | OSError, command: str) -> None:
    """Print an error as one line on stderr, faults as one line each, and the command with its names mended."""
    lines = error.lines if isinstance(error, Faults) else [str(error)]
    for line in lines:
        print("error:", make_printable(hide_userinfo(" ".join(line.split()))), file=sys.stderr)
    if len(lines) > 1:
        print(f"{len(lines)} faults. Nothing was started.", file=sys.stderr)
    if isinstance(error, Faults) and command and (mended := _mend(command, error.replacements)):
        print(make_printable(hide_userinfo(f"with the names mended: {mended}")), file=sys.stderr)


def _mend(command: str, replacements: Mapping[str, str]) -> str:
    """Return a command with words replaced, also before "=" and in lists with commas. Empty: it has no such word."""
    words, is_changed = [], False
    for word in shlex.split(command):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            value = ",".join(replacements.get(part, part) for part in value.split(","))
            new = [*replacements.get(flag, flag).split(" "), *([value] if equals else [])]
            new = [f"{new[0]}{equals}{value}"] if equals and len(new) == 2 else new
        else:
            new = [",".join(replacements.get(part, part) for part in word.split(","))]
        is_changed = is_changed or new != [word]
        words += new
    return shlex.join(words) if is_changed else ""
