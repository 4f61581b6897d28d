"""Compares answers, in processes that can be killed: `AnswerChecker`. No torch, no sympy here.

The checker settles plain numbers in this process; everything else goes to math-verify. Its own time-outs use
`SIGALRM` (main thread only, and C code does not hear it), so they are off, and it runs in worker processes that
this module starts, times and kills.

Workers are `subprocess`es that speak JSON lines, not `multiprocessing` ones: `spawn` would import the
caller's main script, and with it torch, into each, and would break scripts without a `__main__` guard.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import ChainMap, Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nabla_trl.grading.equivalence import VERIFIER_PREFIX, MatchResult, match_without_worker

_EXTRACTION, _EQUIVALENCE = (str(Path(__file__).with_name(name)) for name in ("extraction.py", "equivalence.py"))
_CACHE_LIMIT = 100_000


class AnswerChecker:
    """Compares predicted with gold answers. A context manager; `counts` adds up the verdicts it gave.

    workers: how many processes may run at once; they are started when a pair first needs one. timeout:
    seconds for one comparison; after it the worker is killed and replaced, and that pair alone is TIMEOUT.
    A comparison that ends its worker is ERROR. May be called from any thread.
    """

    def __init__(self, num_workers: int = 1, timeout: float = 5.0, *, _compare_file: str = _EQUIVALENCE) -> None:
        if num_workers < 1 or not timeout > 0:
            raise ValueError(f"workers must be at least 1 and timeout above 0, not {num_workers} and {timeout}")
        self.counts: Counter[MatchResult] = Counter()
        self._start_worker: Callable[[], _Worker] = lambda: _Worker(_compare_file, timeout)
        self._slots: list[_Worker | None] = [None] * num_workers
        self._cached_results: dict[tuple[str, str], MatchResult] = {}
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _end_workers, self._slots)

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and wait until they are gone. A later `check` would start new ones."""
        with self._lock:
            _end_workers(self._slots)

    def check(self, pairs: Sequence[tuple[str | None, str | None]]) -> list[MatchResult]:
        """Verdicts on (predicted, gold) pairs, in order.

        Predicted answers are what `extract_answer` gives; gold ones may be solutions with a box or `####`.
        Without a gold answer NO_GOLD, then without a predicted one NO_ANSWER: a gold answer is only parsed to
        be compared with something. Raises RuntimeError if no worker can be started.
        """
        with self._lock:
            keyed = [match_without_worker(predicted, gold) for predicted, gold in pairs]
            unknown = dict.fromkeys(key for key in keyed if isinstance(key, tuple) and key not in self._cached_results)
            fresh = self._match_in_workers(list(unknown)) if unknown else {}
            settled = ChainMap(fresh, self._cached_results)
            verdicts = [key if isinstance(key, MatchResult) else settled[key] for key in keyed]
            self._update_cache(fresh)
            self.counts.update(verdicts)
        return verdicts

    def _update_cache(self, fresh: dict[tuple[str, str], MatchResult]) -> None:
        if len(self._cached_results) > _CACHE_LIMIT:
            self._cached_results.clear()
        lasting = (
            MatchResult.CORRECT,
            MatchResult.INCORRECT,
            MatchResult.BAD_GOLD,
        )  # a time-out may have been a busy machine
        self._cached_results.update({key: verdict for key, verdict in fresh.items() if verdict in lasting})

    def _match_in_workers(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], MatchResult]:
        """Verdicts on distinct pairs from the workers, one thread feeding each."""
        pending, verdicts = deque(keys), {}

        def feed(slot: int) -> None:
            for key in _pop_until_empty(pending):
                verdicts[key] = self._match_in_slot(slot, key)

        count = min(len(self._slots), len(keys))
        with ThreadPoolExecutor(count) as threads:
            try:
                for future in [threads.submit(feed, slot) for slot in range(count)]:
                    future.result()
            except BaseException:  # Ctrl-C too: threads end once there is no work and their workers are gone
                pending.clear()
                _end_workers(self._slots)
                raise
        return verdicts

    def _match_in_slot(self, slot: int, key: tuple[str, str]) -> MatchResult:
        worker = self._slots[slot]
        if worker is None or worker.process.poll() is not None:
            worker = self._slots[slot] = self._start_worker()
        if key[1].startswith(VERIFIER_PREFIX) and not worker.has_reasoning_gym:
            worker.load_reasoning_gym(key[1])
        return worker.match(key)


def _pop_until_empty(pending: deque[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The items of a queue that other threads take from too."""
    with contextlib.suppress(IndexError):
        while True:
            yield pending.popleft()


# ---------------------------------------------------------------- worker processes

_START_TIMEOUT_SECONDS = 120.0  # importing sympy on a busy machine
_ORPHAN_SECONDS = 2  # after its time-out a worker ends by itself, should its parent be gone
_MAX_MEMORY_BYTES = 4 << 30
_WORKER_SCRIPT = """
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
import importlib.util, sys
sys.path[:] = [entry for entry in sys.path if entry]
def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
# the checker finds them by these names, so the package is not imported
load("nabla_trl.grading.extraction", sys.argv[1])
load("nabla_trl.grading.equivalence", sys.argv[2])
checker = load("nabla_trl.grading.checker", sys.argv[3])
checker._serve(lambda: load("answers_compare", sys.argv[4]).compare, float(sys.argv[5]))
"""


def _end_workers(slots: list[_Worker | None]) -> None:
    for slot, worker in enumerate(slots):
        if worker is not None:
            worker.kill()
            slots[slot] = None


class _Worker:
    """A process that compares one pair at a time; it loads this file and answers.py, not the package."""

    def __init__(self, compare_file: str, timeout: float) -> None:
        self.timeout = timeout
        command = [
            sys.executable,
            "-c",
            _WORKER_SCRIPT,
            _EXTRACTION,
            _EQUIVALENCE,
            __file__,
            compare_file,
            str(timeout),
        ]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, encoding="ascii")
        assert self.process.stdin and self.process.stdout  # for the type checker: both are pipes
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self.has_reasoning_gym = False  # whether reasoning-gym is loaded
        hello = self._read_reply(_START_TIMEOUT_SECONDS)
        if hello != "ready":
            self.kill()
            raise RuntimeError(f"no worker for math-verify could be started: {hello or 'it gave no sign'}")

    def load_reasoning_gym(self, gold: str) -> None:
        """Load what scores this question, now and not on its first answer's time. A worker that fails will say so."""
        self.has_reasoning_gym = True
        self._send(("", gold))
        self._read_reply(_START_TIMEOUT_SECONDS)

    def _send(self, key: tuple[str, str]) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(key) + "\n")
            self._requests.flush()

    def match(self, key: tuple[str, str]) -> MatchResult:
        """The verdict on one normalised pair; a worker that hung or died has ended when this returns."""
        began = time.monotonic()
        self._send(key)
        answer = self._read_reply(self.timeout)
        late = time.monotonic() - began >= self.timeout
        if late or answer is None:
            self.kill()
        return MatchResult(answer or (MatchResult.TIMEOUT if late else MatchResult.ERROR))

    def _read_reply(self, seconds: float) -> str | None:
        """The worker's next line, or None when it died; it is killed after `seconds`."""
        timer = threading.Timer(seconds, self.process.kill)
        timer.start()
        try:
            return json.loads(self._replies.readline() or "null")
        finally:
            timer.cancel()
            timer.join()  # whether it killed the worker is settled now

    def kill(self) -> None:
        """Kill the process, reap it and close its pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self._requests, self._replies):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _run_worker(load_compare: Callable[[], Callable[[str, str], str]], timeout: float) -> None:
    """A worker's life: one JSON line (predicted, gold) in, one verdict out, until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be read as a verdict

    def reply(value: str) -> None:
        print(json.dumps(value), file=replies, flush=True)

    logging.disable(logging.WARNING)  # math-verify warns that its time-out is off
    _limit_memory()
    try:
        compare = load_compare()
        compare("1", "1")  # imports math-verify now, not on the first pair's time
    except Exception as error:
        return reply(f"{type(error).__name__}: {error}")
    reply("ready")
    for line in sys.stdin:
        predicted, gold = json.loads(line)
        # Without an answer it is asked to load what it needs.
        _set_exit_alarm(math.ceil(timeout if predicted else _START_TIMEOUT_SECONDS) + _ORPHAN_SECONDS)
        reply(compare(predicted, gold))
        _set_exit_alarm(0)


def _set_exit_alarm(seconds: int) -> None:
    """End this process in so many seconds, 0 for never: it may hang when nobody is left to kill it."""
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
