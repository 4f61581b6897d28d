"""A search of one problem, shown on a terminal while it goes on: one place, drawn anew, of which nothing stays.

`nabla_trl.cli.console` writes the account that does stay, and the only one where there is no terminal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from nabla_trl.cli.console import Decode, View, gain
from nabla_trl.traces.schema import bases
from nabla_trl.utils.formatting import si

if TYPE_CHECKING:
    from nabla_trl.search.loop import Search
    from nabla_trl.search.state import Chain

MOST_LINES = 14  # of a response: what was changed last is always in it
_BAR, _SPARK = 24, 24  # columns
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Snapshot:
    """What is to be seen of a search between two rounds.

    Attributes:
        rewards: of the kept chain's incumbents, the first response's first.
        share: how much of the limit that ends the search has gone; None where no number tells.
        lines: the incumbent, wrapped, its last change marked.
    """

    rewards: tuple[float, ...]
    responses: int
    proposed: int
    accepted: int
    flops: float
    share: float | None
    lines: tuple[Text, ...]


class LiveView:
    """Context manager; calling it with the search (as `search.solve`'s `watch` does) shows how far that has come."""

    def __init__(self, decode: Decode, console: Console):
        self.console, self.view = console, View(decode, console)
        self.began = time.monotonic()
        self.snapshot: Snapshot | None = None
        self.spinner = Spinner("dots")
        self.live = Live(self, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveView:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def __call__(self, search: Search) -> None:
        for chains in search.walks.values():  # of the one problem, unless it could not be read
            chain = search.kept(chains)
            made = [revision for one in chains for revision in one.revisions]
            self.snapshot = Snapshot(
                rewards=(chain.initial.reward, *(one.reward_after for one in chain.revisions if one.accepted)),
                responses=len(chains),
                proposed=len(made),
                accepted=sum(revision.accepted for revision in made),
                flops=search.meter.cost(chain.problem.id).flops,
                share=_share(search, chains),
                lines=tuple(self._lines(chain)),
            )
            self.live.refresh()

    def _lines(self, chain: Chain) -> Sequence[Text]:
        """The response with its last accepted revision marked, if it has one."""
        last = None
        for revision, base in bases(chain.initial.response, chain.revisions):
            last = (revision, base) if revision.accepted else last
        return self.view.change(*last) if last else self.view.whole(chain.state.response)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = self.snapshot
        seconds = f"{time.monotonic() - self.began:.0f} s"
        spinner = self.spinner.render(time.monotonic())
        mark = spinner if isinstance(spinner, Text) else Text("·")
        if now is None:
            yield self._fit(Text.assemble(mark, f" drawing the first response  {seconds}"))
            return
        yield self._fit(Text.assemble(mark, f" {_counts(now)}  {si(now.flops, 'FLOPs')}  {seconds}"))
        yield self._fit(self._curve(now, options.ascii_only))
        yield Text()
        most = max(1, min(MOST_LINES, options.max_height - 5))
        yield from now.lines[-most:]

    def _fit(self, line: Text) -> Text:
        line.truncate(self.view.width, overflow="ellipsis")
        line.no_wrap = True
        return line

    def _curve(self, now: Snapshot, plain: bool) -> Text:
        line = Text(gain(now.rewards[0], now.rewards[-1]), "bold")
        if not plain:
            line.append(f"  {sparkline(now.rewards[-_SPARK:])}", "green")
            if now.share is not None:
                full = round(_BAR * now.share)
                line.append("  " + "━" * full, "cyan").append("─" * (_BAR - full), "dim")
        if now.share is not None:
            line.append(f" {now.share:.0%} of the limit", "dim")
        return line


def _counts(now: Snapshot) -> str:
    responses = f", {now.responses} first responses" if now.responses > 1 else ""
    return f"{now.accepted} of {now.proposed} proposals accepted{responses}"


def _share(search: Search, chains: list[Chain]) -> float | None:
    """Of the first limit that is set: FLOPs, rounds, rollouts."""
    config = search.config
    if config.flops:
        gone = search.meter.cost(chains[0].problem.id).flops / config.flops
    elif config.rounds:
        gone = max(chain.rounds for chain in chains) / config.rounds
    elif config.rollouts:
        gone = search.rollouts(chains[0].problem) / config.rollouts
    else:
        return None
    return min(1.0, gone)


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, from the lowest to the highest; a value that is not finite leaves a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    top = len(_LEVELS) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values)
