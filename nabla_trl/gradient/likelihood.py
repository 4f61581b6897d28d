"""The kinds of terms: the log-likelihood of a response under a causal LM, the score of a classifier's head, and the
sum of such scores over the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_trl.gradient.objectives import EncodedSample, ForwardBatch, GradientSeed, Objective, Sample, ScoreCache
from nabla_trl.gradient.relaxation import RelaxedResponse
from nabla_trl.models.flops import FlopCounter

# Heads over a large vocabulary are applied in slices of at most so many logits (floats), or of this multiple of the
# hidden states, which the body's own layers need several times over: a slice never decides the peak of memory.
MAX_HEAD_LOGITS = 2**22
LOGITS_PER_HIDDEN_VALUE = 4


class LikelihoodObjective(Objective):
    """Σ_t log π(y_t | x, y_<t): the log-likelihood of the response under a causal LM."""

    def build_caches(
        self,
        kv_rows: Sequence[Tensor],
        logps: Sequence[Tensor],
        hidden_states: Sequence[Tensor],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        lengths: Sequence[int],
    ) -> list[ScoreCache]:
        known = zip(kv_rows, logps, hidden_states, caches, num_shared, strict=True)
        return [
            ScoreCache(row, logp, torch.cat((memo.hidden_states[:count], fresh)), memo.prefix_scores)
            for row, logp, fresh, memo, count in known
        ]

    @torch.no_grad()
    def compute_candidate_logp(self, cache: ScoreCache, candidates: Tensor) -> Tensor:
        """log π(v | y_<t) of candidates [T, K] (this model's ids) along a remembered response: the head alone."""
        size = self._compute_slice_size(cache.hidden_states)
        chunks = zip(cache.hidden_states.split(size), candidates.split(size), strict=True)
        return torch.cat([self._compute_logp(states).gather(1, ids) for states, ids in chunks])

    def has_draw_logp(self, sample: Sample) -> bool:
        return sample.draw_info is not None and sample.draw_info.model is self.model

    def score(
        self,
        samples: Sequence[Sample],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        flop_counter: FlopCounter,
        return_caches: bool = False,
    ) -> tuple[list[float], list[ScoreCache]]:
        if not all(self.has_draw_logp(sample) for sample in samples):
            return super().score(samples, caches, num_shared, flop_counter, return_caches)
        values = [
            float(sample.draw_info.gather_response_logp(sample.response_ids).double().sum())
            for sample in samples
            if sample.draw_info
        ]
        return values, list(caches) if return_caches else []

    def encode(self, sample: Sample) -> EncodedSample:
        return EncodedSample(
            self.encode_prompt(sample.problem, sample.prompt_ids),
            self.vocab_map[sample.response_ids].tolist(),
            turn_end_ids=[],
        )

    def select_input_ids(self, encoded: EncodedSample, num_shared: int) -> list[int]:
        sequence = encoded.prompt_ids + encoded.response_ids
        return sequence[len(encoded.prompt_ids) - 1 + num_shared : -1]

    def count_head_positions(self, num_tokens: int) -> int:
        return num_tokens

    def compute_values(
        self, hidden: Tensor, batch: ForwardBatch, encoded: Sequence[EncodedSample], num_shared: Sequence[int]
    ) -> list[Tensor]:
        targets = [row.response_ids[count:] for row, count in zip(encoded, num_shared, strict=True)]
        flat = torch.cat([hidden[row, : len(ids)] for row, ids in enumerate(targets)])
        wanted = torch.tensor([index for ids in targets for index in ids], device=flat.device)
        size = self._compute_slice_size(hidden)
        chunks = zip(flat.split(size), wanted.split(size), strict=True)
        logp = torch.cat([self._compute_logp(states).gather(1, ids[:, None]).squeeze(1) for states, ids in chunks])
        return list(logp.split([len(ids) for ids in targets]))

    def compute_gradient_seed(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        encoded: Sequence[EncodedSample],
        num_shared: Sequence[int],
        targets: Sequence[RelaxedResponse],
        candidates: Sequence[Tensor] | None,
    ) -> GradientSeed:
        lengths = [len(target.ids) for target in targets]
        flat = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)]).detach()
        ids, weights = _stack_relaxed(targets)
        table = None if candidates is None else torch.cat(list(candidates))
        size = self._compute_slice_size(hidden)
        tables = [None] * len(flat) if table is None else table.split(size)
        values, by_hidden, direct = [], [], []
        chunks = zip(flat.split(size), ids.split(size), weights.split(size), tables, strict=False)
        for states, tokens, shares, wanted in chunks:
            likely, slope, part = self._compute_seed_slice(states, tokens, shares, wanted)
            values.append(likely)
            by_hidden.append(slope)
            direct.append(part)
        seeded = torch.zeros_like(hidden)
        for row, part in enumerate(torch.cat(by_hidden).split(lengths)):
            seeded[row, : len(part)] = part
        totals = torch.stack([part.double().sum() for part in torch.cat(values).split(lengths)])
        return GradientSeed(totals, seeded, list(torch.cat(direct).split(lengths)))

    def _compute_seed_slice(
        self, states: Tensor, ids: Tensor, weights: Tensor, table: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of positions [S, d]: values Σ_v Y[v]·log p(v) [S], ∂value/∂state [S, d], and log p at the table [S, K].

        The derivative by the logits, Y − (Σ Y)·p, is written over the log-probabilities: autograd would hold two more
        matrices of their size.
        """
        with torch.enable_grad():
            leaf = states.requires_grad_(True)
            logits = self.model.get_output_embeddings()(leaf)
        logp = logits.detach().log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights = weights.to(logp)
        value = (weights * logp.gather(1, ids)).sum(1)
        part = logp.clone() if table is None else logp.gather(1, table)
        by_logits = logp.exp_().mul_(-weights.sum(1, keepdim=True)).scatter_add_(1, ids, weights)
        return value, torch.autograd.grad(logits, leaf, by_logits.to(logits.dtype))[0], part

    def _compute_logp(self, states: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(states)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _compute_slice_size(self, hidden: Tensor) -> int:
        """Positions of a slice, given the hidden states of a whole batch."""
        budget = max(MAX_HEAD_LOGITS, LOGITS_PER_HIDDEN_VALUE * hidden.numel())
        return max(1, budget // self.model.get_output_embeddings().weight.shape[0])


def _stack_relaxed(targets: Sequence[RelaxedResponse]) -> tuple[Tensor, Tensor]:
    """Ids and weights of all rows' positions, [ΣT, K]; narrower rows are filled with weight 0."""
    width = max(target.ids.shape[1] for target in targets)
    wide = [width - target.ids.shape[1] for target in targets]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(target.ids, (0, add)) for target, add in zip(targets, wide, strict=True)]),
        torch.cat([pad(target.weights, (0, add)) for target, add in zip(targets, wide, strict=True)]),
    )
