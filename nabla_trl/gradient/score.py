"""Scores of a sequence classifier as differentiable objectives.

With s_t the scalar head read after response token t, the outcome score is f(y) = s_T at the end of the closed turn,
and the process score is f(y) = Σ_e s_e over the ends e of reasoning steps and the end of the turn. A score depends on
the tokens through the hidden states h alone, so that its gradient has no part at fixed h:

    ∂f/∂h_t = ∂s_t/∂h_t where the head is read, and 0 elsewhere
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_trl.gradient.objectives import (
    EncodedSample,
    ForwardBatch,
    GradientSeed,
    Objective,
    Sample,
    ScoreCache,
    widen_dtype,
)
from nabla_trl.gradient.relaxation import RelaxedResponse
from nabla_trl.gradient.step_ends import StepFinder
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem


class TurnPromptEncoder(ABC):
    """Maps a problem to a model's prompt ids, where the opening of the turn may depend on the response."""

    @abstractmethod
    def __call__(self, problem: Problem, prompt_ids: list[int]) -> list[int]:
        """Return the prompt ids before most responses."""

    @abstractmethod
    def encode_for_response(self, problem: Problem, response_ids: Sequence[int]) -> list[int]:
        """Return the prompt ids before a response.

        Args:
            response_ids: in the model's ids, −1 where it has none.
        """


class ScoreObjective(Objective):
    """f(y): the scalar head of a sequence-classification model at the last token of the closed turn.

    Args:
        turn_end_ids: ids that close the assistant's turn in the model's chat template. May be empty.
        stop_ids: the policy's stop tokens. A final one is kept if it begins the turn's end, and dropped otherwise.

    Attributes:
        repeats_turn_end: write the whole end of the turn after a response that ends with its first token.
    """

    def __init__(self, *args: Any, turn_end_ids: list[int], stop_ids: frozenset[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.turn_end_ids, self.stop_ids, self.repeats_turn_end = turn_end_ids, stop_ids, False

    def encode(self, sample: Sample) -> EncodedSample:
        response_ids, turn_end_ids = (
            (self.vocab_map[sample.response_ids].tolist(), [])
            if sample.is_partial
            else self._close_turn(sample.response_ids)
        )
        if isinstance(self.encode_prompt, TurnPromptEncoder):
            prompt_ids = self.encode_prompt.encode_for_response(sample.problem, response_ids)
        else:
            prompt_ids = self.encode_prompt(sample.problem, sample.prompt_ids)
        return EncodedSample(prompt_ids, response_ids, turn_end_ids)

    def _close_turn(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return a response in this model's ids, and what closes the turn after it."""
        response_ids, turn_end_ids = self.vocab_map[ids].tolist(), self.turn_end_ids
        if ids and ids[-1] in self.stop_ids:
            if turn_end_ids and response_ids[-1] == turn_end_ids[0]:
                turn_end_ids = turn_end_ids if self.repeats_turn_end else turn_end_ids[1:]
            elif turn_end_ids or response_ids[-1] < 0:
                response_ids = response_ids[:-1]
        return response_ids, turn_end_ids

    def list_score_positions(self, response_ids: Sequence[int], num_turn_end_ids: int) -> list[int]:
        """Return after how many tokens the head is read, ascending. f is the sum of these scores.

        Args:
            response_ids: in this model's ids.
            num_turn_end_ids: how many tokens close the turn after the response.
        """
        return [len(response_ids) + num_turn_end_ids]

    def select_input_ids(self, encoded: EncodedSample, num_shared: int) -> list[int]:
        return encoded.sequence_ids[len(encoded.prompt_ids) - 1 + num_shared :]

    # --- values ---

    def get_cached_values(self, cache: ScoreCache, encoded: EncodedSample, num_shared: int) -> Tensor:
        positions = self.list_score_positions(encoded.response_ids, len(encoded.turn_end_ids))
        # The last shared token is read again, and its score with it.
        return cache.prefix_scores[[count for count in positions if count < num_shared]]

    def compute_values(self, hidden: Tensor, batch: ForwardBatch) -> list[Tensor]:
        inputs = []
        for row, begin in zip(batch.encoded, batch.num_shared, strict=True):
            positions = self.list_score_positions(row.response_ids, len(row.turn_end_ids))
            inputs.append([count - begin for count in positions if count >= begin])
        return self._gather_scores(hidden, inputs)

    def build_caches(
        self,
        batch: ForwardBatch,
        hidden_states: Sequence[Tensor],
        states: Sequence[PrefixState],
        values: Sequence[Tensor],
        caches: Sequence[ScoreCache],
    ) -> list[ScoreCache]:
        scores = self.apply_head(torch.cat(list(hidden_states))).split(batch.num_tokens)
        new_caches = []
        for state, new, cache, encoded, count in zip(
            states, scores, caches, batch.encoded, batch.num_shared, strict=True
        ):
            # The inputs begin with the last shared token. The turn's end at their end is no part of the response.
            new = new[: len(encoded.response_ids) - count + 1]
            new_cache = self.make_prompt_cache(state, encoded.prompt_ids)
            new_cache.prefix_scores = torch.cat((cache.prefix_scores[:count].to(new), new))
            new_caches.append(new_cache)
        return new_caches

    def compute_running_values(self, sample: Sample, cache: ScoreCache) -> Tensor:
        # f = Σ_e s_e. After token t, the ends e ≤ t have their scores, and all later ones are taken to have s_t.
        response_ids, turn_end_ids = self._close_turn(sample.response_ids)
        positions = self.list_score_positions(response_ids, len(turn_end_ids))
        scores = cache.prefix_scores.double()
        is_end = torch.zeros_like(scores)
        is_end[[count for count in positions if count < len(scores)]] = 1
        return (is_end * scores).cumsum(0) + (len(positions) - is_end.cumsum(0)) * scores

    def _gather_scores(self, hidden: Tensor, inputs: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return per row the scores at some of its inputs."""
        rows = [row for row, indices in enumerate(inputs) for _ in indices]
        columns = [index for indices in inputs for index in indices]
        return list(self.apply_head(hidden[rows, columns]).split([len(indices) for indices in inputs]))

    def apply_head(self, states: Tensor) -> Tensor:
        """Return the scores [...] (float32 at least) of last hidden states [..., d]."""
        scores = self.model.score(states).squeeze(-1)
        return scores.to(widen_dtype(scores))

    # --- gradient ---

    def compute_gradient_seed(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        relaxed_responses: Sequence[RelaxedResponse],
        candidates: Sequence[Tensor] | None,
    ) -> GradientSeed:
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            # The head is read where the response's own tokens say, whatever is mixed into them.
            values = torch.stack([scores.double().sum() for scores in self.compute_values(leaf, batch)])
        return GradientSeed(values.detach(), torch.autograd.grad(values.sum(), leaf)[0], None)


class ProcessObjective(ScoreObjective):
    """f(y) = Σ_e s(x, y_≤e) over the ends e of reasoning steps and the end of the closed turn.

    An end of a step that is also the end of the turn counts once.

    Args:
        step_finder: finds the ends of steps in this model's ids.
    """

    def __init__(self, *args: Any, step_finder: StepFinder, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step_finder = step_finder

    def list_score_positions(self, response_ids: Sequence[int], num_turn_end_ids: int) -> list[int]:
        step_ends = {position + 1 for position in self.step_finder.find_step_ends(response_ids)}
        return sorted({*step_ends, *super().list_score_positions(response_ids, num_turn_end_ids)})
