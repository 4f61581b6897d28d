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

from nabla_trl.gradient.relaxation import RelaxedResponse, build_mixture, build_one_hot
from nabla_trl.models import kv_cache
from nabla_trl.models.flops import FlopCounter, ModelSize
from nabla_trl.tasks.problem import Problem


@dataclass(frozen=True)
class DrawInfo:
    """What drawing a response showed: `model` gave `candidates` [T, K] the log-probabilities `logp` [T, K].

    The drawn tokens are among the candidates. A likelihood under that very model need not be computed again.
    """

    model: PreTrainedModel
    candidates: Tensor
    logp: Tensor

    def gather_response_logp(self, response: Sequence[int]) -> Tensor:
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
    prompt_ids: list[int]
    response_ids: list[int]
    cost_key_override: str | None = None
    draw_info: DrawInfo | None = None
    is_partial: bool = False

    @property
    def cost_key(self) -> str:
        return self.problem.id if self.cost_key_override is None else self.cost_key_override

    def relax(self, alpha: float, min_p: float = 0.0) -> RelaxedResponse:
        """The mixture of the response and the candidates seen when it was drawn (`relax.mixture`).

        Raises:
            ValueError: α > 0 and nothing is known of the drawing.
        """
        if not alpha:
            return build_one_hot(self.response_ids)
        if self.draw_info is None:
            raise ValueError(f"{self.problem.id}: a mixture needs the policy's candidates along the response")
        return build_mixture(self.response_ids, self.draw_info.candidates, self.draw_info.logp, alpha, min_p=min_p)


@dataclass(frozen=True)
class EncodedSample:
    """A sample in a term's own ids; `tail` closes the turn after the response. All ids are real (≥ 0)."""

    prompt_ids: list[int]
    response_ids: list[int]
    turn_end_ids: list[int]

    @property
    def sequence_ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids + self.turn_end_ids


@dataclass
class ScoreCache:
    """What a term remembers of a response, so that one that shares its beginning is scored from the branch on.

    Attributes:
        cache: kv row of the prompt (all but its last token) and the response fed so far.
        logp: [T] log-likelihood of each response token; empty for terms without one.
        hidden: [T, d] the states it was predicted from; empty likewise.
        levels: [T + 1] the score after none, one, … of the response's tokens; empty for terms without a score.
    """

    kv_row: Tensor
    logp: Tensor
    hidden_states: Tensor
    prefix_scores: Tensor


@dataclass
class ForwardBatch:
    """One padded batch: B rows, R fed tokens at most, C cached ones at most."""

    input_ids: Tensor  # [B, R]
    position_ids: Tensor  # [B, R]
    kv_rows: list[Tensor]  # kv row of each prefix
    start_positions: list[int]  # position of each row's first fed token
    num_tokens: list[int]  # fed tokens of each row


@dataclass
class GradientSeed:
    """Values of a term at B relaxed responses, and where the gradient by Y begins.

    Attributes:
        values: [B], detached.
        by_hidden: [B, R, d] derivative of the summed values by the hidden states.
        direct: per row ∂value/∂Y at fixed hidden states, [T, K] or [T, V]; None for terms without such a part.
    """

    values: Tensor
    hidden_grad: Tensor
    token_grads: list[Tensor] | None


class Objective(ABC):
    """One model's share in an objective.

    Attributes:
        weight: factor of this term in its sum.
        mapping: [policy rows] long, this model's id of each policy token, −1 where it has none.
        encode_prompt: problem and policy prompt ids → this model's prompt ids.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        model_size: ModelSize,
        *,
        vocab_map: Tensor,
        weight: float = 1.0,
        encode_prompt: Callable[[Problem, list[int]], list[int]],
    ):
        self.model, self.model_size, self.weight = model, model_size, weight
        self.vocab_map = vocab_map.to(model.device)
        self.encode_prompt = encode_prompt

    @abstractmethod
    def encode(self, sample: Sample) -> EncodedSample: ...

    @abstractmethod
    def select_input_ids(self, encoded: EncodedSample, num_shared: int) -> list[int]:
        """Ids to feed when `shared` response tokens are in the cache already; the first one is re-fed."""

    def get_cached_values(self, cache: ScoreCache, encoded: EncodedSample, num_shared: int) -> Tensor:
        """The numbers that a memo's first `shared` response tokens give to the value."""
        return cache.logp[:num_shared]

    @abstractmethod
    def compute_values(
        self, hidden: Tensor, batch: ForwardBatch, encoded: Sequence[EncodedSample], num_shared: Sequence[int]
    ) -> list[Tensor]:
        """Per row, the numbers whose sum (with those of `past`) is its value. Scores are float32."""

    @abstractmethod
    def compute_gradient_seed(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        encoded: Sequence[EncodedSample],
        num_shared: Sequence[int],
        targets: Sequence[RelaxedResponse],
        candidates: Sequence[Tensor] | None,
    ) -> GradientSeed:
        """Values at relaxed responses, and what the gradient by their tokens begins from.

        Args:
            shared: per row how many tokens are in the cache already; values leave out what was known by then (`past`).
            targets: per row Y of the tokens after those, in this model's ids.
            candidates: per row [T, K] ids of this model at these tokens, or None for its whole vocabulary.
        """

    def compute_running_values(self, sample: Sample, cache: ScoreCache) -> Tensor:
        """[T + 1] the value after none, one, … of a remembered response's tokens, if its score were to stay as it is
        there; empty for terms without a score. A stop token that the template drops is left out."""
        return cache.prefix_scores

    def has_draw_logp(self, sample: Sample) -> bool:
        """This term's value was shown when the sample was drawn."""
        return False

    @abstractmethod
    def count_head_positions(self, num_tokens: int) -> int:
        """Positions to which the output head is applied when `count` tokens are fed."""

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., d] of this model's ids, by its own module: some scale the rows of their table."""
        return self.model.get_input_embeddings()(ids).detach()

    def map_to_model_ids(self, relaxed: RelaxedResponse, span: slice) -> RelaxedResponse:
        """Positions of a relaxed response in this model's ids; tokens it lacks lose their weight."""
        ids = self.vocab_map[relaxed.ids[span].to(self.vocab_map.device)]
        weights = relaxed.weights[span].to(self.vocab_map.device).masked_fill(ids < 0, 0.0)
        weights[:, 0] += (weights.sum(-1) == 0).to(weights)  # nothing left: the response's own token, which is first
        return RelaxedResponse(ids.clamp(min=0), weights / weights.sum(-1, keepdim=True))

    def embed_relaxed(self, batch: ForwardBatch, responses: Sequence[RelaxedResponse]) -> Tensor:
        """Input embeddings [B, R, d] of a feed whose tokens after the first begin with these, Σ_v Y[t, v]·e(v)."""
        embeds = self.embed_ids(batch.input_ids)
        for row, response in enumerate(responses):
            # The last token of a likelihood is not fed at all.
            count = min(batch.num_tokens[row] - 1, len(response.ids))
            if count and response.ids.shape[1] > 1:
                embeds[row, 1 : count + 1] = response.average_embeddings(self.embed_ids, count).to(embeds)
        return embeds

    def make_prompt_cache(self, kv_row: Tensor) -> ScoreCache:
        """The memo of a cached prefix of which no response token is known."""
        width = self.model.config.get_text_config().hidden_size
        return ScoreCache(kv_row, kv_row.new_zeros(0), kv_row.new_zeros(0, width), kv_row.new_zeros(0))

    def compute_prompt_caches(self, samples: Sequence[Sample], flop_counter: FlopCounter) -> list[ScoreCache]:
        """Memos of the bare prompts."""
        prompts = [self.encode_prompt(sample.problem, sample.prompt_ids) for sample in samples]
        for sample, prompt in zip(samples, prompts, strict=True):
            flop_counter.add_flops(
                sample.cost_key, self.model_size, "prefill", 0, len(prompt) - 1, num_head_positions=0
            )
        rows = kv_cache.prefill_sequences(self.model, [prompt[:-1] for prompt in prompts])
        return [self.make_prompt_cache(row) for row in rows]

    def build_batch(
        self, encoded: Sequence[EncodedSample], caches: Sequence[ScoreCache], num_shared: Sequence[int]
    ) -> ForwardBatch:
        tokens = [self.select_input_ids(row, count) for row, count in zip(encoded, num_shared, strict=True)]
        starts = [len(row.prompt_ids) - 1 + count for row, count in zip(encoded, num_shared, strict=True)]
        ids, _ = kv_cache.pad_sequences(tokens, self.model.device, left=False)
        positions = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        rows = [memo.kv_row[:, :, :, :start] for memo, start in zip(caches, starts, strict=True)]
        # Padding repeats the last real position, which exists in every position table.
        last = torch.tensor([start + len(row) - 1 for start, row in zip(starts, tokens, strict=True)])
        positions = positions.minimum(last.to(ids.device)[:, None])
        return ForwardBatch(ids, positions, rows, starts, [len(row) for row in tokens])

    def compute_hidden_states(
        self, batch: ForwardBatch, embeds: Tensor | None = None, return_caches: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Last hidden states [B, R, d] of the fed tokens (or of `embeds` in their place), and kv rows if kept."""
        cache, cached = kv_cache.stack_caches(batch.kv_rows)
        output = self.model.base_model(
            input_ids=batch.input_ids if embeds is None else None,
            inputs_embeds=embeds,
            attention_mask=kv_cache.build_attention_mask(cached, batch.input_ids.shape[1], self.model.dtype),
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        if not return_caches:
            return output.last_hidden_state, []
        padding, width = (cached == 0).sum(1).tolist(), cached.shape[1]
        spans = [(begin, width + count) for begin, count in zip(padding, batch.num_tokens, strict=True)]
        return output.last_hidden_state, kv_cache.unstack_caches(cache, torch.arange(len(spans)), spans)

    @torch.no_grad()
    def score(
        self,
        samples: Sequence[Sample],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        flop_counter: FlopCounter,
        return_caches: bool = False,
    ) -> tuple[list[float], list[ScoreCache]]:
        """Values (unweighted) of samples that share their first `shared` response tokens with the memos' ones."""
        encoded = [self.encode(sample) for sample in samples]
        feed = self.build_batch(encoded, caches, num_shared)
        for sample, start, count in zip(samples, feed.start_positions, feed.num_tokens, strict=True):
            flop_counter.add_flops(
                sample.cost_key,
                self.model_size,
                "forward",
                start,
                count,
                num_head_positions=self.count_head_positions(count),
            )
        hidden, rows = self.compute_hidden_states(feed, return_caches=return_caches)
        new = self.compute_values(hidden, feed, encoded, num_shared)
        logps = [
            torch.cat((self.get_cached_values(memo, one, count).to(fresh), fresh))
            for memo, one, count, fresh in zip(caches, encoded, num_shared, new, strict=True)
        ]
        values = [float(logp.double().sum()) for logp in logps]
        if not return_caches:
            return values, []
        states = [hidden[row, :count] for row, count in enumerate(feed.num_tokens)]
        return values, self.build_caches(
            rows, logps, states, caches, num_shared, [len(one.response_ids) for one in encoded]
        )

    def build_caches(
        self,
        kv_rows: Sequence[Tensor],
        logps: Sequence[Tensor],
        hidden_states: Sequence[Tensor],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        lengths: Sequence[int],
    ) -> list[ScoreCache]:
        """Memos of freshly scored responses of some lengths, from the hidden states of what was fed."""
        return [self.make_prompt_cache(row) for row in kv_rows]
