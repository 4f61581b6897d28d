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

from nabla_trl.audit.swaps import SampledResponse
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabeler, has_step_labels
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class WrongResponse:
    """A wrong response.

    Attributes:
        row: its index among the responses.
        position: of its first error.
        right: [K] bool, the candidates there that are right and may be proposed.
    """

    response_index: int
    response: SampledResponse
    error_position: int
    correct_candidates: Tensor

    @property
    def is_repairable(self) -> bool:
        return bool(self.correct_candidates.any())

    def mask_disallowed(self, table: Tensor) -> Tensor:
        """[T, K] the table with −inf at what may not be proposed."""
        return table.masked_fill(~self.response.allowed_swaps, -torch.inf)


def find_wrong_responses(
    problems: Sequence[Problem], responses: Sequence[SampledResponse], policy: Policy
) -> tuple[list[WrongResponse], str | None]:
    """The finished responses with a first error and a wrong answer; where there is none, why.

    A right answer after an error is luck, and left out. Answers are compared by their writing.
    """
    if not has_step_labels(problems):
        return [], "the problems have no step labels"
    labels = TokenLabeler(policy)
    wrong = []
    for row, one in enumerate(responses):
        problem, ids = one.sample.problem, one.sample.response_ids
        at = labels.find_first_error(problem, ids) if one.finished else None
        if at is not None and not _is_answer_correct(
            policy.decode_response(ids, policy.get_stop_strings(problem)), problem
        ):
            right = labels.label_candidates(problem, ids, one.draw_info.candidates)[at] & one.allowed_swaps[at]
            wrong.append(WrongResponse(row, one, at, right))
    return wrong, None if wrong else f"none of {len(responses)} responses is finished and wrong"


def _is_answer_correct(text: str, problem: Problem) -> bool:
    answer = extract_answer(text)
    return answer is not None and normalize_answer(answer) == normalize_answer(problem.answer or "")


def rank_errors_by_swap(wrong_responses: Sequence[WrongResponse], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] rank (from 0) of the first error among positions, by the best swap allowed at each."""
    pairs = zip(wrong_responses, tables, strict=True)
    return np.array(
        [_rank_position(one.mask_disallowed(table).amax(-1), one.error_position) for one, table in pairs], dtype=int
    )


def rank_errors_by_entropy(wrong_responses: Sequence[WrongResponse]) -> np.ndarray:
    """[W] rank (from 0) of the first error among positions, by the entropy of the policy's candidates."""
    return np.array(
        [_rank_position(_compute_entropy(one.response.draw_info.logp), one.error_position) for one in wrong_responses],
        dtype=int,
    )


def find_repairs_at_error(wrong_responses: Sequence[WrongResponse], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] bool: at the first error the best swap allowed is a right token."""
    found = []
    for one, table in zip(wrong_responses, tables, strict=True):
        row = one.mask_disallowed(table)[one.error_position]
        found.append(bool(one.correct_candidates[int(row.argmax())]))
    return np.array(found, dtype=bool)


def find_predicted_corrections(wrong_responses: Sequence[WrongResponse], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] bool: at the first error some right token stands above 0."""
    pairs = zip(wrong_responses, tables, strict=True)
    return np.array(
        [bool((table[one.error_position][one.correct_candidates] > 0).any()) for one, table in pairs], dtype=bool
    )


def find_repairs(wrong_responses: Sequence[WrongResponse], tables: Sequence[Tensor]) -> np.ndarray:
    """[W] bool: the best swap of all that are allowed is a right token at the first error."""
    found = []
    for one, table in zip(wrong_responses, tables, strict=True):
        position, column = divmod(int(one.mask_disallowed(table).argmax()), table.shape[1])
        found.append(position == one.error_position and bool(one.correct_candidates[column]))
    return np.array(found, dtype=bool)


def _rank_position(scores: Tensor, position: int) -> int:
    """How many positions come before this one; the earlier of equals does, and −inf is never found."""
    own = scores[position]
    if own == -torch.inf:
        return len(scores)
    return int((scores > own).sum() + (scores[:position] == own).sum())


def _compute_entropy(logp: Tensor) -> Tensor:
    """[T] nats, of log π [T, K] over the candidates alone."""
    normal = logp.double().log_softmax(-1)
    return -(normal.exp() * normal.nan_to_num(neginf=0.0)).sum(-1)
