"""Start the processes of a run in the way of `accelerate launch`, without its tracebacks.

`accelerate launch` ends with a traceback of its own when a process ends with an error, also with one that the process
has explained, and at Ctrl-C. Here the exit code of the process is that of the command, and nothing is added.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil

from nabla_trl.utils.formatting import is_verbose
from nabla_trl.utils.interrupts import COMMAND_VARIABLE, get_current_command

MODULE = "nabla_trl.distill"
# Option → that of `accelerate launch`, and its help.
LAUNCH_OPTIONS = {
    "--num_processes": (
        "--num_processes",
        "Number of processes to start on this machine, one for each GPU (default: this process alone).",
    ),
    "--accelerate_config": (
        "--config_file",
        "YAML file of accelerate that says which processes to start, such as recipes/accelerate/fsdp2.yaml (default: "
        "none).",
    ),
}


def split_launch_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for `accelerate launch`, and all others. No words are for it where nothing is to be started."""
    launch_words: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name in LAUNCH_OPTIONS:
            launch_words += [LAUNCH_OPTIONS[name][0], value if equals else next(words, "")]
        else:
            others.append(word)
    return launch_words, others


def start_processes(launch_words: Sequence[str], argv: Sequence[str]) -> int:
    """Run `accelerate launch` in this process and return the exit code of the first process that failed, or 0.

    Args:
        launch_words: options of `accelerate launch`.
        argv: options of the run.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = [*launch_words, "-m", MODULE, *argv]
    if "--config_file" not in launch_words:
        # accelerate starts several processes for GPUs only. Without a GPU the run uses the CPU and gloo.
        words = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *words]
        words = ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1"), *words]
    if not is_verbose():
        for name in ("torch.distributed.elastic", "torch.distributed.run", "accelerate"):
            _silence(name)
    os.environ[COMMAND_VARIABLE] = get_current_command()
    try:
        with _leaving_signals_to_children():
            launch_command(launch_command_parser().parse_args(words))
    except subprocess.CalledProcessError as error:
        return _to_exit_code(error.returncode)
    except ChildFailedError as error:
        return _to_exit_code(error.get_first_failure()[1].exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    finally:
        os.environ.pop(COMMAND_VARIABLE, None)
    return 0


def _to_exit_code(code: int) -> int:
    """Return the exit code as a shell reports it: 128 + number for a process that a signal ended."""
    return 128 - code if code < 0 else code


def _silence(name: str) -> None:
    """Drop what a logger and those below it say, those included that its library makes later with a level."""
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    for other in list(logging.root.manager.loggerDict):
        if other.startswith(f"{name}."):
            logging.getLogger(other).setLevel(logging.CRITICAL + 1)


@contextmanager
def _leaving_signals_to_children() -> Iterator[None]:
    """Let the processes end by themselves at Ctrl-C, which a terminal sends to all, and hand SIGTERM on to them."""

    def wait(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            for child in psutil.Process().children():
                child.send_signal(number)

    previous = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
