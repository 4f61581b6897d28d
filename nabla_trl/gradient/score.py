"""Scores of a sequence classifier, at the end of a response or summed over the ends of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_trl.gradient.objectives import Encoded, Feed, Memo, Sample, Seeded, Term
from nabla_trl.gradient.relaxation import Relaxed
from nabla_trl.gradient.step_ends import StepFinder


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
