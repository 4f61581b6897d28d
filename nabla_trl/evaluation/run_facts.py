"""Facts of a run that a report needs beside its rows: models, revisions, hardware, and what training cost."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nabla_trl.models.options import Sampling
from nabla_trl.rewards.spec import compute_reward_identity, parse_reward_spec, read_manifest
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import describe_hardware, find_hub_revision, get_package_versions
from nabla_trl.training.checkpoints import get_policy_label, list_trained_methods, read_training_record
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.formatting import hide_userinfo


class RunStopwatch:
    """Seconds of a run over all its calls, kept in clock.json of its folder.

    Args:
        start_time: `time.perf_counter()` at the start of this call.
        setup_seconds: what making the environment took for this call. 0: it existed.
    """

    def __init__(self, folder: Path, start_time: float, setup_seconds: float):
        self.path, self._start_time = folder / "clock.json", start_time
        earlier = read_json_file(self.path) if self.path.exists() else {}
        if not all(isinstance(value, int | float) and value >= 0 for value in earlier.values()):
            raise ValueError(f"{self.path} must hold numbers of seconds: delete it")
        self._earlier_seconds = earlier.get("total_seconds", 0.0)
        self.setup_seconds = max(earlier.get("setup_seconds", 0.0), setup_seconds)

    @property
    def total_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._start_time

    def save(self) -> None:
        """Write the seconds until now."""
        seconds = {"total_seconds": self.total_seconds, "setup_seconds": self.setup_seconds}
        write_atomic(self.path, json.dumps(seconds, indent=1))


def build_run_facts(
    *,
    title: str,
    command: str,
    policy: str,
    reward: str,
    task: str,
    seeds: Sequence[int],
    sampling: Sampling,
    problems: Sequence[Problem],
    dollars_per_gpu_hour: float | None = None,
    reward_kind: str | None = None,
) -> dict[str, Any]:
    """Return the facts that every report needs (`nabla_trl.report.text`).

    Args:
        policy, reward: names, as in the options.
        sampling: how the tokens were drawn.
        task: the name of a task, or that of problems in memory.
        problems: the held-out problems.
        dollars_per_gpu_hour: price of an hour of the device of one process. None: costs are not told in dollars.
        reward_kind: as `Reward.kind`. None: the kind that the reward's name says.
    """
    is_function = reward_kind == "function"
    names = sorted({policy, *(() if is_function else parse_reward_spec(reward).model_names)})
    revisions = {name: find_hub_revision(name) for name in names}
    revisions[task] = problems[0].task_version if problems else ""
    if not is_function:
        revisions[reward] = compute_reward_identity(reward)
    return {
        **hide_userinfo({"title": title, "command": command, "policy": policy, "reward": reward, "task": task}),
        "reward_kind": reward_kind or parse_reward_spec(reward).kind,
        "versions": get_package_versions(),
        "hardware": describe_hardware(),
        # commits on the hub, hashes of local rewards, versions of tasks
        "revisions": {
            hide_userinfo(name): revision for name, revision in revisions.items() if revision not in ("", name)
        },
        "seeds": list(seeds),
        "sampling": asdict(sampling),
        "problems": {problem.id: {"question": problem.question, "level": problem.level} for problem in problems},
        **compute_reward_training_cost(reward),
        **({} if dollars_per_gpu_hour is None else {"dollars_per_gpu_hour": dollars_per_gpu_hour}),
    }


def collect_training_facts(folder: Path, audit_facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each trained policy of a run cost: traces, training and the audit of the reward."""
    facts = []
    for method in list_trained_methods(folder):
        record = read_training_record(folder, method)
        facts.append(
            {
                "label": get_policy_label(method),
                "method": method,
                "beta": record["beta"],
                "tuning": record["tuning"],
                "train_flops": record["flops"] + record["trace_flops"] + audit_facts.get("flops", 0.0),
                # Traces are timed in each process. Processes run side by side, so they take that much less in all.
                "train_seconds": record["seconds"] + record["trace_seconds"] / record["processes"],
                "processes": record["processes"],
            }
        )
    return facts


def compute_reward_training_cost(reward: str) -> dict[str, float]:
    """Return the FLOPs and seconds of training a reward, as its folder records them. Empty if nothing is recorded."""
    folder = parse_reward_spec(reward).folder
    rounds = read_manifest(folder).training_rounds if folder else []
    stages = [stage for training_round in rounds for stage in training_round.get("training", ())]
    totals = {f"reward_train_{unit}": sum(stage.get(unit) or 0.0 for stage in stages) for unit in ("flops", "seconds")}
    return {name: total for name, total in totals.items() if total}
