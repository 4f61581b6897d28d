"""The command `nabla-trl`. This module imports nothing heavy, so that `nabla-trl --help` answers at once."""

from __future__ import annotations

import importlib
import io
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from nabla_trl import __version__


class Command(NamedTuple):
    """A command of `nabla-trl`.

    Attributes:
        module: its module in `nabla_trl.cli`.
        summary: its line in `nabla-trl --help`.
        resumable: the same command line continues an interrupted run.
    """

    module: str
    summary: str
    resumable: bool = False


COMMANDS = {
    "init": Command("init", "write a commented configuration for your model, reward and data, or the demo's files"),
    "solve": Command("commands.solve", "refine the answer to one question and show how it changed"),
    "traces": Command(
        "commands.traces", "refine the answers to many problems and store the traces to train on", resumable=True
    ),
    "train": Command(
        "commands.train", "train policies on traces (sft, dpo) or on problems (rloo, grpo)", resumable=True
    ),
    "eval": Command(
        "commands.evaluate", "run methods on held-out problems and compare accuracy and cost", resumable=True
    ),
    "distill": Command("distill.run", "traces, training, evaluation and report in one run", resumable=True),
    "report": Command("commands.report", "write the report of an evaluation again, from its rows"),
    "breakeven": Command("commands.breakeven", "count the queries after which training has paid for itself"),
    "audit": Command("commands.audit", "measure if a reward prefers correct answers"),
    "serve": Command("commands.serve", "answer requests over HTTP, as OpenAI's chat completions"),
    "plan": Command("commands.plan", "estimate memory, batch, FLOPs and hours of a run from the models' configs"),
    "export": Command("commands.export", "write a trained checkpoint to a folder that others can load"),
}
RENAMED_COMMANDS = {"ship": "export"}


def format_overview() -> str:
    """Return the text of `nabla-trl --help`."""
    return "\n".join(
        [
            "usage: nabla-trl COMMAND [options]",
            "",
            "Refine answers by gradient search with a reward, and train on the results.",
            "",
            *(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()),
            "",
            "nabla-trl COMMAND --help explains a command's options; nabla-trl --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nabla-trl` and return the exit code.

    Args:
        argv: the arguments. None takes those of the process.
    """
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" in its place
    if name in ("--help", "-h", "--version"):
        print(__version__ if name == "--version" else format_overview())
        return 0
    if name not in COMMANDS:
        match = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {match[0]}?" if match else f"choose from {', '.join(COMMANDS)}"
        hint = f"it is now {RENAMED_COMMANDS[name]}" if name in RENAMED_COMMANDS else hint
        print(f"error: unknown command {name!r}: {hint}", file=sys.stderr)
        return 2

    from nabla_trl.cli.parsing import run_main
    from nabla_trl.cli.quiet import announce_startup, stop_announcing_startup

    command = COMMANDS[name]
    announce_startup()
    module = importlib.import_module(f"nabla_trl.cli.{command.module}")
    command_line = shlex.join(["nabla-trl", name, *arguments])
    resume_command = command_line if command.resumable else ""
    try:
        return run_main(module.main, arguments, resume_command=resume_command, command=command_line)
    finally:
        stop_announcing_startup()


if __name__ == "__main__":
    sys.exit(main())
