"""Does a table of numbers per position and candidate find the first error of a wrong response, and its repair?

The tables are predicted changes of the reward (`swaps`), log-probabilities, or sums of both; only candidates that a
search may propose are looked at. Needs step labels (`labels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nabla_trl.audit.swaps import Response
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabels, has_step_labels
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class Wrong:
    """A wrong response.

    Attributes:
        row: its index among the responses.
        position: of its first error.
        right: [K] bool, the candidates there that are right and may be proposed.
    """

    row: int
    response: Response
    position: int
    right: Tensor

    @property
    def fixable(self) -> bool:
        return bool(self.right.any())

    def allowed_only(self, table: Tensor) -> Tensor:
        """[T, K] the table with −inf at what may not be proposed."""
        return table.masked_fill(~self.response.allowed, -torch.inf)


def find_wrong(
    problems: Sequence[Problem], responses: Sequence[Response], policy: Policy
) -> tuple[list[Wrong], str | None]:
    """The finished responses with a first error and a wrong answer; where there is none, why.

    A right answer after an error is luck, and left out. Answers are compared by their writing.
    """
    if not has_step_labels(problems):
        return [], "the problems have no step labels"
    labels = TokenLabels(policy)
    wrong = []
    for row, one in enumerate(responses):
        problem, ids = one.sample.problem, one.sample.response
        at = labels.first_error(problem, ids) if one.finished else None
        if at is not None and not _right_answer(policy.said(ids, policy.stops(problem)), problem):
            right = labels.right(problem, ids, one.known.candidates)[at] & one.allowed[at]
            wrong.append(Wrong(row, one, at, right))
    return wrong, None if wrong else f"none of {len(responses)} responses is finished and wrong"


def _right_answer(text: str, problem: Problem) -> bool:
    answer = extract_answer(text)
    return answer is not None and normalize_answer(answer) == normalize_answer(problem.answer or "")


def best_ranks(wrong: Sequence[Wrong], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] rank (from 0) of the first error among positions, by the best swap allowed at each."""
    pairs = zip(wrong, tables, strict=True)
    return np.array([_rank(one.allowed_only(table).amax(-1), one.position) for one, table in pairs], dtype=int)


def entropy_ranks(wrong: Sequence[Wrong]) -> np.ndarray:
    """[W] rank (from 0) of the first error among positions, by the entropy of the policy's candidates."""
    return np.array([_rank(_entropy(one.response.known.logp), one.position) for one in wrong], dtype=int)


def right_first(wrong: Sequence[Wrong], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] bool: at the first error the best swap allowed is a right token."""
    found = []
    for one, table in zip(wrong, tables, strict=True):
        row = one.allowed_only(table)[one.position]
        found.append(bool(one.right[int(row.argmax())]))
    return np.array(found, dtype=bool)


def right_above(wrong: Sequence[Wrong], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] bool: at the first error some right token stands above 0."""
    pairs = zip(wrong, tables, strict=True)
    return np.array([bool((table[one.position][one.right] > 0).any()) for one, table in pairs], dtype=bool)


def repairs(wrong: Sequence[Wrong], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] bool: the best swap of all that are allowed is a right token at the first error."""
    found = []
    for one, table in zip(wrong, tables, strict=True):
        position, column = divmod(int(one.allowed_only(table).argmax()), table.shape[1])
        found.append(position == one.position and bool(one.right[column]))
    return np.array(found, dtype=bool)


def _rank(scores: Tensor, position: int) -> int:
    """How many positions come before this one; the earlier of equals does, and −inf is never found."""
    own = scores[position]
    if own == -torch.inf:
        return len(scores)
    return int((scores > own).sum() + (scores[:position] == own).sum())


def _entropy(logp: Tensor) -> Tensor:
    """[T] nats, of log π [T, K] over the candidates alone."""
    normal = logp.double().log_softmax(-1)
    return -(normal.exp() * normal.nan_to_num(neginf=0.0)).sum(-1)
