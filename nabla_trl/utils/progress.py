"""Progress of long runs on stderr: a bar on a terminal, and a line now and then elsewhere, as in a cluster's log."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from nabla_trl.utils.formatting import format_duration, format_interval, format_si, make_printable
from nabla_trl.utils.interrupts import is_main_process
from nabla_trl.utils.statistics import Interval, proportion_interval

# A line comes every ten seconds for ten minutes. Later ones come whenever the time has grown by a tenth, and at least
# every quarter of an hour. That makes some hundred lines in ten hours.
_LINE_SECONDS, _OFTEN_SECONDS, _INTERVAL_GROWTH, _MAX_INTERVAL_SECONDS = 10.0, 600.0, 1.1, 900.0
_ANNOUNCE_SECONDS, _BEAT_SECONDS = 3.0, 10.0

_UNLIMITED_WIDTH = 100_000  # columns of a pipe or a file
# Of one item: its problem, whether it is right (None = not graded), FLOPs.
ProgressItem = tuple[str, float | None, float]


_is_enabled = True


def disable_progress() -> None:
    """Show no progress of long work in this process, neither as a bar nor as lines. Messages go to `logging`."""
    global _is_enabled
    _is_enabled = False


def enable_progress() -> None:
    """Show the progress of long work again, after `disable_progress`."""
    global _is_enabled
    _is_enabled = True


class PrintableConsole(Console):
    """A console on which control characters of texts become replacement characters, and styles stay.

    It writes to the stream behind a `PrintableStream`, because its own control sequences must pass. Where it is no
    terminal, lines and tables have the length that they need, unless COLUMNS or `width` limits them.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        if not self.is_terminal and options.get("width") is None and "COLUMNS" not in os.environ:
            self.width = _UNLIMITED_WIDTH

    @property
    def file(self) -> IO[str]:
        """Return the stream that is written to."""
        file = Console.file.fget(self)
        return getattr(file, "raw_stream", file)

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        Console.file.fset(self, new_file)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            segment if segment.control else Segment(make_printable(segment.text), segment.style) for segment in buffer
        )


class Heartbeat:
    """A thread that calls a function every ten seconds, or less often if it is postponed.

    Args:
        first_seconds: until the first call.
    """

    def __init__(self, function: Callable[[], None], first_seconds: float | None = None):
        self._function = function
        self._next_seconds = _BEAT_SECONDS if first_seconds is None else first_seconds
        self._wake_up, self._is_stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> Heartbeat:
        """Start the thread."""
        self._thread.start()
        return self

    def postpone(self) -> None:
        """Begin to count the ten seconds again."""
        if threading.current_thread() is not self._thread:
            self._wake_up.set()

    def stop(self) -> None:
        """End the thread."""
        self._is_stopped = True
        self._wake_up.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped:
            is_early = self._wake_up.wait(self._next_seconds)
            self._next_seconds = _BEAT_SECONDS
            self._wake_up.clear()
            if not is_early and not self._is_stopped:
                self._function()


@contextmanager
def announce(activity: str, *, show: bool | None = None, console: Console | None = None) -> Iterator[None]:
    """Say what the block is doing, if it takes more than a moment, and that it still does, every ten seconds.

    Args:
        activity: such as "loading the policy P".
        show: False says nothing. None: only the first process of a launch says something.
    """
    if not (is_main_process() if show is None else show):
        yield
        return
    console = PrintableConsole(stderr=True) if console is None else console
    started_at, num_lines = time.monotonic(), 0

    def beat() -> None:
        nonlocal num_lines
        elapsed = f", {format_duration(time.monotonic() - started_at)} so far" if num_lines else " …"
        console.print(f"{activity}{elapsed}", markup=False, highlight=False, soft_wrap=not console.is_terminal)
        num_lines += 1

    heartbeat = Heartbeat(beat, _ANNOUNCE_SECONDS).start()
    try:
        yield
    finally:
        heartbeat.stop()


class ProgressDisplay:
    """A display that counts the items of one piece of work and shows its progress. It is a context manager.

    An item is one problem with one seed. The accuracy is a mean over problems, after averaging their seeds, with the
    interval of tables and reports. The rate and the remaining time are those of new items.

    Args:
        name: name of the work, such as a method.
        total: number of items, including those that are already done.
        num_done: number of items on disk about which nothing else is known.
        show_progress: show something. If False, items are only counted.
        trials_per_item: independent answers that the score of one item averages, such as N for samples_N.
        console: where to write. None means stderr.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        num_done: int = 0,
        show_progress: bool = True,
        trials_per_item: int = 1,
        console: Console | None = None,
    ):
        self.name, self.total, self.num_done = name, total, num_done
        self.show_progress = show_progress and _is_enabled
        self.trials_per_item = trials_per_item
        self.console = PrintableConsole(stderr=True) if console is None else console
        self.num_new = 0
        self.flops = 0.0
        self._scores_by_problem: dict[str, list[float]] = {}  # of the graded items
        self._started_at = self._last_counted_at = time.monotonic()
        self._next_line = _LINE_SECONDS
        self._live: Live | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def num_completed(self) -> int:
        """Number of items that are done, new or not."""
        return self.num_done + self.num_new

    def add_items(self, items: Iterable[ProgressItem], *, is_new: bool = True) -> None:
        """Count items.

        Args:
            is_new: the items were computed just now. False for items from disk.
        """
        items = list(items)
        for problem, is_correct, flops in items:
            self.flops += flops
            if is_correct is not None:
                self._scores_by_problem.setdefault(problem, []).append(float(is_correct))
        if not is_new:
            self.num_done += len(items)
            return
        self.num_new += len(items)
        self._last_counted_at = time.monotonic()
        elapsed = self._last_counted_at - self._started_at
        if self._live is not None:
            self._live.refresh()
        elif self.show_progress and elapsed >= self._next_line and self.num_completed < self.total:
            self.print_line()

    def print_line(self, addition: str = "") -> None:
        """Print what is known as one line, and decide when the next one may come."""
        elapsed = time.monotonic() - self._started_at
        self._print(self.format_line() + addition)
        interval = _LINE_SECONDS if elapsed < _OFTEN_SECONDS else (_INTERVAL_GROWTH - 1) * elapsed
        self._next_line = elapsed + min(_MAX_INTERVAL_SECONDS, interval)
        if self._heartbeat is not None:
            self._heartbeat.postpone()

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        if self.show_progress:
            self._print(f"warning: {text}")

    def estimate_seconds(self, num_items: int) -> float | None:
        """Return the seconds that so many items take at the measured rate. Before the first new item return None."""
        if not self.num_new:
            return None
        return (self._last_counted_at - self._started_at) / self.num_new * num_items

    def compute_rate(self) -> dict[str, float | None]:
        """Return the measured number of items per hour by its name. None before the first new item."""
        seconds = self.estimate_seconds(1)
        return {"problems_per_hour": 3600 / seconds if seconds else None}

    def estimate_seconds_left(self) -> float | None:
        """Return the remaining time in seconds. Before the first new item return None."""
        seconds = self.estimate_seconds(self.total - self.num_completed)
        return None if seconds is None else max(0.0, seconds - (time.monotonic() - self._last_counted_at))

    def compute_mean_score(self) -> float | None:
        """Return the accuracy so far without its interval. None before anything was graded."""
        means = [sum(scores) / len(scores) for scores in self._scores_by_problem.values()]
        return sum(means) / len(means) if means else None

    def format_metrics(self) -> str:
        """Return rate, accuracy and FLOPs as text, as far as they are known."""
        seconds_per_item = self.estimate_seconds(1)
        parts = [] if seconds_per_item is None else [_format_rate(seconds_per_item)]
        if self._scores_by_problem:
            parts.append(f"accuracy {format_interval(self.compute_accuracy().to_dict())}")
        return ", ".join([*parts, format_si(self.flops, "FLOPs")] if self.flops else parts)

    def compute_accuracy(self) -> Interval:
        """Return the accuracy so far with its interval.

        Raises:
            ValueError: nothing was graded yet.
        """
        num_seeds = max(map(len, self._scores_by_problem.values()), default=0)
        rows = [scores + [math.nan] * (num_seeds - len(scores)) for scores in self._scores_by_problem.values()]
        return proportion_interval(np.array(rows, dtype=np.float64), trials_per_cell=self.trials_per_item)

    def format_position(self) -> str:
        """Return the number of finished items as text."""
        return f"{self.name}: {self.num_completed} of {self.total}"

    def format_line(self) -> str:
        """Return everything that is known as one line."""
        left = self.estimate_seconds_left()
        ahead = "" if left is None or self.num_completed == self.total else f", {format_duration(left)} to go"
        return ", ".join(filter(None, [f"{self.format_position()}{ahead}", self.format_metrics()]))

    def __enter__(self) -> ProgressDisplay:
        self._started_at = self._last_counted_at = time.monotonic()
        has_bar = self.show_progress and self.console.is_terminal and not self.console.is_dumb_terminal
        if has_bar and self.num_completed < self.total:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        elif self.show_progress and self.num_completed < self.total:
            self._heartbeat = Heartbeat(self._beat).start()
        return self

    def _beat(self) -> None:
        """Print a line although nothing new is done, as during a long batch."""
        if time.monotonic() - self._started_at >= self._next_line:
            self.print_line(f", {self._format_elapsed()} so far")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self.num_new and self.show_progress and kind is None:
            self._print(f"{self.format_line()}, took {self._format_elapsed()}")

    def _render(self) -> Group:
        """Return two lines: name, bar, count and remaining time, and below them the metrics."""
        left = self.estimate_seconds_left()
        columns = Column(no_wrap=True, overflow="ellipsis"), Column(ratio=1), Column(no_wrap=True)
        grid = Table.grid(*columns, expand=True)
        count = f"  {self.num_completed}/{self.total}  {'-:--:--' if left is None else format_duration(left)} to go"
        grid.add_row(f"{self.name}  ", ProgressBar(self.total, self.num_completed), count)
        metrics = ", ".join(filter(None, [self.format_metrics(), f"{self._format_elapsed()} so far"]))
        return Group(grid, Text(f"  {metrics}", style="dim", no_wrap=True, overflow="ellipsis"))

    def _format_elapsed(self) -> str:
        return format_duration(time.monotonic() - self._started_at)

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


class StepDisplay(ProgressDisplay):
    """Progress of a training: steps, and what its log says, such as the loss. Arguments are in steps."""

    def __init__(self, name: str, total: int, **options: Any):
        super().__init__(name, total, **options)
        self.metrics: dict[str, float] = {}

    def set_step(self, step: int) -> None:
        """Note that a step is done."""
        self.add_items([("", None, 0.0)] * (step - self.num_completed))

    def format_metrics(self) -> str:
        """Return what the log says, and the time of a step."""
        seconds = self.estimate_seconds(1)
        rate = [] if seconds is None else [f"{seconds:.3g} s/step"]
        return ", ".join([*(f"{name} {value:.4g}" for name, value in self.metrics.items()), *rate])

    def format_position(self) -> str:
        """Return the number of steps as text."""
        return f"{self.name}: step {self.num_completed} of {self.total}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.num_new = 0  # the line about a finished training has more to say
        super().__exit__(kind, error, traceback)


def _format_rate(seconds_per_item: float) -> str:
    if seconds_per_item > 90:
        return f"{seconds_per_item / 60:.3g} min/problem"
    if seconds_per_item > 1:
        return f"{seconds_per_item:.3g} s/problem"
    rate = 1 / max(seconds_per_item, 1e-9)
    return f"{rate:,.0f} problems/s" if rate >= 100 else f"{rate:.3g} problems/s"


# --- figures for experiment trackers ----------------------------------------------------------------------

MetricsReceiver = Callable[[dict[str, float]], None]  # takes values by name

_receivers: list[MetricsReceiver] = []


def report_metrics(stage: str, values: Mapping[str, float | None]) -> None:
    """Hand values to all receivers under names STAGE/NAME. Nothing happens without a receiver.

    Args:
        values: those that are not known are None, and are left out.
    """
    known = {f"{stage}/{name}": float(value) for name, value in values.items() if value is not None}
    for receive in list(_receivers):
        receive(known)


@contextmanager
def receive_metrics(receiver: MetricsReceiver) -> Iterator[None]:
    """Hand the values that are reported in the `with` block to a receiver."""
    _receivers.append(receiver)
    try:
        yield
    finally:
        _receivers.remove(receiver)
