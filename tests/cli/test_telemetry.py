"""Commands report nothing to the makers of libraries unless the user asks for it."""

from __future__ import annotations

import os
from typing import Any

import datasets.config
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry

from nabla_trl.cli.parsing import run_main
from nabla_trl.cli.telemetry import _SWITCHES, disable_telemetry


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is sent home. Telemetry is on, as after the import of the libraries by a user's script."""
    sent: list[str] = []
    for variable in _SWITCHES:
        monkeypatch.setenv(variable, "")  # so that the variable is restored afterwards
        monkeypatch.delenv(variable)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: sent.append("home"))
    monkeypatch.setattr(_telemetry._TELEMETRY_QUEUE, "put", lambda item: None)
    return sent


def report(argv: Any) -> None:
    _telemetry.send_telemetry(topic="trl/SFTTrainer")


def test_a_command_reports_nothing(reports: list[str]) -> None:
    report([])
    assert reports == ["home"], "the library would"
    reports.clear()
    assert run_main(report, [], resume_command="") == 0
    assert reports == [] and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1", "for the processes that it starts"


def test_a_user_can_turn_reports_on(reports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    run_main(report, [], resume_command="")
    assert reports == ["home"]


def test_what_is_set_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HF_HUB_DISABLE_TELEMETRY": "0", "VLLM_NO_USAGE_STATS": "0"}
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    disable_telemetry(environ)
    assert environ == {
        "HF_HUB_DISABLE_TELEMETRY": "0",
        "VLLM_NO_USAGE_STATS": "0",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
