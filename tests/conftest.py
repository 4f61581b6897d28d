"""Shared fixtures. Models are tiny, random and frozen, so one of each serves the whole session."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)

import pytest
import torch
import worlds

from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def little_to_collect() -> Iterator[None]:
    """Every trainer collects garbage when it begins; walking all imported modules takes most of a small training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A causal LM of every architecture on disk, wide enough for 4-bit weights, which come in blocks of 64."""
    root = tmp_path_factory.mktemp("bases")
    for name in worlds.ARCHITECTURES:
        worlds.tiny_model(name, seed=3, width=64).save_pretrained(root / name)
        worlds.char_tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in worlds.ARCHITECTURES}


@pytest.fixture(scope="session")
def policy() -> Policy:
    """A float32 Llama over the character vocabulary."""
    return worlds.tiny_policy()


@pytest.fixture(scope="session")
def scalar_reward(policy: Policy) -> Reward:
    return worlds.tiny_scalar(policy)


@pytest.fixture(scope="session")
def logratio_reward(policy: Policy) -> Reward:
    return worlds.tiny_logratio(policy)


@pytest.fixture(scope="session", params=["scalar", "log-ratio"])
def reward(request: pytest.FixtureRequest) -> Reward:
    """Each kind of differentiable reward in turn."""
    return request.getfixturevalue("scalar_reward" if request.param == "scalar" else "logratio_reward")


@pytest.fixture(scope="session")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small run with traces (`pages`). Only to be read."""
    import pages  # loads matplotlib

    folder = tmp_path_factory.mktemp("report")
    pages.write_run(folder)
    return folder


@pytest.fixture
def problems() -> list[Problem]:
    """Four questions of different lengths."""
    return worlds.tiny_problems()
