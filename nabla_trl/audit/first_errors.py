"""Measure whether a table of numbers per position and candidate finds the first error of a response, and its repair.

The tables are predicted changes of the reward (`nabla_trl.audit.swaps`), log-probabilities, or sums of both. Only
candidates that a search may propose count. The task needs step labels (`nabla_trl.reward_training.labels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """A finished response with a first error and an incorrect answer. Tables are [T, K].

    Attributes:
        response_index: its index among the responses.
        error_position: position of its first error.
        correct_candidates: [K] bool, the candidates at the error that are correct and may be proposed.
    """

    response_index: int
    response: SampledResponse
    error_position: int
    correct_candidates: Tensor

    @property
    def is_repairable(self) -> bool:
        """Whether a correct token may be proposed at the first error."""
        return bool(self.correct_candidates.any())

    def rank_error_by_swap(self, table: Tensor) -> int:
        """Return the rank (from 0) of the first error among positions, by the best swap allowed at each."""
        return _rank_position(self._mask_disallowed(table).amax(-1), self.error_position)

    def rank_error_by_entropy(self) -> int:
        """Return the rank (from 0) of the first error among positions, by the entropy of the policy's candidates."""
        logp = self.response.draw_info.logp.double().log_softmax(-1)
        return _rank_position(-(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1), self.error_position)

    def is_repaired_at_error(self, table: Tensor) -> bool:
        """Return True if the best swap allowed at the first error is a correct token."""
        return bool(self.correct_candidates[int(self._mask_disallowed(table)[self.error_position].argmax())])

    def is_correction_predicted(self, table: Tensor) -> bool:
        """Return True if the table is above 0 for some correct token at the first error."""
        return bool((table[self.error_position][self.correct_candidates] > 0).any())

    def is_repaired(self, table: Tensor) -> bool:
        """Return True if the best swap of all that are allowed is a correct token at the first error."""
        position, column = divmod(int(self._mask_disallowed(table).argmax()), table.shape[1])
        return position == self.error_position and bool(self.correct_candidates[column])

    def _mask_disallowed(self, table: Tensor) -> Tensor:
        return table.masked_fill(~self.response.allowed_swaps, -torch.inf)


def find_wrong_responses(
    problems: Sequence[Problem], responses: Sequence[SampledResponse], policy: Policy
) -> tuple[list[WrongResponse], str | None]:
    """Return the wrong responses, and why there are none, if so.

    A correct answer after an error is chance, and left out. Answers are compared as normalized text.
    """
    if not has_step_labels(problems):
        return [], "the problems have no step labels"
    labeler = TokenLabeler(policy)
    wrong_responses = []
    for index, response in enumerate(responses):
        problem, ids = response.sample.problem, response.sample.response_ids
        position = labeler.find_first_error(problem, ids) if response.finished else None
        if position is None:
            continue
        answer = extract_answer(policy.decode_response(ids, policy.get_stop_strings(problem)))
        if answer is None or normalize_answer(answer) != normalize_answer(problem.answer or ""):
            is_correct = labeler.label_candidates(problem, ids, response.draw_info.candidates)[position]
            correct_candidates = is_correct & response.allowed_swaps[position]
            wrong_responses.append(WrongResponse(index, response, position, correct_candidates))
    return wrong_responses, None if wrong_responses else f"none of {len(responses)} responses is finished and wrong"


def _rank_position(scores: Tensor, position: int) -> int:
    """Return how many positions come before this one. The earlier of equals does, and −inf comes after all."""
    score = scores[position]
    if score == -torch.inf:
        return len(scores)
    return int((scores > score).sum() + (scores[:position] == score).sum())
