"""What a report is told of a run beside its rows: models, revisions, hardware, and what training cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_trl.rewards.spec import FILE as CARD
from nabla_trl.rewards.spec import plan_reward, read_card, reward_identity
from nabla_trl.tasks.registry import task_version
from nabla_trl.traces.build import hardware, hub_revision, versions
from nabla_trl.training.checkpoints import read_training, trained_label, trained_methods
from nabla_trl.utils.files import read_object, write_whole


class Clock:
    """Seconds of a run over all its calls, kept in clock.json of its folder: `total`, and `setup` of the environment.

    Args:
        began: `time.perf_counter()` at the start of this call.
        setup: what making the environment took for this call; 0 where it was there.
    """

    def __init__(self, folder: Path, began: float, setup: float):
        self.path, self._began = folder / "clock.json", began
        before = read_object(self.path) if self.path.exists() else {"total": 0.0, "setup": 0.0}
        self._before, self.setup = before["total"], max(before["setup"], setup)

    @property
    def total(self) -> float:
        return self._before + time.perf_counter() - self._began

    def save(self) -> None:
        write_whole(self.path, json.dumps({"total": self.total, "setup": self.setup}, indent=1))


def run_facts(*, title: str, command: str, policy: str, reward: str, task: str, seeds: list[int]) -> dict[str, Any]:
    """The facts that every report needs (`nabla_trl.report.text`)."""
    return {
        "title": title,
        "command": command,
        "policy": policy,
        "reward": reward,
        "task": task,
        "reward_kind": plan_reward(reward).kind,
        "versions": versions(),
        "hardware": hardware(),
        "revisions": revisions(policy, reward, task),
        "seeds": seeds,
    }


def revisions(policy: str, reward: str, task: str) -> dict[str, str]:
    """Of the hub's models the commit, of our own rewards a hash, of the task its version; what has none is out."""
    found = {name: hub_revision(name) for name in sorted({policy, *plan_reward(reward).models})}
    found |= {reward: reward_identity(reward), task: task_version(task)}
    return {name: one for name, one in found.items() if one not in ("", name)}


def trained_facts(folder: Path, audited: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each trained policy of a run cost: traces, training and the audit."""
    return [_trained(folder, method, audited) for method in trained_methods(folder)]


def _trained(folder: Path, method: str, audited: Mapping[str, Any]) -> dict[str, Any]:
    made = read_training(folder, method)
    return {
        "label": trained_label(method),
        "method": method,
        "beta": made["beta"],
        "tuning": made["tuning"],
        "train_flops": made["flops"] + made["trace_flops"] + audited.get("flops", 0.0),
        # Traces are timed in each process; side by side they take that much less on the clock.
        "train_seconds": made["seconds"] + made["trace_seconds"] / made["processes"],
    }


def reward_cost(reward: str) -> list[str]:
    """A sentence on what training the reward cost, where its folder tells."""
    rounds = read_card(reward).rounds if Path(reward, CARD).is_file() else []
    flops = sum(one["flops"] for round_ in rounds for one in round_["training"])
    return [f"training the reward took {flops:.3g} FLOPs, which no total here counts"] if flops else []
