"""Token labels: which tokens of a response, and which alternatives to them, are free of error.

Step labels exist where a task can say what a right solution may look like character by character (`digit_chains`);
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
CORRECT_CHARACTERS_BY_TASK: dict[str, Callable[[Problem], list[str]]] = {
    "digit_chains": digit_chains.list_allowed_characters
}


def has_step_labels(problems: Sequence[Problem]) -> bool:
    """Whether every problem is of a task that can tell right tokens from wrong ones, and has a solution."""
    return all(problem.task in CORRECT_CHARACTERS_BY_TASK and problem.solution is not None for problem in problems)


class TokenLabeler:
    """Step labels in a policy's vocabulary.

    With tokens of several characters a candidate is judged at the place where the response stands, so alternatives
    of other lengths than the token they replace shift what follows; for one token per character nothing shifts.
    """

    def __init__(self, policy: Policy):
        self.stop_ids = policy.stop_ids
        rows = policy.forbidden_mask.shape[0]
        known = [index for index in range(rows) if not policy.forbidden_mask[index]]
        self.token_texts = dict(zip(known, policy.tokenizer.batch_decode([[i] for i in known]), strict=True))

    def label_candidates(self, problem: Problem, response_ids: Sequence[int], candidates: Tensor) -> Tensor:
        """[T, K] bool: candidates [T, K] that continue a right solution where the response stands.

        Raises:
            ValueError: a task without step labels.
        """
        if not has_step_labels([problem]):
            raise ValueError(f"{problem.id}: the task {problem.task or '(none)'} has no step labels")
        solution = CORRECT_CHARACTERS_BY_TASK[problem.task](problem)
        table = torch.zeros(candidates.shape, dtype=torch.bool)
        place = 0
        for at, (token, row) in enumerate(zip(response_ids, candidates.tolist(), strict=True)):
            table[at] = torch.tensor([self._is_correct(index, solution, place) for index in row])
            place += len(self.token_texts.get(token, ""))
        return table

    def label_prefixes(self, problem: Problem, response_ids: Sequence[int]) -> list[bool]:
        """[T]: no error up to and including each token."""
        own = self.label_candidates(problem, response_ids, torch.tensor(response_ids)[:, None])
        return own.squeeze(1).cumprod(0).bool().tolist()

    def find_first_error(self, problem: Problem, response_ids: Sequence[int]) -> int | None:
        """Index of the first wrong token; None if there is none."""
        sound = self.label_prefixes(problem, response_ids)
        return sound.index(False) if False in sound else None

    def _is_correct(self, token: int, solution: list[str], place: int) -> bool:
        if token in self.stop_ids:
            return place == len(solution)
        text = self.token_texts.get(token, "")
        wanted = solution[place : place + len(text)]
        return bool(text) and len(wanted) == len(text) and all(c in good for c, good in zip(text, wanted, strict=True))
