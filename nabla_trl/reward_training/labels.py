"""Token labels: which tokens of a response, and which alternatives to them, are free of error.

Step labels exist for tasks that specify, character by character, what a correct solution may look like (digit_chains).
For other tasks only the correctness of the final answer is known. A token is correct if its characters continue a
correct solution at the token's position. The stop token is correct at the end of a solution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nabla_trl.models.policy import Policy
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem

# task -> problem -> per character of a correct solution, the characters that are correct there
CORRECT_CHARACTERS_BY_TASK: dict[str, Callable[[Problem], list[str]]] = {
    "digit_chains": digit_chains.list_allowed_characters
}


def has_step_labels(problems: Sequence[Problem]) -> bool:
    """Tell whether every problem has a solution and is of a task with step labels."""
    return all(problem.task in CORRECT_CHARACTERS_BY_TASK and problem.solution is not None for problem in problems)


class TokenLabeler:
    """Step labels in a policy's vocabulary.

    Each candidate is judged at the character where the response's token begins. With tokens of several characters, an
    alternative of another length would shift what follows, and the shift is ignored. With one token per character
    nothing shifts.
    """

    def __init__(self, policy: Policy):
        self.stop_ids = policy.stop_ids
        ids = [index for index in range(policy.forbidden_mask.shape[0]) if not policy.forbidden_mask[index]]
        self.token_texts = dict(zip(ids, policy.tokenizer.batch_decode([[i] for i in ids]), strict=True))

    def label_candidates(self, problem: Problem, response_ids: Sequence[int], candidates: Tensor) -> Tensor:
        """Return [T, K] bool: the candidates that continue a correct solution at the response's positions.

        Args:
            problem: of a task with step labels.
            response_ids: T tokens of the policy.
            candidates: [T, K] tokens of the policy.

        Raises:
            ValueError: a task without step labels.
        """
        if not has_step_labels([problem]):
            raise ValueError(f"{problem.id}: the task {problem.task or '(none)'} has no step labels")
        solution = CORRECT_CHARACTERS_BY_TASK[problem.task](problem)
        labels = torch.zeros(candidates.shape, dtype=torch.bool)
        character = 0
        for position, (token, row) in enumerate(zip(response_ids, candidates.tolist(), strict=True)):
            labels[position] = torch.tensor([self._is_correct(index, solution, character) for index in row])
            character += len(self.token_texts.get(token, ""))
        return labels

    def label_prefixes(self, problem: Problem, response_ids: Sequence[int]) -> list[bool]:
        """Return per response token whether the response is free of error up to and including this token."""
        labels = self.label_candidates(problem, response_ids, torch.tensor(response_ids)[:, None])
        return labels.squeeze(1).cumprod(0).bool().tolist()

    def find_first_error(self, problem: Problem, response_ids: Sequence[int]) -> int | None:
        """Return the index of the first wrong token, or None if there is none."""
        prefixes = self.label_prefixes(problem, response_ids)
        return prefixes.index(False) if False in prefixes else None

    def _is_correct(self, token: int, solution: list[str], character: int) -> bool:
        if token in self.stop_ids:
            return character == len(solution)
        text = self.token_texts.get(token, "")
        allowed = solution[character : character + len(text)]
        return (
            bool(text) and len(allowed) == len(text) and all(c in good for c, good in zip(text, allowed, strict=True))
        )
