"""Drive many coroutines at once, and batch what they ask for.

A search is a coroutine for one problem. Where it awaits `Engine.generate`, `Engine.score` or `Engine.gradient`, it is
set aside, and goes on once its results are there. Sequences to generate join the running decode batch at once
(`nabla_trl.models.decoding`). Everything else waits until enough requests of its kind have come together, or until the
decoder would run too empty. When a request is served changes no result, only the time it takes.

The scheduler is a plain loop: no threads and no event loop.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import GenerationRequest, GenerationSession

# A kind of request runs once it waits this often per sequence that is being decoded.
WAITING_PER_SEQUENCE = 0.25
MAX_IDLE_SESSIONS = 4  # kept for requests with the same options: their buffers are large

BatchFunction = Callable[[list[Any]], Sequence[Any]]


@dataclass(eq=False)
class Task:
    """One coroutine and how it ended.

    Attributes:
        key: what its seconds are charged to.
        owner: whose task it is; owners share the slots of the decoder evenly.
        on_end: called with the task once it has ended.
    """

    key: str
    coroutine: Coroutine[Any, Any, Any]
    owner: Hashable = None
    on_end: Callable[[Task], None] | None = None
    result: Any = None
    error: BaseException | None = None
    ended: bool = False
    waits_for: Call | None = None


@dataclass(eq=False)
class Call:
    """What a task waits for: a list of items, each of which gets a result."""

    task: Task
    results: list[Any]
    missing: int
    error: BaseException | None = None

    def __await__(self) -> Generator[Call, None, list[Any]]:
        while self.missing:
            yield self
        if self.error is not None:
            raise self.error
        return self.results


@dataclass(eq=False)
class _Queue:
    """Requests of one kind that wait to be run together."""

    function: BatchFunction
    entries: list[tuple[Call, int, Any]] = field(default_factory=list)


class Scheduler:
    """Runs tasks, and what they ask for.

    Args:
        num_slots: sequences that are decoded together at most.
        flop_counter: charged with the seconds of all work.
    """

    def __init__(self, *, num_slots: int = 256, flop_counter: FlopCounter | None = None):
        self.num_slots = num_slots
        self.flop_counter = FlopCounter() if flop_counter is None else flop_counter
        self.tasks: set[Task] = set()
        self.current: Task | None = None
        self._ready: deque[Task] = deque()
        self._queues: OrderedDict[Hashable, _Queue] = OrderedDict()
        self._sessions: dict[Hashable, GenerationSession] = {}
        self._sequences: dict[Hashable, OrderedDict[Hashable, deque[tuple[Call, int, GenerationRequest]]]] = {}

    # --- tasks -------------------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """Begin a task at the next `work`."""
        self.tasks.add(task)
        self._ready.append(task)

    def cancel(self, task: Task) -> None:
        """End a task where it stands, and drop what it waits for."""
        if task.ended:
            return
        task.coroutine.close()
        for queue in self._queues.values():
            queue.entries = [entry for entry in queue.entries if entry[0].task is not task]
        for lane, owners in self._sequences.items():
            for waiting in owners.values():
                for entry in [entry for entry in waiting if entry[0].task is task]:
                    waiting.remove(entry)
            session = self._sessions[lane]
            session.cancel([tag for tag, _ in session.list_requests() if tag[0].task is task])  # type: ignore[index]
        self._end(task)

    def run(self, tasks: Iterable[Task], *, max_concurrent: int) -> Iterator[Task]:
        """Run tasks, `max_concurrent` of them at a time, and give back each one as it ends.

        Raises:
            Exception: the first one that a task ended with; the others are cancelled.
        """
        source, ended = iter(tasks), deque[Task]()
        try:
            while True:
                while len(self.tasks) < max_concurrent and (task := next(source, None)) is not None:
                    task.on_end = ended.append
                    self.add(task)
                while ended:
                    task = ended.popleft()
                    if task.error is not None:
                        raise task.error
                    yield task
                if not self.tasks:
                    if ended:
                        continue
                    return
                self.work()
        finally:
            for task in list(self.tasks):
                self.cancel(task)

    def work(self) -> bool:
        """Go on with every task that can, then do one piece of work for those that wait. False: nothing to do."""
        progressed = bool(self._ready)
        while self._ready:
            task = self._ready.popleft()
            if not task.ended:  # cancelled since
                self._resume(task)
        active = sum(session.num_unfinished for session in self._sessions.values())
        active += sum(len(waiting) for owners in self._sequences.values() for waiting in owners.values())
        due = [queue for queue in self._queues.values() if queue.entries]
        due = [queue for queue in due if len(queue.entries) >= WAITING_PER_SEQUENCE * active]
        if due:
            self._run_queue(max(due, key=lambda queue: len(queue.entries)))
        elif active:
            self._decode()
        return progressed or bool(due) or bool(active)

    def _resume(self, task: Task) -> None:
        self.current = task
        try:
            with self.flop_counter.measure_seconds([task.key]):
                task.waits_for = task.coroutine.send(None)
        except StopIteration as stop:
            task.result = stop.value
            self._end(task)
        except Exception as failure:
            task.error = failure
            self._end(task)
        finally:
            self.current = None

    def _end(self, task: Task) -> None:
        task.ended = True
        self.tasks.discard(task)
        if task.on_end is not None:
            task.on_end(task)

    def _settle(self, call: Call, index: int, result: Any, error: BaseException | None = None) -> None:
        """Hand over one result; the task goes on once all of its call are there."""
        call.results[index] = result
        call.missing -= 1
        call.error = call.error or error
        if not call.missing and not call.task.ended and call.task.waits_for is call:
            self._ready.append(call.task)

    # --- requests ----------------------------------------------------------------------------------------

    def batch(self, kind: Hashable, function: BatchFunction, items: Sequence[Any]) -> Call:
        """Ask for `function(items)`, one result per item, together with other requests of this kind."""
        call = Call(self._current_task(), [None] * len(items), len(items))
        queue = self._queues.setdefault(kind, _Queue(function))
        queue.entries += [(call, index, item) for index, item in enumerate(items)]
        return call

    def generate_together(
        self, lane: Hashable, open_session: Callable[[], GenerationSession], items: Sequence[GenerationRequest]
    ) -> Call:
        """Ask for continuations from the session of a lane: of all requests with the same options."""
        call = Call(self._current_task(), [None] * len(items), len(items))
        if lane not in self._sessions:
            self._sessions[lane] = open_session()
        owners = self._sequences.setdefault(lane, OrderedDict())
        if not items:
            return call
        waiting = owners.setdefault(call.task.owner, deque())
        waiting.extend((call, index, request) for index, request in enumerate(items))
        return call

    def _current_task(self) -> Task:
        if self.current is None:
            raise RuntimeError("only a coroutine that the engine runs can ask it for something")
        return self.current

    def _run_queue(self, queue: _Queue) -> None:
        entries, queue.entries = queue.entries, []
        try:
            results = queue.function([item for _, _, item in entries])
        except Exception as error:
            if len(entries) == 1 or isinstance(error, ConnectionError):
                for call, index, _ in entries:
                    self._settle(call, index, None, error)
                return
            for entry in entries:  # one of them fails: the others must not
                self._run_queue(_Queue(queue.function, [entry]))
            return
        for (call, index, _), result in zip(entries, results, strict=True):
            self._settle(call, index, result)

    def _decode(self) -> None:
        """Fill the free slots, owner by owner, and take a step in every lane."""
        for lane, session in self._sessions.items():
            owners = self._sequences[lane]
            free = self.num_slots - session.num_unfinished
            while free and owners:
                owner, waiting = next(iter(owners.items()))
                call, index, request = waiting.popleft()
                del owners[owner]
                if waiting:
                    owners[owner] = waiting  # at the end: the next slot is another owner's
                try:
                    session.submit((call, index), request)
                    free -= 1
                except ValueError as error:
                    self._settle(call, index, None, error)
            if not session.num_unfinished:
                continue
            with self.flop_counter.measure_seconds([request.cost_key for _, request in session.list_requests()]):
                ended = session.step()
            for (call, index), output in ended:  # type: ignore[misc]
                self._settle(call, index, output, output if isinstance(output, Exception) else None)
        idle = [
            lane for lane, session in self._sessions.items() if not (session.num_unfinished or self._sequences[lane])
        ]
        for lane in idle[:-MAX_IDLE_SESSIONS]:
            del self._sessions[lane], self._sequences[lane]
