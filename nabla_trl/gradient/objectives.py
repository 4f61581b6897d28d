"""Differentiable terms: what one language model contributes to an objective over response tokens.

A reward, and the policy's own likelihood, are weighted sums of terms. A term reads a response in its own
vocabulary and gives a value per response, and to the gradient room two things: the derivative of that value by
the last hidden states (`seed`), and, where the value depends on the one-hot of a token directly, that part.

Layout of one forward: a cached prefix (left-padded), then the *fed* tokens (right-padded). The first fed token
is the last one of the prefix proper, because the first response token is predicted from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.gradient.relaxation import Relaxed, hard, mixture
from nabla_trl.models import kv_cache
from nabla_trl.models.flops import Meter, ModelSize
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class Known:
    """What drawing a response showed: `model` gave `candidates` [T, K] the log-probabilities `logp` [T, K].

    The drawn tokens are among the candidates. A likelihood under that very model need not be computed again.
    """

    model: PreTrainedModel
    candidates: Tensor
    logp: Tensor

    def own(self, response: Sequence[int]) -> Tensor:
        """[T] log-probability of each response token."""
        column = (self.candidates == torch.tensor(response)[:, None]).int().argmax(-1)
        return self.logp.gather(1, column[:, None]).squeeze(1)


@dataclass(frozen=True)
class Sample:
    """A response to a problem, in the policy's ids.

    Attributes:
        account: the meter's key where it is not the problem's id.
        open: only the beginning of a response: its turn is not closed, and a score is read at its last token.
    """

    problem: Problem
    prompt: list[int]
    response: list[int]
    account: str | None = None
    known: Known | None = None
    open: bool = False

    @property
    def key(self) -> str:
        return self.problem.id if self.account is None else self.account

    def relaxed(self, alpha: float, min_p: float = 0.0) -> Relaxed:
        """The mixture of the response and the candidates seen when it was drawn (`relax.mixture`).

        Raises:
            ValueError: α > 0 and nothing is known of the drawing.
        """
        if not alpha:
            return hard(self.response)
        if self.known is None:
            raise ValueError(f"{self.problem.id}: a mixture needs the policy's candidates along the response")
        return mixture(self.response, self.known.candidates, self.known.logp, alpha, min_p=min_p)


@dataclass(frozen=True)
class Encoded:
    """A sample in a term's own ids; `tail` closes the turn after the response. All ids are real (≥ 0)."""

    prompt: list[int]
    response: list[int]
    tail: list[int]


@dataclass
class Memo:
    """What a term remembers of a response, so that one that shares its beginning is scored from the branch on.

    Attributes:
        cache: kv row of the prompt (all but its last token) and the response fed so far.
        logp: [T] log-likelihood of each response token; empty for terms without one.
        hidden: [T, d] the states it was predicted from; empty likewise.
        levels: [T + 1] the score after none, one, … of the response's tokens; empty for terms without a score.
    """

    cache: Tensor
    logp: Tensor
    hidden: Tensor
    levels: Tensor


@dataclass
class Feed:
    """One padded batch: B rows, R fed tokens at most, C cached ones at most."""

    ids: Tensor  # [B, R]
    positions: Tensor  # [B, R]
    rows: list[Tensor]  # kv row of each prefix
    starts: list[int]  # position of each row's first fed token
    counts: list[int]  # fed tokens of each row


@dataclass
class Seeded:
    """Values of a term at B relaxed responses, and where the gradient by Y begins.

    Attributes:
        values: [B], detached.
        by_hidden: [B, R, d] derivative of the summed values by the hidden states.
        direct: per row ∂value/∂Y at fixed hidden states, [T, K] or [T, V]; None for terms without such a part.
    """

    values: Tensor
    by_hidden: Tensor
    direct: list[Tensor] | None


class Term(ABC):
    """One model's share in an objective.

    Attributes:
        weight: factor of this term in its sum.
        mapping: [policy rows] long, this model's id of each policy token, −1 where it has none.
        encode_prompt: problem and policy prompt ids → this model's prompt ids.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        size: ModelSize,
        *,
        mapping: Tensor,
        weight: float = 1.0,
        encode_prompt: Callable[[Problem, list[int]], list[int]],
    ):
        self.model, self.size, self.weight = model, size, weight
        self.mapping = mapping.to(model.device)
        self.encode_prompt = encode_prompt

    @abstractmethod
    def encode(self, sample: Sample) -> Encoded: ...

    @abstractmethod
    def fed(self, encoded: Encoded, shared: int) -> list[int]:
        """Ids to feed when `shared` response tokens are in the cache already; the first one is re-fed."""

    def past(self, memo: Memo, encoded: Encoded, shared: int) -> Tensor:
        """The numbers that a memo's first `shared` response tokens give to the value."""
        return memo.logp[:shared]

    @abstractmethod
    def values(self, hidden: Tensor, feed: Feed, encoded: Sequence[Encoded], shared: Sequence[int]) -> list[Tensor]:
        """Per row, the numbers whose sum (with those of `past`) is its value. Scores are float32."""

    @abstractmethod
    def seed(
        self,
        hidden: Tensor,
        feed: Feed,
        encoded: Sequence[Encoded],
        shared: Sequence[int],
        targets: Sequence[Relaxed],
        candidates: Sequence[Tensor] | None,
    ) -> Seeded:
        """Values at relaxed responses, and what the gradient by their tokens begins from.

        Args:
            shared: per row how many tokens are in the cache already; values leave out what was known by then (`past`).
            targets: per row Y of the tokens after those, in this model's ids.
            candidates: per row [T, K] ids of this model at these tokens, or None for its whole vocabulary.
        """

    def running(self, sample: Sample, memo: Memo) -> Tensor:
        """[T + 1] the value after none, one, … of a remembered response's tokens, if its score were to stay as it is
        there; empty for terms without a score. A stop token that the template drops is left out."""
        return memo.levels

    def knows(self, sample: Sample) -> bool:
        """This term's value was shown when the sample was drawn."""
        return False

    @abstractmethod
    def charge_head(self, count: int) -> int:
        """Positions to which the output head is applied when `count` tokens are fed."""

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., d] of this model's ids, by its own module: some scale the rows of their table."""
        return self.model.get_input_embeddings()(ids).detach()

    def read(self, relaxed: Relaxed, span: slice) -> Relaxed:
        """Positions of a relaxed response in this model's ids; tokens it lacks lose their weight."""
        ids = self.mapping[relaxed.ids[span].to(self.mapping.device)]
        weights = relaxed.weights[span].to(self.mapping.device).masked_fill(ids < 0, 0.0)
        weights[:, 0] += (weights.sum(-1) == 0).to(weights)  # nothing left: the response's own token, which is first
        return Relaxed(ids.clamp(min=0), weights / weights.sum(-1, keepdim=True))

    def relaxed_embeds(self, feed: Feed, responses: Sequence[Relaxed]) -> Tensor:
        """Input embeddings [B, R, d] of a feed whose tokens after the first begin with these, Σ_v Y[t, v]·e(v)."""
        embeds = self.embed(feed.ids)
        for row, response in enumerate(responses):
            # The last token of a likelihood is not fed at all.
            count = min(feed.counts[row] - 1, len(response.ids))
            if count and response.ids.shape[1] > 1:
                embeds[row, 1 : count + 1] = response.average(self.embed, count).to(embeds)
        return embeds

    def prompt_memo(self, cache: Tensor) -> Memo:
        """The memo of a cached prefix of which no response token is known."""
        width = self.model.config.get_text_config().hidden_size
        return Memo(cache, cache.new_zeros(0), cache.new_zeros(0, width), cache.new_zeros(0))

    def prompt_memos(self, samples: Sequence[Sample], meter: Meter) -> list[Memo]:
        """Memos of the bare prompts."""
        prompts = [self.encode_prompt(sample.problem, sample.prompt) for sample in samples]
        for sample, prompt in zip(samples, prompts, strict=True):
            meter.charge(sample.key, self.size, "prefill", 0, len(prompt) - 1, head=0)
        rows = kv_cache.prefill(self.model, [prompt[:-1] for prompt in prompts])
        return [self.prompt_memo(row) for row in rows]

    def feed(self, encoded: Sequence[Encoded], memos: Sequence[Memo], shared: Sequence[int]) -> Feed:
        tokens = [self.fed(row, count) for row, count in zip(encoded, shared, strict=True)]
        starts = [len(row.prompt) - 1 + count for row, count in zip(encoded, shared, strict=True)]
        ids, _ = kv_cache.pad(tokens, self.model.device, left=False)
        positions = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        rows = [memo.cache[:, :, :, :start] for memo, start in zip(memos, starts, strict=True)]
        # Padding repeats the last real position, which exists in every position table.
        last = torch.tensor([start + len(row) - 1 for start, row in zip(starts, tokens, strict=True)])
        positions = positions.minimum(last.to(ids.device)[:, None])
        return Feed(ids, positions, rows, starts, [len(row) for row in tokens])

    def hidden(self, feed: Feed, embeds: Tensor | None = None, keep: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, R, d] of the fed tokens (or of `embeds` in their place), and kv rows if kept."""
        cache, cached = kv_cache.stack(feed.rows)
        output = self.model.base_model(
            input_ids=feed.ids if embeds is None else None,
            inputs_embeds=embeds,
            attention_mask=kv_cache.attention_mask(cached, feed.ids.shape[1], self.model.dtype),
            position_ids=feed.positions,
            past_key_values=cache,
            use_cache=True,
        )
        if not keep:
            return output.last_hidden_state, []
        padding, width = (cached == 0).sum(1).tolist(), cached.shape[1]
        spans = [(begin, width + count) for begin, count in zip(padding, feed.counts, strict=True)]
        return output.last_hidden_state, kv_cache.unstack(cache, torch.arange(len(spans)), spans)

    @torch.no_grad()
    def score(
        self,
        samples: Sequence[Sample],
        memos: Sequence[Memo],
        shared: Sequence[int],
        meter: Meter,
        keep: bool = False,
    ) -> tuple[list[float], list[Memo]]:
        """Values (unweighted) of samples that share their first `shared` response tokens with the memos' ones."""
        encoded = [self.encode(sample) for sample in samples]
        feed = self.feed(encoded, memos, shared)
        for sample, start, count in zip(samples, feed.starts, feed.counts, strict=True):
            meter.charge(sample.key, self.size, "forward", start, count, head=self.charge_head(count))
        hidden, rows = self.hidden(feed, keep=keep)
        new = self.values(hidden, feed, encoded, shared)
        logps = [
            torch.cat((self.past(memo, one, count).to(fresh), fresh))
            for memo, one, count, fresh in zip(memos, encoded, shared, new, strict=True)
        ]
        values = [float(logp.double().sum()) for logp in logps]
        if not keep:
            return values, []
        states = [hidden[row, :count] for row, count in enumerate(feed.counts)]
        return values, self.remember(rows, logps, states, memos, shared, [len(one.response) for one in encoded])

    def remember(
        self,
        rows: Sequence[Tensor],
        logps: Sequence[Tensor],
        states: Sequence[Tensor],
        memos: Sequence[Memo],
        shared: Sequence[int],
        lengths: Sequence[int],
    ) -> list[Memo]:
        """Memos of freshly scored responses of some lengths, from the hidden states of what was fed."""
        return [self.prompt_memo(row) for row in rows]
