"""Command lines: dataclasses from YAML and flags through TRL's parser, and mistakes reported in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from nabla_trl.config import PRESETS


def parse(dataclasses: Sequence[type], argv: Sequence[str], *, prog: str | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from `--config file.yaml` and flags; flags win over the file, the file over a `--preset`.

    Raises:
        ValueError: an unknown key of the file, a missing file, or a value a dataclass refuses.
        SystemExit: an unknown flag, or --help (argparse prints why).
    """
    from trl import TrlParser

    argv = list(argv)
    for index, word in enumerate(argv):
        if word.startswith("--config="):
            argv[index : index + 1] = ["--config", word.removeprefix("--config=")]
    parser = TrlParser(list(dataclasses), prog=prog)
    preset = _preset(argv)
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
        parser.set_defaults(**PRESETS[preset])
    return parser.parse_args_and_config(argv)


def _preset(argv: list[str]) -> str | None:
    """Take `--preset NAME` out of the arguments, or `preset:` out of reach of the YAML's own keys."""
    if "--preset" in argv:
        index = argv.index("--preset")
        if index + 1 >= len(argv):
            raise ValueError("--preset needs a name")
        name = argv[index + 1]
        del argv[index : index + 2]
        return name
    return None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        ValueError: no such file, or not a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of options")
    return content


def run_main(main: Callable[[Sequence[str]], int | None]) -> int:
    """Call a command's main; a ValueError becomes one line on stderr and exit code 1."""
    try:
        return main(sys.argv[1:]) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
