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
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from threading import Condition, Thread
from time import monotonic
from typing import Any

from nabla_trl.engine.engine import Engine, TokenLogprobs
from nabla_trl.engine.scheduler import Task
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search
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


@dataclass(frozen=True, eq=False)
class PendingRequest:
    """A request in the queue or in a running task of the engine.

    The service's thread calls `on_progress`, which must neither block nor raise.

    Attributes:
        key: requests with the same key share one task.
        cost_key: what the engine charges its work to.
        begin: returns the coroutine for the engine. It raises ValueError for a request that cannot be run.
        size: the most tokens that it may take to answer (see `Scheduler`).
        submitted: when it came, in seconds of the monotonic clock.
    """

    key: Hashable
    cost_key: str
    begin: Callable[[RunningTask], Coroutine[Any, Any, Any]]
    client: Hashable
    size: float
    on_progress: ProgressCallback | None = None
    future: Future[Any] = field(default_factory=Future)
    submitted: float = field(default_factory=monotonic)

    def set_outcome(self, outcome: Any) -> None:
        """Set the result or the exception of the future, unless the future is already done."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Exception):
                self.future.set_exception(outcome)
            else:
                self.future.set_result(outcome)


@dataclass(eq=False)
class RunningTask:
    """A task of the engine, and the equal requests that wait for it."""

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
        """Hand the outcome of the task to its requests."""
        if task.error is not None:
            if not isinstance(task.error, ValueError):
                log.error("a search failed", exc_info=task.error)
            outcome: Any = SearchFailed(format_error(task.error))
        elif isinstance(task.result, Trace) and task.result.error is not None:
            outcome = SearchFailed(task.result.error)
        else:
            outcome = task.result
        _set_outcomes(self.requests, outcome)


class SearchService:
    """Run searches in a separate thread.

    Args:
        max_queue: maximum number of waiting requests.
        max_running: maximum number of searches that run together. They share the engine's slots evenly by client, and
            a search that may take few tokens does not wait for those that may take many.
        num_slots: sequences that the engine decodes together.
        on_queue_seconds: called with the time that a request has waited when it begins to run.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        *,
        max_queue: int = 1000,
        max_running: int = 64,
        num_slots: int = 256,
        on_queue_seconds: Callable[[float], None] = lambda seconds: None,
    ):
        self.policy, self.reward, self.max_queue, self.max_running = policy, reward, max_queue, max_running
        self.num_slots, self.on_queue_seconds = num_slots, on_queue_seconds
        self.engine = self._open_engine()
        self._waiting_requests: list[PendingRequest] = []
        self._running: dict[Hashable, RunningTask] = {}
        self._last_turn: dict[Hashable, int] = {}  # by client
        self._turn = 0
        self._numbers = count()
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

        # Requests that differ in their options have the same random numbers, and each its own costs.
        digest = hash_json([config.compute_hash(), problem.stop_strings, problem.prompt_ids], length=16)
        own_problem = replace(problem, id=f"{problem.id}/{digest}")

        def begin(running: RunningTask) -> Coroutine[Any, Any, Trace]:
            self.reward.compute_max_new_tokens(own_problem, self.policy.encode(own_problem))
            search = Search(own_problem, self.engine, config, SEARCH_SEED, running.report_progress, problem.id)
            return search.run()

        size = self.estimate_tokens(problem, config)
        return self._submit(PendingRequest(own_problem.id, own_problem.id, begin, client, size, on_progress))

    def submit_scoring(
        self, problem: Problem, response_ids: Sequence[int], num_top: int, client: Hashable = None
    ) -> Future[TokenLogprobs]:
        """Put a request for the log-probabilities of a prompt and a response into the queue.

        Args:
            num_top: alternatives of each token.
            client: as for `submit_request`.

        Raises:
            QueueFull, ServerStopping: as `submit_request`.
        """
        cost_key = f"{problem.id}/logprobs/{next(self._numbers)}"

        def begin(running: RunningTask) -> Coroutine[Any, Any, TokenLogprobs]:
            ids = [*self.policy.encode(problem), *response_ids]
            return self.engine.compute_token_logprobs(cost_key, ids, num_top)

        size = len(problem.prompt_ids or ()) + len(response_ids)
        return self._submit(PendingRequest(cost_key, cost_key, begin, client, size))

    def _submit(self, request: PendingRequest) -> Future[Any]:
        with self._condition:
            self.check_queue()
            self._waiting_requests.append(request)
            self._condition.notify_all()
        return request.future

    def check_queue(self) -> None:
        """Refuse a request before any work on it.

        Raises:
            QueueFull: the maximum number of requests is waiting.
            ServerStopping: the service has been stopped.
        """
        with self._condition:
            if self._stopped:
                raise ServerStopping("the server is shutting down")
            self._waiting_requests = _select_unfinished(self._waiting_requests)
            if len(self._waiting_requests) >= self.max_queue:
                raise QueueFull(
                    f"the queue is full, {len(self._waiting_requests)} requests are waiting: try again later"
                )

    def estimate_tokens(self, problem: Problem, config: SearchConfig) -> float:
        """Return the most tokens that a search may generate, by its budget of FLOPs or by its limits."""
        if config.max_flops:
            return config.max_flops / self.policy.size.compute_forward_flops(0, 1)
        rounds = config.max_rounds * config.num_chains * config.proposals.proposals_per_round or math.inf
        responses = config.max_rollouts or config.num_starts + rounds
        return len(problem.prompt_ids or ()) + config.max_new_tokens * responses

    def count_requests(self) -> tuple[int, int]:
        """Return the number of waiting and the number of running requests."""
        with self._condition:
            running = [request for task in self._running.values() for request in task.requests]
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

    def _open_engine(self) -> Engine:
        return Engine(self.policy, self.reward, num_slots=self.num_slots, share_time=True)

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopped or self._waiting_requests or self._running)
                if self._stopped and not self._running:
                    return
                starting = self._take_requests()
            try:
                for running in starting:
                    self._start(running)
                for running in list(self._running.values()):
                    if not _select_unfinished(running.requests) and running.task is not None:
                        self.engine.cancel(running.task)
                self.engine.work()
            except Exception as error:  # not of one search: nobody knows which of them can go on
                log.exception("the engine failed, and all searches with it")
                self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        """Answer all running requests with an error, and go on with a new engine."""
        with self._condition:
            failed, self._running = list(self._running.values()), {}
        for running in failed:
            _set_outcomes(running.requests, SearchFailed(format_error(error)))
            if running.task is not None:
                running.task.coroutine.close()
        self.engine = self._open_engine()

    def _take_requests(self) -> list[RunningTask]:
        """Move waiting requests to running tasks, as many as may run. Return the tasks that begin."""
        starting = []
        waiting = _select_unfinished(self._waiting_requests)
        self._waiting_requests = []
        load = Counter(dict.fromkeys((request.client for request in waiting), 0))
        load.update(running.requests[0].client for running in self._running.values())
        while waiting:
            # The client with the fewest running searches, of equals the one that has waited longest for its turn.
            request = min(waiting, key=lambda request: (load[request.client], self._last_turn.get(request.client, 0)))
            if request.key not in self._running and len(self._running) >= self.max_running:
                break
            waiting.remove(request)
            if request.key in self._running:
                self._running[request.key].requests.append(request)
            else:
                self._running[request.key] = running = RunningTask([request])
                load[request.client] += 1
                self._last_turn = {client: turn for client, turn in self._last_turn.items() if client in load}
                self._last_turn[request.client] = self._turn = self._turn + 1
                starting.append(running)
            self.on_queue_seconds(monotonic() - request.submitted)
        self._waiting_requests = waiting
        return starting

    def _start(self, running: RunningTask) -> None:
        request, engine = running.requests[0], self.engine

        def on_end(task: Task) -> None:
            with self._condition:
                self._running.pop(request.key, None)
            engine.flop_counter.forget(request.cost_key)
            if task.result is not None or task.error is not None:  # not cancelled
                running.deliver(task)

        try:
            coroutine = request.begin(running)
        except Exception as error:
            with self._condition:
                del self._running[request.key]
            is_refusal = isinstance(error, ValueError)
            if not is_refusal:
                log.exception("a request could not begin")
            _set_outcomes(running.requests, error if is_refusal else SearchFailed(format_error(error)))
            return
        # Each search owns its requests to the engine: slots are shared evenly by client, and then by search.
        running.task = Task(
            request.cost_key, coroutine, owner=running, client=request.client, size=request.size, on_end=on_end
        )
        engine.add(running.task)


def _select_unfinished(requests: Sequence[PendingRequest]) -> list[PendingRequest]:
    return [request for request in requests if not request.future.done()]


def _set_outcomes(requests: Sequence[PendingRequest], outcome: Any) -> None:
    for request in requests:
        request.set_outcome(outcome)
