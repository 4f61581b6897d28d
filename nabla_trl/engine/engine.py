"""What a search may ask for: prompts read, continuations generated, responses scored, proposal scores solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nabla_trl.engine.logprobs import TokenLogprobs, compute_token_logprobs
from nabla_trl.engine.scheduler import Scheduler
from nabla_trl.gradient.objectives import Sample, ScoreCache
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import charge_generation, prepare_prompt_caches
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, GenerationSession, Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.states.prefix import PrefixState


class Engine(Scheduler):
    """A policy and a reward that many searches share.

    Args:
        reward: None where nothing is scored.
        num_slots: sequences that are decoded together at most.
        flop_counter: charged with all work; a new one by default.
        share_time: small tasks do not wait for large ones (see `Scheduler`).
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward | None,
        *,
        num_slots: int = 256,
        flop_counter: FlopCounter | None = None,
        share_time: bool = False,
    ):
        super().__init__(num_slots=num_slots, flop_counter=flop_counter, share_time=share_time)
        self.policy, self.reward = policy, reward

    async def read_prompt(
        self, sample: Sample, *, reward_cost_key: str | None = None
    ) -> tuple[PrefixState, list[ScoreCache]]:
        """Return the policy's cache of a prompt (all but its last token) and the reward's, one per objective.

        Args:
            reward_cost_key: what the reward's work is charged to (default: what the policy's is).
        """
        reward_sample = replace(sample, cost_key_override=reward_cost_key or sample.cost_key_override)
        policy_call = self.batch("policy prompts", self._read_policy_prompts, [(sample.cost_key, sample.prompt_ids)])
        if self.reward and self.reward.uses_model_of(self.policy) and self.policy.backend.returns_caches:
            [policy_cache] = await policy_call
            return policy_cache, [objective.make_prompt_cache(policy_cache) for objective in self.reward.objectives]
        reward_call = (
            None if self.reward is None else self.batch("reward prompts", self._read_reward_prompts, [reward_sample])
        )
        [policy_cache] = await policy_call
        [score_caches] = [[]] if reward_call is None else await reward_call
        return policy_cache, score_caches

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, **options: Any
    ) -> list[GenerationOutput]:
        """Draw continuations. Every request holds the cache of its prefix.

        Outputs have hidden states if the reward reads them, and if the policy's back end gives them.

        Args:
            options: what is recorded of the outputs, as for `GenerationBackend.open_session`.
        """
        # Every request has its own limit of tokens, so requests of other limits are decoded together.
        lane = (replace(sampling, max_new_tokens=1), *sorted(options.items()))

        def open_session() -> GenerationSession:
            return self.policy.backend.open_session(
                self.policy,
                sampling,
                max_sequences=self.num_slots,
                return_hidden_states=self.reward is not None and self.reward.reads_states_of(self.policy),
                **options,
            )

        outputs = await self.generate_together(lane, open_session, requests)
        for request, output in zip(requests, outputs, strict=True):
            charge_generation(self.policy, request, output, self.flop_counter)
        return outputs

    async def score(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        num_shared: Sequence[int],
        *,
        return_caches: bool = True,
    ) -> list[tuple[float, list[ScoreCache]]]:
        """Return the reward of each sample and its caches (see `Reward.score`)."""
        function = self._score_with_caches if return_caches else self._score
        return await self.batch(
            ("score", return_caches), function, list(zip(samples, caches, num_shared, strict=True))
        )

    async def compute_token_logprobs(self, cost_key: str, ids: Sequence[int], num_top: int) -> TokenLogprobs:
        """Return the policy's log-probability of every token of a sequence (see `compute_token_logprobs`)."""
        [logprobs] = await self.batch(("logprobs", num_top), self._compute_logprobs, [(cost_key, ids, num_top)])
        return logprobs

    # --- what is done for many at once -------------------------------------------------------------------

    def _read_policy_prompts(self, prompts: list[tuple[str, list[int]]]) -> list[PrefixState]:
        with self.flop_counter.measure_seconds([key for key, _ in prompts]):
            return prepare_prompt_caches(self.policy, prompts, self.flop_counter)

    def _read_reward_prompts(self, samples: list[Sample]) -> list[list[ScoreCache]]:
        assert self.reward is not None
        return self.reward.compute_prompt_caches(samples, self.flop_counter)

    def _score_with_caches(
        self, items: list[tuple[Sample, Sequence[ScoreCache], int]], return_caches: bool = True
    ) -> list[tuple[float, list[ScoreCache]]]:
        assert self.reward is not None
        samples, caches, num_shared = zip(*items, strict=True)
        rewards, new_caches = self.reward.score(
            samples, caches, flop_counter=self.flop_counter, num_shared=num_shared, return_caches=return_caches
        )
        return list(zip(rewards, new_caches, strict=True))

    def _score(self, items: list[tuple[Sample, Sequence[ScoreCache], int]]) -> list[tuple[float, list[ScoreCache]]]:
        return self._score_with_caches(items, return_caches=False)

    def _compute_logprobs(self, items: list[tuple[str, Sequence[int], int]]) -> list[TokenLogprobs]:
        results = []
        for cost_key, ids, num_top in items:
            with self.flop_counter.measure_seconds([cost_key]):
                results.append(compute_token_logprobs(self.policy, ids, num_top))
            self.flop_counter.add_flops(cost_key, self.policy.size, "forward", 0, len(ids))
        return results
