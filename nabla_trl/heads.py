"""The kinds of terms: the log-likelihood of a response under a causal LM, the score of a classifier's head, and the
sum of such scores over the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_trl.compute import Meter
from nabla_trl.relax import Relaxed
from nabla_trl.steps import StepFinder
from nabla_trl.terms import Encoded, Feed, Memo, Sample, Seeded, Term

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
        prompt = self.encode_prompt(sample.problem, sample.prompt)
        if sample.open:
            return Encoded(prompt, self.mapping[sample.response].tolist(), tail=[])
        return Encoded(prompt, *self._closed(sample.response))

    def _closed(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """A response in this model's ids, and what closes the turn after it."""
        response, tail = self.mapping[ids].tolist(), self.tail
        if ids and ids[-1] in self.stop_ids:
            if tail and response[-1] == tail[0]:
                tail = tail[1:]
            elif tail or response[-1] < 0:
                response = response[:-1]
        return response, tail

    def reads(self, response: Sequence[int], tail: int) -> list[int]:
        """After how many tokens of a response (this model's ids) and of the `tail` ones that close it the head is
        read, ascending: the value is the sum of these scores."""
        return [len(response) + tail]

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

    def past(self, memo: Memo, encoded: Encoded, shared: int) -> Tensor:
        # The last shared token is fed again, and read then.
        return memo.levels[[count for count in self.reads(encoded.response, len(encoded.tail)) if count < shared]]

    def values(self, hidden: Tensor, feed: Feed, encoded: Sequence[Encoded], shared: Sequence[int]) -> list[Tensor]:
        reads = [self.reads(one.response, len(one.tail)) for one in encoded]
        places = [[count - begin for count in row if count >= begin] for row, begin in zip(reads, shared, strict=True)]
        return self._scores(hidden, places)

    def seed(
        self,
        hidden: Tensor,
        feed: Feed,
        encoded: Sequence[Encoded],
        shared: Sequence[int],
        targets: Sequence[Relaxed],
        candidates: Sequence[Tensor] | None,
    ) -> Seeded:
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            # The head is read where the response's own tokens say, whatever is mixed into them.
            scores = self.values(leaf, feed, encoded, shared)
            values = torch.stack([some.double().sum() for some in scores])
        return Seeded(values.detach(), torch.autograd.grad(values.sum(), leaf)[0], None)

    def running(self, sample: Sample, memo: Memo) -> Tensor:
        response, tail = self._closed(sample.response)
        scores = memo.levels.double()
        reads = self.reads(response, len(tail))
        done = torch.zeros_like(scores)
        done[[count for count in reads if count < len(scores)]] = 1
        return (done * scores).cumsum(0) + (len(reads) - done.cumsum(0)) * scores

    def _scores(self, hidden: Tensor, places: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per row the scores at some places among its fed tokens."""
        rows = [row for row, some in enumerate(places) for _ in some]
        flat = [place for some in places for place in some]
        return list(self._read(hidden[rows, flat]).split([len(some) for some in places]))

    def _read(self, states: Tensor) -> Tensor:
        scores = self.model.score(states).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class ProcessTerm(ScoreTerm):
    """r(x, y) = Σ_t s(x, y_≤t) over the tokens t that end a step and the end of the response, where s is the score of
    a `ScoreTerm`, read there after the closed turn. An end of a step that is also the end of all counts once.

    Args:
        steps: finds the ends of steps in this model's ids.
    """

    def __init__(self, *args: Any, steps: StepFinder, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.steps = steps

    def reads(self, response: Sequence[int], tail: int) -> list[int]:
        return sorted({*(place + 1 for place in self.steps.ends(response)), *super().reads(response, tail)})


def _stacked(targets: Sequence[Relaxed]) -> tuple[Tensor, Tensor]:
    """Ids and weights of all rows' positions, [ΣT, K]; narrower rows are filled with weight 0."""
    width = max(target.ids.shape[1] for target in targets)
    wide = [width - target.ids.shape[1] for target in targets]
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(target.ids, (0, add)) for target, add in zip(targets, wide, strict=True)]),
        torch.cat([pad(target.weights, (0, add)) for target, add in zip(targets, wide, strict=True)]),
    )
