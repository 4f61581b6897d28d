"""Command lines: dataclasses filled from a preset, a YAML file and flags, and mistakes reported in one line.

A later source wins over an earlier one: defaults, `--preset`, `--config file.yaml`, flags. The YAML file is
checked against the dataclasses before TRL's parser sees it, since that takes any value for a default.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from typing import Any, NoReturn

from trl import TrlParser

from nabla_trl.utils.fields import coerce_fields, format_suggestion, read_yaml
from nabla_trl.utils.interrupts import StoppedBySignal, get_current_command, handle_stop_signals, is_main_process

Presets = Mapping[str, Mapping[str, Any]]


class UsageError(ValueError):
    """A command line that cannot be understood."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every option that has one, and descriptions with their own line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default == ""
        return action.help if silent else super()._get_help_string(action)


class _RaisingArgumentParser(argparse.ArgumentParser):
    """argparse prints a usage of many lines and exits; a caller can do better with an exception."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class Parser(TrlParser, _RaisingArgumentParser):
    """TRL's parser with `--config` and `--preset` explained in --help, and nothing unknown let through.

    Args:
        dataclasses: their fields are the options; `metadata["help"]` explains them.
        presets: name -> option values, for `--preset` and the YAML key `preset`; none = no such option.
        kwargs: as for `argparse.ArgumentParser`.
    """

    def __init__(self, dataclasses: Sequence[type], *, presets: Presets | None = None, **kwargs: Any):
        kwargs = {"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs}
        super().__init__(list(dataclasses), **kwargs)  # type: ignore[arg-type]  # TrlParser is untyped for mypy
        self.presets = presets or {}
        self.add_argument("--config", metavar="FILE", help="YAML file of options; flags win over it")
        if self.presets:
            names = ", ".join(self.presets)
            self.add_argument("--preset", metavar="NAME", help=f"{names}; file and flags win over it")

    def parse_options(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """The filled dataclasses in their order, then a namespace of the arguments added by hand.

        Raises:
            UsageError: an unknown flag, a missing or malformed argument.
            ValueError: an unknown or ill-typed key of the file, an unknown preset, or a value a dataclass refuses.
            SystemExit: --help.
        """
        self._refuse_unknown_options(argv)
        config, preset = self._read_config_and_preset(argv)
        values = {} if config is None else read_yaml(config)
        if self.presets:
            own = values.pop("preset", None)
            self.set_defaults(**self._get_preset(own if preset is None else preset))
        if config is not None:
            self.set_defaults_with_config(**coerce_fields(values, self.dataclass_types, source=config))
        # Without look_for_args_file, a file "nabla-trl.args" beside the program would add options.
        *filled, rest = self.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return tuple(filled)

    def _read_config_and_preset(self, argv: Sequence[str]) -> tuple[str | None, str | None]:
        """--config and --preset, which must be known before anything else is parsed."""
        peek = _RaisingArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        peek.add_argument("--config")
        peek.add_argument("--preset")
        found, _ = peek.parse_known_args(list(argv))
        return found.config, found.preset

    def _get_preset(self, name: Any) -> Mapping[str, Any]:
        if name is None:
            return {}
        if str(name) not in self.presets:
            raise ValueError(f"unknown preset {name!r}: choose from {', '.join(self.presets)}")
        return self.presets[name]

    def _refuse_unknown_options(self, argv: Sequence[str]) -> None:
        """Before argparse complains of a required option, which may be the very one that was misspelt."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in argv:
            flag = word.partition("=")[0]
            if word == "--":
                return
            if flag.startswith("--") and " " not in flag and flag not in known:
                self.error(f"unknown option {flag}{format_suggestion(flag, known)}")


def parse_dataclasses(
    dataclasses: Sequence[type], argv: Sequence[str], *, presets: Presets | None = None, prog: str | None = None
) -> tuple[Any, ...]:
    """The dataclasses filled from `argv`; raises what `Parser.read` raises."""
    return Parser(dataclasses, presets=presets, prog=prog).parse_options(argv)[: len(dataclasses)]


def collect_given_options(
    argv: Sequence[str], parsed_dataclasses: Iterable[Any], presets: Presets | None = None
) -> dict[str, Any]:
    """The options that a command line, its file and its preset set, by name: a YAML of them gives the same again.

    Args:
        filled: the dataclasses that were parsed from `argv`, for the values of flags.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--config")
    peek.add_argument("--preset")
    sources, _ = peek.parse_known_args(list(argv))
    values = {} if sources.config is None else read_yaml(sources.config)
    preset = sources.preset or values.pop("preset", None)
    values = {**(presets or {}).get(str(preset), {}), **values}
    held = {name: one for one in parsed_dataclasses for name, field in one.__dataclass_fields__.items() if field.init}
    for word in argv:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        name = name if name in held else name.removeprefix("no_")
        if word.startswith("--") and name in held:
            value = getattr(held[name], name)
            values[name] = value.value if isinstance(value, Enum) else value
    return values


def run_main(
    main: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None = None,
    *,
    resume_command: str | None = None,
) -> int:
    """Call a command's main and return its exit code; what a user can mend becomes one line on stderr.

    Args:
        argv: the arguments; None = those of the process.
        again: the command that goes on with what was stopped; None = the one that this process was started with,
            empty = nothing could go on.

    Returns:
        What main returns (None = 0); 1 after a ValueError or OSError, 2 after a UsageError, 130 after Ctrl-C, 143
        after a SIGTERM, 141 where the reader of stdout has gone away.
    """
    resume_command = (
        get_current_command() if resume_command is None else resume_command
    )  # now: a launcher may be gone by the time it is asked for
    try:
        with handle_stop_signals() if resume_command else nullcontext():
            return main(sys.argv[1:] if argv is None else argv) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails too
        return 141
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt as error:
        if is_main_process():
            done = f" at {error.progress_text}" if isinstance(error, StoppedBySignal) and error.progress_text else ""
            go_on = f"; to go on: {resume_command}" if resume_command else ""
            print(f"stopped{done}{go_on}", file=sys.stderr)
        return 128 + (error.signal_number if isinstance(error, StoppedBySignal) else signal.SIGINT)


def quiet_libraries() -> None:
    """Bars of loading weights, libraries' deprecations and a missing 4-bit kernel tell a user nothing here."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
