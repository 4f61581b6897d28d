"""Scores of a sequence classifier, at the end of a response or summed over the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_trl.gradient.objectives import EncodedSample, ForwardBatch, GradientSeed, Objective, Sample, ScoreCache
from nabla_trl.gradient.relaxation import RelaxedResponse
from nabla_trl.gradient.step_ends import StepFinder


class ScoreObjective(Objective):
    """r(x, y): the scalar head of a sequence-classification model at the last token of the closed turn.

    Args:
        tail: ids that close the assistant's turn in the reward's template; may be empty.
        stop_ids: the policy's stop tokens. A trailing one is kept if it opens the tail, dropped otherwise.
    """

    def __init__(self, *args: Any, turn_end_ids: list[int], stop_ids: frozenset[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.turn_end_ids, self.stop_ids = turn_end_ids, stop_ids

    def encode(self, sample: Sample) -> EncodedSample:
        prompt = self.encode_prompt(sample.problem, sample.prompt_ids)
        if sample.is_partial:
            return EncodedSample(prompt, self.vocab_map[sample.response_ids].tolist(), turn_end_ids=[])
        return EncodedSample(prompt, *self._close_turn(sample.response_ids))

    def _close_turn(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A response in this model's ids, and what closes the turn after it."""
        response, tail = self.vocab_map[ids].tolist(), self.turn_end_ids
        if ids and ids[-1] in self.stop_ids:
            if tail and response[-1] == tail[0]:
                tail = tail[1:]
            elif tail or response[-1] < 0:
                response = response[:-1]
        return response, tail

    def list_score_positions(self, response_ids: Sequence[int], num_turn_end_ids: int) -> list[int]:
        """After how many tokens of a response (this model's ids) and of the `tail` ones that close it the head is
        read, ascending: the value is the sum of these scores."""
        return [len(response_ids) + num_turn_end_ids]

    def select_input_ids(self, encoded: EncodedSample, num_shared: int) -> list[int]:
        return encoded.sequence_ids[len(encoded.prompt_ids) - 1 + num_shared :]

    def count_head_positions(self, num_tokens: int) -> int:
        return num_tokens  # the head is one row: what it costs to read it everywhere does not matter

    def build_caches(
        self,
        kv_rows: Sequence[Tensor],
        logps: Sequence[Tensor],
        hidden_states: Sequence[Tensor],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        lengths: Sequence[int],
    ) -> list[ScoreCache]:
        fresh = self._apply_score_head(torch.cat(list(hidden_states))).split([len(state) for state in hidden_states])
        known = []
        for row, new, memo, count, length in zip(kv_rows, fresh, caches, num_shared, lengths, strict=True):
            bare = self.make_prompt_cache(row)
            # What is fed begins with the last shared token, and ends with the tail, which is no part of the response.
            levels = torch.cat((memo.prefix_scores[:count].to(new), new[: length - count + 1]))
            known.append(ScoreCache(bare.kv_row, bare.logp, bare.hidden_states, levels))
        return known

    def get_cached_values(self, cache: ScoreCache, encoded: EncodedSample, num_shared: int) -> Tensor:
        # The last shared token is fed again, and read then.
        return cache.prefix_scores[
            [
                count
                for count in self.list_score_positions(encoded.response_ids, len(encoded.turn_end_ids))
                if count < num_shared
            ]
        ]

    def compute_values(
        self, hidden: Tensor, batch: ForwardBatch, encoded: Sequence[EncodedSample], num_shared: Sequence[int]
    ) -> list[Tensor]:
        reads = [self.list_score_positions(one.response_ids, len(one.turn_end_ids)) for one in encoded]
        places = [
            [count - begin for count in row if count >= begin] for row, begin in zip(reads, num_shared, strict=True)
        ]
        return self._gather_scores(hidden, places)

    def compute_gradient_seed(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        encoded: Sequence[EncodedSample],
        num_shared: Sequence[int],
        targets: Sequence[RelaxedResponse],
        candidates: Sequence[Tensor] | None,
    ) -> GradientSeed:
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            # The head is read where the response's own tokens say, whatever is mixed into them.
            scores = self.compute_values(leaf, batch, encoded, num_shared)
            values = torch.stack([some.double().sum() for some in scores])
        return GradientSeed(values.detach(), torch.autograd.grad(values.sum(), leaf)[0], None)

    def compute_running_values(self, sample: Sample, cache: ScoreCache) -> Tensor:
        response, tail = self._close_turn(sample.response_ids)
        scores = cache.prefix_scores.double()
        reads = self.list_score_positions(response, len(tail))
        done = torch.zeros_like(scores)
        done[[count for count in reads if count < len(scores)]] = 1
        return (done * scores).cumsum(0) + (len(reads) - done.cumsum(0)) * scores

    def _gather_scores(self, hidden: Tensor, places: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per row the scores at some places among its fed tokens."""
        rows = [row for row, some in enumerate(places) for _ in some]
        flat = [place for some in places for place in some]
        return list(self._apply_score_head(hidden[rows, flat]).split([len(some) for some in places]))

    def _apply_score_head(self, states: Tensor) -> Tensor:
        scores = self.model.score(states).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class ProcessObjective(ScoreObjective):
    """r(x, y) = Σ_t s(x, y_≤t) over the tokens t that end a step and the end of the response, where s is the score of
    a `ScoreTerm`, read there after the closed turn. An end of a step that is also the end of all counts once.

    Args:
        steps: finds the ends of steps in this model's ids.
    """

    def __init__(self, *args: Any, step_finder: StepFinder, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.step_finder = step_finder

    def list_score_positions(self, response_ids: Sequence[int], num_turn_end_ids: int) -> list[int]:
        return sorted(
            {
                *(place + 1 for place in self.step_finder.find_step_ends(response_ids)),
                *super().list_score_positions(response_ids, num_turn_end_ids),
            }
        )
