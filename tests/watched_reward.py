"""A reward that notes what is scored together, and can be held up."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import Any

from nabla_trl.rewards.reward import Reward

PATIENCE = 120.0  # seconds until a test gives up. A crowded machine may need most of them


class Watched(Reward):
    """A reward that notes what is scored together, and asks `before` first; built from another's fields."""

    def __init__(self, reward: Reward):
        super().__init__(**vars(reward))
        self.scored: list[list[str]] = []
        self.before: Callable[[list[str]], None] = lambda questions: None

    def score(self, samples: Any, *args: Any, **options: Any) -> Any:
        questions = [sample.problem.question for sample in samples]
        self.scored.append(questions)
        self.before(questions)
        return super().score(samples, *args, **options)


class Gate:
    """Holds the engine where a question is scored, until it is opened."""

    def __init__(self, question: str):
        self.question, self.reached, self.opened = question, Event(), Event()

    def __call__(self, questions: list[str]) -> None:
        if self.question in questions:
            self.reached.set()
            assert self.opened.wait(PATIENCE)
