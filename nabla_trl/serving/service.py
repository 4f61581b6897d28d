"""Search for the requests of many threads at once: one engine, driven by one thread.

A request joins the running searches as soon as there is a place, whatever its options are, and leaves when its own
search has ended. Its result does not depend on the others. Its seed is part of the id of its problem, and this id
selects the random numbers of every draw, so one seed of the search serves requests of all seeds. HTTP is in
`nabla_trl.serving.asgi`.

The caller of a request holds a `concurrent.futures.Future`. Cancelling the future removes the request from the queue,
or ends its search.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Condition, Thread

from nabla_trl.engine.engine import Engine
from nabla_trl.engine.scheduler import Task
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import PromptTooLong
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search
from nabla_trl.search.reasoner import as_problem
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import hash_json

SEARCH_SEED = 0  # the seed of every search, because a request's own seed is in the id of its problem

log = logging.getLogger(__name__)


class SearchFailed(RuntimeError):
    """The search of a valid request failed."""


class QueueFull(RuntimeError):
    """The queue holds the maximum number of requests."""


class ServerStopping(RuntimeError):
    """The service is shutting down and starts no further search."""


@dataclass(frozen=True)
class SearchProgress:
    """A new incumbent of a search: the first response of a chain, or the response after an accepted revision.

    Attributes:
        chain: index of the chain among the chains of the problem.
        round: round of the revision, None for a first response. The same holds for `position` and `reward_before`.
        flops: FLOPs spent on the problem so far.
        text: the complete incumbent.
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
    """Return a chat as a problem whose id contains the seed.

    `run_search` on this problem with `SEARCH_SEED` gives the same answer as the service.

    Raises:
        ValueError: `messages` is not a chat (see `as_problem`).
    """
    digest = hash_json([seed, messages], length=16)
    return replace(as_problem(messages), id=f"request/{digest}")


@dataclass(frozen=True, eq=False)
class PendingRequest:
    """A request in the queue or in a running search.

    The service's thread calls `on_progress`, which must neither block nor raise.
    """

    problem: Problem
    config: SearchConfig
    on_progress: ProgressCallback | None
    client: Hashable
    future: Future[Trace] = field(default_factory=Future)

    def set_outcome(self, outcome: Trace | Exception) -> None:
        """Set the result or the exception of the future, unless the future is already done."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Trace):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)


@dataclass(eq=False)
class RunningSearch:
    """One search, and the equal requests that wait for it."""

    requests: list[PendingRequest]
    num_reported: dict[int, int] = field(default_factory=dict)  # chain -> revisions that were reported
    task: Task | None = None

    def report_progress(self, search: Search) -> None:
        """Report new incumbents. A chain accepts at most one revision per round."""
        callbacks = [request.on_progress for request in _select_unfinished(self.requests) if request.on_progress]
        for chain in search.chains:
            num_reported = self.num_reported.get(chain.index)
            accepted = [revision for revision in chain.revisions[num_reported or 0 :] if revision.accepted]
            self.num_reported[chain.index] = len(chain.revisions)
            if not callbacks or not (num_reported is None or accepted):
                continue
            last = accepted[-1] if accepted else None
            progress = SearchProgress(
                chain=chain.index,
                round=last.round if last else None,
                position=last.position if last else None,
                reward_before=last.reward_before if last else None,
                reward=chain.incumbent.reward,
                flops=last.cumulative_flops if last else search.count_flops(),
                text=search.policy.decode(chain.incumbent.response_ids),
            )
            for on_progress in callbacks:
                on_progress(progress)

    def deliver(self, task: Task) -> None:
        """Hand the outcome of the search to its requests."""
        if task.error is not None:
            if not isinstance(task.error, PromptTooLong | ValueError):
                log.error("a search failed", exc_info=task.error)
            outcome: Trace | Exception = SearchFailed(format_error(task.error))
        else:
            outcome = task.result if task.result.error is None else SearchFailed(task.result.error)
        _set_outcomes(self.requests, outcome)


class SearchService:
    """Run searches in a separate thread.

    Args:
        max_queue: maximum number of waiting requests.
        max_running: maximum number of searches that run together. They share the engine's slots evenly, so a search
            with a huge budget does not delay a small one by more than its share.
        num_slots: sequences that the engine decodes together.
    """

    def __init__(
        self, policy: Policy, reward: Reward, *, max_queue: int = 1000, max_running: int = 64, num_slots: int = 256
    ):
        self.policy, self.reward, self.max_queue, self.max_running = policy, reward, max_queue, max_running
        self.engine = Engine(policy, reward, num_slots=num_slots)
        self._waiting_requests: list[PendingRequest] = []
        self._running: dict[tuple[str, str], RunningSearch] = {}
        self._last_turn: dict[Hashable, int] = {}  # by client
        self._turn = 0
        self._stopped = False
        self._condition = Condition()
        self._thread = Thread(target=self._serve, name="nabla_trl searches", daemon=True)
        self._thread.start()

    def submit_request(
        self,
        problem: Problem,
        config: SearchConfig,
        on_progress: ProgressCallback | None = None,
        client: Hashable = None,
    ) -> Future[Trace]:
        """Put a request into the queue.

        Args:
            problem: from `make_request_problem`. Requests with the same id and configuration share one search.
            client: who asks. If requests wait, those of clients with fewer running searches come first.

        Returns:
            A future of a trace without an error. The future raises PromptTooLong or another ValueError for a request
            that cannot be run, SearchFailed if the search of a valid request fails, and ServerStopping if the service
            stopped before the search began.

        Raises:
            QueueFull: the maximum number of requests is waiting.
            ServerStopping: the service has been stopped.
        """
        request = PendingRequest(problem, config, on_progress, client)
        with self._condition:
            if self._stopped:
                raise ServerStopping("the server is shutting down")
            self._waiting_requests = _select_unfinished(self._waiting_requests)
            if len(self._waiting_requests) >= self.max_queue:
                raise QueueFull(
                    f"the queue is full, {len(self._waiting_requests)} requests are waiting: try again later"
                )
            self._waiting_requests.append(request)
            self._condition.notify_all()
        return request.future

    def count_requests(self) -> tuple[int, int]:
        """Return the number of waiting and the number of running requests."""
        with self._condition:
            running = [request for search in self._running.values() for request in search.requests]
            return len(_select_unfinished(self._waiting_requests)), len(_select_unfinished(running))

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._stopped

    def stop(self) -> None:
        """Refuse waiting and future requests. Running searches continue to their end."""
        with self._condition:
            self._stopped = True
            waiting, self._waiting_requests = self._waiting_requests, []
            self._condition.notify_all()
        _set_outcomes(waiting, ServerStopping("the server is shutting down"))

    def join(self) -> None:
        """Wait for the end of the thread after `stop`."""
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopped or self._waiting_requests or self._running)
                if self._stopped and not self._running:
                    return
                starting = self._take_requests()
            for search in starting:
                self._start(search)
            for search in list(self._running.values()):
                if not _select_unfinished(search.requests) and search.task is not None:
                    self.engine.cancel(search.task)
            self.engine.work()

    def _take_requests(self) -> list[RunningSearch]:
        """Move waiting requests to running searches, as many as may run. Return the searches that begin."""
        starting = []
        waiting = _select_unfinished(self._waiting_requests)
        self._waiting_requests = []
        load = Counter(dict.fromkeys((request.client for request in waiting), 0))
        load.update(search.requests[0].client for search in self._running.values())
        while waiting:
            # The client with the fewest running searches, of equals the one that has waited longest for its turn.
            request = min(waiting, key=lambda request: (load[request.client], self._last_turn.get(request.client, 0)))
            key = (request.problem.id, request.config.compute_hash())
            if key not in self._running and len(self._running) >= self.max_running:
                break
            waiting.remove(request)
            if key in self._running:
                self._running[key].requests.append(request)
            else:
                self._running[key] = search = RunningSearch([request])
                load[request.client] += 1
                self._last_turn = {client: turn for client, turn in self._last_turn.items() if client in load}
                self._last_turn[request.client] = self._turn = self._turn + 1
                starting.append(search)
        self._waiting_requests = waiting
        return starting

    def _start(self, search: RunningSearch) -> None:
        request = search.requests[0]
        key = (request.problem.id, request.config.compute_hash())

        def on_end(task: Task) -> None:
            with self._condition:
                del self._running[key]
            self.engine.flop_counter.forget(request.problem.id)
            if task.result is not None or task.error is not None:  # not cancelled
                search.deliver(task)

        try:
            self.reward.compute_max_new_tokens(request.problem, self.policy.encode(request.problem))
        except Exception as error:
            with self._condition:
                del self._running[key]
            is_refusal = isinstance(error, ValueError)
            if not is_refusal:
                log.exception("a prompt could not be encoded")
            _set_outcomes(search.requests, error if is_refusal else SearchFailed(format_error(error)))
            return
        run = Search(request.problem, self.engine, request.config, SEARCH_SEED, search.report_progress).run()
        # Each search owns its requests to the engine: slots are shared evenly by search.
        search.task = Task(request.problem.id, run, owner=search, on_end=on_end)
        self.engine.add(search.task)


def _select_unfinished(requests: Sequence[PendingRequest]) -> list[PendingRequest]:
    return [request for request in requests if not request.future.done()]


def _set_outcomes(requests: Sequence[PendingRequest], outcome: Trace | Exception) -> None:
    for request in requests:
        request.set_outcome(outcome)
