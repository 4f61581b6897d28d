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

from nabla_trl.cli.console import Decode, TraceFormatter, format_reward_change
from nabla_trl.traces.schema import replay_revisions
from nabla_trl.utils.formatting import format_si

if TYPE_CHECKING:
    from nabla_trl.search.loop import Search
    from nabla_trl.search.state import SearchState

MAX_RESPONSE_LINES = 14  # of a response: what was changed last is always in it
_BAR_WIDTH, _SPARKLINE_WIDTH = 24, 24  # columns
_SPARKLINE_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class SearchSnapshot:
    """What is to be seen of a search between two rounds.

    Attributes:
        rewards: of the kept chain's incumbents, the first response's first.
        share: how much of the limit that ends the search has gone; None where no number tells.
        lines: the incumbent, wrapped, its last change marked.
    """

    rewards: tuple[float, ...]
    num_responses: int
    num_proposals: int
    num_accepted: int
    flops: float
    limit_fraction: float | None
    response_lines: tuple[Text, ...]


class LiveView:
    """Context manager; calling it with the search (as `search.solve`'s `watch` does) shows how far that has come."""

    def __init__(self, decode: Decode, console: Console):
        self.console, self.formatter = console, TraceFormatter(decode, console)
        self.start_time = time.monotonic()
        self.snapshot: SearchSnapshot | None = None
        self.spinner = Spinner("dots")
        self.rich_live = Live(self, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveView:
        self.rich_live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.rich_live.stop()

    def __call__(self, search: Search) -> None:
        for chains in search.chains_by_problem.values():  # of the one problem, unless it could not be read
            chain = search.select_chain(chains)
            made = [revision for one in chains for revision in one.revisions]
            self.snapshot = SearchSnapshot(
                rewards=(chain.initial.reward, *(one.reward_after for one in chain.revisions if one.accepted)),
                num_responses=len(chains),
                num_proposals=len(made),
                num_accepted=sum(revision.accepted for revision in made),
                flops=search.flop_counter.get_cost(chain.problem.id).flops,
                limit_fraction=_compute_limit_fraction(search, chains),
                response_lines=tuple(self._format_response(chain)),
            )
            self.rich_live.refresh()

    def _format_response(self, chain: SearchState) -> Sequence[Text]:
        """The response with its last accepted revision marked, if it has one."""
        last = None
        for revision, base in replay_revisions(chain.initial.response_ids, chain.revisions):
            last = (revision, base) if revision.accepted else last
        return (
            self.formatter.format_change(*last) if last else self.formatter.format_text(chain.incumbent.response_ids)
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = self.snapshot
        seconds = f"{time.monotonic() - self.start_time:.0f} s"
        spinner = self.spinner.render(time.monotonic())
        mark = spinner if isinstance(spinner, Text) else Text("·")
        if now is None:
            yield self._truncate_line(Text.assemble(mark, f" drawing the first response  {seconds}"))
            return
        yield self._truncate_line(
            Text.assemble(mark, f" {_format_counts(now)}  {format_si(now.flops, 'FLOPs')}  {seconds}")
        )
        yield self._truncate_line(self._format_reward_line(now, options.ascii_only))
        yield Text()
        most = max(1, min(MAX_RESPONSE_LINES, options.max_height - 5))
        yield from now.response_lines[-most:]

    def _truncate_line(self, line: Text) -> Text:
        line.truncate(self.formatter.width, overflow="ellipsis")
        line.no_wrap = True
        return line

    def _format_reward_line(self, snapshot: SearchSnapshot, ascii_only: bool) -> Text:
        line = Text(format_reward_change(snapshot.rewards[0], snapshot.rewards[-1]), "bold")
        if not ascii_only:
            line.append(f"  {format_sparkline(snapshot.rewards[-_SPARKLINE_WIDTH:])}", "green")
            if snapshot.limit_fraction is not None:
                full = round(_BAR_WIDTH * snapshot.limit_fraction)
                line.append("  " + "━" * full, "cyan").append("─" * (_BAR_WIDTH - full), "dim")
        if snapshot.limit_fraction is not None:
            line.append(f" {snapshot.limit_fraction:.0%} of the limit", "dim")
        return line


def _format_counts(snapshot: SearchSnapshot) -> str:
    responses = f", {snapshot.num_responses} first responses" if snapshot.num_responses > 1 else ""
    return f"{snapshot.num_accepted} of {snapshot.num_proposals} proposals accepted{responses}"


def _compute_limit_fraction(search: Search, chains: list[SearchState]) -> float | None:
    """Of the first limit that is set: FLOPs, rounds, rollouts."""
    config = search.config
    if config.max_flops:
        gone = search.flop_counter.get_cost(chains[0].problem.id).flops / config.max_flops
    elif config.max_rounds:
        gone = max(chain.num_rounds for chain in chains) / config.max_rounds
    elif config.max_rollouts:
        gone = search.count_rollouts(chains[0].problem) / config.max_rollouts
    else:
        return None
    return min(1.0, gone)


def format_sparkline(values: Sequence[float]) -> str:
    """One bar per value, from the lowest to the highest; a value that is not finite leaves a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    top = len(_SPARKLINE_LEVELS) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(
        _SPARKLINE_LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values
    )
