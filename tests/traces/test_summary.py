"""Traces that teach nothing are noticed while they are made."""

from __future__ import annotations

from dataclasses import replace

from nabla_trl.models.flops import Cost
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.summary import MIN_WARNING_TRACES, TraceTotals

GOOD = Trace("p", "t", "nabla", 0, "q", "r", [1], [2], [2], 0.5, 1.0, "3", None, None, [], Cost(), "x", True, {})


def kinds(traces: list[Trace]) -> set[str]:
    totals = TraceTotals()
    for trace in traces:
        totals.add(trace)
    return set(totals.list_warnings(512))


def test_most_unfinished_unreadable_failed_or_all_equal() -> None:
    num = MIN_WARNING_TRACES
    varied = [replace(GOOD, response_ids=[index], reward=float(index)) for index in range(num)]
    assert kinds(varied) == set()
    few = num // 2
    for change, kind in (({"finished": False}, "unfinished"), ({"answer": None}, "unreadable")):
        assert kinds([replace(trace, **change) for trace in varied]) == {kind}  # type: ignore[arg-type]
        assert kinds([replace(trace, **change) for trace in varied[:few]] + varied[few:]) == set()  # type: ignore[arg-type]
    assert kinds([replace(trace, error="too long") for trace in varied]) == {"failed"}
    assert kinds([GOOD] * num) == {"equal"} and kinds([GOOD] * (num - 1)) == set()
    same_reward = [replace(trace, reward=1.0, reward_initial=1.0) for trace in varied]
    totals = TraceTotals()
    for trace in same_reward:
        totals.add(trace)
    assert totals.list_warnings(512) == {
        "equal": f"all {num} responses have the reward 1, so nothing can be preferred: audit the reward"
    }


def test_an_end_is_missing_and_its_answer_is_not_missed_twice() -> None:
    cut = [replace(GOOD, response_ids=[index], finished=False, answer=None) for index in range(MIN_WARNING_TRACES)]
    totals = TraceTotals()
    for trace in cut:
        totals.add(trace)
    assert "raise max_new_tokens (512)" in totals.list_warnings(512)["unfinished"]
    assert "unreadable" not in totals.list_warnings(512)
