"""Show the progress of a search on a terminal, in a view that disappears at the end.

`nabla_trl.cli.console` prints the result that stays, which is the only output without a terminal.
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

MAX_RESPONSE_LINES = 14  # the last lines of the response, which contain the last change
_BAR_WIDTH = 24  # columns
_SPARKLINE_WIDTH = 24
_SPARKLINE_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class SearchSnapshot:
    """State of a search between two rounds.

    Attributes:
        rewards: of the incumbents of the best chain, beginning with its first response.
        limit_fraction: used part of the limit that ends the search, None if the search has no such limit.
        response_lines: the incumbent, wrapped, with its last change marked.
    """

    rewards: tuple[float, ...]
    num_responses: int
    num_proposals: int
    num_accepted: int
    flops: float
    limit_fraction: float | None
    response_lines: tuple[Text, ...]


class LiveView:
    """A context manager whose call with a search updates the view. Hand it to a search as `on_round`."""

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
        if search.chains:
            chains, chain = search.chains, search.select_chain()
            revisions = [revision for state in chains for revision in state.revisions]
            accepted_rewards = [revision.reward_after for revision in chain.revisions if revision.accepted]
            self.snapshot = SearchSnapshot(
                rewards=(chain.initial.reward, *accepted_rewards),
                num_responses=len(chains),
                num_proposals=len(revisions),
                num_accepted=sum(revision.accepted for revision in revisions),
                flops=search.count_flops(),
                limit_fraction=_compute_limit_fraction(search),
                response_lines=tuple(self._format_response(chain)),
            )
            self.rich_live.refresh()

    def _format_response(self, chain: SearchState) -> Sequence[Text]:
        """Return the incumbent with its last accepted revision marked, if it has one."""
        last = None
        for revision, base_ids in replay_revisions(chain.initial.response_ids, chain.revisions):
            last = (revision, base_ids) if revision.accepted else last
        if last is None:
            return self.formatter.format_text(chain.incumbent.response_ids)
        return self.formatter.format_change(*last)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot = self.snapshot
        seconds = f"{time.monotonic() - self.start_time:.0f} s"
        spinner = self.spinner.render(time.monotonic())
        mark = spinner if isinstance(spinner, Text) else Text("·")
        if snapshot is None:
            yield self._truncate_line(Text.assemble(mark, f" drawing the first response  {seconds}"))
            return
        status = f" {_format_counts(snapshot)}  {format_si(snapshot.flops, 'FLOPs')}  {seconds}"
        yield self._truncate_line(Text.assemble(mark, status))
        yield self._truncate_line(self._format_reward_line(snapshot, options.ascii_only))
        yield Text()
        num_lines = max(1, min(MAX_RESPONSE_LINES, options.max_height - 5))
        yield from snapshot.response_lines[-num_lines:]

    def _truncate_line(self, line: Text) -> Text:
        line.truncate(self.formatter.width, overflow="ellipsis")
        line.no_wrap = True
        return line

    def _format_reward_line(self, snapshot: SearchSnapshot, ascii_only: bool) -> Text:
        line = Text(format_reward_change(snapshot.rewards[0], snapshot.rewards[-1]), "bold")
        if not ascii_only:
            line.append(f"  {format_sparkline(snapshot.rewards[-_SPARKLINE_WIDTH:])}", "green")
            if snapshot.limit_fraction is not None:
                width = round(_BAR_WIDTH * snapshot.limit_fraction)
                line.append("  " + "━" * width, "cyan").append("─" * (_BAR_WIDTH - width), "dim")
        if snapshot.limit_fraction is not None:
            line.append(f" {snapshot.limit_fraction:.0%} of the limit", "dim")
        return line


def _format_counts(snapshot: SearchSnapshot) -> str:
    responses = f", {snapshot.num_responses} first responses" if snapshot.num_responses > 1 else ""
    return f"{snapshot.num_accepted} of {snapshot.num_proposals} proposals accepted{responses}"


def _compute_limit_fraction(search: Search) -> float | None:
    """Return the used part of the first limit that is set: FLOPs, rounds or rollouts."""
    config = search.config
    if config.max_flops:
        fraction = search.count_flops() / config.max_flops
    elif config.max_rounds:
        fraction = max(chain.num_rounds for chain in search.chains) / config.max_rounds
    elif config.max_rollouts:
        fraction = search.count_rollouts() / config.max_rollouts
    else:
        return None
    return min(1.0, fraction)


def format_sparkline(values: Sequence[float]) -> str:
    """Return one bar per value, scaled from the lowest to the highest. A value that is not finite becomes a gap."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(_SPARKLINE_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        _SPARKLINE_LEVELS[round((value - low) * scale)] if math.isfinite(value) else " " for value in values
    )
