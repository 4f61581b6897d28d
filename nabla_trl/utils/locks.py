"""Locks of output folders: one launch at a time writes to a folder.

Each process of a launch locks a file of its own, `.rank-00000.lock`, with the operating system (`filelock` uses flock,
which NFS has too). Such a lock ends with its process, so nothing needs cleaning up after a kill. The file is never
removed, because a process that has opened it would otherwise hold a lock that no other process sees.
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

# Errors of file systems without locks, such as Lustre without its mount option flock.
_LOCKS_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderInUse(ValueError):
    """Another launch is writing to the folder."""


@contextmanager
def lock_folder(folder: str | Path, rank: int = 0) -> Iterator[None]:
    """Lock an output folder for the length of a `with` block. Create the folder if it does not exist.

    In a launch of several processes rank 0 must be the first (`PartialState.main_process_first`), because it also
    checks the locks of all other ranks. On a file system without locks it prints a warning on stderr.

    Args:
        rank: rank of this process in its launch. The processes of one launch share a folder.

    Raises:
        FolderInUse: if another launch holds a lock. The message names its process.
        OSError: if the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own_file = folder / f".rank-{rank:05d}.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(_acquire_lock(own_file))
            for other_file in folder.glob(".rank-*.lock") if rank == 0 else ():
                if other_file != own_file:
                    with _acquire_lock(other_file):
                        pass
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
            print(f"{folder} cannot be locked ({error.strerror}): let no other process write there", file=sys.stderr)
        else:
            start = time.strftime("%Y-%m-%d %H:%M")
            own_file.write_text(f"process {os.getpid()} on {socket.gethostname()}, since {start}", encoding="utf-8")
        yield


@contextmanager
def _acquire_lock(path: Path) -> Iterator[None]:
    # filelock's fallback, a lock by the existence of a file, would outlive its process.
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
