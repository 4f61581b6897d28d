"""Progress: the figures are right, lines are few, and a bar fits 80 columns."""

from __future__ import annotations

import io
import re
from time import sleep

import pytest
from rich.console import Console

from nabla_trl.utils import progress as progress_
from nabla_trl.utils.progress import ProgressDisplay
from nabla_trl.utils.statistics import wilson_interval


class Time:
    """A clock that goes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(progress_, "time", clock)
    return clock


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ={})


def said(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_rate_accuracy_time_to_go_and_flops(time: Time) -> None:
    log = console(terminal=False)
    with ProgressDisplay("nabla", 10, console=log) as display:
        display.add_items([("a", True, 1e9), ("b", False, 1e9)], is_new=False)
        assert display.estimate_seconds_left() is None and display.format_line() == (
            "nabla: 2 of 10, accuracy 0.500 [0.095, 0.905], 2 GFLOPs"  # Wilson's interval of one in two
        )
        time.now += 10
        display.add_items([("c", True, 1e9), ("d", None, 5e8)])
        assert display.estimate_seconds(3) == 15
        assert display.estimate_seconds_left() == 30, (
            "six to go at five seconds each: what was there before tells nothing"
        )
        time.now += 4
        assert display.estimate_seconds_left() == 26
        display.add_items([("a", False, 1e9)])  # another seed: problems count once
        mean = (0.5 + 0 + 1) / 3
        low, high = wilson_interval(mean, 3)
        assert f"accuracy {mean:.3f} [{low:.3f}, {high:.3f}], 4.5 GFLOPs" in display.format_line()


def test_wilson_against_the_formula_of_the_text() -> None:
    """It is the set of shares p whose z-score against what was seen is at most 1.96."""
    for share, count in ((0.0, 5), (0.5, 2), (0.9, 300), (1.0, 7)):
        for end in wilson_interval(share, count):
            if 0 < end < 1:
                assert (share - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count)
    assert wilson_interval(0.0, 5)[0] == 0 and wilson_interval(1.0, 7)[1] == 1


def test_a_log_gets_a_line_now_and_then(time: Time) -> None:
    log = console(terminal=False)
    with ProgressDisplay("nabla", 36_000, console=log) as display:
        for _ in range(36_000):  # ten hours, an item a second
            time.now += 1
            display.add_items([("a", True, 1e9)])
    lines = said(log)
    assert 80 < len(lines) < 140
    assert lines[0].startswith("nabla: 10 of 36000, 9:59:50 to go, 1 problems/s, accuracy 1.000 [")
    assert lines[-1].startswith("nabla: 36000 of 36000, ") and lines[-1].endswith("36 TFLOPs, took 10:00:00")
    assert not any("\r" in line or "\x1b" in line for line in lines)


def test_what_is_done_at_once_is_one_line_and_what_was_there_none(time: Time) -> None:
    log = console(terminal=False)
    with ProgressDisplay("greedy", 2, console=log) as display:
        display.add_items([("a", True, 1e9), ("b", True, 1e9)], is_new=False)
    assert said(log) == []
    with ProgressDisplay("greedy", 2, console=log, show_progress=False) as display:
        display.add_items([("a", True, 1e9), ("b", True, 1e9)])
    assert said(log) == []
    with ProgressDisplay("greedy", 2, console=log) as display:
        display.add_items([("a", True, 1e9), ("b", True, 1e9)])
    assert len(said(log)) == 1


@pytest.mark.parametrize("name", ["nabla", "reward_weighted_self_consistency_16"])
def test_a_bar_fits_80_columns_and_goes_when_it_is_done(name: str) -> None:
    terminal = console(terminal=True)
    with ProgressDisplay(name, 90_000, console=terminal) as display:
        display.add_items([(str(n), n % 3 > 0, 1.234e15) for n in range(45_678)])
        last = terminal.file.getvalue().split("\x1b[2K")[-1]
        frame = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", last).splitlines()
    assert len(frame) == 2 and all(len(line) <= 80 for line in frame)
    assert frame[0].startswith(name[:12]) and "45678/90000" in frame[0] and "to go" in frame[0]
    assert "accuracy 0.667 [0.662, 0.671], 56.4 EFLOPs" in frame[1]
    last = said(terminal)[-2:]
    assert f"{name}: 45678 of 90000" in last[0] and "took 0:00:0" in last[1] and max(map(len, last)) <= 100


def test_a_long_batch_and_a_long_loading_are_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_, "_LINE_SECONDS", 0.02)
    monkeypatch.setattr(progress_, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(progress_, "_ANNOUNCE_SECONDS", 0.02)
    log = console(terminal=False)
    with ProgressDisplay("nabla", 2, console=log, show_progress=True):
        for _ in range(100):
            if len(said(log)) >= 2:
                break
            sleep(0.02)
    assert said(log)[0] == "nabla: 0 of 2, 0:00:00 so far"
    other = console(terminal=False)
    with progress_.announce("loading P", console=other):
        for _ in range(100):
            if len(said(other)) >= 2:
                break
            sleep(0.02)
    assert said(other)[0] == "loading P …" and said(other)[1].startswith("loading P, 0:00:00 so far")
    quick = console(terminal=False)
    monkeypatch.setattr(progress_, "_ANNOUNCE_SECONDS", 60.0)
    with progress_.announce("loading P", console=quick), progress_.announce("loading Q", show=False):
        pass
    assert said(quick) == []


def test_steps_of_a_training(time: Time) -> None:
    log = console(terminal=False)
    with progress_.StepDisplay("train rloo", 40, num_done=10, console=log) as display:
        time.now += 30
        display.metrics = {"loss": 0.12345, "reward": -1.0, "KL": 0.01}
        display.set_step(20)
    assert said(log) == ["train rloo: step 20 of 40, 0:01:00 to go, loss 0.1235, reward -1, KL 0.01, 3 s/step"]


@pytest.mark.parametrize(("each", "words"), [(0.1, "10 problems/s"), (12.0, "12 s/problem"), (5400, "90 min/problem")])
def test_slow_work_is_told_by_the_problem(time: Time, each: float, words: str) -> None:
    with ProgressDisplay("nabla", 3, console=console(False)) as display:
        time.now += each
        display.add_items([("a", None, 0.0)])
        assert display.format_metrics() == words
