"""Check before any work that results can be reported and pushed: packages, logins and names."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from nabla_trl.utils.faults import Faults
from nabla_trl.utils.formatting import format_error

_WANDB_HOST = "api.wandb.ai"
_OFFLINE_WANDB_MODES = ("offline", "disabled", "dryrun")


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
        raise ValueError("; ".join(errors))


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
