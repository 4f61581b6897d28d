"""Compare answers in processes that can be killed.

`AnswerChecker` compares plain numbers in the calling process. math-verify compares everything else. math-verify can
hang, and its own time limits need `SIGALRM`, which works in the main thread only and does not interrupt C code. So
math-verify runs in worker processes that this module starts, times and kills.

A worker is a `subprocess` that exchanges JSON lines, not a `multiprocessing` process. `spawn` and `forkserver`, and
with them `pebble.ProcessPool`, import the caller's main script into every worker. For a script that imports torch the
first comparison then takes 7 s instead of 1 s, also after every kill. A script without a `__main__` guard fails.
"""

from __future__ import annotations

import contextlib
import importlib
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
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nabla_trl.grading.equivalence import VERIFIER_PREFIX, MatchResult, match_without_worker

_MAX_CACHED_RESULTS = 100_000
# A time-out counts as the fault of the pair if the worker computed for this share of the time. On a busy machine or
# after a crash the pair is tried once more.
_BUSY_SHARE = 0.5
_MAX_ATTEMPTS = 2
# After so many points of time-outs with different partners an answer is not compared any more. A time-out of a worker
# that computed counts 2 points, and of a worker without a processor 1 point.
_MAX_POINTS_OF_PREDICTED = 4
_MAX_POINTS_OF_GOLD = 6
_START_TIMEOUT_SECONDS = 120.0  # importing sympy on a busy machine
_ORPHAN_SECONDS = 2  # how long after its time limit a worker ends by itself, in case its parent is gone
_MAX_MEMORY_BYTES = 4 << 30
_WORKER_SCRIPT = """
import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
import json, sys; sys.path[:] = json.loads(sys.argv[1])
from nabla_trl.grading.checker import _run_worker; _run_worker(sys.argv[2], float(sys.argv[3]))
"""


class _Memory:
    """The results of a process, so that no pair, and no answer that takes endless time, is paid for twice."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str], MatchResult] = {}
        self._attempts: Counter[tuple[str, str]] = Counter()
        # For each side of a pair: the points of each text for its time-outs, and the texts that were compared in time.
        self._points: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        self._decided: tuple[set[str], set[str]] = (set(), set())

    def get(self, key: tuple[str, str]) -> MatchResult | None:
        """Return the result of a pair if it is known, also if one of its sides has always timed out."""
        if (result := self.results.get(key)) is not None:
            return result
        limits = (_MAX_POINTS_OF_PREDICTED, _MAX_POINTS_OF_GOLD)
        for text, limit, points, decided in zip(key, limits, self._points, self._decided, strict=True):
            if points[text] >= limit and text not in decided:
                return MatchResult.TIMEOUT
        return None

    def add(self, key: tuple[str, str], result: MatchResult, is_final: bool) -> None:
        """Store the result of a comparison. A result that is not final is stored after the second attempt."""
        if len(self.results) > _MAX_CACHED_RESULTS:
            self.__init__()  # type: ignore[misc]
        for text, points, decided in zip(key, self._points, self._decided, strict=True):
            if result is MatchResult.TIMEOUT:
                points[text] += 2 if is_final else 1
            elif result is not MatchResult.ERROR:
                decided.add(text)
        self._attempts[key] += 1
        if is_final or self._attempts[key] >= _MAX_ATTEMPTS:
            self.results[key] = result


_DEFAULT_MATCHER = "nabla_trl.grading.equivalence"
_shared_memories: dict[float, _Memory] = {}  # for each time limit, because a longer one may find more


class AnswerChecker:
    """A comparer of predicted with gold answers. It is a context manager and may be called from any thread.

    Args:
        num_workers: maximum number of worker processes. A worker starts when a pair first needs one.
        timeout: seconds for one comparison. After that the worker is killed and replaced, and the pair is TIMEOUT.
            A pair that ends its worker is ERROR.
        matcher: name of an importable module of yours with a function `match_answers(predicted, gold)`, which returns
            True or False. It compares every pair, as written, in place of the built-in comparison.

    Attributes:
        counts: how often each result was returned.

    Raises:
        ValueError: if `num_workers` is below 1 or `timeout` is not positive.
    """

    def __init__(
        self,
        num_workers: int = 1,
        timeout: float = 5.0,
        *,
        matcher: str | None = None,
        _matcher_module: str = _DEFAULT_MATCHER,
    ) -> None:
        if num_workers < 1 or not timeout > 0:
            raise ValueError(f"num_workers must be at least 1 and timeout above 0, not {num_workers} and {timeout}")
        self.counts: Counter[MatchResult] = Counter()
        self._timeout, self._matcher_module = timeout, matcher or _matcher_module
        self._match_at_once = match_without_worker if matcher is None else _find_missing
        self._workers: list[_Worker | None] = [None] * num_workers
        is_shared = self._matcher_module == _DEFAULT_MATCHER
        self._memory = _shared_memories.setdefault(timeout, _Memory()) if is_shared else _Memory()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_workers, self._workers)

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers and wait until they are gone. A later `check` starts new ones."""
        with self._lock:
            _kill_workers(self._workers)

    def check(self, pairs: Sequence[tuple[str | None, str | None]]) -> list[MatchResult]:
        """Compare (predicted, gold) pairs and return the results in the same order.

        Args:
            pairs: a predicted answer is what `extract_answer` returns. A gold answer may also be a worked solution
                with a box or `####`. The result is NO_GOLD without a gold answer, else NO_ANSWER without a predicted
                one. A gold answer without a predicted answer is not parsed, so it is never BAD_GOLD.

        Raises:
            RuntimeError: if no worker can be started.
        """
        with self._lock:
            keys = [self._match_at_once(predicted, gold) for predicted, gold in pairs]
            known = {key: result for key in keys if isinstance(key, tuple) and (result := self._memory.get(key))}
            new_keys = [key for key in dict.fromkeys(keys) if isinstance(key, tuple) and key not in known]
            known |= self._match_in_workers(new_keys) if new_keys else {}
            results = [key if isinstance(key, MatchResult) else known[key] for key in keys]
            self.counts.update(results)
        return results

    def _match_in_workers(self, keys: list[tuple[str, str]]) -> dict[tuple[str, str], MatchResult]:
        """Compare distinct pairs in the workers, with one thread for each worker."""
        pending, results = deque(keys), {}

        def feed_worker(index: int) -> None:
            with contextlib.suppress(IndexError):  # the queue, which all threads share, is empty
                while True:
                    key = pending.popleft()
                    # Another pair of the same call may have shown that an answer takes endless time.
                    results[key] = self._memory.get(key) or self._match_in_worker(index, key)

        num_threads = min(len(self._workers), len(keys))
        with ThreadPoolExecutor(num_threads) as executor:
            try:
                for future in [executor.submit(feed_worker, index) for index in range(num_threads)]:
                    future.result()
            except BaseException:  # Ctrl-C too: threads end once the queue is empty and their workers are gone
                pending.clear()
                _kill_workers(self._workers)
                raise
        return results

    def _match_in_worker(self, index: int, key: tuple[str, str]) -> MatchResult:
        worker = self._workers[index]
        if worker is None or worker.process.poll() is not None:
            worker = self._workers[index] = _Worker(self._matcher_module, self._timeout)
        if key[1].startswith(VERIFIER_PREFIX) and not worker.has_reasoning_gym:
            worker.load_reasoning_gym(key[1])
        result, is_final = worker.match(key)
        self._memory.add(key, result, is_final)
        return result


def _find_missing(predicted: str | None, gold: str | None) -> MatchResult | tuple[str, str]:
    """Return the pair for a comparison that knows all answers itself, or which side is missing."""
    if gold is None or not gold.strip():
        return MatchResult.NO_GOLD
    return (predicted.strip(), gold.strip()) if predicted and predicted.strip() else MatchResult.NO_ANSWER


# --- worker processes -----------------------------------------------------------------------------


class _Worker:
    """A process that compares one pair at a time.

    Raises:
        RuntimeError: if the process cannot be started.
    """

    def __init__(self, matcher_module: str, timeout: float) -> None:
        self.timeout = timeout
        import_path = json.dumps(list(map(str, sys.path)))
        command = [sys.executable, "-c", _WORKER_SCRIPT, import_path, matcher_module, str(timeout)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, encoding="ascii")
        assert self.process.stdin and self.process.stdout  # for the type checker: both are pipes
        self._requests, self._replies = self.process.stdin, self.process.stdout
        self.has_reasoning_gym = False
        self._cpu_seconds = 0.0  # of the process when it last replied
        greeting = self._read_reply(_START_TIMEOUT_SECONDS)
        if greeting != "ready":
            self.kill()
            raise RuntimeError(f"no worker for math-verify could be started: {greeting or 'it did not answer'}")

    def load_reasoning_gym(self, gold: str) -> None:
        """Load the scorer of a question now, so that its time does not count for the first answer."""
        self.has_reasoning_gym = True
        self._send(("", gold))
        self._read_reply(_START_TIMEOUT_SECONDS)

    def match(self, key: tuple[str, str]) -> tuple[MatchResult, bool]:
        """Compare one normalized pair. A worker that hung or crashed has ended when this returns.

        Returns:
            The result, and whether another attempt would have the same result. A worker that had no processor, or that
            crashed, may do better.
        """
        began = time.monotonic()
        self._send(key)
        reply = self._read_reply(self.timeout)
        if reply is not None and time.monotonic() - began < self.timeout:
            return MatchResult(reply), True
        cpu_seconds = self.kill()
        if reply is not None:  # it came at the last moment
            return MatchResult(reply), reply != MatchResult.ERROR
        if time.monotonic() - began < self.timeout:
            return MatchResult.ERROR, False
        return MatchResult.TIMEOUT, cpu_seconds is None or cpu_seconds >= _BUSY_SHARE * self.timeout

    def kill(self) -> float | None:
        """Kill the process, reap it and close its pipes.

        Returns:
            The seconds that it computed since its last reply, or None where the system does not tell.
        """
        cpu_seconds = None
        if hasattr(os, "wait4") and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGKILL)  # Popen.kill would reap a process that has ended
                usage = os.wait4(self.process.pid, 0)[2]
                cpu_seconds = usage.ru_utime + usage.ru_stime - self._cpu_seconds
        self.process.kill()
        self.process.wait()
        for stream in (self._requests, self._replies):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return cpu_seconds

    def _send(self, key: tuple[str, str]) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(key) + "\n")
            self._requests.flush()

    def _read_reply(self, timeout: float) -> str | None:
        """Return the next line of the worker, or None if it died. Kill the worker after `timeout` seconds."""
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        try:
            line = self._replies.readline()
            reply, self._cpu_seconds = json.loads(line) if line else (None, self._cpu_seconds)
            return reply
        finally:
            timer.cancel()
            timer.join()  # afterwards the timer cannot kill the worker any more


def _kill_workers(workers: list[_Worker | None]) -> None:
    for index, worker in enumerate(workers):
        if worker is not None:
            worker.kill()
            workers[index] = None


def _run_worker(matcher_module: str, timeout: float) -> None:
    """Read (predicted, gold) pairs as JSON lines and write one result for each, until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be read as a result

    def reply(value: str) -> None:
        print(json.dumps((value, time.process_time())), file=replies, flush=True)

    logging.disable(logging.WARNING)  # math-verify warns that its time limit is off
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
    try:
        match_answers = importlib.import_module(matcher_module).match_answers
        match_answers("1", "1")  # imports math-verify now, so that its time does not count for the first pair
    except Exception as error:
        return reply(f"{type(error).__name__}: {error}")
    reply("ready")
    for line in sys.stdin:
        predicted, gold = json.loads(line)
        # A pair without a predicted answer asks to load what the gold answer needs.
        _set_exit_alarm(math.ceil(timeout if predicted else _START_TIMEOUT_SECONDS) + _ORPHAN_SECONDS)
        result = match_answers(predicted, gold)
        reply({True: "correct", False: "incorrect"}.get(result, result))
        _set_exit_alarm(0)


def _set_exit_alarm(seconds: int) -> None:
    """End this process after so many seconds, 0 for never. A parent that is gone cannot kill a worker that hangs."""
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
