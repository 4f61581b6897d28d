"""Turn traces into rows for trainers: token ids and labels, never text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from nabla_trl.traces.schema import Revision, Trace

IGNORE_INDEX = -100  # the label that a loss skips
SFT_SELECTIONS = ("best", "improved", "samples", "correct")


class TrainingRows(NamedTuple):
    """Rows for a trainer, and how many responses or revisions were left out, by reason."""

    rows: list[dict[str, Any]]
    skipped: Counter[str]


class RewardedResponse(NamedTuple):
    """A response that a trace passed through, with its reward."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float


def build_sft_rows(
    traces: Iterable[Trace], selection: str = "best", *, include_unfinished: bool = False
) -> TrainingRows:
    """Return rows of `input_ids` = prompt + response and `labels` = -100 over the prompt, then the response.

    Skipped and counted are traces with an "error", responses that are "unfinished", "empty" or "unscorable" for the
    reward, and what is "not the best", "not improved", "not correct" or "duplicate".

    Args:
        selection: which responses. "best": per problem the last response with the highest reward. "improved": per
            trace every accepted response whose reward is above the first one's. "samples": the last response of every
            trace, which is what Metropolis chains sample. "correct": per problem every distinct last response with the
            right answer, whatever its reward.
        include_unfinished: take responses that were cut at the limit, too. Without them, samples are those of π* given
            that the response ends.

    Raises:
        ValueError: a trace without a prompt.
    """
    trainable, skipped = _select_trainable(traces, include_unfinished)
    end_tokens = _collect_end_tokens(trainable)
    if selection == "best":
        best: dict[tuple[str, str], Trace] = {}
        for trace in trainable:
            key = (trace.task, trace.problem_id)
            if key not in best or trace.reward > best[key].reward:
                best[key] = trace
        skipped["not the best"] = len(trainable) - len(best)
        responses = [_list_responses(trace)[-1] for trace in best.values()]
    elif selection == "improved":
        candidates = [(trace, response) for trace in trainable for response in _list_responses(trace)]
        responses = [response for trace, response in candidates if response.reward > trace.reward_initial]
        skipped["not improved"] = len(candidates) - len(responses)
    elif selection == "correct":
        correct = [trace for trace in trainable if trace.correct]
        distinct = {(trace.task, trace.problem_id, tuple(trace.response_ids)): trace for trace in correct}
        skipped["not correct"] = len(trainable) - len(correct)
        skipped["duplicate"] = len(correct) - len(distinct)
        responses = [_list_responses(trace)[-1] for trace in distinct.values()]
    else:
        responses = [_list_responses(trace)[-1] for trace in trainable]
    finished = [response for response in responses if include_unfinished or response.response_ids[-1] in end_tokens]
    skipped["unfinished"] += len(responses) - len(finished)
    return TrainingRows([_build_sft_row(response) for response in finished], +skipped)


def build_weighted_rows(traces: Iterable[Trace], beta: float, *, include_unfinished: bool = False) -> TrainingRows:
    """Return rows as `build_sft_rows`, of every response that a problem's traces passed through, with a `weight` each.

    Weights are ∝ exp(r/β) within a problem and add up to the number of its responses. For traces that are plain
    samples of the policy (one rollout each) this is self-normalized importance sampling of π*. The responses of a
    search are not sampled from π alone. For them it is reward-weighted regression (Peters & Schaal, 2007).
    """
    trainable, skipped = _select_trainable(traces, include_unfinished)
    end_tokens = _collect_end_tokens(trainable)
    groups: dict[tuple[str, str], list[RewardedResponse]] = {}
    for trace in trainable:
        for response in _list_responses(trace):
            if include_unfinished or response.response_ids[-1] in end_tokens:
                groups.setdefault((trace.task, trace.problem_id), []).append(response)
            else:
                skipped["unfinished"] += 1
    rows = []
    for responses in groups.values():
        highest = max(response.reward for response in responses)
        weights = [math.exp((response.reward - highest) / beta) for response in responses]
        scale = len(responses) / sum(weights)
        rows += [
            _build_sft_row(response) | {"weight": scale * weight}
            for response, weight in zip(responses, weights, strict=True)
        ]
    return TrainingRows(rows, +skipped)


def build_soft_target_rows(traces: Iterable[Trace]) -> TrainingRows:
    """Return a row for each response along which a search recorded refined distributions.

    A row has `input_ids` = prompt + response, `labels` = -100 over the prompt, then the response, and the targets of
    the T response tokens: `target_ids` and `target_logp`, [T·k] each, and `top_k` = k. A response that was cut at the
    limit is taken too, since every prefix has its own target. Skipped and counted are traces with an "error" and those
    "without soft targets".

    Raises:
        ValueError: no trace has soft targets.
    """
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for trace in traces:
        if trace.error is not None:
            skipped["error"] += 1
            continue
        skipped["without soft targets"] += not trace.soft_targets
        for targets, (response_ids, reward) in zip(trace.soft_targets, trace.list_incumbents(), strict=False):
            if response_ids:
                ids, logp = targets.to_arrays()
                row = _build_sft_row(RewardedResponse(trace.prompt_ids, response_ids, reward))
                rows.append(row | {"target_ids": ids.ravel(), "target_logp": logp.ravel(), "top_k": targets.top_k})
    if not rows:
        raise ValueError(
            "soft-targets needs refined distributions in the traces, and these hold none: generate them again with "
            "soft_target_top_k 16"
        )
    return TrainingRows(rows, +skipped)


def _select_trainable(traces: Iterable[Trace], include_unfinished: bool) -> tuple[list[Trace], Counter[str]]:
    trainable: list[Trace] = []
    skipped: Counter[str] = Counter()
    for trace in traces:
        if trace.error is not None:
            skipped["error"] += 1
        elif not trace.response_ids:
            skipped["empty"] += 1
        elif not trace.finished and not include_unfinished:
            skipped["unfinished"] += 1
        elif trace.reward == -math.inf:
            skipped["unscorable"] += 1
        elif not trace.prompt_ids:
            raise ValueError(f"{trace.describe()}: no prompt ids; was it read without that column?")
        else:
            trainable.append(trace)
    return trainable, skipped


def _collect_end_tokens(traces: Iterable[Trace]) -> set[int]:
    """Return the tokens that finished traces end with."""
    return {trace.response_ids[-1] for trace in traces if trace.finished}


def _list_responses(trace: Trace) -> list[RewardedResponse]:
    return [RewardedResponse(trace.prompt_ids, ids, reward) for ids, reward in trace.list_incumbents() if ids]


def _build_sft_row(response: RewardedResponse) -> dict[str, Any]:
    prompt_ids, response_ids = list(response.prompt_ids), list(response.response_ids)
    return {"input_ids": prompt_ids + response_ids, "labels": [IGNORE_INDEX] * len(prompt_ids) + response_ids}


def build_preference_rows(traces: Iterable[Trace]) -> TrainingRows:
    """Return one row per revision that the reward decided: the better and the worse continuation of a prefix.

    `prompt_ids` = prompt + shared part of the response. `chosen_ids` and `rejected_ids` are the proposal and the
    incumbent from the branch on: an accepted proposal with a higher reward is chosen, and a rejected one with a lower
    reward is rejected. Skipped and counted are traces with an "error", revisions with a "tie", with a "non-finite"
    reward or decided "against the reward" (Metropolis does that), and "duplicate" rows.

    Raises:
        ValueError: a trace that contradicts itself.
    """
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for trace in traces:
        if trace.error is not None:
            skipped["error"] += 1
            continue
        trace.validate()
        for revision, base in trace.replay_revisions():
            if reason := _get_skip_reason(revision):
                skipped[reason] += 1
                continue
            proposal, incumbent = list(revision.suffix), base[revision.position :]
            chosen, rejected = (proposal, incumbent) if revision.accepted else (incumbent, proposal)
            prompt = list(trace.prompt_ids) + base[: revision.position]
            key = (tuple(prompt), tuple(chosen), tuple(rejected))
            if key in seen:
                skipped["duplicate"] += 1
                continue
            seen.add(key)
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return TrainingRows(rows, skipped)


def _get_skip_reason(revision: Revision) -> str | None:
    """Return why a revision does not tell which continuation is better, or None if it does."""
    gain = revision.reward_after - revision.reward_before
    if not math.isfinite(gain):
        return "non-finite"
    if gain == 0:
        return "tie"
    return None if (gain > 0) == revision.accepted else "against the reward"
