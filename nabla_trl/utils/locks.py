"""One launch at a time writes to an output folder: locks that end with the process that holds them.

Each process of a launch holds a file of its own, `.rank-00000.lock`, by the operating system's lock (`filelock`:
flock, on NFS too), so nothing is left to clean up after a kill. A file is never removed: whoever had it open would go
on with a lock that nobody else sees.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

# What file systems answer that have no locks, as Lustre without its mount option flock.
_LOCKS_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderInUse(ValueError):
    """Another launch is writing to the folder."""


@contextmanager
def lock_folder(folder: str | Path, rank: int = 0) -> Iterator[None]:
    """Hold an output folder, which is made where it is not there, for the length of a `with` block.

    Of a launch of several processes rank 0 must come first (`PartialState.main_process_first`): it also looks whether
    any other process, of whatever rank, is still there. On a file system without locks a line on stderr says so.

    Args:
        rank: of this process in its launch; the processes of one launch share a folder.

    Raises:
        InUse: another launch has it; says which process, and what to do.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".rank-{rank:05d}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(_acquire_lock(mine))
            for other in folder.glob(".rank-*.lock") if rank == 0 else ():
                if other != mine:
                    with _acquire_lock(other):
                        pass
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
            print(f"{folder} cannot be locked ({error.strerror}): let no other process write there", file=sys.stderr)
        else:
            began = time.strftime("%Y-%m-%d %H:%M")
            mine.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {began}", encoding="utf-8")
        yield


@contextmanager
def _acquire_lock(path: Path) -> Iterator[None]:
    # A lock that is a mere file would outlive its holder: rather none.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
        raise FolderInUse(
            f"{path.parent} is in use by {holder}: wait for it, stop it, or use another --output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
