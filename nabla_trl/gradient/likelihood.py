"""The log-likelihood of a response under a causal LM as a differentiable objective.

With last hidden states h_t, the model's output head z and p_t = softmax(z(h_t)), a relaxed response Y has the value

    f(Y) = Σ_t Σ_v Y[t, v]·log p_t(v),

which is log π(y|x) at the one-hot Y of a response. It depends on Y in two ways. The factor Y[t, v] at fixed h gives
the "token" gradient. The h of later positions, which read the embedding of token t, give the "suffix" gradient.

    ∂f/∂Y[t, v] at fixed h = log p_t(v)
    ∂f/∂h_t                = (∂z/∂h_t)ᵀ(Y[t] − (Σ_v Y[t, v])·p_t)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import (
    EncodedSample,
    ForwardBatch,
    GradientSeed,
    Objective,
    Sample,
    ScoreCache,
    get_prompt_ids,
    widen_dtype,
)
from nabla_trl.gradient.relaxation import RelaxedResponse
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.heads import OutputHead
from nabla_trl.models.policy import Policy
from nabla_trl.states.prefix import PrefixState

# Logits [positions, V] are computed in slices of at most so many values, or of this multiple of the hidden states,
# which the layers need several times over. So the logits never decide the peak of memory.
MAX_HEAD_LOGITS = 2**22
LOGITS_PER_HIDDEN_VALUE = 4


class LikelihoodObjective(Objective):
    """f(y) = Σ_t log π(y_t | x, y_<t).

    Args:
        head: of the model. None: it is made here.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, head: OutputHead | None = None, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.head = OutputHead(model) if head is None else head

    def encode(self, sample: Sample) -> EncodedSample:
        prompt_ids = self.encode_prompt(sample.problem, sample.prompt_ids)
        return EncodedSample(prompt_ids, self.vocab_map[sample.response_ids].tolist(), turn_end_ids=[])

    def select_input_ids(self, encoded: EncodedSample, num_shared: int) -> list[int]:
        # The last token is only predicted, never read.
        return encoded.sequence_ids[len(encoded.prompt_ids) - 1 + num_shared : -1]

    # --- values ---

    def get_cached_values(self, cache: ScoreCache, encoded: EncodedSample, num_shared: int) -> Tensor:
        return cache.logp[:num_shared]

    def compute_values(self, hidden: Tensor, batch: ForwardBatch) -> list[Tensor]:
        targets = [row.response_ids[count:] for row, count in zip(batch.encoded, batch.num_shared, strict=True)]
        states = torch.cat([hidden[row, : len(ids)] for row, ids in enumerate(targets)])
        target_ids = torch.tensor([index for ids in targets for index in ids], device=states.device)
        logp = self._gather_logp(states, target_ids[:, None], self._get_slice_size(hidden)).squeeze(1)
        return list(logp.split([len(ids) for ids in targets]))

    def has_draw_logp(self, sample: Sample) -> bool:
        return sample.draw_info is not None and sample.draw_info.model is self.model

    def score_drawn(
        self, samples: Sequence[Sample], caches: Sequence[ScoreCache], flop_counter: FlopCounter, return_caches: bool
    ) -> tuple[list[float], list[ScoreCache]] | None:
        if not all(self.has_draw_logp(sample) for sample in samples):
            return None
        # Generation gave the log-probabilities already: no forward, and nothing new to remember.
        totals = [
            float(sample.draw_info.gather_response_logp(sample.response_ids).double().sum())
            for sample in samples
            if sample.draw_info
        ]
        return totals, list(caches) if return_caches else []

    def build_caches(
        self,
        batch: ForwardBatch,
        hidden_states: Sequence[Tensor],
        states: Sequence[PrefixState],
        values: Sequence[Tensor],
        caches: Sequence[ScoreCache],
    ) -> list[ScoreCache]:
        return [
            # Without shared tokens, the width of the cache's empty states is not known to be that of the head's input.
            ScoreCache(
                state, logp, torch.cat((cache.hidden_states[:count], hidden)) if count else hidden, cache.prefix_scores
            )
            for state, logp, hidden, cache, count in zip(
                states, values, hidden_states, caches, batch.num_shared, strict=True
            )
        ]

    @torch.no_grad()
    def compute_candidate_logp(self, cache: ScoreCache, candidates: Tensor) -> Tensor:
        """Return log p_t(v) of candidates [T, K] (this model's ids) along a scored response, by the head alone."""
        return self._gather_logp(cache.hidden_states, candidates, self._get_slice_size(cache.hidden_states))

    # --- gradient ---

    def compute_gradient_seed(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        relaxed_responses: Sequence[RelaxedResponse],
        candidates: Sequence[Tensor] | None,
    ) -> GradientSeed:
        # The positions of all rows, one after the other: N = Σ lengths.
        lengths = [len(relaxed.ids) for relaxed in relaxed_responses]
        states = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)]).detach()
        ids, weights = _stack_relaxed(relaxed_responses)
        table = None if candidates is None else torch.cat(list(candidates))
        size = self._get_slice_size(hidden)
        slices = [
            self._compute_seed_slice(states[span], ids[span], weights[span], None if table is None else table[span])
            for span in (slice(begin, begin + size) for begin in range(0, len(states), size))
        ]
        values, state_grads, token_grads = (torch.cat(column) for column in zip(*slices, strict=True))
        hidden_grad = torch.zeros_like(hidden)
        for row, grads in enumerate(state_grads.split(lengths)):
            hidden_grad[row, : len(grads)] = grads
        totals = torch.stack([row_values.double().sum() for row_values in values.split(lengths)])
        return GradientSeed(totals, hidden_grad, list(token_grads.split(lengths)))

    def _compute_seed_slice(
        self, states: Tensor, ids: Tensor, weights: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return values [S], ∂f/∂h [S, d] and ∂f/∂Y at fixed h [S, K] of positions with states [S, d].

        Args:
            ids, weights: [S, K'] Y in sparse form.
            table: [S, K] ids at which to return ∂f/∂Y. None: all V.
        """
        with torch.enable_grad():
            states = states.requires_grad_(True)
            logits = self.head(states)
        logp = logits.detach().log_softmax(-1, dtype=widen_dtype(logits))
        weights = weights.to(logp)
        values = (weights * logp.gather(1, ids)).sum(1)  # Σ_v Y[v]·log p(v)
        token_grads = logp.clone() if table is None else logp.gather(1, table)
        # ∂f/∂logits = Y − (Σ_v Y[v])·p, written over logp: autograd would keep two more matrices of its size.
        logit_grads = logp.exp_().mul_(-weights.sum(1, keepdim=True)).scatter_add_(1, ids, weights)
        return values, torch.autograd.grad(logits, states, logit_grads.to(logits.dtype))[0], token_grads

    def _gather_logp(self, states: Tensor, ids: Tensor, slice_size: int) -> Tensor:
        """Return log p(v) [N, K] of ids [N, K] at states [N, d], `slice_size` positions at a time."""
        parts = []
        for states_slice, ids_slice in zip(states.split(slice_size), ids.split(slice_size), strict=True):
            logits = self.head(states_slice)
            parts.append(logits.log_softmax(-1, dtype=widen_dtype(logits)).gather(1, ids_slice))
        return torch.cat(parts)

    def _get_slice_size(self, hidden: Tensor) -> int:
        """Return how many positions to slice off a batch with these hidden states."""
        budget = max(MAX_HEAD_LOGITS, LOGITS_PER_HIDDEN_VALUE * hidden.numel())
        return max(1, budget // self.head.num_rows)


def _stack_relaxed(relaxed_responses: Sequence[RelaxedResponse]) -> tuple[Tensor, Tensor]:
    """Return ids and weights [N, K] of all rows' positions. Narrower rows are padded with weight 0."""
    width = max(relaxed.ids.shape[1] for relaxed in relaxed_responses)
    padding = [(0, width - relaxed.ids.shape[1]) for relaxed in relaxed_responses]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(relaxed.ids, add) for relaxed, add in zip(relaxed_responses, padding, strict=True)]),
        torch.cat([pad(relaxed.weights, add) for relaxed, add in zip(relaxed_responses, padding, strict=True)]),
    )


def policy_likelihood(policy: Policy, weight: float = 1.0) -> LikelihoodObjective:
    """Return weight · log π(y|x) of a policy as an objective."""
    return LikelihoodObjective(
        policy.model,
        policy.size,
        vocab_map=torch.arange(policy.forbidden_mask.shape[0]),
        weight=weight,
        encode_prompt=get_prompt_ids,
        head=policy.head,
    )
