"""The kinds of terms: the log-likelihood of a response under a causal LM, the score of a classifier's head, and the
sum of such scores over the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nabla_trl.gradient.objectives import Encoded, Feed, Memo, Sample, Seeded, Term
from nabla_trl.gradient.relaxation import Relaxed
from nabla_trl.models.flops import Meter

# Heads over a large vocabulary are applied in slices of at most so many logits (floats), or of this multiple of the
# hidden states, which the body's own layers need several times over: a slice never decides the peak of memory.
LOGIT_BUDGET = 2**22
LOGITS_PER_STATE = 4


class LikelihoodTerm(Term):
    """Σ_t log π(y_t | x, y_<t): the log-likelihood of the response under a causal LM."""

    def remember(
        self,
        rows: Sequence[Tensor],
        logps: Sequence[Tensor],
        states: Sequence[Tensor],
        memos: Sequence[Memo],
        shared: Sequence[int],
        lengths: Sequence[int],
    ) -> list[Memo]:
        known = zip(rows, logps, states, memos, shared, strict=True)
        return [
            Memo(row, logp, torch.cat((memo.hidden[:count], fresh)), memo.levels)
            for row, logp, fresh, memo, count in known
        ]

    @torch.no_grad()
    def direct(self, memo: Memo, candidates: Tensor) -> Tensor:
        """log π(v | y_<t) of candidates [T, K] (this model's ids) along a remembered response: the head alone."""
        size = self._slice_size(memo.hidden)
        chunks = zip(memo.hidden.split(size), candidates.split(size), strict=True)
        return torch.cat([self._logp(states).gather(1, ids) for states, ids in chunks])

    def knows(self, sample: Sample) -> bool:
        return sample.known is not None and sample.known.model is self.model

    def score(
        self,
        samples: Sequence[Sample],
        memos: Sequence[Memo],
        shared: Sequence[int],
        meter: Meter,
        keep: bool = False,
    ) -> tuple[list[float], list[Memo]]:
        if not all(self.knows(sample) for sample in samples):
            return super().score(samples, memos, shared, meter, keep)
        values = [float(sample.known.own(sample.response).double().sum()) for sample in samples if sample.known]
        return values, list(memos) if keep else []

    def encode(self, sample: Sample) -> Encoded:
        return Encoded(
            self.encode_prompt(sample.problem, sample.prompt), self.mapping[sample.response].tolist(), tail=[]
        )

    def fed(self, encoded: Encoded, shared: int) -> list[int]:
        sequence = encoded.prompt + encoded.response
        return sequence[len(encoded.prompt) - 1 + shared : -1]

    def charge_head(self, count: int) -> int:
        return count

    def values(self, hidden: Tensor, feed: Feed, encoded: Sequence[Encoded], shared: Sequence[int]) -> list[Tensor]:
        targets = [row.response[count:] for row, count in zip(encoded, shared, strict=True)]
        flat = torch.cat([hidden[row, : len(ids)] for row, ids in enumerate(targets)])
        wanted = torch.tensor([index for ids in targets for index in ids], device=flat.device)
        size = self._slice_size(hidden)
        chunks = zip(flat.split(size), wanted.split(size), strict=True)
        logp = torch.cat([self._logp(states).gather(1, ids[:, None]).squeeze(1) for states, ids in chunks])
        return list(logp.split([len(ids) for ids in targets]))

    def seed(
        self,
        hidden: Tensor,
        feed: Feed,
        encoded: Sequence[Encoded],
        shared: Sequence[int],
        targets: Sequence[Relaxed],
        candidates: Sequence[Tensor] | None,
    ) -> Seeded:
        lengths = [len(target.ids) for target in targets]
        flat = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)]).detach()
        ids, weights = _stacked(targets)
        table = None if candidates is None else torch.cat(list(candidates))
        size = self._slice_size(hidden)
        tables = [None] * len(flat) if table is None else table.split(size)
        values, by_hidden, direct = [], [], []
        chunks = zip(flat.split(size), ids.split(size), weights.split(size), tables, strict=False)
        for states, tokens, shares, wanted in chunks:
            likely, slope, part = self._seed_slice(states, tokens, shares, wanted)
            values.append(likely)
            by_hidden.append(slope)
            direct.append(part)
        seeded = torch.zeros_like(hidden)
        for row, part in enumerate(torch.cat(by_hidden).split(lengths)):
            seeded[row, : len(part)] = part
        totals = torch.stack([part.double().sum() for part in torch.cat(values).split(lengths)])
        return Seeded(totals, seeded, list(torch.cat(direct).split(lengths)))

    def _seed_slice(
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

    def _logp(self, states: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(states)
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    def _slice_size(self, hidden: Tensor) -> int:
        """Positions of a slice, given the hidden states of a whole batch."""
        budget = max(LOGIT_BUDGET, LOGITS_PER_STATE * hidden.numel())
        return max(1, budget // self.model.get_output_embeddings().weight.shape[0])


def _stacked(targets: Sequence[Relaxed]) -> tuple[Tensor, Tensor]:
    """Ids and weights of all rows' positions, [ΣT, K]; narrower rows are filled with weight 0."""
    width = max(target.ids.shape[1] for target in targets)
    wide = [width - target.ids.shape[1] for target in targets]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(target.ids, (0, add)) for target, add in zip(targets, wide, strict=True)]),
        torch.cat([pad(target.weights, (0, add)) for target, add in zip(targets, wide, strict=True)]),
    )
