"""Figures of many traces: rewards, acceptance, accuracy and cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from nabla_trl.traces.schema import Trace

# The fields of traces that a summary reads.
SUMMARY_COLUMNS = ("reward_initial", "reward", "correct", "revisions", "cost", "finished", "error")


MIN_WARNING_TRACES = 8  # fewer may look odd by chance


@dataclass
class TraceTotals:
    """Sums over traces. A trace with an error has revisions and costs, and no reward or correctness.

    Attributes:
        first_error: message of the first trace with an error.
        num_scored: traces with rewards, whose sums are `reward_before` and `reward_after`.
        num_unfinished: responses without an end.
        num_unreadable: responses with an end, in which no answer is found.
        rewards, responses: distinct ones, the first two at most. More say no more.
        tokens: by model and kind of work, as in `Cost`.
    """

    num_traces: int = 0
    num_errors: int = 0
    first_error: str = ""
    num_scored: int = 0
    reward_before: float = 0.0
    reward_after: float = 0.0
    num_proposed: int = 0
    num_accepted: int = 0
    num_graded: int = 0
    num_correct: int = 0
    num_unfinished: int = 0
    num_unreadable: int = 0
    rewards: set[float] = field(default_factory=set)
    responses: set[tuple[int, ...]] = field(default_factory=set)
    flops: float = 0.0
    seconds: float = 0.0
    tokens: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> TraceTotals:
        """Return the totals of traces."""
        totals = cls()
        for trace in traces:
            totals.add(trace)
        return totals

    def add(self, trace: Trace) -> None:
        """Count a trace."""
        self.num_traces += 1
        self.flops += trace.cost.flops
        self.seconds += trace.cost.seconds
        self.tokens.update(trace.cost.tokens)
        self.num_proposed += len(trace.revisions)
        self.num_accepted += sum(revision.accepted for revision in trace.revisions)
        if trace.error is not None:
            self.num_errors += 1
            self.first_error = self.first_error or trace.error
            return
        self.num_unfinished += not trace.finished
        self.num_unreadable += trace.finished and trace.answer is None
        if len(self.rewards) < 2:
            self.rewards |= {trace.reward, trace.reward_initial}
        if len(self.responses) < 2:
            self.responses.add(tuple(trace.response_ids))
        if trace.correct is not None:
            self.num_graded += 1
            self.num_correct += trace.correct
        if math.isfinite(trace.reward_initial) and math.isfinite(trace.reward):
            self.num_scored += 1
            self.reward_before += trace.reward_initial
            self.reward_after += trace.reward

    def list_warnings(self, max_new_tokens: int) -> dict[str, str]:
        """Return what looks wrong with most or all traces, as a sentence by kind. A few traces say nothing."""
        num_valid = self.num_traces - self.num_errors
        warnings = {}
        if self.num_traces >= MIN_WARNING_TRACES and 2 * self.num_errors > self.num_traces:
            warnings["failed"] = (
                f"{self.num_errors} of {self.num_traces} problems failed, the first: {self.first_error}"
            )
        if num_valid < MIN_WARNING_TRACES:
            return warnings
        if 2 * self.num_unfinished > num_valid:
            warnings["unfinished"] = (
                f"{self.num_unfinished} of {num_valid} responses were cut off before their end: raise max_new_tokens "
                f"({max_new_tokens}), or check that the prompt shows the policy how to end"
            )
        if 2 * self.num_unreadable > num_valid:
            warnings["unreadable"] = (
                f"no answer is found in {self.num_unreadable} of {num_valid} responses: check the prompt, "
                "its instruction and the chat template"
            )
        if len(self.responses) == 1:
            warnings["equal"] = f"all {num_valid} responses are the same: is the prompt right, and the temperature?"
        elif len(self.rewards) == 1:
            [value] = self.rewards
            warnings["equal"] = (
                f"all {num_valid} responses have the reward {value:.4g}, so nothing can be preferred: audit the reward"
            )
        return warnings

    def __str__(self) -> str:
        means = self.compute_metrics()
        before, after = (means[name] or 0.0 for name in ("reward_before", "reward_after"))
        text = f"{self.num_accepted} of {self.num_proposed} revisions accepted, mean reward {before:.2f} → {after:.2f}"
        return f"{text}, {self.num_errors} failed (the first: {self.first_error})" if self.num_errors else text

    def compute_metrics(self) -> dict[str, float | None]:
        """Return means per trace and shares by name. None where nothing is known."""
        num_valid = self.num_traces - self.num_errors
        return {
            "reward_before": _divide(self.reward_before, self.num_scored),
            "reward_after": _divide(self.reward_after, self.num_scored),
            "acceptance_rate": _divide(self.num_accepted, self.num_proposed),
            "accuracy": _divide(self.num_correct, self.num_graded),
            "unfinished_rate": _divide(self.num_unfinished, num_valid),
            "error_rate": _divide(self.num_errors, self.num_traces),
            "flops_per_problem": _divide(self.flops, self.num_traces),
            "problems": float(self.num_traces),
        }


def _divide(total: float, count: int) -> float | None:
    return total / count if count else None
