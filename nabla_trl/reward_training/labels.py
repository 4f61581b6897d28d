"""Token labels: which tokens of a response, and which alternatives to them, are free of error.

Step labels exist where a task can say what a right solution may look like character by character (`chains`);
elsewhere only the verdict on the final answer is known. A token is right if its characters continue a right
solution at the place where it stands, and the stop token is right at the end of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nabla_trl.models.policy import Policy
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem

# task -> problem -> per character of a right solution, the characters that are right there
RIGHT_CHARACTERS: dict[str, Callable[[Problem], list[str]]] = {"chains": digit_chains.right_characters}


def has_step_labels(problems: Sequence[Problem]) -> bool:
    """Whether every problem is of a task that can tell right tokens from wrong ones, and has a solution."""
    return all(problem.task in RIGHT_CHARACTERS and problem.solution is not None for problem in problems)


class TokenLabels:
    """Step labels in a policy's vocabulary.

    With tokens of several characters a candidate is judged at the place where the response stands, so alternatives
    of other lengths than the token they replace shift what follows; for one token per character nothing shifts.
    """

    def __init__(self, policy: Policy):
        self.stop_ids = policy.stop_ids
        rows = policy.forbidden.shape[0]
        known = [index for index in range(rows) if not policy.forbidden[index]]
        self.strings = dict(zip(known, policy.tokenizer.batch_decode([[i] for i in known]), strict=True))

    def right(self, problem: Problem, response: Sequence[int], candidates: Tensor) -> Tensor:
        """[T, K] bool: candidates [T, K] that continue a right solution where the response stands.

        Raises:
            ValueError: a task without step labels.
        """
        if not has_step_labels([problem]):
            raise ValueError(f"{problem.id}: the task {problem.task or '(none)'} has no step labels")
        solution = RIGHT_CHARACTERS[problem.task](problem)
        table = torch.zeros(candidates.shape, dtype=torch.bool)
        place = 0
        for at, (token, row) in enumerate(zip(response, candidates.tolist(), strict=True)):
            table[at] = torch.tensor([self._fits(index, solution, place) for index in row])
            place += len(self.strings.get(token, ""))
        return table

    def sound(self, problem: Problem, response: Sequence[int]) -> list[bool]:
        """[T]: no error up to and including each token."""
        own = self.right(problem, response, torch.tensor(response)[:, None])
        return own.squeeze(1).cumprod(0).bool().tolist()

    def first_error(self, problem: Problem, response: Sequence[int]) -> int | None:
        """Index of the first wrong token; None if there is none."""
        sound = self.sound(problem, response)
        return sound.index(False) if False in sound else None

    def _fits(self, token: int, solution: list[str], place: int) -> bool:
        if token in self.stop_ids:
            return place == len(solution)
        text = self.strings.get(token, "")
        wanted = solution[place : place + len(text)]
        return bool(text) and len(wanted) == len(text) and all(c in good for c, good in zip(text, wanted, strict=True))
