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

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult
from nabla_trl.grading.extraction import extract_answer, extract_strict_answer
from nabla_trl.models.flops import Cost
from nabla_trl.models.policy import Policy
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Revision, Trace

PACKAGES = ("nabla-trl", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "math-verify")


@cache
def get_package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe_hardware() -> str:
    """The machine in words: system, cores, accelerators."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    named = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {named or 'no GPU'}"


def find_hub_revision(name: str) -> str:
    """The commit of a hub model that is in the cache; empty for a folder, and where it is not known."""
    if Path(name).exists():
        return ""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub could know
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


def build_trace_meta(policy: Policy, reward_name: str, config_hash: str) -> dict[str, str]:
    """Provenance that travels with every trace."""
    return {
        "policy": policy.name,
        "reward": reward_name,
        "config_hash": config_hash,
        "tokenizer_hash": policy.tokenizer_hash,
        **policy.prompt_options.get_changed_settings(),
        **{f"version/{name}": number for name, number in get_package_versions().items()},
        **policy.backend.get_metadata(),
    }


def build_response_trace(
    policy: Policy,
    problem: Problem,
    *,
    method: str,
    seed: int,
    prompt_ids: list[int],
    response_ids: list[int],
    reward: float,
    cost: Cost,
    meta: dict[str, str],
    stop_reason: str = "single",
    initial_ids: list[int] | None = None,
    reward_initial: float | None = None,
    revisions: Sequence[Revision] = (),
    predicted_gain: Sequence[list[float]] = (),
    answer: str | None = None,
    error: str | None = None,
) -> Trace:
    """A trace of a response; `answer` overrides the one extracted from its text (self-consistency)."""
    stops = policy.get_stop_strings(problem)
    said = policy.decode_response(response_ids, stops)
    return Trace(
        problem_id=problem.id,
        task=problem.task,
        method=method,
        seed=seed,
        prompt=policy.tokenizer.decode(prompt_ids),
        response=policy.decode(response_ids),
        prompt_ids=prompt_ids,
        initial_ids=response_ids if initial_ids is None else initial_ids,
        response_ids=response_ids,
        reward_initial=reward if reward_initial is None else reward_initial,
        reward=reward,
        answer=extract_answer(said) if answer is None else answer,
        answer_strict=extract_strict_answer(said, problem.answer_format) if problem.answer_format else None,
        gold=problem.answer,
        correct=None,
        revisions=list(revisions),
        cost=cost,
        stop_reason=stop_reason,
        finished=policy.is_finished(response_ids, stops),
        meta=meta | _build_problem_meta(problem),
        error=error,
        predicted_gain=list(predicted_gain),
    )


def build_error_trace(
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
        stop_reason="error",
        finished=False,
        meta=meta | _build_problem_meta(problem),
        error=message,
    )


def _build_problem_meta(problem: Problem) -> dict[str, str]:
    """What a trace has to tell of its problem beside the answers: its version, the form asked for, who judges."""
    told = {"task_version": problem.task_version, "form": problem.answer_format, "verifier": problem.verifier}
    return {name: value for name, value in told.items() if value}


def grade_traces(traces: Sequence[Trace], checker: AnswerChecker) -> list[Trace]:
    """Copies with `correct`, `correct_strict` and `verdict` set; `correct` is None without a usable gold answer.

    `correct_strict` is None too where the task asks for no certain form.
    """
    verdicts = checker.check([(trace.answer, trace.grading_reference) for trace in traces])
    # The same answer has the same verdict; the others are few.
    apart = [trace for trace in traces if "form" in trace.meta and trace.answer_strict != trace.answer]
    again = checker.check([(trace.answer_strict, trace.grading_reference) for trace in apart])
    strict = {id(trace): verdict for trace, verdict in zip(apart, again, strict=True)}
    return [
        replace(
            trace,
            correct=_is_correct(trace, verdict),
            correct_strict=_is_correct(trace, strict.get(id(trace), verdict)) if "form" in trace.meta else None,
            match_result=verdict.value,
        )
        for trace, verdict in zip(traces, verdicts, strict=True)
    ]


def _is_correct(trace: Trace, verdict: MatchResult) -> bool | None:
    ungraded = verdict in (MatchResult.NO_GOLD, MatchResult.BAD_GOLD)
    return None if ungraded else verdict.is_correct and trace.error is None
