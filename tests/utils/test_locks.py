"""Locks of output folders, with real processes: one launch at a time, and nothing left of a dead one."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest
from lock_holder import holder

from nabla_trl.utils import locks
from nabla_trl.utils.locks import FolderInUse, lock_folder


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_launch_is_told_whose_the_folder_is(tmp_path: Path, rank: int) -> None:
    """Also where the first process of the other launch is gone, and only its second is left."""
    with holder(tmp_path, rank) as process:
        with pytest.raises(FolderInUse) as caught, lock_folder(tmp_path):
            pass
        where = f"process {process.pid} on {socket.gethostname()}, since 2"
        assert str(caught.value).startswith(f"{tmp_path} is in use by {where}")
        assert str(caught.value).endswith("wait for it, stop it, or use another --output_dir")
    with lock_folder(tmp_path):
        pass


def test_the_processes_of_one_launch_share_a_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path), holder(tmp_path, 1), pytest.raises(FolderInUse), lock_folder(tmp_path, 1):
        pass


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock_folder(tmp_path):
            pass


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        ready, go = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            os.write(ready[1], b"1")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with lock_folder(tmp_path):
            pass
    finally:
        os.write(go[1], b"1")
        os.waitpid(child, 0)


def test_a_refused_launch_leaves_the_holders_note(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        note = next(tmp_path.iterdir()).read_text()
        for _ in range(2):
            with pytest.raises(FolderInUse), lock_folder(tmp_path):
                pass
        assert next(tmp_path.iterdir()).read_text() == note


def test_a_refused_launch_leaves_no_new_folder_and_a_stopped_one_leaves_its_results(tmp_path: Path) -> None:
    new = tmp_path / "outputs" / "new"
    with pytest.raises(ValueError, match="refused"), lock_folder(new), lock_folder(new, 1):
        (new / "config.yaml").write_text("dataset: none\n")
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), lock_folder(new):
        (new / "rows.jsonl").write_text("{}\n")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="refused"), lock_folder(new):
        raise ValueError("refused")
    assert (new / "rows.jsonl").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="refused"), lock_folder(tmp_path / "mine"):
        raise ValueError("refused")
    assert (tmp_path / "mine").is_dir(), "it was there before"


def test_where_there_are_no_locks_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_flock(path: Path, **options: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks, "FileLock", no_flock)
    with lock_folder(tmp_path):
        pass
    line = f"{tmp_path} cannot be locked (Function not implemented): let no other process write there"
    assert caplog.messages == [line]
