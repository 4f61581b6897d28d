"""The kinds of terms: the log-likelihood of a response under a causal LM, and the score of a classifier's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_trl.compute import Meter
from nabla_trl.relax import Relaxed
from nabla_trl.terms import Encoded, Feed, Memo, Sample, Seeded, Term

# Most logits (floats) held at once; heads over a large vocabulary are applied in slices of this size.
LOGIT_BUDGET = 2**24


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
        chunks = zip(self._slices(memo.hidden), self._slices(candidates), strict=True)
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
        chunks = zip(self._slices(flat), self._slices(wanted), strict=True)
        logp = torch.cat([self._logp(states).gather(1, ids[:, None]).squeeze(1) for states, ids in chunks])
        return list(logp.split([len(ids) for ids in targets]))

    def seed(
        self, hidden: Tensor, feed: Feed, targets: Sequence[Relaxed], candidates: Sequence[Tensor] | None
    ) -> Seeded:
        lengths = [len(target.ids) for target in targets]
        flat = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)]).detach()
        ids, weights = _stacked(targets)
        table = None if candidates is None else torch.cat(list(candidates))
        values, by_hidden, direct = [], [], []
        for number, states in enumerate(self._slices(flat)):
            begin = number * self._slice_size()
            rows = slice(begin, begin + len(states))
            with torch.enable_grad():
                states.requires_grad_(True)
                logp = self._logp(states)
                likely = (weights[rows].to(logp) * logp.gather(1, ids[rows])).sum(1)
            by_hidden.append(torch.autograd.grad(likely.sum(), states)[0])
            values.append(likely.detach())
            logp = logp.detach()
            direct.append(logp if table is None else logp.gather(1, table[rows]))
        seeded = torch.zeros_like(hidden)
        for row, part in enumerate(torch.cat(by_hidden).split(lengths)):
            seeded[row, : len(part)] = part
        totals = torch.stack([part.double().sum() for part in torch.cat(values).split(lengths)])
        return Seeded(totals, seeded, list(torch.cat(direct).split(lengths)))

    def _logp(self, states: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _slice_size(self) -> int:
        return max(1, LOGIT_BUDGET // self.model.get_output_embeddings().weight.shape[0])

    def _slices(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self._slice_size())


class ScoreTerm(Term):
    """r(x, y): the scalar head of a sequence-classification model at the last token of the closed turn.

    Args:
        tail: ids that close the assistant's turn in the reward's template; may be empty.
        stop_ids: the policy's stop tokens. A trailing one is kept if it opens the tail, dropped otherwise.
    """

    def __init__(self, *args: Any, tail: list[int], stop_ids: frozenset[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tail, self.stop_ids = tail, stop_ids

    def encode(self, sample: Sample) -> Encoded:
        response, tail = self.mapping[sample.response].tolist(), self.tail
        if sample.response and sample.response[-1] in self.stop_ids:
            if tail and response[-1] == tail[0]:
                tail = tail[1:]
            elif tail or response[-1] < 0:
                response = response[:-1]
        return Encoded(self.encode_prompt(sample.problem, sample.prompt), response, tail)

    def fed(self, encoded: Encoded, shared: int) -> list[int]:
        sequence = encoded.prompt + encoded.response + encoded.tail
        return sequence[len(encoded.prompt) - 1 + shared :]

    def charge_head(self, count: int) -> int:
        return count  # the head is one row: what it costs to read it everywhere does not matter

    def remember(
        self,
        rows: Sequence[Tensor],
        logps: Sequence[Tensor],
        states: Sequence[Tensor],
        memos: Sequence[Memo],
        shared: Sequence[int],
        lengths: Sequence[int],
    ) -> list[Memo]:
        fresh = self._read(torch.cat(list(states))).split([len(state) for state in states])
        known = []
        for row, new, memo, count, length in zip(rows, fresh, memos, shared, lengths, strict=True):
            bare = self.prompt_memo(row)
            # What is fed begins with the last shared token, and ends with the tail, which is no part of the response.
            levels = torch.cat((memo.levels[:count].to(new), new[: length - count + 1]))
            known.append(Memo(bare.cache, bare.logp, bare.hidden, levels))
        return known

    def values(self, hidden: Tensor, feed: Feed, encoded: Sequence[Encoded], shared: Sequence[int]) -> list[Tensor]:
        return list(self._scores(hidden, feed).unsqueeze(1))

    def seed(
        self, hidden: Tensor, feed: Feed, targets: Sequence[Relaxed], candidates: Sequence[Tensor] | None
    ) -> Seeded:
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            scores = self._scores(leaf, feed)
        return Seeded(scores.detach().double(), torch.autograd.grad(scores.sum(), leaf)[0], None)

    def _scores(self, hidden: Tensor, feed: Feed) -> Tensor:
        last = torch.tensor(feed.counts, device=hidden.device) - 1
        return self._read(hidden[torch.arange(len(last), device=last.device), last])

    def _read(self, states: Tensor) -> Tensor:
        scores = self.model.score(states).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _stacked(targets: Sequence[Relaxed]) -> tuple[Tensor, Tensor]:
    """Ids and weights of all rows' positions, [ΣT, K]; narrower rows are filled with weight 0."""
    width = max(target.ids.shape[1] for target in targets)
    wide = [width - target.ids.shape[1] for target in targets]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(target.ids, (0, add)) for target, add in zip(targets, wide, strict=True)]),
        torch.cat([pad(target.weights, (0, add)) for target, add in zip(targets, wide, strict=True)]),
    )
