"""How far a long run is: a bar on a terminal; elsewhere, as in a cluster's log, a line now and then. On stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from nabla_trl.utils.formatting import format_si
from nabla_trl.utils.interrupts import format_duration
from nabla_trl.utils.statistics import wilson_interval

# A line after half a minute, then each time a quarter more has gone by, at most a quarter of an hour apart: some
# sixty in ten hours.
_FIRST_LINE_SECONDS, _INTERVAL_GROWTH, _MAX_INTERVAL_SECONDS = 30.0, 1.25, 900.0

# Of one item: its problem, whether it is right (None = not graded), FLOPs.
ProgressItem = tuple[str, float | None, float]


class ProgressDisplay:
    """Counts the items of one piece of work and shows how far it is; a context manager.

    An item is one problem with one seed. Accuracy so far is over all that were counted, seeds averaged first, with
    Wilson's interval over problems, which is rather too wide where there are several seeds; the rate, and the time to
    go that follows from it, are of the items made here.

    Args:
        name: of the work, as a method's.
        total: items, those that are there already included.
        there: items on disk that are not counted: nothing more is known of them.
        shown: False counts only.
        console: where to; None = stderr.
    """

    def __init__(
        self, name: str, total: int, *, num_done: int = 0, show_progress: bool = True, console: Console | None = None
    ):
        self.name, self.total, self.num_done, self.show_progress = name, total, num_done, show_progress
        self.console = Console(stderr=True) if console is None else console
        self.num_new = 0
        self.flops = 0.0
        self._counts_by_problem: dict[str, tuple[float, int]] = {}  # right and graded items, by problem
        self._accuracy_sum = 0.0  # sum over problems of the share that is right
        self._started_at = self._last_counted_at = time.monotonic()
        self._next_line = _FIRST_LINE_SECONDS
        self._live: Live | None = None

    @property
    def num_completed(self) -> int:
        return self.num_done + self.num_new

    def add_items(self, items: Iterable[ProgressItem], *, is_new: bool = True) -> None:
        """Take items; `made`: just now, not found on disk."""
        items = list(items)
        for problem, correct, flops in items:
            self.flops += flops
            if correct is not None:
                right, graded = self._counts_by_problem.get(problem, (0, 0))
                self._counts_by_problem[problem] = right + correct, graded + 1
                self._accuracy_sum += (right + correct) / (graded + 1) - (right / graded if graded else 0.0)
        if not is_new:
            self.num_done += len(items)
            return
        self.num_new += len(items)
        self._last_counted_at = time.monotonic()
        if self._live is not None:
            self._live.refresh()
        elif self.show_progress and self.get_elapsed_seconds() >= self._next_line and self.num_completed < self.total:
            self._print(self.format_line())
            self._next_line = self.get_elapsed_seconds() + min(
                _MAX_INTERVAL_SECONDS, max(_FIRST_LINE_SECONDS, (_INTERVAL_GROWTH - 1) * self.get_elapsed_seconds())
            )

    def get_elapsed_seconds(self) -> float:
        return time.monotonic() - self._started_at

    def estimate_seconds_per_item(self) -> float | None:
        """Seconds for an item, as measured so far; None before the first."""
        return (self._last_counted_at - self._started_at) / self.num_new if self.num_new else None

    def estimate_seconds(self, num_items: int) -> float | None:
        each = self.estimate_seconds_per_item()
        return None if each is None else each * num_items

    def estimate_seconds_left(self) -> float | None:
        """Seconds to go; None before the first item."""
        each = self.estimate_seconds_per_item()
        if each is None:
            return None
        return max(0.0, each * (self.total - self.num_completed) - (time.monotonic() - self._last_counted_at))

    def format_metrics(self) -> str:
        """Rate, accuracy and FLOPs, as far as there are any."""
        each = self.estimate_seconds_per_item()
        found = [] if each is None else [_format_rate(each)]
        if self._counts_by_problem:
            mean = self._accuracy_sum / len(self._counts_by_problem)
            low, high = wilson_interval(mean, len(self._counts_by_problem))
            found.append(f"accuracy {mean:.3f} [{low:.3f}, {high:.3f}]")
        return ", ".join([*found, format_si(self.flops, "FLOPs")] if self.flops else found)

    def format_position(self) -> str:
        return f"{self.name}: {self.num_completed} of {self.total}"

    def format_line(self) -> str:
        left = self.estimate_seconds_left()
        ahead = "" if left is None or self.num_completed == self.total else f", {format_duration(left)} to go"
        return ", ".join(filter(None, [f"{self.format_position()}{ahead}", self.format_metrics()]))

    def __enter__(self) -> ProgressDisplay:
        self._started_at = self._last_counted_at = time.monotonic()
        if (
            self.show_progress
            and self.console.is_terminal
            and not self.console.is_dumb_terminal
            and self.num_completed < self.total
        ):
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self.num_new and self.show_progress and kind is None:
            self._print(f"{self.format_line()}, took {format_duration(self.get_elapsed_seconds())}")

    def _render(self) -> Group:
        """Two lines: name, bar, count and time to go; below them the figures."""
        left = self.estimate_seconds_left()
        columns = Column(no_wrap=True, overflow="ellipsis"), Column(ratio=1), Column(no_wrap=True)
        grid = Table.grid(*columns, expand=True)
        at = f"  {self.num_completed}/{self.total}  {'-:--:--' if left is None else format_duration(left)} to go"
        grid.add_row(f"{self.name}  ", ProgressBar(self.total, self.num_completed), at)
        figures = ", ".join(
            filter(None, [self.format_metrics(), f"{format_duration(self.get_elapsed_seconds())} so far"])
        )
        return Group(grid, Text(f"  {figures}", style="dim", no_wrap=True, overflow="ellipsis"))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


def _format_rate(each: float) -> str:
    if each > 90:
        return f"{each / 60:.3g} min/problem"
    if each > 1:
        return f"{each:.3g} s/problem"
    rate = 1 / max(each, 1e-9)
    return f"{rate:,.0f} problems/s" if rate >= 100 else f"{rate:.3g} problems/s"
