"""Locks of output folders: one launch at a time writes to a folder, or the shards of one output.

Each process of a launch locks a file of its own, `.rank-00000.lock`, with the operating system (`filelock` uses flock,
which NFS has too). A shard is a launch of its own, and locks the file of its number. Such a lock ends with its
process, so nothing needs cleaning up after a kill. The file is never removed, because a process that has opened it
would otherwise hold a lock that no other process sees.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# Errors of file systems without locks, such as Lustre without its mount option flock.
_LOCKS_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# Files that say how a run was started. Without another file beside them there is nothing to continue.
_NOTES = ("config.yaml", "template_date.json")
_SHARD_NOTE = ", shard {}/{}"  # the end of a lock file's text


class FolderInUse(ValueError):
    """Another launch is writing to the folder."""


@contextmanager
def lock_folder(folder: str | Path, rank: int = 0, num_shards: int = 1) -> Iterator[None]:
    """Lock an output folder for the length of a `with` block. Create the folder if it does not exist.

    A folder that is created here is removed again if the block raises an error before it has written a result.

    In a launch of several processes rank 0 must be the first (`PartialState.main_process_first`), because it also
    checks the locks of all other ranks. On a file system without locks it logs a warning.

    Args:
        rank: rank of this process in its launch, or number of its shard. The processes of one launch share a folder.
        num_shards: number of shards, which share a folder although each of them is a launch. 1: no shards.

    Raises:
        FolderInUse: if another launch holds a lock, other than another shard of as many. The message names its
            process.
        OSError: if the folder cannot be written to.
    """
    folder = Path(folder)
    missing_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    own_file = folder / f".rank-{rank:05d}.lock"
    with ExitStack() as stack:
        try:
            # One process starts at a time, because a process that looks at a lock holds it for a moment.
            with hold_lock(folder / ".start.lock"):
                stack.enter_context(hold_lock(own_file, 0))
                for other_file in folder.glob(".rank-*.lock") if rank == 0 or num_shards > 1 else ():
                    if other_file != own_file:
                        _check_other_lock(other_file, num_shards)
                own_file.write_text(_describe_process(rank, num_shards), encoding="utf-8")
        except OSError as error:
            if error.errno not in _LOCKS_UNSUPPORTED:
                raise
            logger.warning("%s cannot be locked (%s): let no other process write there", folder, error.strerror)
        try:
            yield
        except BaseException:
            _remove_folders_without_results(missing_folders)
            raise


def _remove_folders_without_results(folders: Sequence[Path]) -> None:
    """Remove folders that hold only notes of a run that was refused, the innermost first."""
    with suppress(OSError):  # the error that is on its way matters more
        for folder in folders:
            if any(path.is_dir() or (path.name not in _NOTES and path.suffix != ".lock") for path in folder.iterdir()):
                return
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def _describe_process(rank: int, num_shards: int) -> str:
    shard = _SHARD_NOTE.format(rank, num_shards) if num_shards > 1 else ""
    start = time.strftime("%Y-%m-%d %H:%M")
    return f"process {os.getpid()} on {socket.gethostname()}, since {start}{shard}"


def _check_other_lock(path: Path, num_shards: int) -> None:
    """Refuse the lock of another process, unless it is another shard of as many."""
    try:
        with hold_lock(path, 0):
            pass
    except FolderInUse:
        note = _SHARD_NOTE.format(int(path.stem.rpartition("-")[2]), num_shards)
        if num_shards < 2 or not path.read_text(encoding="utf-8", errors="replace").endswith(note):
            raise


@contextmanager
def hold_lock(path: Path, seconds: float = 60.0) -> Iterator[None]:
    """Hold a lock for the length of a `with` block.

    Args:
        seconds: how long to wait for it.

    Raises:
        FolderInUse: if another process holds it for longer.
        OSError: if the file cannot be written, or the file system has no locks.
    """
    # filelock's fallback, a lock by the existence of a file, would outlive its process.
    lock = FileLock(path, timeout=seconds, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
        raise FolderInUse(
            f"{path} has been locked for {seconds:.0f} s: is the process that holds it stopped?"
            if seconds
            else f"{path.parent} is in use by {holder}: wait for it, stop it, or use another --output_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
