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

from nabla_trl.utils.formatting import si
from nabla_trl.utils.interrupts import clock
from nabla_trl.utils.statistics import wilson

# A line after half a minute, then each time a quarter more has gone by, at most a quarter of an hour apart: some
# sixty in ten hours.
_FIRST, _GROWTH, _LONGEST = 30.0, 1.25, 900.0

# Of one item: its problem, whether it is right (None = not graded), FLOPs.
Item = tuple[str, bool | None, float]


class Progress:
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

    def __init__(self, name: str, total: int, *, there: int = 0, shown: bool = True, console: Console | None = None):
        self.name, self.total, self.there, self.shown = name, total, there, shown
        self.console = Console(stderr=True) if console is None else console
        self.made = 0
        self.flops = 0.0
        self._scores: dict[str, tuple[int, int]] = {}  # right and graded items, by problem
        self._right = 0.0  # sum over problems of the share that is right
        self._began = self._counted = time.monotonic()
        self._next_line = _FIRST
        self._live: Live | None = None

    @property
    def done(self) -> int:
        return self.there + self.made

    def count(self, items: Iterable[Item], *, made: bool = True) -> None:
        """Take items; `made`: just now, not found on disk."""
        items = list(items)
        for problem, correct, flops in items:
            self.flops += flops
            if correct is not None:
                right, graded = self._scores.get(problem, (0, 0))
                self._scores[problem] = right + correct, graded + 1
                self._right += (right + correct) / (graded + 1) - (right / graded if graded else 0.0)
        if not made:
            self.there += len(items)
            return
        self.made += len(items)
        self._counted = time.monotonic()
        if self._live is not None:
            self._live.refresh()
        elif self.shown and self.elapsed() >= self._next_line and self.done < self.total:
            self._print(self.line())
            self._next_line = self.elapsed() + min(_LONGEST, max(_FIRST, (_GROWTH - 1) * self.elapsed()))

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def seconds_each(self) -> float | None:
        """Seconds for an item, as measured so far; None before the first."""
        return (self._counted - self._began) / self.made if self.made else None

    def seconds_for(self, items: int) -> float | None:
        each = self.seconds_each()
        return None if each is None else each * items

    def left(self) -> float | None:
        """Seconds to go; None before the first item."""
        each = self.seconds_each()
        if each is None:
            return None
        return max(0.0, each * (self.total - self.done) - (time.monotonic() - self._counted))

    def figures(self) -> str:
        """Rate, accuracy and FLOPs, as far as there are any."""
        each = self.seconds_each()
        found = [] if each is None else [_rate(each)]
        if self._scores:
            mean = self._right / len(self._scores)
            low, high = wilson(mean, len(self._scores))
            found.append(f"accuracy {mean:.3f} [{low:.3f}, {high:.3f}]")
        return ", ".join([*found, si(self.flops, "FLOPs")] if self.flops else found)

    def position(self) -> str:
        return f"{self.name}: {self.done} of {self.total}"

    def line(self) -> str:
        left = self.left()
        ahead = "" if left is None or self.done == self.total else f", {clock(left)} to go"
        return ", ".join(filter(None, [f"{self.position()}{ahead}", self.figures()]))

    def __enter__(self) -> Progress:
        self._began = self._counted = time.monotonic()
        if self.shown and self.console.is_terminal and not self.console.is_dumb_terminal and self.done < self.total:
            self._live = Live(get_renderable=self._frame, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self.made and self.shown and kind is None:
            self._print(f"{self.line()}, took {clock(self.elapsed())}")

    def _frame(self) -> Group:
        """Two lines: name, bar, count and time to go; below them the figures."""
        left = self.left()
        columns = Column(no_wrap=True, overflow="ellipsis"), Column(ratio=1), Column(no_wrap=True)
        grid = Table.grid(*columns, expand=True)
        at = f"  {self.done}/{self.total}  {'-:--:--' if left is None else clock(left)} to go"
        grid.add_row(f"{self.name}  ", ProgressBar(self.total, self.done), at)
        figures = ", ".join(filter(None, [self.figures(), f"{clock(self.elapsed())} so far"]))
        return Group(grid, Text(f"  {figures}", style="dim", no_wrap=True, overflow="ellipsis"))

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)


def _rate(each: float) -> str:
    if each > 90:
        return f"{each / 60:.3g} min/problem"
    if each > 1:
        return f"{each:.3g} s/problem"
    rate = 1 / max(each, 1e-9)
    return f"{rate:,.0f} problems/s" if rate >= 100 else f"{rate:.3g} problems/s"
