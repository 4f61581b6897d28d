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
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search
from nabla_trl.search.reasoner import as_problem
from nabla_trl.search.state import SearchState
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.formatting import format_error

SEARCH_SEED = 0  # of every search: a request's own is in its problem's id

log = logging.getLogger(__name__)


class SearchFailed(RuntimeError):
    """The search of a request failed, by no fault of the request."""


class QueueFull(RuntimeError):
    """As many requests wait as may."""


class ServerStopping(RuntimeError):
    """The engine takes and begins nothing any more."""


@dataclass(frozen=True)
class SearchProgress:
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


ProgressCallback = Callable[[SearchProgress], None]


def make_request_problem(messages: list[dict[str, str]], seed: int) -> Problem:
    """A chat under a seed. `search.solve` of it with seed `SEED` gives the answer that the service gives.

    Raises:
        ValueError: no chat (see `as_problem`).
    """
    digest = hashlib.sha256(json.dumps([seed, messages], sort_keys=True).encode()).hexdigest()[:16]
    return replace(as_problem(messages), id=f"request/{digest}")


@dataclass(frozen=True, eq=False)
class PendingRequest:
    """One request. `watch` is called from the engine's thread, and must neither block nor raise."""

    problem: Problem
    config: SearchConfig
    on_progress: ProgressCallback | None
    future: Future[Trace] = field(default_factory=Future)

    def set_outcome(self, outcome: Trace | Exception) -> None:
        """Hand over how it ended, unless it was cancelled or has been told."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Trace):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)


# The requests that search for each problem: equal ones, of equal seed, share one search.
RequestBatch = dict[str, list[PendingRequest]]


class Engine:
    """One search at a time, in a thread of its own.

    Args:
        queue: most requests that may wait.
        window: seconds that a request waits for others to be searched for with it, where there is room in its batch.
    """

    def __init__(self, policy: Policy, reward: Reward, *, max_queue: int = 1000, batch_window: float = 0.01):
        self.policy, self.reward, self.max_queue, self.batch_window = policy, reward, max_queue, batch_window
        self._waiting_requests: list[PendingRequest] = []
        self._running_requests: list[PendingRequest] = []
        self._stopped = False
        self._condition = Condition()
        self._thread = Thread(target=self._serve_batches, name="nabla_trl engine", daemon=True)
        self._thread.start()

    def submit_request(
        self, problem: Problem, config: SearchConfig, on_progress: ProgressCallback | None = None
    ) -> Future[Trace]:
        """Queue a request; its future gives a trace without an error, or raises.

        Args:
            problem: of `request_problem`: requests of one id and configuration are answered as one.

        Raises:
            QueueFull, Stopping: it was not taken. From the future: PromptTooLong, ValueError (the request cannot be
            run), Failed (it should have been), Stopping (it was waiting when the engine was told to stop).
        """
        ticket = PendingRequest(problem, config, on_progress)
        with self._condition:
            if self._stopped:
                raise ServerStopping("the server is shutting down")
            self._waiting_requests = _select_unfinished(self._waiting_requests)
            if len(self._waiting_requests) >= self.max_queue:
                raise QueueFull(f"{len(self._waiting_requests)} requests are waiting already: try again later")
            self._waiting_requests.append(ticket)
            self._condition.notify_all()
        return ticket.future

    def count_requests(self) -> tuple[int, int]:
        """How many requests wait and how many are searched for."""
        with self._condition:
            return len(_select_unfinished(self._waiting_requests)), len(_select_unfinished(self._running_requests))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    def stop(self) -> None:
        """Refuse what waits and what comes; what is searched for goes on."""
        with self._condition:
            self._stopped = True
            waiting, self._waiting_requests = self._waiting_requests, []
            self._condition.notify_all()
        for ticket in waiting:
            ticket.set_outcome(ServerStopping("the server is shutting down"))

    def join(self) -> None:
        """Wait for the end of the thread, once stopped."""
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------

    def _serve_batches(self) -> None:
        while (batch := self._take_next_batch()) is not None:
            readable = {key: tickets for key, tickets in batch.items() if self._is_encodable(tickets)}
            if readable:
                self._solve_batch(readable)

    def _take_next_batch(self) -> RequestBatch | None:
        """The next batch, taken from the queue (empty: all of it was cancelled); None once stopped."""
        with self._condition:
            self._running_requests = []
            self._condition.wait_for(lambda: self._stopped or self._waiting_requests)
            deadline = time.monotonic() + self.batch_window
            while not self._stopped and not self._is_batch_full() and (left := deadline - time.monotonic()) > 0:
                self._condition.wait(left)
            if self._stopped:
                return None
            batch = self._collect_compatible_requests()
            self._running_requests = [ticket for tickets in batch.values() for ticket in tickets]
            self._waiting_requests = [
                ticket for ticket in self._waiting_requests if ticket not in self._running_requests
            ]
            return batch

    def _is_batch_full(self) -> bool:
        batch = self._collect_compatible_requests()
        return bool(batch) and len(batch) >= self._waiting_requests[0].config.batch_size

    def _collect_compatible_requests(self) -> RequestBatch:
        """The oldest request and all that can be searched for with it."""
        self._waiting_requests = _select_unfinished(self._waiting_requests)
        batch: RequestBatch = {}
        for ticket in self._waiting_requests:
            config, key = self._waiting_requests[0].config, ticket.problem.id
            if ticket.config == config and (key in batch or len(batch) < config.batch_size):
                batch.setdefault(key, []).append(ticket)
        return batch

    def _is_encodable(self, requests: list[PendingRequest]) -> bool:
        """Whether policy and reward can read the problem; if not, its requests are told."""
        problem = requests[0].problem
        try:
            self.reward.compute_max_new_tokens(problem, self.policy.encode(problem))
        except ValueError as error:
            _set_outcomes(requests, error)
        except Exception as error:
            log.exception("a prompt could not be read")
            _set_outcomes(requests, SearchFailed(format_error(error)))
        else:
            return True
        return False

    def _solve_batch(self, batch: RequestBatch) -> None:
        """Search for a batch. Where that breaks, each problem that has no answer yet is searched for alone."""
        first = next(iter(batch.values()))[0]
        try:
            search = StreamingSearch(self.policy, self.reward, first.config, batch)
            for trace in search.refine_batch([tickets[0].problem for tickets in batch.values()]):
                search.deliver_trace(trace)
        except Exception as error:
            log.exception("a search of %d requests broke", len(batch))
            # A server that draws has been asked again and again: it would fail each of them as slowly.
            if len(batch) == 1 or isinstance(error, ConnectionError):
                for tickets in batch.values():
                    _set_outcomes(tickets, SearchFailed(format_error(error)))
                return
            for key, tickets in batch.items():
                if _select_unfinished(tickets):
                    self._solve_batch({key: tickets})


class StreamingSearch(Search):
    """A search that tells of its progress, hands over each trace once it is made, and ends what nobody waits for."""

    def __init__(self, policy: Policy, reward: Reward, config: SearchConfig, batch: RequestBatch):
        super().__init__(policy, reward, config, SEARCH_SEED)
        self.batch = batch
        self.num_reported_revisions: dict[
            tuple[str, int], int
        ] = {}  # revisions that were looked at, by problem and chain

    def update_active_chains(self) -> list[SearchState]:
        """As in every search; it is asked before each round, and once all have ended."""
        for key, chains in self.chains_by_problem.items():
            if not _select_unfinished(self.batch[key]):
                for chain in chains:
                    chain.stop_reason = "cancelled"
        going = super().update_active_chains()
        for key, chains in self.chains_by_problem.items():
            for chain in chains:
                self.report_progress(self.batch[key], chain)
        for key in self.chains_by_problem.keys() - {chain.problem.id for chain in going}:
            if _select_unfinished(self.batch[key]):
                self.deliver_trace(self.build_trace(self.chains_by_problem[key]))
        return going

    def report_progress(self, requests: list[PendingRequest], chain: SearchState) -> None:
        """What is new in a chain, which accepts one revision per round at most."""
        watching = [ticket.on_progress for ticket in _select_unfinished(requests) if ticket.on_progress]
        begun = self.num_reported_revisions.get((chain.problem.id, chain.index))
        accepted = [one for one in chain.revisions[begun or 0 :] if one.accepted]
        self.num_reported_revisions[chain.problem.id, chain.index] = len(chain.revisions)
        if not watching or not (begun is None or accepted):
            return
        made = accepted[-1] if accepted else None
        progress = SearchProgress(
            chain=chain.index,
            round=made.round if made else None,
            position=made.position if made else None,
            reward_before=made.reward_before if made else None,
            reward=chain.incumbent.reward,
            flops=made.cumulative_flops if made else self.flop_counter.get_cost(chain.problem.id).flops,
            text=self.policy.decode(chain.incumbent.response_ids),
        )
        for watch in watching:
            watch(progress)

    def deliver_trace(self, trace: Trace) -> None:
        _set_outcomes(self.batch[trace.problem_id], trace if trace.error is None else SearchFailed(trace.error))


def _select_unfinished(requests: Sequence[PendingRequest]) -> list[PendingRequest]:
    """Those that somebody waits for."""
    return [ticket for ticket in requests if not ticket.future.done()]


def _set_outcomes(requests: Sequence[PendingRequest], outcome: Trace | Exception) -> None:
    for ticket in requests:
        ticket.set_outcome(outcome)
