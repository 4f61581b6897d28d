"""Ctrl-C, and the SIGTERM of a cluster's scheduler: the batch in hand is finished, and how to go on is said.

`listening` is around a whole command, `in_hand` around each of its batches. A signal during a batch is noted, and
acted on when the batch is on disk; a second one, or one between batches, stops at once. Without `listening`, as in a
notebook, signals do what they always do.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A scheduler signals launcher and processes, and the launcher passes its own on: that is still the first one.
_ECHO_SECONDS = 1.0


class StoppedBySignal(KeyboardInterrupt):
    """A command was asked to stop, and has: by which signal, and what is done."""

    def __init__(self, signal_number: int, progress_text: str = ""):
        super().__init__(signal_number, progress_text)
        self.signal_number, self.progress_text = signal_number, progress_text


class _SignalListener:
    """What was asked, and whether a batch is in hand."""

    def __init__(self) -> None:
        self.requested_signal: int | None = None
        self.requested_at = 0.0
        self.describe_batch: Callable[[], str] | None = None  # of the batch in hand

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested_signal is not None and now - self.requested_at < _ECHO_SECONDS:
            return
        again, self.requested_signal, self.requested_at = self.requested_signal is not None, number, now
        if again or self.describe_batch is None:
            raise StoppedBySignal(number)
        if is_main_process():
            # Not by print: the stream may be in the middle of something. On a terminal below the ^C, and above the two
            # lines that a bar of `nabla_trl.utils.progress` takes for its own.
            before, after = ("\n", "\n\n") if os.isatty(2) else ("", "\n")
            os.write(2, f"{before}stopping after {self.describe_batch()}; once more stops at once{after}".encode())


_listener: _SignalListener | None = None


@contextmanager
def handle_stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Stopped` for the length of a `with` block; what is ignored stays ignored.

    Does nothing outside of the main thread, which alone can hear signals.
    """
    global _listener
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    outer, _listener = _listener, _SignalListener()
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _listener.handle_signal)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _listener = outer


@contextmanager
def finish_current_batch(
    batch_description: str, describe_progress: Callable[[], str], expected_seconds: float | None = None
) -> Iterator[None]:
    """Finish a batch before stopping.

    Args:
        what: the batch in words, as "4 problems".
        done: what is done, in words; asked for at the end of the batch.
        seconds: how long such a batch takes, where that is known.

    Raises:
        Stopped: at the end of the block, where it was asked for within.
    """
    listener = _listener
    if listener is None:
        yield
        return
    began = time.monotonic()

    def told() -> str:
        left = (
            ""
            if expected_seconds is None
            else f", about {format_duration(began + expected_seconds - time.monotonic())} more"
        )
        return f"the {batch_description} in hand{left}"

    listener.describe_batch = told
    try:
        yield
    finally:
        listener.describe_batch = None
    if listener.requested_signal is not None:
        raise StoppedBySignal(listener.requested_signal, describe_progress())


def format_duration(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def is_main_process() -> bool:
    """This is the first process of a launch, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def get_current_command() -> str:
    """The command that started this process, its launcher (`accelerate launch`) included, as a shell takes it."""
    own, parent = sys.orig_argv, psutil.Process().parent()
    script = sys.argv[0]
    try:
        called = parent.cmdline() if parent else []
    except psutil.Error:  # another user's, or gone
        called = []
    launched = script in called and any("launch" in word or "torchrun" in word for word in called)
    return shlex.join(_strip_interpreter(called if launched else own))


def _strip_interpreter(command: Sequence[str]) -> list[str]:
    """Without the interpreter that the system puts before a script of PATH."""
    if len(command) > 1:
        name = Path(command[1]).name
        found = shutil.which(name)
        if found and Path(found).resolve() == Path(command[1]).resolve():
            return [name, *command[2:]]
    return list(command)
