"""Processes of a launch: none outlives its launcher, and one that stalls is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import worlds
from torch.distributed import HashStore

from nabla_trl.cli.launch import StallWatch, check_stall_minutes, watch_for_stalls
from nabla_trl.traces.storage import read_traces

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


# --- signs of life ----------------------------------------------------------------------------------------


def make_watches(count: int, store: HashStore, sentences: dict[int, str]) -> list[StallWatch]:
    watches = [
        StallWatch(rank, count, lambda: store, lambda text, rank=rank: sentences.update({rank: text}))
        for rank in range(count)
    ]
    for watch in watches:
        watch.limit_seconds = 0.4
    return watches


def test_a_silent_rank_is_named_once_and_a_finished_one_is_not() -> None:
    store, sentences = HashStore(), {}
    store.set_timeout(timedelta(seconds=1))
    first, second, third = make_watches(3, store, sentences)
    for watch in (first, second, third):
        watch.start()
    assert wait_until(lambda: len(first._last_beats) == 2, 10)
    second.finish()
    assert not wait_until(lambda: bool(sentences), 1.0)
    third._stop.set()  # without a word, as a killed process
    third._beat = lambda *_: None  # type: ignore[method-assign]
    assert wait_until(lambda: bool(sentences), 10)
    assert list(sentences) == [0]
    note = f"rank 2 (process {os.getpid()} on {socket.gethostname()}) gave no sign of life for 0.00667 minutes"
    assert sentences[0].startswith(note)
    first.finish()


def test_a_rank_that_never_started_has_time_to_start() -> None:
    sentences: dict[int, str] = {}
    watch, _ = make_watches(2, HashStore(), sentences)
    watch._silent_seconds[1] = 599.0
    assert watch._list_stalled(0.4) == []
    watch._silent_seconds[1] = 601.0
    assert watch._list_stalled(0.4) == [1]


def test_a_store_that_is_not_there_yet_is_asked_again() -> None:
    store, calls = HashStore(), []

    def connect() -> HashStore:
        calls.append(threading.current_thread())
        if len(calls) < 3:
            raise RuntimeError("connection refused")
        return store

    watch = StallWatch(0, 2, connect, lambda text: None)
    watch.start()
    assert wait_until(lambda: store.check(["0"]), 10) and len(calls) == 3
    watch.finish()
    assert store.get("0") == b"finished" and not watch._thread.is_alive()


def test_a_lone_process_has_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with watch_for_stalls() as watch:
        assert watch is None


@pytest.mark.parametrize("minutes", [-1.0, float("nan"), float("inf")])
def test_limits_that_are_refused(minutes: float) -> None:
    worlds.refused(lambda: check_stall_minutes(minutes), "stall_minutes must be a number of at least 0")


# --- real launches ----------------------------------------------------------------------------------------


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Launch:
    """`accelerate launch` of two processes on the CPU that generate traces."""

    def __init__(self, folder: Path, port: int, *more: str, problems: int = 400):
        launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/multi_cpu.yaml"]
        recipe = ["recipes/distill.py", "--config", "recipes/tiny/distill.yaml", "--output_dir", str(folder)]
        recipe += ["--stages", "traces", "--max_train_problems", str(problems), "--batch_size", "4", *more]
        command = [sys.executable, *launch, "--main_process_port", str(port), *recipe, "--max_audit_problems", "0"]
        self.folder, self.port = folder, port
        self.log = (folder.parent / f"{folder.name}.log").open("w+")
        self.process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=self.log, stderr=self.log)

    def read_log(self) -> str:
        return Path(self.log.name).read_text()

    def find_workers(self) -> list[psutil.Process]:
        """Return the two processes in the order of their ranks."""
        try:
            children = psutil.Process(self.process.pid).children()
            ranks = {child.environ().get("RANK"): child for child in children}
        except psutil.Error:
            return []
        return [ranks[rank] for rank in ("0", "1")] if {"0", "1"} <= set(ranks) else []

    def wait_for_workers(self) -> list[psutil.Process]:
        assert wait_until(lambda: len(self.find_workers()) == 2, 120), self.read_log()
        return self.find_workers()

    def wait_for_traces(self) -> None:
        """Wait until both ranks have written."""
        both = lambda: len({path.name[:12] for path in self.folder.glob("traces/*.parquet")}) == 2  # noqa: E731
        assert wait_until(both, 300), self.read_log()


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("group_stands", [False, True])
def test_workers_end_with_a_killed_launcher_and_leave_the_port(tmp_path: Path, group_stands: bool) -> None:
    port = find_free_port()
    launch = Launch(tmp_path / "run", port)
    workers = launch.wait_for_workers()
    if group_stands:
        launch.wait_for_traces()
    launch.process.send_signal(signal.SIGKILL)
    launch.process.wait()
    killed_at = time.monotonic()
    assert wait_until(lambda: all(map(has_ended, workers)), 90), launch.read_log()
    # After the imports, which take a while on a busy machine, it is a matter of the poll interval.
    assert not group_stands or time.monotonic() - killed_at < 15
    again = Launch(tmp_path / "run", port, problems=24)  # the same port and folder, at once
    assert again.process.wait(timeout=400) == 0, again.read_log()
    assert len({trace.problem_id for trace in read_traces(tmp_path / "run/traces")}) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_worker_ends_the_launch_with_a_line_that_names_its_rank(tmp_path: Path, rank: int) -> None:
    launch = Launch(tmp_path / "run", find_free_port(), "--stall_minutes", "0.25")
    workers = launch.wait_for_workers()
    launch.wait_for_traces()
    workers[rank].send_signal(signal.SIGSTOP)
    assert launch.process.wait(timeout=180) != 0
    lines = [line for line in launch.read_log().splitlines() if "gave no sign of life" in line]
    assert len(lines) == 1 and f"error: rank {rank} (process {workers[rank].pid} on " in lines[0], launch.read_log()
    assert "for 0.25 minutes: stopped, hanging, or its machine is gone" in lines[0]
    assert wait_until(lambda: all(map(has_ended, workers)), 60)
