"""Differentiable objectives: what one language model contributes to a reward or a loss over response tokens.

The search minimizes L(y) = −λ·r(y|x) − log π(y|x) (arXiv 2603.04948). The reward r and log π are both weighted sums of
objectives f(y), one per model: log-likelihoods (likelihood.py) and scores (score.py). An objective reads a response in
the vocabulary of its own model, and gives

- f(y) (`score`), reusing the state of what the response shares with one that was scored before, and
- the seed of ∂f/∂Y for relaxed tokens Y (`compute_gradient_seed`): ∂f/∂h for the last hidden states h, and ∂f/∂Y at
  fixed h. `compute_token_gradient` goes on from there, through the layers to the input embeddings.

One forward reads a cached prefix (padded on the left) and then new input tokens (padded on the right). The first input
token is the last token of the prefix, because its hidden state predicts the first response token:

    x_1 … x_{P−1} | x_P y_1 y_2 … y_T, end of turn
        cached    |   input
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.gradient.embeddings import embed_tokens, find_embedding_scale, split_embeddings
from nabla_trl.gradient.relaxation import RelaxedResponse, build_mixture, build_one_hot
from nabla_trl.models.flops import FlopCounter, ModelSize
from nabla_trl.models.sampling import find_token_columns
from nabla_trl.states import prefix
from nabla_trl.states.batch import pad_sequences, prefill_sequences, read_tokens
from nabla_trl.states.layout import StateLayout
from nabla_trl.states.prefix import PrefixState
from nabla_trl.states.probe import get_layout
from nabla_trl.tasks.problem import Problem

# --- samples --------------------------------------------------------------------------------------------


def get_prompt_ids(problem: Problem, prompt_ids: list[int]) -> list[int]:
    """Return the policy's prompt ids, for an objective that reads the policy's own tokens."""
    return prompt_ids


@dataclass(frozen=True)
class DrawInfo:
    """What is known from generating a response of T tokens: `model` gave `candidates` [T, K] the log-probabilities
    `logp` [T, K]. The response's tokens are candidates. A likelihood under that model need not be computed again.

    Attributes:
        hidden_states: [T, d] the last hidden states of `model` that predicted the tokens. None: not known.
    """

    model: PreTrainedModel
    candidates: Tensor
    logp: Tensor
    hidden_states: Tensor | None = None

    def gather_response_logp(self, response_ids: Sequence[int]) -> Tensor:
        """Return [T] the log-probability of each response token."""
        return self.logp.gather(1, find_token_columns(self.candidates, response_ids)[:, None]).squeeze(1)


@dataclass(frozen=True)
class Sample:
    """A response to a problem, in the policy's ids.

    Attributes:
        cost_key_override: key of the FLOP counter, where it is not the problem's id.
        is_partial: the response is only a beginning. Its turn is not closed, and a score is read at its last token.
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
        """Return the mixture of the response and its candidates (see `build_mixture`), for α = 0 the hard tokens.

        Raises:
            ValueError: α > 0 and the candidates are not known.
        """
        if not alpha:
            return build_one_hot(self.response_ids)
        if self.draw_info is None:
            raise ValueError(f"{self.problem.id}: a mixture needs the policy's candidates along the response")
        return build_mixture(self.response_ids, self.draw_info.candidates, self.draw_info.logp, alpha, min_p=min_p)


@dataclass(frozen=True)
class EncodedSample:
    """A sample in the ids of an objective's model, all of them real (≥ 0). `turn_end_ids` close the turn."""

    prompt_ids: list[int]
    response_ids: list[int]
    turn_end_ids: list[int]

    @property
    def sequence_ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids + self.turn_end_ids


# --- forward and backward -------------------------------------------------------------------------------


@dataclass
class ScoreCache:
    """What an objective remembers of a scored response of T tokens, to score others that share its beginning.

    Attributes:
        state: state of the prompt (all but its last token) and of the response tokens that were read.
        logp: [T] log-likelihood of each response token. Empty for scores.
        hidden_states: [T, d] the last hidden states that predicted these tokens. Empty for scores.
        prefix_scores: [T + 1] the score after none, one, … of the tokens. Empty for log-likelihoods.
        prompt_ids: the prompt, in the objective's ids. None: the one that all responses to the problem have.
    """

    state: PrefixState
    logp: Tensor
    hidden_states: Tensor
    prefix_scores: Tensor
    prompt_ids: list[int] | None = None


@dataclass
class ForwardBatch:
    """One padded batch of B rows with at most R input tokens.

    Attributes:
        encoded: the sample of each row.
        num_shared: response tokens of each row that are cached already. The last one is read again.
        input_ids, position_ids: [B, R].
        states: cached prefix of each row.
        start_positions: position of each row's first input token, which is the length of its cached prefix.
        num_tokens: input tokens of each row.
    """

    encoded: list[EncodedSample]
    num_shared: list[int]
    input_ids: Tensor
    position_ids: Tensor
    states: list[PrefixState]
    start_positions: list[int]
    num_tokens: list[int]


@dataclass
class GradientSeed:
    """Values of an objective at B relaxed responses, and where its gradient begins.

    Attributes:
        values: [B] float64, detached.
        hidden_grad: [B, R, d] ∂(Σ values)/∂h.
        token_grads: per row ∂f/∂Y at fixed h, [T, K] or [T, V]. None: f depends on Y through h alone.
    """

    values: Tensor
    hidden_grad: Tensor
    token_grads: list[Tensor] | None


def widen_dtype(tensor: Tensor) -> torch.dtype:
    """Return the tensor's dtype, but float32 at least. In bfloat16, a log-probability of −10 is off by up to 0.03."""
    return torch.promote_types(tensor.dtype, torch.float32)


class Objective(ABC):
    """What one model contributes to a weighted sum.

    Attributes:
        weight: factor of this objective in the sum.
        vocab_map: [rows of the policy's head] long, this model's id of each policy token, −1 where it has none.
        encode_prompt: maps a problem and the policy's prompt ids to this model's prompt ids.

    Raises:
        ValueError: the model does not read the vectors of tokens as it reads their ids.
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
        find_embedding_scale(model)  # refuses a model that does not read vectors as it reads ids
        self.model, self.model_size, self.weight = model, model_size, weight
        self.vocab_map = vocab_map.to(model.device)
        self.encode_prompt = encode_prompt

    @abstractmethod
    def encode(self, sample: Sample) -> EncodedSample:
        """Return the sample in this model's ids."""

    @abstractmethod
    def select_input_ids(self, encoded: EncodedSample, num_shared: int) -> list[int]:
        """Return the ids to read when `num_shared` response tokens are cached. The last cached token is read again."""

    @abstractmethod
    def get_cached_values(self, cache: ScoreCache, encoded: EncodedSample, num_shared: int) -> Tensor:
        """Return what the first `num_shared` response tokens contribute to f, as `compute_values` does."""

    @abstractmethod
    def compute_values(self, hidden: Tensor, batch: ForwardBatch) -> list[Tensor]:
        """Return per row numbers (float32 at least) whose sum, with that of `get_cached_values`, is f.

        Args:
            hidden: [B, R, d] last hidden states of the batch.
        """

    @abstractmethod
    def compute_gradient_seed(
        self,
        hidden: Tensor,
        batch: ForwardBatch,
        relaxed_responses: Sequence[RelaxedResponse],
        candidates: Sequence[Tensor] | None,
    ) -> GradientSeed:
        """Return f at relaxed responses, and where its gradient begins.

        Args:
            hidden: [B, R, d] last hidden states of a batch without shared tokens.
            relaxed_responses: per row Y in this model's ids.
            candidates: per row [T, K] ids of this model. None: its whole vocabulary.
        """

    @abstractmethod
    def build_caches(
        self,
        batch: ForwardBatch,
        hidden_states: Sequence[Tensor],
        states: Sequence[PrefixState],
        values: Sequence[Tensor],
        caches: Sequence[ScoreCache],
    ) -> list[ScoreCache]:
        """Return what to remember of freshly scored responses.

        Args:
            hidden_states: per row [num_tokens, d] of its input tokens.
            values: per row the cached and the new numbers whose sum is f.
            caches: what was known of the shared tokens.
        """

    def compute_running_values(self, sample: Sample, cache: ScoreCache) -> Tensor:
        """Return [T + 1] f after none, one, … of the tokens of a scored response, if its score stayed as it is there.

        Empty for log-likelihoods. A stop token that the template drops is left out.
        """
        return cache.prefix_scores

    def has_draw_logp(self, sample: Sample) -> bool:
        """Return whether f is known from generating the sample."""
        return False

    def score_drawn(
        self, samples: Sequence[Sample], caches: Sequence[ScoreCache], flop_counter: FlopCounter, return_caches: bool
    ) -> tuple[list[float], list[ScoreCache]] | None:
        """Return what `score` does, if all of it is known from generating the samples. None: it takes a forward."""
        return None

    # --- relaxed tokens ---

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Return the vectors E [..., D] that this model reads for its ids (see `embed_tokens`)."""
        return embed_tokens(self.model, ids)

    def map_to_model_ids(self, relaxed: RelaxedResponse, span: slice) -> RelaxedResponse:
        """Return positions of a relaxed response in this model's ids. Tokens that it lacks lose their weight."""
        ids = self.vocab_map[relaxed.ids[span].to(self.vocab_map.device)]
        weights = relaxed.weights[span].to(self.vocab_map.device).masked_fill(ids < 0, 0.0)
        weights[:, 0] += (weights.sum(-1) == 0).to(weights)  # nothing left: the response's own token, which is first
        return RelaxedResponse(ids.clamp(min=0), weights / weights.sum(-1, keepdim=True))

    def embed_relaxed(self, batch: ForwardBatch, relaxed_responses: Sequence[RelaxedResponse]) -> Tensor:
        """Return input embeddings [B, R, d] of a batch, with Σ_v Y[t, v]·E_v at the response tokens."""
        embeds = self.embed_ids(batch.input_ids)
        for row, relaxed in enumerate(relaxed_responses):
            # Response token t is input t + 1: the first input is the prompt's. A likelihood never reads the last one.
            count = min(batch.num_tokens[row] - 1, len(relaxed.ids))
            if count and relaxed.ids.shape[1] > 1:
                embeds[row, 1 : count + 1] = relaxed.average_embeddings(self.embed_ids, count).to(embeds)
        return embeds

    # --- the forward ---

    @property
    def layout(self) -> StateLayout:
        return get_layout(self.model)

    def make_prompt_cache(self, state: PrefixState, prompt_ids: list[int] | None = None) -> ScoreCache:
        """Return the cache of a prefix of which no response token is known."""
        width = self.model.config.get_text_config().hidden_size
        empty = torch.zeros(0, dtype=self.model.dtype, device=self.model.device)
        return ScoreCache(state, empty, empty.new_zeros(0, width), empty, prompt_ids)

    def compute_prompt_caches(self, samples: Sequence[Sample], flop_counter: FlopCounter) -> list[ScoreCache]:
        """Return the caches of the samples' prompts."""
        prompts = [self.encode_prompt(sample.problem, sample.prompt_ids) for sample in samples]
        return self._read_prompts(samples, prompts, flop_counter)

    def _read_prompts(
        self, samples: Sequence[Sample], prompts: Sequence[list[int]], flop_counter: FlopCounter
    ) -> list[ScoreCache]:
        for sample, prompt in zip(samples, prompts, strict=True):
            flop_counter.add_flops(
                sample.cost_key, self.model_size, "prefill", 0, len(prompt) - 1, num_head_positions=0
            )
        states = prefill_sequences(self.model, self.layout, [prompt[:-1] for prompt in prompts])
        return [self.make_prompt_cache(state, prompt) for state, prompt in zip(states, prompts, strict=True)]

    def fit_caches(
        self,
        samples: Sequence[Sample],
        encoded: Sequence[EncodedSample],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        flop_counter: FlopCounter,
    ) -> tuple[list[ScoreCache], list[int]]:
        """Return caches and numbers of shared tokens, with new caches for responses that have another prompt.

        A chat template may open a turn with a thought in another way than a turn without one.
        """
        fitted, counts = list(caches), list(num_shared)
        others = [
            index
            for index, (row, cache) in enumerate(zip(encoded, caches, strict=True))
            if cache.prompt_ids is not None and cache.prompt_ids != row.prompt_ids
        ]
        if others:
            prompts = [encoded[index].prompt_ids for index in others]
            new_caches = self._read_prompts([samples[index] for index in others], prompts, flop_counter)
            for index, cache in zip(others, new_caches, strict=True):
                fitted[index], counts[index] = cache, 0
        return fitted, counts

    def build_batch(
        self, encoded: Sequence[EncodedSample], caches: Sequence[ScoreCache], num_shared: Sequence[int]
    ) -> ForwardBatch:
        """Return the batch that reads what is not cached of the samples."""
        tokens = [self.select_input_ids(row, count) for row, count in zip(encoded, num_shared, strict=True)]
        starts = [len(row.prompt_ids) - 1 + count for row, count in zip(encoded, num_shared, strict=True)]
        ids, _ = pad_sequences(tokens, self.model.device, left=False)
        positions = torch.tensor(starts, device=ids.device)[:, None] + torch.arange(ids.shape[1], device=ids.device)
        # Padding repeats the last real position, which exists in every position table.
        last = torch.tensor([start + len(row) - 1 for start, row in zip(starts, tokens, strict=True)])
        return ForwardBatch(
            encoded=list(encoded),
            num_shared=list(num_shared),
            input_ids=ids,
            position_ids=positions.minimum(last.to(ids.device)[:, None]),
            states=[cache.state.cut(start) for cache, start in zip(caches, starts, strict=True)],
            start_positions=starts,
            num_tokens=[len(row) for row in tokens],
        )

    def compute_hidden_states(
        self, batch: ForwardBatch, embeds: Tensor | None = None, return_states: bool = False
    ) -> tuple[Tensor, list[PrefixState]]:
        """Return the last hidden states [B, R, d] of the input tokens, and the new states with `return_states`.

        Args:
            embeds: [B, R, d] input embeddings to read in place of the batch's ids.
        """
        return read_tokens(
            self.model,
            self.layout,
            batch.states,
            batch.input_ids,
            batch.position_ids,
            batch.num_tokens,
            embeds=None if embeds is None else split_embeddings(self.model, embeds),
            return_states=return_states,
            snapshot_every=prefix.SNAPSHOT_INTERVAL,
        )

    def count_reusable(self, encoded: EncodedSample, cache: ScoreCache, num_shared: int) -> int:
        """Return how many of the shared response tokens need not be read again. 0: the prompt's state is there."""
        num_prompt = len(encoded.prompt_ids) - 1
        return max(0, cache.state.cut(num_prompt + num_shared).resume_length - num_prompt)

    @torch.no_grad()
    def score(
        self,
        samples: Sequence[Sample],
        caches: Sequence[ScoreCache],
        num_shared: Sequence[int],
        flop_counter: FlopCounter,
        return_caches: bool = False,
    ) -> tuple[list[float], list[ScoreCache]]:
        """Return f (unweighted) of samples, and what to remember of them with `return_caches`.

        Args:
            caches: of responses that share their first `num_shared` tokens with the samples.
        """
        if (drawn := self.score_drawn(samples, caches, flop_counter, return_caches)) is not None:
            return drawn
        encoded = [self.encode(sample) for sample in samples]
        caches, num_shared = self.fit_caches(samples, encoded, caches, num_shared, flop_counter)
        num_shared = [self.count_reusable(*row) for row in zip(encoded, caches, num_shared, strict=True)]
        batch = self.build_batch(encoded, caches, num_shared)
        for sample, start, count in zip(samples, batch.start_positions, batch.num_tokens, strict=True):
            flop_counter.add_flops(sample.cost_key, self.model_size, "forward", start, count)
        hidden, states = self.compute_hidden_states(batch, return_states=return_caches)
        values = []
        for cache, row, count, new in zip(
            caches, encoded, num_shared, self.compute_values(hidden, batch), strict=True
        ):
            values.append(torch.cat((self.get_cached_values(cache, row, count).to(new), new)))
        totals = [float(numbers.double().sum()) for numbers in values]
        if not return_caches:
            return totals, []
        hidden_states = [hidden[row, :count] for row, count in enumerate(batch.num_tokens)]
        return totals, self.build_caches(batch, hidden_states, states, values, caches)
