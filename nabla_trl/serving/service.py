"""Solve the requests of many threads in batches, with a queue and one search thread.

Requests with the same configuration share one batch of the search, in order of arrival. The result of a request does
not depend on its batch. Its seed is part of the id of its problem, and this id selects the random numbers of every
draw, so one seed of the search serves requests of all seeds. HTTP is in `nabla_trl.serving.asgi`.

The caller of a request holds a `concurrent.futures.Future`. Cancelling the future removes the request from the queue,
or ends its search at the next round.
"""

from __future__ import annotations

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
from nabla_trl.utils.identity import hash_json

SEARCH_SEED = 0  # the seed of every search, because a request's own seed is in the id of its problem

log = logging.getLogger(__name__)


class SearchFailed(RuntimeError):
    """The search of a valid request failed."""


class QueueFull(RuntimeError):
    """The queue holds the maximum number of requests."""


class ServerStopping(RuntimeError):
    """The engine is shutting down and starts no further search."""


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
    """A request in the queue or in the running search.

    The engine's thread calls `on_progress`, which must neither block nor raise.
    """

    problem: Problem
    config: SearchConfig
    on_progress: ProgressCallback | None
    future: Future[Trace] = field(default_factory=Future)

    def set_outcome(self, outcome: Trace | Exception) -> None:
        """Set the result or the exception of the future, unless the future is already done."""
        with suppress(InvalidStateError):
            if isinstance(outcome, Trace):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)


RequestBatch = dict[str, list[PendingRequest]]  # by problem id, as equal requests of equal seed share one search


class Engine:
    """Run one search at a time in a separate thread.

    Args:
        max_queue: maximum number of waiting requests.
        batch_window: seconds that a request waits for other requests to fill its batch.
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
        """Put a request into the queue.

        Args:
            problem: from `make_request_problem`. Requests with the same id and configuration share one search.

        Returns:
            A future of a trace without an error. The future raises PromptTooLong or another ValueError for a request
            that cannot be run, SearchFailed if the search of a valid request fails, and ServerStopping if the engine
            stopped before the search began.

        Raises:
            QueueFull: the maximum number of requests is waiting.
            ServerStopping: the engine has been stopped.
        """
        request = PendingRequest(problem, config, on_progress)
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
            return len(_select_unfinished(self._waiting_requests)), len(_select_unfinished(self._running_requests))

    @property
    def is_alive(self) -> bool:
        """Return whether the engine accepts requests."""
        return self._thread.is_alive() and not self._stopped

    def stop(self) -> None:
        """Refuse waiting and future requests. The running search continues to its end."""
        with self._condition:
            self._stopped = True
            waiting, self._waiting_requests = self._waiting_requests, []
            self._condition.notify_all()
        _set_outcomes(waiting, ServerStopping("the server is shutting down"))

    def join(self) -> None:
        """Wait for the end of the thread after `stop`."""
        self._thread.join()

    # --- the thread -------------------------------------------------------------------------------------

    def _serve_batches(self) -> None:
        while (batch := self._take_next_batch()) is not None:
            encodable = {key: requests for key, requests in batch.items() if self._is_encodable(requests)}
            if encodable:
                self._solve_batch(encodable)

    def _take_next_batch(self) -> RequestBatch | None:
        """Return the next batch, empty if all its requests were cancelled, or None once the engine is stopped."""
        with self._condition:
            self._running_requests = []
            self._condition.wait_for(lambda: self._stopped or self._waiting_requests)
            deadline = time.monotonic() + self.batch_window
            while not self._stopped and not self._is_batch_full() and (seconds := deadline - time.monotonic()) > 0:
                self._condition.wait(seconds)
            if self._stopped:
                return None
            batch = self._collect_compatible_requests()
            self._running_requests = [request for requests in batch.values() for request in requests]
            self._waiting_requests = [
                request for request in self._waiting_requests if request not in self._running_requests
            ]
            return batch

    def _is_batch_full(self) -> bool:
        batch = self._collect_compatible_requests()
        return bool(batch) and len(batch) >= self._waiting_requests[0].config.batch_size

    def _collect_compatible_requests(self) -> RequestBatch:
        """Return the oldest request and all requests that can share its search."""
        self._waiting_requests = _select_unfinished(self._waiting_requests)
        batch: RequestBatch = {}
        for request in self._waiting_requests:
            config, key = self._waiting_requests[0].config, request.problem.id
            if request.config == config and (key in batch or len(batch) < config.batch_size):
                batch.setdefault(key, []).append(request)
        return batch

    def _is_encodable(self, requests: list[PendingRequest]) -> bool:
        """Return whether policy and reward can encode the problem. If not, end its requests with the error."""
        problem = requests[0].problem
        try:
            self.reward.compute_max_new_tokens(problem, self.policy.encode(problem))
        except ValueError as error:
            _set_outcomes(requests, error)
        except Exception as error:
            log.exception("a prompt could not be encoded")
            _set_outcomes(requests, SearchFailed(format_error(error)))
        else:
            return True
        return False

    def _solve_batch(self, batch: RequestBatch) -> None:
        """Search for a batch. If the search fails, search again for each problem alone."""
        first = next(iter(batch.values()))[0]
        try:
            search = StreamingSearch(self.policy, self.reward, first.config, batch)
            for trace in search.refine_batch([requests[0].problem for requests in batch.values()]):
                search.deliver_trace(trace)
        except Exception as error:
            log.exception("a search for %d problems failed", len(batch))
            # A vLLM server that does not answer was called repeatedly. It would fail each problem as slowly.
            if len(batch) == 1 or isinstance(error, ConnectionError):
                for requests in batch.values():
                    _set_outcomes(requests, SearchFailed(format_error(error)))
                return
            for key, requests in batch.items():
                if _select_unfinished(requests):
                    self._solve_batch({key: requests})


class StreamingSearch(Search):
    """A search that reports progress, delivers each trace when it is complete, and ends cancelled problems."""

    def __init__(self, policy: Policy, reward: Reward, config: SearchConfig, batch: RequestBatch):
        super().__init__(policy, reward, config, SEARCH_SEED)
        self.batch = batch
        self.num_reported_revisions: dict[tuple[str, int], int] = {}  # by problem id and chain

    def update_active_chains(self) -> list[SearchState]:
        """Return the chains that continue. The search calls this before each round, and after the last one."""
        for key, chains in self.chains_by_problem.items():
            if not _select_unfinished(self.batch[key]):
                for chain in chains:
                    chain.stop_reason = "cancelled"
        active = super().update_active_chains()
        for key, chains in self.chains_by_problem.items():
            for chain in chains:
                self.report_progress(self.batch[key], chain)
        for key in self.chains_by_problem.keys() - {chain.problem.id for chain in active}:
            if _select_unfinished(self.batch[key]):
                self.deliver_trace(self.build_trace(self.chains_by_problem[key]))
        return active

    def report_progress(self, requests: list[PendingRequest], chain: SearchState) -> None:
        """Report a new incumbent of a chain. A chain accepts at most one revision per round."""
        callbacks = [request.on_progress for request in _select_unfinished(requests) if request.on_progress]
        num_reported = self.num_reported_revisions.get((chain.problem.id, chain.index))
        accepted = [revision for revision in chain.revisions[num_reported or 0 :] if revision.accepted]
        self.num_reported_revisions[chain.problem.id, chain.index] = len(chain.revisions)
        if not callbacks or not (num_reported is None or accepted):
            return
        last = accepted[-1] if accepted else None
        progress = SearchProgress(
            chain=chain.index,
            round=last.round if last else None,
            position=last.position if last else None,
            reward_before=last.reward_before if last else None,
            reward=chain.incumbent.reward,
            flops=last.cumulative_flops if last else self.flop_counter.get_cost(chain.problem.id).flops,
            text=self.policy.decode(chain.incumbent.response_ids),
        )
        for on_progress in callbacks:
            on_progress(progress)

    def deliver_trace(self, trace: Trace) -> None:
        """Set the trace, or its error, as the outcome of the problem's requests."""
        _set_outcomes(self.batch[trace.problem_id], trace if trace.error is None else SearchFailed(trace.error))


def _select_unfinished(requests: Sequence[PendingRequest]) -> list[PendingRequest]:
    return [request for request in requests if not request.future.done()]


def _set_outcomes(requests: Sequence[PendingRequest], outcome: Trace | Exception) -> None:
    for request in requests:
        request.set_outcome(outcome)
