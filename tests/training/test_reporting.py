"""What is reported and pushed is checked before the work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import worlds
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from nabla_trl.training import reporting
from nabla_trl.training.reporting import check_hub_repository, check_reporting


@dataclass
class Config:
    report_to: list[str] = field(default_factory=list)
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = None


class Api:
    def __init__(self, account: dict[str, Any] | Exception):
        self.account = account

    def whoami(self) -> dict[str, Any]:
        if isinstance(self.account, Exception):
            raise self.account
        return self.account


ORGS = [{"name": "us", "roleInOrg": "admin"}, {"name": "them", "roleInOrg": "read"}]
ME: dict[str, Any] = {"name": "me", "orgs": ORGS, "auth": {"accessToken": {"role": "write"}}}


@pytest.fixture(autouse=True)
def services(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """wandb and trackio are installed, and nobody is logged in."""
    monkeypatch.setattr(reporting, "get_available_reporting_integrations", lambda: ["wandb", "trackio"])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_nothing_to_check() -> None:
    check_reporting(Config())
    check_reporting(Config(["trackio"]))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(["mlflow"]), ["report_to mlflow needs a package that is not installed: mlflow"]),
        (Config(["wandbb", "mlflow"]), ["report_to wandbb is unknown: choose from none,", "; report_to mlflow needs"]),
        (Config(["wandb"]), ["report_to wandb needs a login", "WANDB_API_KEY"]),
        (Config(push_to_hub=True), ["push_to_hub needs hub_model_id"]),
        (Config(push_to_hub=True, hub_model_id="a/b/c"), ["'a/b/c' is not a name on the Hub"]),
        (Config(push_to_hub=True, hub_model_id="me/it"), ["cannot push to me/it"]),
    ],
)
def test_what_is_refused(config: Config, words: list[str]) -> None:
    worlds.refused(lambda: check_reporting(config), *words)


def test_several_models_are_not_pushed_to_one_repository() -> None:
    config = Config(push_to_hub=True, hub_model_id="me/it")
    worlds.refused(lambda: check_reporting(config, 3), "push_to_hub would push 3 models to me/it")


@pytest.mark.parametrize("variable", ["WANDB_API_KEY=k", "WANDB_MODE=offline", "HOME"])
def test_a_login_to_wandb(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    name, _, value = variable.partition("=")
    if value:
        monkeypatch.setenv(name, value)
    else:
        (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
        (tmp_path / ".netrc").chmod(0o600)
    check_reporting(Config(["wandb"]))


@pytest.mark.parametrize("repo_id", ["me/model", "us/model", "model"])
def test_repositories_that_may_be_written(repo_id: str) -> None:
    check_hub_repository(repo_id, Api(ME))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("repo_id", "account", "words"),
    [
        ("you/model", ME, ["cannot push to you/model: me may write to repositories of me, us"]),
        ("them/model", ME, ["cannot push to them/model"]),
        ("me/model", {**ME, "auth": {"accessToken": {"role": "read"}}}, ["the token of me may only read"]),
        ("me/model", LocalTokenNotFoundError("no token"), ["run hf auth login, or set HF_TOKEN"]),
        ("me/model", ConnectionError("no route"), ["cannot push to me/model: the Hub gives no account (no route)"]),
        ("me/../model", ME, ["is not a name on the Hub"]),
    ],
)
def test_repositories_that_may_not(repo_id: str, account: Any, words: list[str]) -> None:
    worlds.refused(lambda: check_hub_repository(repo_id, Api(account)), *words)  # type: ignore[arg-type]


def test_offline_nothing_is_pushed() -> None:
    """The tests run offline, and the real client says so."""
    worlds.refused(lambda: check_hub_repository("me/model", HfApi(token="hf_x")), "the Hub gives no account")
