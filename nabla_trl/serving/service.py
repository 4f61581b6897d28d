"""Requests of many threads, solved together: a queue, and one thread that searches for all that it can at once.

Requests of one configuration go into one batch of the search, in the order they came. What a request gets does not
depend on its batch: its seed is part of its problem's id, which names the random numbers of every draw, so that one
seed of the search serves all seeds of requests. Nothing here knows HTTP (`nabla_trl.serving.asgi` does).

A request is a `concurrent.futures.Future`. Cancelling it drops it from the queue or ends its search at the next round.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Condition, Thread

from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.loop import Search
from nabla_trl.search.reasoner import as_problem
from nabla_trl.search.state import Chain
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.formatting import one_line

SEED = 0  # of every search: a request's own is in its problem's id

log = logging.getLogger(__name__)


class Failed(RuntimeError):
    """The search of a request failed, by no fault of the request."""


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class Stopping(RuntimeError):
    """The engine takes and begins nothing any more."""


@dataclass(frozen=True)
class Progress:
    """An incumbent that a search has come to: the first of a chain, or the one after an accepted revision.

    Attributes:
        chain: which of the problem's chains.
        round: of the revision; None for a first response. So are `position` and `reward_before`.
        text: the incumbent, whole.
        flops: spent on the problem until then.
    """

    chain: int
    round: int | None
    position: int | None
    reward_before: float | None
    reward: float
    flops: float
    text: str


Watch = Callable[[Progress], None]


def request_problem(messages: list[dict[str, str]], seed: int) -> Problem:
    """A chat under a seed. `search.solve` of it with seed `SEED` gives the answer that the service gives.

    Raises:
        ValueError: no chat (see `as_problem`).
    """
    digest = hashlib.sha256(json.dumps([seed, messages], sort_keys=True).encode()).hexdigest()[:16]
    return replace(as_problem(messages), id=f"request/{digest}")


@dataclass(frozen=True, eq=False)
class Ticket:
    """One request. `watch` is called from the engine's thread, and must neither block nor raise."""

    problem: Problem
    config: ReasonerConfig
    watch: Watch | None
    future: Future[Trace] = field(default_factory=Future)

    def settle(self, end: Trace | Exception) -> None:
        """Hand over how it ended, unless it was cancelled or has been told."""
        with suppress(InvalidStateError):
            if isinstance(end, Trace):
                self.future.set_result(end)
            else:
                self.future.set_exception(end)


# The requests that search for each problem: equal ones, of equal seed, share one search.
Batch = dict[str, list[Ticket]]


class Engine:
    """One search at a time, in a thread of its own.

    Args:
        queue: most requests that may wait.
        window: seconds that a request waits for others to be searched for with it, where there is room in its batch.
    """

    def __init__(self, policy: Policy, reward: Reward, *, queue: int = 1000, window: float = 0.01):
        self.policy, self.reward, self.queue, self.window = policy, reward, queue, window
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._work, name="nabla_trl engine", daemon=True)
        self._thread.start()

    def submit(self, problem: Problem, config: ReasonerConfig, watch: Watch | None = None) -> Future[Trace]:
        """Queue a request; its future gives a trace without an error, or raises.

        Args:
            problem: of `request_problem`: requests of one id and configuration are answered as one.

        Raises:
            QueueFull, Stopping: it was not taken. From the future: PromptTooLong, ValueError (the request cannot be
            run), Failed (it should have been), Stopping (it was waiting when the engine was told to stop).
        """
        ticket = Ticket(problem, config, watch)
        with self._changed:
            if self._stopped:
                raise Stopping("the server is shutting down")
            self._waiting = _live(self._waiting)
            if len(self._waiting) >= self.queue:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already: try again later")
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket.future

    def load(self) -> tuple[int, int]:
        """How many requests wait and how many are searched for."""
        with self._changed:
            return len(_live(self._waiting)), len(_live(self._running))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    def stop(self) -> None:
        """Refuse what waits and what comes; what is searched for goes on."""
        with self._changed:
            self._stopped = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for ticket in waiting:
            ticket.settle(Stopping("the server is shutting down"))

    def join(self) -> None:
        """Wait for the end of the thread, once stopped."""
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            readable = {key: tickets for key, tickets in batch.items() if self._readable(tickets)}
            if readable:
                self._solve(readable)

    def _next(self) -> Batch | None:
        """The next batch, taken from the queue (empty: all of it was cancelled); None once stopped."""
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._stopped or self._waiting)
            deadline = time.monotonic() + self.window
            while not self._stopped and not self._full() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._stopped:
                return None
            batch = self._together()
            self._running = [ticket for tickets in batch.values() for ticket in tickets]
            self._waiting = [ticket for ticket in self._waiting if ticket not in self._running]
            return batch

    def _full(self) -> bool:
        batch = self._together()
        return bool(batch) and len(batch) >= self._waiting[0].config.batch_size

    def _together(self) -> Batch:
        """The oldest request and all that can be searched for with it."""
        self._waiting = _live(self._waiting)
        batch: Batch = {}
        for ticket in self._waiting:
            config, key = self._waiting[0].config, ticket.problem.id
            if ticket.config == config and (key in batch or len(batch) < config.batch_size):
                batch.setdefault(key, []).append(ticket)
        return batch

    def _readable(self, tickets: list[Ticket]) -> bool:
        """Whether policy and reward can read the problem; if not, its requests are told."""
        problem = tickets[0].problem
        try:
            self.reward.room(problem, self.policy.encode(problem))
        except ValueError as error:
            _settle(tickets, error)
        except Exception as error:
            log.exception("a prompt could not be read")
            _settle(tickets, Failed(one_line(error)))
        else:
            return True
        return False

    def _solve(self, batch: Batch) -> None:
        """Search for a batch. Where that breaks, each problem that has no answer yet is searched for alone."""
        first = next(iter(batch.values()))[0]
        try:
            search = WatchedSearch(self.policy, self.reward, first.config, batch)
            for trace in search.run([tickets[0].problem for tickets in batch.values()]):
                search.deliver(trace)
        except Exception as error:
            log.exception("a search of %d requests broke", len(batch))
            # A server that draws has been asked again and again: it would fail each of them as slowly.
            if len(batch) == 1 or isinstance(error, ConnectionError):
                for tickets in batch.values():
                    _settle(tickets, Failed(one_line(error)))
                return
            for key, tickets in batch.items():
                if _live(tickets):
                    self._solve({key: tickets})


class WatchedSearch(Search):
    """A search that tells of its progress, hands over each trace once it is made, and ends what nobody waits for."""

    def __init__(self, policy: Policy, reward: Reward, config: ReasonerConfig, batch: Batch):
        super().__init__(policy, reward, config, SEED)
        self.batch = batch
        self.told: dict[tuple[str, int], int] = {}  # revisions that were looked at, by problem and chain

    def active(self) -> list[Chain]:
        """As in every search; it is asked before each round, and once all have ended."""
        for key, chains in self.walks.items():
            if not _live(self.batch[key]):
                for chain in chains:
                    chain.stop = "cancelled"
        going = super().active()
        for key, chains in self.walks.items():
            for chain in chains:
                self.tell(self.batch[key], chain)
        for key in self.walks.keys() - {chain.problem.id for chain in going}:
            if _live(self.batch[key]):
                self.deliver(self.trace(self.walks[key]))
        return going

    def tell(self, tickets: list[Ticket], chain: Chain) -> None:
        """What is new in a chain, which accepts one revision per round at most."""
        watching = [ticket.watch for ticket in _live(tickets) if ticket.watch]
        begun = self.told.get((chain.problem.id, chain.index))
        accepted = [one for one in chain.revisions[begun or 0 :] if one.accepted]
        self.told[chain.problem.id, chain.index] = len(chain.revisions)
        if not watching or not (begun is None or accepted):
            return
        made = accepted[-1] if accepted else None
        progress = Progress(
            chain=chain.index,
            round=made.round if made else None,
            position=made.position if made else None,
            reward_before=made.reward_before if made else None,
            reward=chain.state.reward,
            flops=made.flops if made else self.meter.cost(chain.problem.id).flops,
            text=self.policy.decode(chain.state.response),
        )
        for watch in watching:
            watch(progress)

    def deliver(self, trace: Trace) -> None:
        _settle(self.batch[trace.problem_id], trace if trace.error is None else Failed(trace.error))


def _live(tickets: Sequence[Ticket]) -> list[Ticket]:
    """Those that somebody waits for."""
    return [ticket for ticket in tickets if not ticket.future.done()]


def _settle(tickets: Sequence[Ticket], end: Trace | Exception) -> None:
    for ticket in tickets:
        ticket.settle(end)
