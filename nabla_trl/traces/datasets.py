"""Traces as rows for trainers: token ids and labels, never text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from nabla_trl.traces.schema import Revision, Trace

IGNORE_INDEX = -100  # the label that a loss skips


SFT_SELECTIONS = ("best", "improved", "samples")


class TrainingRows(NamedTuple):
    """Rows for a trainer, and how often something was left out, by reason."""

    rows: list[dict[str, Any]]
    skipped: Counter[str]


class RewardedResponse(NamedTuple):
    """A response that a trace came through, with its reward."""

    prompt_ids: list[int]
    response_ids: list[int]
    reward: float


def build_sft_rows(
    traces: Iterable[Trace], selection: str = "best", *, include_unfinished: bool = False
) -> TrainingRows:
    """Rows of `input_ids` = prompt + response and `labels` = -100 over the prompt, then the response.

    Args:
        select: which responses, "best" (per problem the final response with the highest reward), "improved" (per trace
            every accepted response whose reward is above the first one's) or "samples" (the final response of every
            trace: what Metropolis chains sample).
        unfinished: take responses that were cut at the limit, too: without them samples are those of π* given an end.

    Skipped and counted: traces with an "error", "unfinished" and "empty" responses, those "unreadable" for the reward,
    and what is "not the best" or "not improved". ValueError for a trace without a prompt.
    """
    sound, skipped = _select_trainable(traces, include_unfinished)
    ends = _collect_end_tokens(sound)
    if selection == "best":
        best: dict[tuple[str, str], Trace] = {}
        for trace in sound:
            key = (trace.task, trace.problem_id)
            if key not in best or trace.reward > best[key].reward:
                best[key] = trace
        skipped["not the best"] = len(sound) - len(best)
        states = [_list_responses(trace)[-1] for trace in best.values()]
    elif selection == "improved":
        reached = [(trace, state) for trace in sound for state in _list_responses(trace)]
        states = [state for trace, state in reached if state.reward > trace.reward_initial]
        skipped["not improved"] = len(reached) - len(states)
    else:
        states = [_list_responses(trace)[-1] for trace in sound]
    whole = [state for state in states if include_unfinished or state.response_ids[-1] in ends]
    skipped["unfinished"] += len(states) - len(whole)
    return TrainingRows([_build_sft_row(state) for state in whole], +skipped)


def build_weighted_rows(traces: Iterable[Trace], beta: float, *, include_unfinished: bool = False) -> TrainingRows:
    """Rows as `sft_rows`, of every response that a problem's traces came through, each with a `weight`.

    Weights are ∝ exp(r/β) within a problem and add up to the number of its responses. For traces that are plain draws
    of the policy (one rollout each) this is self-normalised importance sampling of π*; what a search came through was
    not drawn from π alone, and there it is reward-weighted regression (Peters & Schaal, 2007).
    """
    sound, skipped = _select_trainable(traces, include_unfinished)
    ends = _collect_end_tokens(sound)
    groups: dict[tuple[str, str], list[RewardedResponse]] = {}
    for trace in sound:
        for state in _list_responses(trace):
            if include_unfinished or state.response_ids[-1] in ends:
                groups.setdefault((trace.task, trace.problem_id), []).append(state)
            else:
                skipped["unfinished"] += 1
    rows = []
    for states in groups.values():
        top = max(state.reward for state in states)
        shares = [math.exp((state.reward - top) / beta) for state in states]
        scale = len(states) / sum(shares)
        rows += [
            _build_sft_row(state) | {"weight": scale * share} for state, share in zip(states, shares, strict=True)
        ]
    return TrainingRows(rows, +skipped)


def _select_trainable(traces: Iterable[Trace], include_unfinished: bool) -> tuple[list[Trace], Counter[str]]:
    """The traces that can be trained on."""
    sound: list[Trace] = []
    skipped: Counter[str] = Counter()
    for trace in traces:
        if trace.error is not None:
            skipped["error"] += 1
        elif not trace.response_ids:
            skipped["empty"] += 1
        elif not trace.finished and not include_unfinished:
            skipped["unfinished"] += 1
        elif trace.reward == -math.inf:
            skipped["unreadable"] += 1
        elif not trace.prompt_ids:
            raise ValueError(f"{trace.describe()}: no prompt ids; was it read without that column?")
        else:
            sound.append(trace)
    return sound, skipped


def _collect_end_tokens(traces: Iterable[Trace]) -> set[int]:
    """The tokens that finished traces end with."""
    return {trace.response_ids[-1] for trace in traces if trace.finished}


def _list_responses(trace: Trace) -> list[RewardedResponse]:
    return [RewardedResponse(trace.prompt_ids, ids, reward) for ids, reward in trace.list_incumbents() if ids]


def _build_sft_row(state: RewardedResponse) -> dict[str, Any]:
    prompt, response = list(state.prompt_ids), list(state.response_ids)
    return {"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response}


def build_preference_rows(traces: Iterable[Trace]) -> TrainingRows:
    """One row per revision that was decided by the reward: the better and the worse continuation of a prefix.

    `prompt_ids` = prompt + shared part of the response, `chosen_ids` and `rejected_ids` = the proposal and
    the incumbent from the branch on. An accepted proposal with a higher reward is chosen, a rejected one with
    a lower reward is rejected. Skipped and counted: traces with an "error"; revisions with a "tie", with a
    "non-finite" reward, or decided "against the reward" (Metropolis does); "duplicate" rows. ValueError for a
    trace that contradicts itself.
    """
    out = TrainingRows([], Counter())
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for trace in traces:
        if trace.error is not None:
            out.skipped["error"] += 1
            continue
        trace.validate()
        for revision, base in trace.replay_revisions():
            if reason := _get_skip_reason(revision):
                out.skipped[reason] += 1
                continue
            proposal, incumbent = list(revision.suffix), base[revision.position :]
            chosen, rejected = (proposal, incumbent) if revision.accepted else (incumbent, proposal)
            prompt = list(trace.prompt_ids) + base[: revision.position]
            key = (tuple(prompt), tuple(chosen), tuple(rejected))
            if key in seen:
                out.skipped["duplicate"] += 1
                continue
            seen.add(key)
            out.rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return out


def _get_skip_reason(revision: Revision) -> str | None:
    """Why a revision says nothing about which continuation is better; None if it does."""
    gain = revision.reward_after - revision.reward_before
    if not math.isfinite(gain):
        return "non-finite"
    if gain == 0:
        return "tie"
    return None if (gain > 0) == revision.accepted else "against the reward"
