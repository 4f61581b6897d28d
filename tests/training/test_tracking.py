"""Experiment trackers get the figures of traces and evaluations, and never end a run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import worlds
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from nabla_trl.evaluation.plan import EvaluationSetup, plan_jobs
from nabla_trl.evaluation.rows import RowStore
from nabla_trl.evaluation.runner import run_job
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.search.batches import search_in_batches
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.summary import TraceTotals
from nabla_trl.training import reporting
from nabla_trl.training.reporting import list_trackers, track_metrics
from nabla_trl.utils.progress import report_metrics

PROBLEMS = [Problem(f"q{index}", question, "7") for index, question in enumerate(worlds.QUESTIONS)]


class Tracker:
    """A tracker as accelerate starts them, which writes down what it gets."""

    requires_logging_directory = False
    runs: list[Tracker]

    def __init__(self, project: str, **options: Any):
        self.project, self.options = project, options
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.config: dict[str, str] = {}
        self.is_open = False
        self.runs.append(self)

    def start(self) -> None:
        self.is_open = True

    def store_init_configuration(self, values: dict[str, str]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_open = False


class BrokenTracker(Tracker):
    def log(self, values: dict[str, float], step: int) -> None:
        raise ConnectionError("no route to the tracker")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tracker]]:
    """trackio writes down what it gets, and wandb breaks at the first figures."""
    Tracker.runs = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Tracker)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", BrokenTracker)
    monkeypatch.setattr(reporting, "get_available_reporting_integrations", lambda: ["wandb", "trackio", "codecarbon"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("TRACKIO_PROJECT", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    yield Tracker.runs


def test_traces_and_evaluations_are_tracked_and_a_broken_tracker_is_dropped(
    runs, policy, scalar_reward, tmp_path: Path, caplog
) -> None:
    config = worlds.search_config(max_rounds=2, max_new_tokens=8, batch_size=3)
    stored: list[Trace] = []
    options = {"stage": "traces", "output_dir": tmp_path / "demo", "settings": {"policy": "P"}}
    with AnswerChecker() as checker, caplog.at_level(logging.WARNING):
        with track_metrics(["trackio", "wandb"], **options):
            models = {"policy": policy, "reward": scalar_reward}
            search_in_batches(
                PROBLEMS, stored.extend, **models, config=config, seed=0, checker=checker, show_progress=False
            )
        with track_metrics("trackio", stage="eval", output_dir=tmp_path, project="mine"):
            jobs = plan_jobs(["best_of_2"], EvaluationSetup(policy, scalar_reward, config, (0,)), {}, lambda name: 0.0)
            for job in jobs:
                run_job(job, PROBLEMS, RowStore(tmp_path, "x"), checker)
    assert caplog.text.count("wandb does not work any more") == 1 and "no route to the tracker" in caplog.text
    traces, _, evaluation = runs
    assert (traces.project, traces.options, traces.config) == ("nabla-trl", {"name": "demo-traces"}, {"policy": "P"})
    assert [step for step, _ in traces.logged] == [1, 2] and not traces.is_open and evaluation.project == "mine"
    values = traces.logged[-1][1]
    totals = TraceTotals.of(stored)
    assert values["traces/problems"] == 4 and values["traces/reward_after"] >= values["traces/reward_before"]
    assert values["traces/flops_per_problem"] == pytest.approx(sum(trace.cost.flops for trace in stored) / 4)
    assert values["traces/acceptance_rate"] == totals.num_accepted / totals.num_proposed
    assert values["traces/unfinished_rate"] == sum(not trace.finished for trace in stored) / 4
    assert values["traces/problems_per_hour"] > 0 and 0 <= values["traces/accuracy"] <= 1
    names = {"accuracy", "flops_per_problem", "unfinished_rate", "error_rate", "problems", "problems_per_hour"}
    assert {f"eval/best_of_2/{name}" for name in names} == set(evaluation.logged[-1][1])
    report_metrics("traces", {"problems": 1.0})  # nobody listens any more
    assert len(traces.logged) == 2


def test_a_process_that_is_not_the_main_one_tracks_nothing(runs) -> None:
    for nothing in (None, [], "none"):
        with track_metrics(nothing, stage="traces"):
            report_metrics("traces", {"problems": 1.0})
    assert not runs


def test_what_cannot_track_is_refused_before_any_work(runs, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(reporting, "_is_logged_in_to_wandb", lambda: False)
    for names, words in (
        (["trackoi", "mlflow"], ("trackoi is unknown", "mlflow needs a package")),
        ("wandb", ("needs a login",)),
        ("codecarbon", ("tracks trainings only",)),
    ):
        worlds.refused(lambda names=names: track_metrics(names, stage="eval").__enter__(), *words)
    assert list_trackers(["codecarbon", "trackio"]) == ["trackio"] and not runs


def test_totals_count_traces_with_errors_apart() -> None:
    totals = TraceTotals()
    assert totals.compute_metrics()["accuracy"] is None and "0 of 0 revisions" in str(totals)


SCRIPT = """
from nabla_trl import track_metrics
from nabla_trl.utils.progress import report_metrics

with track_metrics("{name}", stage="traces", output_dir="run", settings={{"policy": "P"}}):
    report_metrics("traces", {{"reward_after": 1.5, "accuracy": None}})
    report_metrics("traces", {{"reward_after": 2.5}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_the_trackers_themselves_work_offline(name: str, tmp_path: Path) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    environment = os.environ | {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", SCRIPT.format(name=name)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and "does not work" not in result.stderr, result.stderr[-2000:]
    assert any(b"reward_after" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
