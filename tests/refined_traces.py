"""Made-up traces of a search, whose tokens are characters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nabla_trl.models.flops import Cost
from nabla_trl.traces.schema import Revision, Trace
from nabla_trl.traces.texts import TextDecoder

END = 0


def ids_of(text: str) -> list[int]:
    return [*map(ord, text), END]


def decode(ids: list[int]) -> str:
    """Characters by their code point; END is special."""
    return "".join(chr(index) for index in ids if index != END)


def trace_of(first: str, *proposals: tuple[int, str, bool], **changes: Any) -> Trace:
    """Proposals (position, suffix, accepted), each a round of its own; the reward counts the accepted ones."""
    base, reward, revisions = ids_of(first), 0.0, []
    for number, (at, suffix, accepted) in enumerate(proposals):
        new, after = ids_of(suffix), reward + (1 if accepted else -1)
        revisions.append(Revision(number, at, base[at], new[0], tuple(new), reward, after, accepted, 1e6))
        if accepted:
            base, reward = base[:at] + new, after
    trace = Trace(
        problem_id="question/0",
        task="custom",
        method="nabla",
        seed=0,
        prompt="1+2?",
        response=decode(base),
        prompt_ids=[1],
        initial_ids=ids_of(first),
        response_ids=base,
        reward_initial=0.0,
        reward=reward,
        answer="9",
        gold=None,
        correct=None,
        revisions=revisions,
        cost=Cost(1.2e9, 0.25, {"policy/decode": 3}),
        stop_reason="max_rounds",
        finished=True,
        meta={"policy": "p"},
        decoder=TextDecoder(decode),
    )
    trace.validate()
    return replace(trace, **changes)


STORY = trace_of("1+2=4;#4", (4, "3;#3", False), (0, "1+2=5;#5", False), (4, "3;#9", True), (6, "#7", True))
