"""Notice when a process of a launch stalls. All others would wait for it, for as long as their process group allows.

A thread of every process counts up a number in the store of the launch, and reads the numbers of the others. If a
number stands still, its process is stopped, its machine is gone, or it hangs in a call that holds the interpreter. The
process that notices this ends with a line that names the rank, and the launcher ends the rest.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from nabla_trl.utils.interrupts import end_with_launcher

if TYPE_CHECKING:
    from torch.distributed import Store

DEFAULT_STALL_MINUTES = 10.0
STALL_MINUTES_HELP = (
    "End the launch if one of its processes gives no sign of life for so many minutes. A line names its rank. "
    "Increase it if your machines are suspended for longer. 0 disables it."
)
_MAX_BEAT_SECONDS = 5.0  # between two signs of life
_START_SECONDS = 60 * DEFAULT_STALL_MINUTES  # for a process to start
_FINISHED = b"finished"


def check_stall_minutes(minutes: float) -> None:
    """Raise ValueError if the option is negative or no number."""
    if not 0 <= minutes < math.inf:
        raise ValueError(f"stall_minutes must be a number of at least 0, not {minutes}")


class StallWatch:
    """The signs of life of the processes of a launch.

    Args:
        rank: rank of this process.
        connect: returns the store of the launch. Called in the thread, again after an error.
        on_stall: called with a sentence once a rank has stalled.

    Attributes:
        limit_seconds: for how long a rank may be silent. 0: for ever.
    """

    def __init__(self, rank: int, world_size: int, connect: Callable[[], Store], on_stall: Callable[[str], None]):
        self.rank, self.limit_seconds = rank, 60 * DEFAULT_STALL_MINUTES
        self._connect, self._on_stall = connect, on_stall
        self._silent_seconds = {other: 0.0 for other in range(world_size) if other != rank}
        self._last_beats: dict[int, bytes] = {}
        self._num_beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall watch", daemon=True)

    def start(self) -> None:
        """Begin to beat and to watch."""
        self._thread.start()

    def finish(self) -> None:
        """Tell the other processes that this one is done, and stop watching."""
        self._stop.set()
        self._thread.join(timeout=2 * _MAX_BEAT_SECONDS)

    def _run(self) -> None:
        store, previous = None, time.monotonic()
        while True:
            limit = self.limit_seconds
            interval = min(_MAX_BEAT_SECONDS, limit / 8 or _MAX_BEAT_SECONDS)
            is_last = self._stop.wait(interval if store is not None else 0.1)
            # Time in which this process did not run itself, such as a suspended machine's, is not counted.
            now = time.monotonic()
            elapsed, previous = min(now - previous, 2 * interval), now
            try:
                store = store or self._connect()
                self._beat(store, is_last)
                if is_last:
                    return
                self._listen(store, elapsed)
            except RuntimeError:  # of a store that is not there yet, or not there any more
                store = None
                if is_last:
                    return
            if limit and (stalled := self._list_stalled(limit)):
                self._report(stalled, limit, interval)
                return

    def _beat(self, store: Store, is_last: bool) -> None:
        self._num_beats += 1
        note = f"process {os.getpid()} on {socket.gethostname()}|{self._num_beats}".encode()
        store.set(str(self.rank), _FINISHED if is_last else note)

    def _listen(self, store: Store, elapsed: float) -> None:
        """Add up the time for which each other rank has been silent."""
        for rank in self._silent_seconds:
            beat = store.get(str(rank)) if store.check([str(rank)]) else b""
            if beat == _FINISHED or beat != self._last_beats.get(rank, b""):
                self._last_beats[rank], self._silent_seconds[rank] = beat, 0.0
            else:
                self._silent_seconds[rank] += elapsed

    def _list_stalled(self, limit: float) -> list[int]:
        """Return the ranks that are silent for too long. One that was never heard may still be importing."""
        limits = {
            rank: limit if rank in self._last_beats else max(limit, _START_SECONDS) for rank in self._silent_seconds
        }
        return [rank for rank, seconds in self._silent_seconds.items() if seconds > limits[rank]]

    def _report(self, stalled: list[int], limit: float, interval: float) -> None:
        first = min(rank for rank in (self.rank, *self._silent_seconds) if rank not in stalled)
        if self.rank != first and self._stop.wait(4 * interval):  # one line is enough, if that rank lives to print it
            return
        names = ", ".join(f"rank {rank} ({self._describe(rank)})" for rank in stalled)
        self._on_stall(
            f"{names} gave no sign of life for {limit / 60:.3g} minutes: stopped, hanging, or its machine is gone. "
            "This launch ends, and the same command goes on"
        )

    def _describe(self, rank: int) -> str:
        return self._last_beats.get(rank, b"").decode().partition("|")[0] or "never started"


@contextmanager
def join_launch() -> Iterator[StallWatch | None]:
    """Take part in a launch for the length of a `with` block, as its only process or as one of several.

    The process ends with its launcher, and notices processes that stall. Enter the block before anything of
    accelerate, because the first state chooses the back end.
    """
    import torch
    from accelerate import PartialState

    end_with_launcher()
    with watch_for_stalls() as watch:
        # A process may wait for hours for another process that draws longer responses.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
        yield watch


@contextmanager
def watch_for_stalls() -> Iterator[StallWatch | None]:
    """Watch the other processes of this launch for the length of a `with` block. None without other processes.

    Set `limit_seconds` of the watch once the options are known. Until then it is `DEFAULT_STALL_MINUTES`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size < 2 or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        yield None
        return
    watch = StallWatch(int(os.environ["RANK"]), world_size, _connect_to_store, _end_process)
    watch.start()
    try:
        yield watch
    finally:
        watch.finish()


def _connect_to_store() -> Store:
    """Return a connection of its own to the store of the launch. Others block for as long as a process waits."""
    from torch.distributed import PrefixStore, TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
    attempt = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    return PrefixStore("/".join(["nabla_trl", *attempt]), store)


def _end_process(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
