"""Building traces: what every method writes down about a response, and where it came from."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from nabla_trl.answers import extract_answer
from nabla_trl.checker import AnswerChecker
from nabla_trl.compute import Cost
from nabla_trl.models import Policy
from nabla_trl.tasks import Problem
from nabla_trl.traces import Revision, Trace

PACKAGES = ("nabla-trl", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "math-verify")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware() -> str:
    """The machine in words: system, cores, accelerators."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    named = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {named or 'no GPU'}"


def hub_revision(name: str) -> str:
    """The commit of a hub model that is in the cache; empty for a folder, and where it is not known."""
    if Path(name).exists():
        return ""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could know
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


def run_meta(policy: Policy, reward: str, config_hash: str) -> dict[str, str]:
    """Provenance that travels with every trace."""
    drawn_by = {} if policy.server is None else {"version/vllm": policy.server.version}
    return {
        "policy": policy.name,
        "reward": reward,
        "config_hash": config_hash,
        "tokenizer_hash": policy.tokenizer_hash,
        **{f"version/{name}": number for name, number in versions().items()},
        **drawn_by,
    }


def response_trace(
    policy: Policy,
    problem: Problem,
    *,
    method: str,
    seed: int,
    prompt: list[int],
    response: list[int],
    reward: float,
    cost: Cost,
    meta: dict[str, str],
    stop: str = "single",
    initial: list[int] | None = None,
    reward_initial: float | None = None,
    revisions: Sequence[Revision] = (),
    pull: Sequence[list[float]] = (),
    answer: str | None = None,
    error: str | None = None,
) -> Trace:
    """A trace of a response; `answer` overrides the one extracted from its text (self-consistency)."""
    text = policy.decode(response)
    return Trace(
        problem_id=problem.id,
        task=problem.task,
        method=method,
        seed=seed,
        prompt=policy.tokenizer.decode(prompt),
        response=text,
        prompt_ids=prompt,
        initial_ids=response if initial is None else initial,
        response_ids=response,
        reward_initial=reward if reward_initial is None else reward_initial,
        reward=reward,
        answer=extract_answer(text) if answer is None else answer,
        gold=problem.answer,
        correct=None,
        revisions=list(revisions),
        cost=cost,
        stop=stop,
        finished=bool(response) and response[-1] in policy.stop_ids,
        meta=meta,
        error=error,
        pull=list(pull),
    )


def error_trace(
    problem: Problem, method: str, seed: int, message: str, meta: dict[str, str], cost: Cost | None = None
) -> Trace:
    """The visible record of a problem that could not be run; `cost` is what was spent on it all the same."""
    return Trace(
        problem_id=problem.id,
        task=problem.task,
        method=method,
        seed=seed,
        prompt=problem.question,
        response="",
        prompt_ids=[],
        initial_ids=[],
        response_ids=[],
        reward_initial=math.nan,
        reward=math.nan,
        answer=None,
        gold=problem.answer,
        correct=None,
        revisions=[],
        cost=Cost() if cost is None else cost,
        stop="error",
        finished=False,
        meta=meta,
        error=message,
    )


def grade(traces: Sequence[Trace], checker: AnswerChecker) -> list[Trace]:
    """Copies with `correct` set: None where there is no usable gold answer."""
    verdicts = checker.check([(trace.answer, trace.gold) for trace in traces])
    return [
        replace(
            trace,
            correct=None if verdict.name in ("NO_GOLD", "BAD_GOLD") else verdict.right and trace.error is None,
        )
        for trace, verdict in zip(traces, verdicts, strict=True)
    ]
