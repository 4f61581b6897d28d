"""Build traces: what every method records about a response, and where it came from."""

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
from nabla_trl.models.chat.control_tokens import get_template
from nabla_trl.models.chat.thinking import decode_with_thinking
from nabla_trl.models.flops import Cost
from nabla_trl.models.policy import Policy
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.templates import get_template_date, is_dated
from nabla_trl.traces.schema import Revision, SoftTargets, Trace
from nabla_trl.traces.texts import TextDecoder

PACKAGES = ("nabla-trl", "torch", "transformers", "trl", "peft", "datasets", "accelerate", "math-verify")


@cache
def get_package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe_hardware() -> str:
    """Return the machine in words: system, cores, accelerators."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    gpu_counts = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus))
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {gpu_counts or 'no GPU'}"


def find_hub_revision(name: str) -> str:
    """Return the commit of a hub model that is in the cache, or "" for a folder and for an unknown model."""
    if Path(name).exists():
        return ""
    try:
        config_file = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name that the hub accepts
        return ""
    return Path(config_file).parent.name if isinstance(config_file, str) else ""


def build_trace_meta(policy: Policy, reward_name: str, config_hash: str) -> dict[str, str]:
    """Return the provenance that travels with every trace."""
    return {
        "policy": policy.name,
        "reward": reward_name,
        "config_hash": config_hash,
        "tokenizer_hash": policy.tokenizer_hash,
        **policy.prompt_options.get_changed_settings(),
        **({"template_date": get_template_date()} if is_dated(get_template(policy.tokenizer)) else {}),
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
    soft_targets: Sequence[SoftTargets] = (),
    error: str | None = None,
) -> Trace:
    """Return the trace of a response, not graded yet.

    Args:
        prompt_ids: the encoded prompt.
        initial_ids: the first response, None where it is the last one.
        reward_initial: reward of the first response, None where it is the last one.
    """
    stops = policy.get_stop_strings(problem)
    text = policy.decode_response(response_ids, stops)
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
        answer=extract_answer(text),
        answer_strict=extract_strict_answer(text, problem.answer_format) if problem.answer_format else None,
        gold=problem.answer,
        correct=None,
        revisions=list(revisions),
        cost=cost,
        stop_reason=stop_reason,
        finished=policy.is_finished(response_ids, stops),
        meta=meta | _build_problem_meta(problem),
        error=error,
        predicted_gain=list(predicted_gain),
        soft_targets=list(soft_targets),
        decoder=make_decoder(policy),
    )


def make_decoder(policy: Policy) -> TextDecoder:
    """Return the decoder of a policy's traces. It holds the tokenizer and not the model."""
    tokenizer, token_ids = policy.tokenizer, policy.think_token_ids
    return TextDecoder(lambda ids: decode_with_thinking(tokenizer, ids, token_ids), tokenizer)


def build_error_trace(
    problem: Problem, method: str, seed: int, message: str, meta: dict[str, str], cost: Cost | None = None
) -> Trace:
    """Return the record of a problem that could not be run, with the cost that was spent on it before it failed."""
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
    meta = {"task_version": problem.task_version, "form": problem.answer_format, "verifier": problem.verifier}
    return {name: value for name, value in meta.items() if value}


def grade_traces(traces: Sequence[Trace], checker: AnswerChecker) -> list[Trace]:
    """Return copies with `correct`, `correct_strict` and `match_result` set.

    `correct` is None without a usable gold answer. `correct_strict` is None, too, where the task asks for no
    particular form of the answer.
    """
    results = checker.check([(trace.answer, trace.grading_reference) for trace in traces])
    # Most strict answers equal the others and have their result.
    differing = [trace for trace in traces if "form" in trace.meta and trace.answer_strict != trace.answer]
    differing_results = checker.check([(trace.answer_strict, trace.grading_reference) for trace in differing])
    strict_results = {id(trace): result for trace, result in zip(differing, differing_results, strict=True)}
    return [
        replace(
            trace,
            correct=_is_correct(trace, result),
            correct_strict=_is_correct(trace, strict_results.get(id(trace), result)) if "form" in trace.meta else None,
            match_result=result.value,
        )
        for trace, result in zip(traces, results, strict=True)
    ]


def _is_correct(trace: Trace, result: MatchResult) -> bool | None:
    if result in (MatchResult.NO_GOLD, MatchResult.BAD_GOLD):
        return None
    return result.is_correct and trace.error is None
