"""Differentiable rewards over token ids (scalar, process, head, log-ratio, ensemble), and a verifier for labels.

The search, best-of-N and the audits all score through `Reward.score`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.objectives import EncodedSample, Objective, Sample, ScoreCache
from nabla_trl.gradient.score import ProcessObjective, ScoreObjective
from nabla_trl.gradient.state_head import HeadObjective
from nabla_trl.gradient.token_gradient import compute_direct_likelihood_gradient, compute_token_gradient
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import HARD_GRADIENT_POINT, GradientPoint
from nabla_trl.models.policy import Policy, get_context_length
from nabla_trl.models.prompts import PromptTooLong
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.tasks.problem import Problem


@dataclass
class Reward:
    """A weighted sum of objectives, r(x, y) = Σ weight · objective(x, y), or an ensemble's lower confidence bound.

    Attributes:
        kind: "scalar", "process", "head", "log-ratio", "ensemble", "power" or "function".
        objectives: one per model.
        in_vocabulary: [policy rows] bool, the policy's tokens that every objective can read inside a response. A
            response with any other token, or longer than a model's context, scores −inf: it is never preferred.
        stop_ids: stop tokens of the policy that the reward can read at the end of a response.
        batch_size: responses that are scored together.
        preferred_model: of a log-ratio: the model that one could sample from instead.
        uncertainty_penalty: of an ensemble, whose objectives are its members: r = mean − uncertainty_penalty · std
            over the members' scores, with the population's std (Coste et al., arXiv 2310.02743). None: the weighted
            sum.
        gradient_at: the gradient that a search follows by default (`GradientPoint.parse`).
        validated_limits: how far the audit allows a search to go. None: not audited.
        gradient_unhelpful: the audit found no gradient of this reward that helps.
    """

    name: str
    kind: str
    objectives: list[Objective]
    in_vocabulary: Tensor
    stop_ids: frozenset[int]
    batch_size: int = 256
    preferred_model: Policy | None = None
    uncertainty_penalty: float | None = None
    gradient_at: str = "mixture:0.5"
    validated_limits: ValidatedLimits | None = None
    gradient_unhelpful: bool = False

    def with_repeated_turn_end(self) -> Reward:
        """Return the reward whose score models read the end of the turn twice after responses that end with it."""
        objectives = [copy(objective) for objective in self.objectives]
        for objective in objectives:
            if isinstance(objective, ScoreObjective):
                objective.repeats_turn_end = True
        return replace(self, objectives=objectives)

    def compute_max_new_tokens(self, problem: Problem, prompt_ids: list[int]) -> int:
        """Return how many response tokens fit into the contexts of all models.

        Raises:
            PromptTooLong: no token fits.
            ValueError: an objective cannot read the prompt.
        """
        prompt = Sample(problem, prompt_ids, [])
        num_tokens = min(_count_remaining_tokens(objective, objective.encode(prompt)) for objective in self.objectives)
        if num_tokens < 1:
            raise PromptTooLong(f"{problem.id}: the prompt fills the context of {self.name}")
        return num_tokens

    def reads_states_of(self, policy: Policy) -> bool:
        """Tell whether all objectives read the hidden states that this policy computes when it draws a response."""
        are_heads = all(isinstance(objective, HeadObjective) for objective in self.objectives)
        return are_heads and self.uses_model_of(policy)

    def uses_model_of(self, policy: Policy) -> bool:
        """Tell whether all objectives read with this policy's model, so that its caches of prompts are theirs."""
        return all(objective.model is policy.model for objective in self.objectives)

    def compute_prompt_caches(self, samples: Sequence[Sample], flop_counter: FlopCounter) -> list[list[ScoreCache]]:
        """Return per sample one cache of its prompt per objective. Responses are ignored."""
        with flop_counter.measure_seconds([sample.cost_key for sample in samples]):
            columns = [objective.compute_prompt_caches(samples, flop_counter) for objective in self.objectives]
        return [list(row) for row in zip(*columns, strict=True)]

    def score(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        *,
        flop_counter: FlopCounter,
        num_shared: Sequence[int] | None = None,
        return_caches: bool = False,
    ) -> tuple[list[float], list[list[ScoreCache]]]:
        """Return the rewards of B responses.

        Args:
            caches: per sample one cache per objective, of its prompt or of a response with the same first tokens.
            num_shared: per sample how many response tokens the cache holds. They are not computed again.
            return_caches: also return the caches of these responses (else empty lists).

        Returns:
            B rewards (−inf where the reward cannot read a response, NaN where a model gives NaN), and caches.
        """
        values, _, new_caches = self.score_by_objective(
            samples, caches, flop_counter=flop_counter, num_shared=num_shared, return_caches=return_caches
        )
        return values, new_caches

    def score_by_objective(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        *,
        flop_counter: FlopCounter,
        num_shared: Sequence[int] | None = None,
        return_caches: bool = False,
    ) -> tuple[list[float], list[list[float]], list[list[ScoreCache]]]:
        """Return what `score` returns, and between them per sample the objectives' unweighted values.

        These values are empty where the reward cannot read a response.
        """
        values, new_caches = [-math.inf] * len(samples), [list(cache) for cache in caches]
        objective_values: list[list[float]] = [[] for _ in samples]
        scorable = [index for index, sample in enumerate(samples) if self._is_scorable(sample)]
        for begin in range(0, len(scorable), self.batch_size):
            indices = scorable[begin : begin + self.batch_size]
            batch = [samples[index] for index in indices]
            with flop_counter.measure_seconds([sample.cost_key for sample in batch]):
                counts = [0 if num_shared is None else num_shared[index] for index in indices]
                scores, cache_columns = [], []
                for number, objective in enumerate(self.objectives):
                    batch_caches = [caches[index][number] for index in indices]
                    column, cache_column = objective.score(batch, batch_caches, counts, flop_counter, return_caches)
                    scores.append(column)
                    cache_columns.append(cache_column)
                totals = self._combine_objective_values(torch.tensor(scores, dtype=torch.float64)).tolist()
            for row, index in enumerate(indices):
                values[index] = totals[row]
                objective_values[index] = [column[row] for column in scores]
                new_caches[index] = [column[row] for column in cache_columns] if return_caches else []
        return values, objective_values, new_caches

    def compute_backward_gradient(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        candidates: Sequence[Tensor] | None,
        *,
        flop_counter: FlopCounter,
        gradient_at: GradientPoint = HARD_GRADIENT_POINT,
        likelihood_token_grad: bool = True,
    ) -> list[Tensor]:
        """Return ∂r/∂Y of each sample by backward passes, averaged over the α of `gradient_at`.

        Args:
            caches: per sample the caches of its prompt.
            candidates: per sample [T, K] policy ids at which the gradient is needed. None = the whole vocabulary.
            gradient_at: where to differentiate. Anything but the hard tokens needs samples with `draw_info`.
            likelihood_token_grad: include the direct part of log-likelihoods.

        Returns:
            per sample [T, K] or [T, policy rows].
        """
        gradients: list[Tensor] = []
        for begin in range(0, len(samples), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            with flop_counter.measure_seconds([sample.cost_key for sample in samples[rows]]):
                by_alpha = [
                    compute_token_gradient(
                        self.objectives,
                        samples[rows],
                        caches[rows],
                        None if candidates is None else candidates[rows],
                        flop_counter=flop_counter,
                        relaxed_responses=[
                            sample.relax(alpha, gradient_at.candidate_min_p) for sample in samples[rows]
                        ],
                        objective_grad_fn=self._compute_objective_grads,
                        likelihood_token_grad=likelihood_token_grad,
                    )
                    for alpha in gradient_at.alphas
                ]
                gradients += [torch.stack(of_sample).mean(0) for of_sample in zip(*by_alpha, strict=True)]
        return gradients

    @property
    def has_gradient(self) -> bool:
        """Tell whether the reward has a gradient by the response's tokens. A function (`FunctionReward`) has none."""
        return True

    @property
    def step_delimiter(self) -> str:
        """Return what ends the reasoning steps of a process reward, and an empty text for others."""
        finders = (obj.step_finder for obj in self.objectives if isinstance(obj, ProcessObjective))
        return next((finder.delimiter for finder in finders), "")

    @property
    def has_dense_gradient(self) -> bool:
        """Tell whether all objectives are log-likelihoods, so that every token has a direct gradient."""
        return all(isinstance(objective, LikelihoodObjective) for objective in self.objectives)

    def compute_direct_gradient(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        candidates: Sequence[Tensor],
        *,
        flop_counter: FlopCounter,
    ) -> list[Tensor]:
        """Return the direct part of ∂r/∂Y at the candidates, without a backward pass.

        Of log-likelihoods the direct part is log π(v | y_<t) for every candidate v.

        A score s is a sum of what each token added, s_T = s_0 + Σ_t (s_t − s_{t−1}), where the same head reads s_t
        after token t. The direct part is that difference for the response's own token, and 0 for all other tokens.
        The difference is meaningful if the head was trained at every token, which the gradient audit measures.

        A process reward Σ_e s_e is a sum of the same differences, each counted once per step that ends at or after
        its token: Σ_e s_e = n_0·s_0 + Σ_t n_t (s_t − s_{t−1}) with n_t = #{e ≥ t}, the end of the response included.
        The direct part is n_t (s_t − s_{t−1}).

        Args:
            caches: per sample the caches of the scored response.
            candidates: per sample [T, K] policy ids.

        Returns:
            per sample [T, K].
        """
        likelihoods = [objective for objective in self.objectives if isinstance(objective, LikelihoodObjective)]
        with flop_counter.measure_seconds([sample.cost_key for sample in samples]):
            if len(likelihoods) == len(self.objectives):
                return compute_direct_likelihood_gradient(
                    likelihoods, samples, caches, candidates, flop_counter=flop_counter
                )
            return [self._compute_score_increments(*args) for args in zip(samples, caches, candidates, strict=True)]

    def compute_running_rewards(self, sample: Sample, caches: Sequence[ScoreCache]) -> Tensor:
        """Return [T + 1] the reward after none, one, … of the tokens of a response. All objectives must be scores.

        Args:
            caches: of the scored response, one per objective.
        """
        length = len(sample.response_ids) + 1
        running_values = [
            objective.compute_running_values(sample, cache).cpu()
            for objective, cache in zip(self.objectives, caches, strict=True)
        ]
        # A stop token that a template drops has no score: it adds nothing.
        running_values = [torch.cat((row, row[-1:].expand(length - len(row)))) for row in running_values]
        return self._combine_objective_values(torch.stack(running_values))

    @property
    def scores_every_token(self) -> bool:
        """Tell whether all objectives are scores of a sequence classifier, which can be read after any token."""
        return all(type(objective) is ScoreObjective for objective in self.objectives)

    def _compute_score_increments(self, sample: Sample, caches: Sequence[ScoreCache], candidates: Tensor) -> Tensor:
        """Return [T, K]: what each response token added to the reward. The first one has nothing before it: 0."""
        increments = self.compute_running_rewards(sample, caches).diff()
        increments[:1] = 0
        is_response_token = candidates == torch.tensor(sample.response_ids)[:, None]
        return torch.where(is_response_token, increments[:, None], 0.0).float()

    def compute_gradient(
        self,
        samples: Sequence[Sample],
        prompt_caches: Sequence[Sequence[ScoreCache]],
        response_caches: Sequence[Sequence[ScoreCache]],
        candidates: Sequence[Tensor],
        *,
        flop_counter: FlopCounter,
        gradient_at: GradientPoint,
    ) -> list[Tensor]:
        """Return ∂r/∂Y at the candidates as `gradient_at` selects it: the direct part, backward passes, or their sum.

        Args:
            prompt_caches: per sample the caches of its prompt, for backward passes.
            response_caches: per sample the caches of the scored response, for the direct part.
            candidates: per sample [T, K] policy ids.

        Returns:
            per sample [T, K].
        """
        parts = []
        if gradient_at.direct:
            parts.append(self.compute_direct_gradient(samples, response_caches, candidates, flop_counter=flop_counter))
        if gradient_at.alphas:
            parts.append(
                self.compute_backward_gradient(
                    samples,
                    prompt_caches,
                    candidates,
                    flop_counter=flop_counter,
                    gradient_at=gradient_at,
                    likelihood_token_grad=not gradient_at.direct,
                )
            )
        return [sum(of_sample[1:], start=of_sample[0]) for of_sample in zip(*parts, strict=True)]

    def _combine_objective_values(self, values: Tensor) -> Tensor:
        """Return [B] rewards from the values of the objectives, [objectives, B]."""
        if self.uncertainty_penalty is None:
            return self._get_objective_weights(values) @ values
        return values.mean(0) - self.uncertainty_penalty * values.std(0, correction=0)

    def _compute_objective_grads(self, values: Tensor) -> Tensor:
        """Return ∂r/∂objective [objectives, B] at the values of the objectives, [objectives, B]."""
        if self.uncertainty_penalty is None:
            return self._get_objective_weights(values)[:, None].expand_as(values)
        deviations, std = values - values.mean(0), values.std(0, correction=0)
        # Where all members agree, std has no gradient: 0/0 becomes 0.
        return (1 - self.uncertainty_penalty * (deviations / std).nan_to_num()) / len(values)

    def _get_objective_weights(self, values: Tensor) -> Tensor:
        return torch.tensor([objective.weight for objective in self.objectives], dtype=values.dtype)

    def _is_scorable(self, sample: Sample) -> bool:
        """Tell whether the reward can read a response, and whether it fits into every context."""
        ids = sample.response_ids
        if not self.in_vocabulary[ids[:-1] if ids and ids[-1] in self.stop_ids else ids].all():
            return False
        return all(_count_remaining_tokens(objective, objective.encode(sample)) >= 0 for objective in self.objectives)


def encode_prompt(
    problem: Problem, policy: Policy, reward: Reward | None, max_new_tokens: int
) -> tuple[list[int], int]:
    """Return a prompt's ids, and the longest response up to `max_new_tokens` that policy and reward can read after it.

    Raises:
        ValueError: the problem cannot be run, because it cannot be written as a prompt or fills a context.
    """
    ids = policy.encode(problem)
    limit = min(max_new_tokens, policy.context_length - len(ids))
    return ids, limit if reward is None else min(limit, reward.compute_max_new_tokens(problem, ids))


def _count_remaining_tokens(objective: Objective, encoded: EncodedSample) -> int:
    """Return how many tokens could still be added to an encoded sample."""
    return get_context_length(objective.model) - len(encoded.sequence_ids)


class Verifier:
    """Answer checking as a 0/1 label. Not differentiable: for labels, RL and evaluation, never at test time."""

    def __init__(self, checker: AnswerChecker):
        self.checker = checker

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[tuple[str | None, MatchResult]]:
        """Return per response text the extracted answer and whether it matches the problem's gold answer."""
        answers = [extract_answer(text) for text in texts]
        golds = [problem.grading_target for problem in problems]
        return list(zip(answers, self.checker.check(list(zip(answers, golds, strict=True))), strict=True))
