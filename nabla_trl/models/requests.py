"""What a generation back end is asked for, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class GenerationRequest:
    """A request for one continuation.

    Attributes:
        cost_key: key that the FLOP counter charges, usually the problem id.
        prefix_ids: ids to continue: the prompt, or the prompt and the beginning of a response. Never empty.
        rng: random numbers for this continuation alone. Unused when decoding is greedy.
        max_new_tokens: at least 1.
        cache: kv row of `prefix_ids[:-1]`. None: `generate_continuations` computes it.
        stop_strings: strings that end the response, besides the policy's stop tokens.
        response_tokens_in_prefix: how many tokens at the end of the prefix belong to the response. A stop string may
            begin in them.
        should_stop: called once with every new token, in order. True ends the continuation, as a stop token does.
    """

    cost_key: str
    prefix_ids: list[int]
    rng: np.random.Generator | None
    max_new_tokens: int
    cache: Tensor | None = None
    stop_strings: tuple[str, ...] = ()
    response_tokens_in_prefix: int = 0
    should_stop: Callable[[int], bool] | None = None

    def get_rng(self) -> np.random.Generator:
        """Return the random numbers of a sampled continuation."""
        if self.rng is None:
            raise ValueError("sampling needs a random stream for every request: set rng")
        return self.rng

    def get_cache(self) -> Tensor:
        """Return the cache of a request whose prefix has been prefilled."""
        if self.cache is None:
            raise RuntimeError("the request's prefix has no cache: call generate_continuations, which prefills it")
        return self.cache

    def join_response(self, new_ids: Sequence[int]) -> list[int]:
        """Return the response's tokens so far: those in the prefix, then the new ones."""
        return [*self.prefix_ids[len(self.prefix_ids) - self.response_tokens_in_prefix :], *new_ids]


@dataclass
class GenerationOutput:
    """A continuation of T tokens.

    Attributes:
        ids: the T new tokens, a final stop token included.
        finished: the last token is a stop token, or completes a stop string.
        candidates: [T, K] long, the policy's K likeliest tokens at each position. The sampled token is one of them.
        logp: [T, K] float32, log π of the candidates (temperature 1, no filter). −inf for forbidden tokens.
        log_importance_weight: [T, K] log π − log q of the candidates, where q is the sampler, both normalized over
            the allowed tokens. inf where q is 0. None where q = π, or if it was not asked for.
        cache: kv row of `prefix_ids + ids[:-1]`. None if it was not asked for.
    """

    ids: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    log_importance_weight: Tensor | None = None
    cache: Tensor | None = None

    def get_cache(self) -> Tensor:
        """Return the cache of an output made with `return_cache`."""
        if self.cache is None:
            raise RuntimeError("the output has no cache: generate it with return_cache")
        return self.cache

    def get_log_importance_weight(self) -> Tensor:
        """Return the weights of an output made with `return_log_importance_weight` by a sampler that is not π."""
        if self.log_importance_weight is None:
            raise RuntimeError("the output has no log_importance_weight: its sampler is π itself")
        return self.log_importance_weight
