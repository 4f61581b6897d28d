"""What a generation back end is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nabla_trl.models.policy import Policy


@dataclass
class GenerationRequest:
    """One continuation to draw.

    Attributes:
        key: problem id, for the meter.
        prefix: ids the continuation starts from (prompt, or prompt and a branch); not empty.
        stream: randomness of this continuation; unused when greedy.
        limit: most tokens to draw, at least 1.
        cache: kv row of `prefix[:-1]`, or None to have it computed.
        stop: strings that end it, besides the policy's stop tokens.
        given: how many tokens at the prefix's end belong to the response already: a string may begin in them.
        ends: is told every token as it is drawn, in order, and says whether the continuation ends with it; None: a
            stop token or the limit ends it, as they do in any case.
    """

    cost_key: str
    prefix_ids: list[int]
    rng: np.random.Generator | None
    max_new_tokens: int
    cache: Tensor | None = None
    stop_strings: tuple[str, ...] = ()
    response_tokens_in_prefix: int = 0
    should_stop: Callable[[int], bool] | None = None

    def is_finished(self, policy: Policy, new_ids: list[int]) -> bool:
        """Whether the response ends with these drawn tokens, before the limit."""
        return policy.is_finished(
            self.prefix_ids[len(self.prefix_ids) - self.response_tokens_in_prefix :] + new_ids, self.stop_strings
        )


@dataclass
class GenerationOutput:
    """A drawn continuation of T tokens.

    Attributes:
        ids: the T new tokens, stop token included.
        finished: the last token is a stop token, or completes a stop string.
        candidates: [T, K] long, the policy's K likeliest tokens at each position, the drawn one among them.
        logp: [T, K] float32, log π of the candidates (temperature 1, unwarped); −inf for forbidden tokens.
        tilt: [T, K] log π less the log-probability that the sampler gives the candidates, both over the tokens that
            are allowed; inf where it never draws one. None where the sampler is π itself, or unless asked for.
        cache: kv row of `prefix + ids[:-1]`, None unless asked for.
    """

    ids: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    log_importance_weight: Tensor | None = None
    cache: Tensor | None = None

    def get_cache(self) -> Tensor:
        """The cache of a draft made with `keep_cache`."""
        if self.cache is None:
            raise RuntimeError("the draft was made without keep_cache")
        return self.cache

    def get_log_importance_weight(self) -> Tensor:
        """The tilt of a draft whose sampler is not π."""
        if self.log_importance_weight is None:
            raise RuntimeError("the draft was made by a sampler that is π itself")
        return self.log_importance_weight
