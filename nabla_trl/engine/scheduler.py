"""Drive many coroutines at once, and batch what they ask for.

A search is a coroutine for one problem. Where it awaits `Engine.generate`, `Engine.score` or `Engine.gradient`, it is
set aside, and goes on once its results are there. Sequences to generate join the running decode batch at once
(`nabla_trl.models.decoding`). Everything else waits until enough requests of its kind have come together, or until the
decoder would run too empty. When a request is served changes no result, only the time it takes.

Tasks may share the time by their size (`share_time`): while others wait, the smallest ones get `SMALL_TASKS_SHARE` of
it to themselves. So a small task ends soon beside large ones, and the large ones go on as well.

The scheduler is a plain loop: no threads and no event loop.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Coroutine, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import GenerationRequest, GenerationSession

# A kind of request runs once it waits this often per sequence that is being decoded.
WAITING_PER_SEQUENCE = 0.25
MAX_IDLE_SESSIONS = 4  # kept for requests with the same options: their buffers are large
MAX_SESSIONS = 8  # that decode at a time. Requests with further options wait
SMALL_TASKS_SHARE = 0.8  # of the time, which the smallest tasks get to themselves
SAME_SIZE_RATIO = 2.0  # tasks of up to this many times the smallest size count as small
MAX_RESUME_SECONDS = 0.01  # of searches' own work at a time, where small tasks must not wait
CLIENT_SLOTS_SHARE = 0.75  # of the slots of a decoder, which one client can have

_Sequences = OrderedDict[Hashable, deque[tuple["Call", int, GenerationRequest]]]  # by owner
BatchFunction = Callable[[list[Any]], Sequence[Any]]


def check_distinct_ids(problems: Sequence[Any]) -> None:
    """Refuse two problems with the same id, by which results and costs are known."""
    for name, count in Counter(problem.id for problem in problems).most_common(1):
        if count > 1:
            raise ValueError(f"problem id {name!r} occurs {count} times")


@dataclass(eq=False)
class Task:
    """One coroutine and how it ended.

    Attributes:
        key: what its seconds are charged to.
        owner: whose task it is; owners share the slots of the decoder evenly.
        client: who asked for it. Clients share the slots evenly before owners do. None: nobody in particular.
        size: how much work it may be at most, in any unit (see `share_time`).
        on_end: called with the task once it has ended.
    """

    key: str
    coroutine: Coroutine[Any, Any, Any]
    owner: Hashable = None
    client: Hashable = None
    size: float = 0.0
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
        share_time: small tasks do not wait for large ones. Costs throughput, because they are batched apart.

    Attributes:
        small_tasks: those that have a share of the time to themselves at the moment.
    """

    def __init__(self, *, num_slots: int = 256, flop_counter: FlopCounter | None = None, share_time: bool = False):
        self.num_slots, self.share_time = num_slots, share_time
        self.small_tasks: set[Task] = set()
        self._small_seconds = self._shared_seconds = 0.0
        self._piece_seconds = 0.0  # of a usual piece of work for all tasks
        self.flop_counter = FlopCounter() if flop_counter is None else flop_counter
        self.tasks: set[Task] = set()
        self.current: Task | None = None
        self._ready: deque[Task] = deque()
        self._queues: OrderedDict[Hashable, _Queue] = OrderedDict()
        self._sessions: dict[Hashable, GenerationSession] = {}
        self._openers: dict[Hashable, Callable[[], GenerationSession]] = {}
        self._sequences: dict[Hashable, _Sequences] = {}

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
            for owner, waiting in list(owners.items()):
                owners[owner] = deque(entry for entry in waiting if entry[0].task is not task)
                if not owners[owner]:
                    del owners[owner]
            session = self._sessions.get(lane)
            if session is not None:
                session.cancel([tag for tag, _ in session.list_requests() if tag[0].task is task])  # type: ignore[index]
        self._end(task)

    def run_problems(
        self, problems: Sequence[Any], search: Callable[[Any], Coroutine[Any, Any, Any]], *, max_concurrent: int
    ) -> list[Any]:
        """Run one coroutine for each problem, and return their results in the order of the problems (see `run`).

        Raises:
            ValueError: two problems have the same id.
        """
        check_distinct_ids(problems)
        tasks = (Task(problem.id, search(problem)) for problem in problems)
        results = {task.key: task.result for task in self.run(tasks, max_concurrent=max_concurrent)}
        return [results[problem.id] for problem in problems]

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
        self.small_tasks = self._find_small_tasks() if self.share_time else set()
        if not self.small_tasks:
            self._small_seconds = self._shared_seconds = 0.0
            return self._work_for_all()
        # What is begun cannot be interrupted, so the others wait until their share covers a piece of work.
        others_share = (self._shared_seconds + self._piece_seconds) * SMALL_TASKS_SHARE
        if self._small_seconds * (1 - SMALL_TASKS_SHARE) <= others_share:
            began = perf_counter()
            progressed = self._work(self.small_tasks)
            self._small_seconds += perf_counter() - began
            if progressed:
                return True
        began = perf_counter()
        progressed = self._work_for_all()
        self._shared_seconds += perf_counter() - began
        return progressed

    def _work_for_all(self) -> bool:
        """Go on with all tasks, and note how long a piece of work for them takes."""
        began = perf_counter()
        progressed = self._work(None)
        self._piece_seconds += 0.2 * (perf_counter() - began - self._piece_seconds)
        return progressed

    def _find_small_tasks(self) -> set[Task]:
        """Return the smallest tasks, and none if all are of about the same size."""
        smallest = min((task.size for task in self.tasks), default=0.0)
        small = {task for task in self.tasks if task.size <= SAME_SIZE_RATIO * smallest}
        return small if len(small) < len(self.tasks) else set()

    def _work(self, tasks: Collection[Task] | None) -> bool:
        """Go on with these tasks (None: all of them), as `work` does."""
        ready = self._ready
        if tasks is not None:
            ready = deque(task for task in self._ready if task in tasks)
            self._ready = deque(task for task in self._ready if task not in tasks)
        progressed = bool(ready)
        began = perf_counter()
        while ready:
            task = ready.popleft()
            if not task.ended:  # cancelled since
                self._resume(task)
            if self.share_time and tasks is None and perf_counter() - began > MAX_RESUME_SECONDS and ready:
                return True  # a small task may have come
        active = self._count_sequences(tasks)
        waiting = {kind: _count_entries(queue.entries, tasks) for kind, queue in self._queues.items()}
        due = [kind for kind, count in waiting.items() if count and count >= WAITING_PER_SEQUENCE * active]
        if due:
            self._run_queue(self._queues[max(due, key=lambda kind: waiting[kind])], tasks)
        elif active:
            progressed |= self._decode(tasks)
        return progressed or bool(due)

    def _count_sequences(self, tasks: Collection[Task] | None) -> int:
        """Return how many sequences of these tasks are being decoded or wait for a slot."""
        waiting = [entries for owners in self._sequences.values() for entries in owners.values()]
        return sum(_count_entries(entries, tasks) for entries in waiting) + sum(
            _count_active(session, tasks) for session in self._sessions.values()
        )

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
        task = self._current_task()
        call = Call(task, [None] * len(items), len(items))
        if not items:
            return call
        lane = (lane, task in self.small_tasks)  # small tasks take their steps without the others
        self._openers.setdefault(lane, open_session)
        owners = self._sequences.setdefault(lane, OrderedDict())
        waiting = owners.setdefault(call.task.owner, deque())
        waiting.extend((call, index, request) for index, request in enumerate(items))
        return call

    def _current_task(self) -> Task:
        if self.current is None:
            raise RuntimeError("only a coroutine that the engine runs can ask it for something")
        return self.current

    def _run_queue(self, queue: _Queue, tasks: Collection[Task] | None = None) -> None:
        entries = [entry for entry in queue.entries if tasks is None or entry[0].task in tasks]
        queue.entries = [entry for entry in queue.entries if tasks is not None and entry[0].task not in tasks]
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

    def _decode(self, tasks: Collection[Task] | None) -> bool:
        """Fill the free slots, and take a step in every lane with a sequence of these tasks. False: in none."""
        self._open_sessions()
        stepped = False
        for lane, session in self._sessions.items():
            waiting = self._sequences[lane].values()
            if not (_count_active(session, tasks) or any(_count_entries(entries, tasks) for entries in waiting)):
                continue
            self._fill_slots(session, self._sequences[lane])
            if not session.num_unfinished:
                continue
            with self.flop_counter.measure_seconds([request.cost_key for _, request in session.list_requests()]):
                ended = session.step()
            for tag, output in ended:
                self._settle(*tag, output, output if isinstance(output, Exception) else None)  # type: ignore[misc, call-arg]
            stepped = True
        for lane in self._list_idle_lanes()[:-MAX_IDLE_SESSIONS]:
            self._close(lane)
        return stepped

    def _open_sessions(self) -> None:
        """Open sessions for lanes with waiting sequences, those of small tasks and the others `MAX_SESSIONS` each."""
        for lane, owners in list(self._sequences.items()):
            if lane in self._sessions or not owners:
                continue
            is_small = lane[1]  # type: ignore[index]
            same = [other for other in self._sessions if other[1] == is_small]  # type: ignore[index]
            if len(same) >= MAX_SESSIONS:
                idle = next((other for other in self._list_idle_lanes() if other in same), None)
                if idle is None:
                    continue
                self._close(idle)
            try:
                self._sessions[lane] = self._openers[lane]()
            except (ValueError, RuntimeError) as error:  # options that the back end does not support, or no memory
                for entry in [entry for waiting in owners.values() for entry in waiting]:
                    self._settle(entry[0], entry[1], None, error)
                self._close(lane)

    def _list_idle_lanes(self) -> list[Hashable]:
        return [
            lane for lane, session in self._sessions.items() if not (session.num_unfinished or self._sequences[lane])
        ]

    def _close(self, lane: Hashable) -> None:
        self._sessions.pop(lane, None)
        del self._sequences[lane], self._openers[lane]

    def _fill_slots(self, session: GenerationSession, owners: _Sequences) -> None:
        """Give each free slot to the client with the fewest, and of its owners to the next one in turn."""
        free = self.num_slots - session.num_unfinished
        held: Counter[Hashable] = Counter()
        if free and owners:
            held.update(tag[0].task.client for tag, _ in session.list_requests())  # type: ignore[index]
        while free and owners:
            owner = min(owners, key=lambda owner: held[owners[owner][0][0].task.client])
            waiting = owners[owner]
            client = waiting[0][0].task.client
            if client is not None and held[client] >= max(1, CLIENT_SLOTS_SHARE * self.num_slots):
                return
            call, index, request = waiting.popleft()
            held[client] += 1
            del owners[owner]
            if waiting:
                owners[owner] = waiting  # at the end: the next slot is another owner's
            try:
                session.submit((call, index), request)
                free -= 1
            except ValueError as error:
                self._settle(call, index, None, error)


def _count_active(session: GenerationSession, tasks: Collection[Task] | None) -> int:
    """Return how many sequences of a session belong to these tasks."""
    if tasks is None:
        return session.num_unfinished
    return sum(tag[0].task in tasks for tag, _ in session.list_requests())  # type: ignore[index]


def _count_entries(entries: Collection[tuple[Call, int, Any]], tasks: Collection[Task] | None) -> int:
    """Return how many waiting requests belong to these tasks."""
    return len(entries) if tasks is None else sum(entry[0].task in tasks for entry in entries)
