"""Experiment trackers and the Hub: checks before any work, and the figures of traces and evaluations.

Trainings are tracked by the callbacks of transformers, traces and evaluations (trackio, wandb, tensorboard, …) by
accelerate's trackers. A tracker that breaks is dropped with a warning, and the run goes on.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from nabla_trl.utils.faults import Faults
from nabla_trl.utils.formatting import format_error, hide_userinfo
from nabla_trl.utils.progress import receive_metrics

DEFAULT_PROJECT = "nabla-trl"
LOG_DIR = "logs"  # of trackers that write files, below the output folder
_WANDB_HOST = "api.wandb.ai"
_OFFLINE_WANDB_MODES = ("offline", "disabled", "dryrun")

logger = logging.getLogger(__name__)


def check_reporting(config: Any, num_trained: int = 1) -> None:
    """Check that a trainer can report where its options ask for, and push if they ask for it.

    Args:
        config: `TrainingArguments`.
        num_trained: models that these options train.

    Raises:
        ValueError: a service of `report_to` is unknown, not installed or not logged in to, or `push_to_hub` cannot
            work. The message names everything that is wrong.
    """
    errors = _find_service_errors(config.report_to or [])
    if config.push_to_hub:
        if not config.hub_model_id:
            errors.append("push_to_hub needs hub_model_id, the repository as NAME/MODEL")
        elif num_trained > 1:
            errors.append(f"push_to_hub would push {num_trained} models to {config.hub_model_id}: train one at a time")
        else:
            try:
                check_hub_repository(config.hub_model_id, HfApi(token=config.hub_token))
            except ValueError as error:
                errors.append(str(error))
    if errors:
        raise Faults(*errors)


def check_services(names: Iterable[str]) -> None:
    """Check that experiment trackers can be used.

    Raises:
        ValueError: one is unknown, not installed or not logged in to. The message names all of them.
    """
    if errors := _find_service_errors(names):
        raise Faults(*errors)


def _find_service_errors(names: Iterable[str]) -> list[str]:
    errors = []
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            errors.append(
                f"report_to {name} is unknown: choose from none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        elif name not in installed:
            errors.append(f"report_to {name} needs a package that is not installed: {name.replace('_', '-')}")
        elif name == "wandb" and not _is_logged_in_to_wandb():
            errors.append("report_to wandb needs a login: run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline")
    return errors


def check_hub_repository(repo_id: str, api: HfApi) -> None:
    """Check that this machine is logged in to the Hub and may write to a repository.

    Raises:
        ValueError: `repo_id` is not a valid name, nobody is logged in, the Hub cannot be reached, or the token may not
            write there.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a name on the Hub: {format_error(error)}") from error
    try:
        account = api.whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"cannot push to {repo_id}: run hf auth login, or set HF_TOKEN") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"cannot push to {repo_id}: the Hub gives no account ({format_error(error)})") from error
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ValueError(f"cannot push to {repo_id}: the token of {account['name']} may only read")
    owner = repo_id.rpartition("/")[0] or account["name"]
    writable = {org["name"] for org in account.get("orgs", []) if org.get("roleInOrg") != "read"}
    if owner not in {account["name"], *writable}:
        choices = ", ".join([account["name"], *sorted(writable)])
        raise ValueError(f"cannot push to {repo_id}: {account['name']} may write to repositories of {choices}")


def _is_logged_in_to_wandb() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in _OFFLINE_WANDB_MODES:
        return True
    try:
        return netrc.netrc().authenticators(_WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --- figures of traces and evaluations ----------------------------------------------------------------


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
