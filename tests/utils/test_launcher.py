"""A process of a launch ends when its launcher is gone, and no other process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

CHILD = "from nabla_trl.utils.interrupts import end_with_launcher as end; end(0.05); print('here', flush=True); {}"
LAUNCHER = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True); {}"
WAIT = "import time; time.sleep(60)"


def launch(child: str, launcher: str, **variables: str) -> tuple[subprocess.Popen, psutil.Process]:
    """Start a launcher and its child, and wait until both run."""
    env = os.environ | variables
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(launcher), child], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None
    child_process = psutil.Process(int(process.stdout.readline()))
    return process, child_process


def has_ended(process: psutil.Process, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_process_ends_with_its_killed_launcher() -> None:
    launcher, child = launch(CHILD.format(WAIT), WAIT, TORCHELASTIC_RUN_ID="none")
    assert launcher.stdout is not None and launcher.stdout.readline() == "here\n"
    assert not has_ended(child, 0.5)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert has_ended(child, 30)


def test_a_process_ends_that_begins_when_its_launcher_is_gone() -> None:
    """The launcher is killed before the process has asked who it is, so a system process is its parent."""
    late = CHILD.format(WAIT)
    launcher, child = launch(f"import time; time.sleep(1); {late}", "", TORCHELASTIC_RUN_ID="none")
    launcher.wait()
    assert has_ended(child, 30)


def test_a_process_without_a_launcher_goes_on_when_its_shell_is_gone() -> None:
    launcher, child = launch(CHILD.format(WAIT), WAIT)
    assert launcher.stdout is not None and launcher.stdout.readline() == "here\n"
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    try:
        assert not has_ended(child, 1.5)
    finally:
        child.kill()
