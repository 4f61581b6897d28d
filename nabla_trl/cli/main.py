"""The command `nabla-trl`. This file loads nothing heavy: `nabla-trl --help` answers at once."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches

from nabla_trl import __version__

COMMAND_SUMMARIES = {
    "solve": "refine the answer to one question and show how it changed",
    "traces": "refine the answers to many problems and store them to train on",
    "eval": "run methods on held-out problems and compare accuracy and cost",
    "report": "write the report of an evaluation again, from its rows",
    "audit": "measure whether a reward prefers right answers",
    "serve": "answer requests over HTTP, as OpenAI's chat completions",
    "ship": "make a folder of a trained checkpoint that others can load",
}
# What stops in the middle and can go on.
_RESUMABLE_COMMANDS = ("traces", "eval")


def format_overview() -> str:
    lines = [f"  {name:<8}{summary}" for name, summary in COMMAND_SUMMARIES.items()]
    return "\n".join(
        [
            "usage: nabla-trl COMMAND [options]",
            "",
            "Gradient search over the tokens of an answer, guided by a reward, and what it is worth.",
            "",
            *lines,
            "",
            "nabla-trl COMMAND --help explains a command's options; nabla-trl --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nabla-trl` with these arguments (None = those of the process); returns the exit code."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" for it
    if name in ("--help", "-h", "--version"):
        print(__version__ if name == "--version" else format_overview())
        return 0
    if name not in COMMAND_SUMMARIES:
        match = get_close_matches(name, COMMAND_SUMMARIES, n=1)
        hint = f"did you mean {match[0]}?" if match else f"choose from {', '.join(COMMAND_SUMMARIES)}"
        print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2

    from nabla_trl.cli import commands
    from nabla_trl.cli.parsing import run_main

    again = shlex.join(["nabla-trl", name, *rest]) if name in _RESUMABLE_COMMANDS else ""
    return run_main(commands.COMMAND_FUNCTIONS[name], rest, resume_command=again)


if __name__ == "__main__":
    sys.exit(main())
