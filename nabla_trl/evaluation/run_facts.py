"""What a report is told of a run beside its rows: models, revisions, hardware, and what training cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_trl.rewards.spec import MANIFEST_FILE as CARD
from nabla_trl.rewards.spec import compute_reward_identity, parse_reward_spec, read_manifest
from nabla_trl.tasks.registry import compute_task_version
from nabla_trl.traces.build import describe_hardware, find_hub_revision, get_package_versions
from nabla_trl.training.checkpoints import get_policy_label, list_trained_methods, read_training_record
from nabla_trl.utils.files import read_json_file, write_atomic


class RunStopwatch:
    """Seconds of a run over all its calls, kept in clock.json of its folder: `total`, and `setup` of the environment.

    Args:
        began: `time.perf_counter()` at the start of this call.
        setup: what making the environment took for this call; 0 where it was there.
    """

    def __init__(self, folder: Path, start_time: float, setup_seconds: float):
        self.path, self._start_time = folder / "clock.json", start_time
        before = read_json_file(self.path) if self.path.exists() else {"total": 0.0, "setup": 0.0}
        self._earlier_seconds, self.setup_seconds = before["total"], max(before["setup"], setup_seconds)

    @property
    def total_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._start_time

    def save(self) -> None:
        write_atomic(self.path, json.dumps({"total": self.total_seconds, "setup": self.setup_seconds}, indent=1))


def build_run_facts(
    *, title: str, command: str, policy: str, reward: str, task: str, seeds: list[int]
) -> dict[str, Any]:
    """The facts that every report needs (`nabla_trl.report.text`)."""
    return {
        "title": title,
        "command": command,
        "policy": policy,
        "reward": reward,
        "task": task,
        "reward_kind": parse_reward_spec(reward).kind,
        "versions": get_package_versions(),
        "hardware": describe_hardware(),
        "revisions": collect_revisions(policy, reward, task),
        "seeds": seeds,
    }


def collect_revisions(policy: str, reward: str, task: str) -> dict[str, str]:
    """Of the hub's models the commit, of our own rewards a hash, of the task its version; what has none is out."""
    found = {name: find_hub_revision(name) for name in sorted({policy, *parse_reward_spec(reward).model_names})}
    found |= {reward: compute_reward_identity(reward), task: compute_task_version(task)}
    return {name: one for name, one in found.items() if one not in ("", name)}


def collect_training_facts(folder: Path, audit_facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each trained policy of a run cost: traces, training and the audit."""
    return [_build_training_facts(folder, method, audit_facts) for method in list_trained_methods(folder)]


def _build_training_facts(folder: Path, method: str, audit_facts: Mapping[str, Any]) -> dict[str, Any]:
    made = read_training_record(folder, method)
    return {
        "label": get_policy_label(method),
        "method": method,
        "beta": made["beta"],
        "tuning": made["tuning"],
        "train_flops": made["flops"] + made["trace_flops"] + audit_facts.get("flops", 0.0),
        # Traces are timed in each process; side by side they take that much less on the clock.
        "train_seconds": made["seconds"] + made["trace_seconds"] / made["processes"],
    }


def describe_reward_cost(reward: str) -> list[str]:
    """A sentence on what training the reward cost, where its folder tells."""
    rounds = read_manifest(reward).training_rounds if Path(reward, CARD).is_file() else []
    flops = sum(one["flops"] for round_ in rounds for one in round_["training"])
    return [f"training the reward took {flops:.3g} FLOPs, which no total here counts"] if flops else []
