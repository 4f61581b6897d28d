"""Experiment trackers (trackio, wandb, tensorboard, …) for traces and evaluations, as accelerate starts them.

Trainings are tracked by the callbacks of transformers. A tracker that breaks is dropped with a warning, and the run
goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from nabla_trl.training.reporting import check_services
from nabla_trl.utils.formatting import format_error, hide_userinfo
from nabla_trl.utils.progress import receive_metrics

DEFAULT_PROJECT = "nabla-trl"
LOG_DIR = "logs"  # of trackers that write files, below the output folder

logger = logging.getLogger(__name__)


@contextmanager
def track_metrics(
    report_to: str | Sequence[str] | None,
    *,
    stage: str,
    output_dir: str | Path = ".",
    settings: Mapping[str, Any] | None = None,
    project: str | None = None,
) -> Iterator[None]:
    """Send the figures of the stages in the `with` block to experiment trackers.

    In a launch of several processes, only the main process may give `report_to`.

    Args:
        report_to: names of trackers, as in TRL's `report_to`. None, "none" or empty: none.
        stage: traces or eval, a part of the run's name.
        output_dir: folder of the run. Its name is a part of the run's name, and trackers that write files do so in
            its folder logs/.
        settings: noted as the configuration of the run.
        project: of the tracker (default: nabla-trl). TRACKIO_PROJECT and WANDB_PROJECT win over it.

    Raises:
        ValueError: a tracker is unknown, not installed or not logged in to.
    """
    names = check_trackers(report_to)
    trackers = _Trackers()
    if names:
        PartialState()  # accelerate's trackers log by it
    for name in names:
        trackers.start(name, stage, Path(output_dir), settings or {}, project)
    try:
        with receive_metrics(trackers.log):
            yield
    finally:
        trackers.finish()


def check_trackers(report_to: str | Sequence[str] | None) -> list[str]:
    """Return the names of trackers that `track_metrics` would start.

    Raises:
        ValueError: as `track_metrics`.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name != "none"]
    check_services(names)
    if others := sorted({*names} - {*list_trackers(names)}):
        raise ValueError(
            f"report_to {', '.join(others)} tracks trainings only: traces and evaluations go to "
            f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        )
    return names


def list_trackers(report_to: Sequence[str]) -> list[str]:
    """Return those names of TRL's `report_to` that can also track traces and evaluations."""
    return [name for name in report_to if name in LOGGER_TYPE_TO_CLASS]


class _Trackers:
    """Trackers of one run. One that raises an error is dropped."""

    def __init__(self) -> None:
        self.trackers: dict[str, GeneralTracker] = {}
        self._step = 0

    def start(self, name: str, stage: str, output_dir: Path, settings: Mapping[str, Any], project: str | None) -> None:
        """Start a tracker and note the settings."""
        project = os.environ.get(f"{name.upper()}_PROJECT") or project or DEFAULT_PROJECT
        run_name = f"{output_dir.resolve().name}-{stage}"
        config = {key: str(value) for key, value in hide_userinfo(dict(settings)).items()}

        def begin() -> None:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            if tracker_class.requires_logging_directory:
                tracker = tracker_class(stage, str(output_dir / LOG_DIR))
            elif name in ("trackio", "wandb"):
                tracker = tracker_class(project, name=run_name)
            else:
                tracker = tracker_class(project)
            tracker.start()
            self.trackers[name] = tracker
            if config and name != "tensorboard":  # whose table of hyperparameters is a run of its own
                tracker.store_init_configuration(config)

        self._try(name, begin)

    def log(self, values: dict[str, float]) -> None:
        """Log values at the next step. Steps count the calls, because those of one run must not decrease."""
        self._step += 1
        for name, tracker in list(self.trackers.items()):
            self._try(name, partial(tracker.log, values, step=self._step))

    def finish(self) -> None:
        """Close all trackers."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a run of hours must not end for want of a log
            self.trackers.pop(name, None)
            logger.warning("report_to %s does not work any more, the run goes on: %s", name, format_error(error))
