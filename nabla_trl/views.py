"""Traces as rows for trainers: token ids and labels, never text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from nabla_trl.traces import Revision, Trace

IGNORED = -100  # the label that a loss skips


class Rows(NamedTuple):
    """Rows for a trainer, and how often something was left out, by reason."""

    rows: list[dict[str, list[int]]]
    skipped: Counter[str]


def sft_rows(traces: Iterable[Trace]) -> Rows:
    """One row per trace: `input_ids` = prompt + response, `labels` = -100 over the prompt, then the response.

    Skipped and counted: traces with an "error", "unfinished" ones, "empty" responses. ValueError for a trace
    without a prompt.
    """
    out = Rows([], Counter())
    for trace in traces:
        if trace.error is not None:
            out.skipped["error"] += 1
        elif not trace.response_ids:
            out.skipped["empty"] += 1
        elif not trace.finished:
            out.skipped["unfinished"] += 1
        elif not trace.prompt_ids:
            raise ValueError(f"{trace._label()}: no prompt ids; was it read without that column?")
        else:
            prompt, response = list(trace.prompt_ids), list(trace.response_ids)
            out.rows.append({"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response})
    return out


def preference_rows(traces: Iterable[Trace]) -> Rows:
    """One row per revision that was decided by the reward: the better and the worse continuation of a prefix.

    `prompt_ids` = prompt + shared part of the response, `chosen_ids` and `rejected_ids` = the proposal and
    the incumbent from the branch on. An accepted proposal with a higher reward is chosen, a rejected one with
    a lower reward is rejected. Skipped and counted: traces with an "error"; revisions with a "tie", with a
    "non-finite" reward, or decided "against the reward" (Metropolis does); "duplicate" rows. ValueError for a
    trace that contradicts itself.
    """
    out = Rows([], Counter())
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for trace in traces:
        if trace.error is not None:
            out.skipped["error"] += 1
            continue
        trace.validate()
        for revision, base in trace.bases():
            if reason := _undecided(revision):
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


def _undecided(revision: Revision) -> str | None:
    """Why a revision says nothing about which continuation is better; None if it does."""
    gain = revision.reward_after - revision.reward_before
    if not math.isfinite(gain):
        return "non-finite"
    if gain == 0:
        return "tie"
    return None if (gain > 0) == revision.accepted else "against the reward"
