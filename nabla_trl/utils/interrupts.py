"""Ctrl-C, and the SIGTERM of a cluster's scheduler: finish the current batch, then stop and say how to resume.

`handle_stop_signals` is used around a whole command, and `finish_current_batch` around each of its batches. A signal
during a batch takes effect when the batch is on disk. A second signal, or one between batches, stops at once. Without
`handle_stop_signals`, for example in a notebook, signals have their usual effect.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from nabla_trl.utils.formatting import format_duration, hide_userinfo

# Environment variable with the command that started this process, set by a command that starts others.
COMMAND_VARIABLE = "NABLA_COMMAND"
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A scheduler signals the launcher and its processes, and the launcher passes its signal on. The processes receive the
# same request twice.
_ECHO_SECONDS = 1.0


class StoppedBySignal(KeyboardInterrupt):
    """A command has stopped because of a signal.

    Attributes:
        signal_number: the signal.
        progress_text: what is done, or an empty text if the command stopped at once.
    """

    def __init__(self, signal_number: int, progress_text: str = ""):
        super().__init__(signal_number, progress_text)
        self.signal_number, self.progress_text = signal_number, progress_text


class _SignalListener:
    """The last signal, and a description of the current batch if there is one."""

    def __init__(self) -> None:
        self.requested_signal: int | None = None
        self.requested_at = 0.0
        self.describe_batch: Callable[[], str] | None = None

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested_signal is not None and now - self.requested_at < _ECHO_SECONDS:
            return
        is_repeated, self.requested_signal, self.requested_at = self.requested_signal is not None, number, now
        if is_repeated or self.describe_batch is None:
            raise StoppedBySignal(number)
        if is_main_process():
            # Not `print`, because the signal may interrupt a write to the same stream. On a terminal the line stands
            # below the ^C and above the two lines of a progress bar.
            before, after = ("\n", "\n\n") if os.isatty(2) else ("", "\n")
            os.write(2, f"{before}stopping after {self.describe_batch()}; once more stops at once{after}".encode())


_listener: _SignalListener | None = None


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `StoppedBySignal` for the length of a `with` block.

    A signal that is ignored stays ignored. Outside of the main thread, which alone receives signals, nothing changes.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    outer_listener, _listener = _listener, _SignalListener()
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _listener.handle_signal)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _listener = outer_listener


@contextmanager
def finish_current_batch(
    batch_description: str, describe_progress: Callable[[], str], expected_seconds: float | None = None
) -> Iterator[None]:
    """Delay a signal until the end of the `with` block, which handles one batch.

    Args:
        batch_description: the batch in words, such as "4 problems".
        describe_progress: returns in words what is done. Called at the end of the block.
        expected_seconds: how long such a batch takes, if known.

    Raises:
        StoppedBySignal: at the end of the block, if a signal came within.
    """
    listener = _listener
    if listener is None:
        yield
        return
    start = time.monotonic()

    def describe_batch() -> str:
        if expected_seconds is None:
            return f"the {batch_description} in hand"
        left = format_duration(start + expected_seconds - time.monotonic())
        return f"the {batch_description} in hand, about {left} more"

    listener.describe_batch = describe_batch
    try:
        yield
    finally:
        listener.describe_batch = None
    if listener.requested_signal is not None:
        raise StoppedBySignal(listener.requested_signal, describe_progress())


def is_main_process() -> bool:
    """Return True for the first process of a launch, and for a process without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def get_current_command() -> str:
    """Return the command that started this process for a shell, including a launcher such as `accelerate launch`.

    Passwords in URLs are hidden, because the command is printed and stored with results.
    """
    if COMMAND_VARIABLE in os.environ:
        return os.environ[COMMAND_VARIABLE]
    command = list(sys.orig_argv)
    try:
        parent = psutil.Process().parent()
        parent_command = parent.cmdline() if parent else []
    except psutil.Error:  # the parent has ended or belongs to another user
        parent_command = []
    name_in_launcher = command[command.index("-m") + 1] if "-m" in command[:-1] else sys.argv[0]
    if name_in_launcher in parent_command and any("launch" in word or "torchrun" in word for word in parent_command):
        command = parent_command
    if len(command) > 1:  # leave out the interpreter that the system puts before a script of PATH
        name = Path(command[1]).name
        script = shutil.which(name)
        if script and Path(script).resolve() == Path(command[1]).resolve():
            command = [name, *command[2:]]
    return hide_userinfo(shlex.join(command))


def end_with_launcher(poll_seconds: float = 1.0) -> None:
    """End this process soon after its launcher has ended, as after `kill -9` of `accelerate launch`.

    Without its launcher a process would wait for the other processes for as long as the process group allows, and hold
    the port that the next launch needs. Rows and traces survive a kill at any moment. A process that neither
    `accelerate launch` nor torchrun started as one of several is left alone.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher_id = os.getppid()

    def watch() -> None:
        if not _has_ended(launcher_id):
            while os.getppid() == launcher_id:
                time.sleep(poll_seconds)
        print(f"process {os.getpid()} ends, because its launcher has ended", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def _has_ended(launcher_id: int) -> bool:
    """Whether the launcher had ended before this process asked for it, so that a system process is its parent."""
    try:
        command = psutil.Process(launcher_id).cmdline()
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
    return not any(name in word for word in command for name in ("python", "launch", "torch"))
