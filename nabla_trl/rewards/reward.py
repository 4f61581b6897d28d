"""Differentiable rewards over token ids (scalar, process, log-ratio) and the verifier, which only labels.

Every caller (the reasoner's incumbents and proposals, best-of-N, the audit) scores through `Reward.score`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.objectives import EncodedSample, Objective, Sample, ScoreCache
from nabla_trl.gradient.score import ProcessObjective
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
    """A weighted sum of terms, r(x, y) = Σ weight · term(x, y), or the lower confidence bound of an ensemble.

    Attributes:
        kind: "scalar", "process", "log-ratio" or "ensemble".
        readable: [policy rows] bool, policy tokens that every term can read inside a response. A response with
            any other token, or longer than a term's context, scores −inf: it is never preferred.
        stop_ids: stop tokens of the policy that are readable at the end of a response.
        rival: the model one could sample from instead: the better (or tuned) one of a log-ratio.
        caution: of an ensemble, whose terms are its members: r = mean − caution · std over the members' scores,
            std the population's (Coste et al., arXiv 2310.02743). None: the weighted sum.
        point: the gradient that a search should follow (`options.Point.parse`), unless it is told another.
        trust: how far it may be searched with, by its audit; None: not audited.
        misled: its audit found no gradient of it that helps.
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

    def compute_max_new_tokens(self, problem: Problem, prompt_ids: list[int]) -> int:
        """Most response tokens that the contexts of all terms leave.

        Raises:
            PromptTooLong: a term has no room for a response.
            ValueError: it cannot read the prompt.
        """
        bare = Sample(problem, prompt_ids, [])
        room = min(_count_remaining_tokens(term, term.encode(bare)) for term in self.objectives)
        if room < 1:
            raise PromptTooLong(f"{problem.id}: the prompt fills the context of {self.name}")
        return room

    def compute_prompt_caches(self, samples: Sequence[Sample], flop_counter: FlopCounter) -> list[list[ScoreCache]]:
        """Per sample, one memo of its bare prompt per term (responses are ignored)."""
        with flop_counter.measure_seconds([sample.cost_key for sample in samples]):
            columns = [term.compute_prompt_caches(samples, flop_counter) for term in self.objectives]
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
        """Rewards of B responses.

        Args:
            memos: per sample one memo per term: of its prompt, or of a response that begins with the same
                `shared` tokens, which are then not computed again.
            keep: also return the memos of these responses (empty lists otherwise).

        Returns:
            B floats (−inf: unreadable, see `readable`; NaN is passed on to the caller) and memos.
        """
        values, _, kept = self.score_by_objective(
            samples, caches, flop_counter=flop_counter, num_shared=num_shared, return_caches=return_caches
        )
        return values, kept

    def score_by_objective(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        *,
        flop_counter: FlopCounter,
        num_shared: Sequence[int] | None = None,
        return_caches: bool = False,
    ) -> tuple[list[float], list[list[float]], list[list[ScoreCache]]]:
        """As `score`, and per sample what each term gave, before its weight; empty where it cannot be read."""
        values, kept = [-math.inf] * len(samples), [list(memo) for memo in caches]
        parts: list[list[float]] = [[] for _ in samples]
        readable = [index for index, sample in enumerate(samples) if self._is_scorable(sample)]
        for begin in range(0, len(readable), self.batch_size):
            rows = readable[begin : begin + self.batch_size]
            some = [samples[index] for index in rows]
            with flop_counter.measure_seconds([sample.cost_key for sample in some]):
                counts = [0 if num_shared is None else num_shared[index] for index in rows]
                scores, columns = [], []
                for number, term in enumerate(self.objectives):
                    bases = [caches[index][number] for index in rows]
                    column, fresh = term.score(some, bases, counts, flop_counter, return_caches)
                    scores.append(column)
                    columns.append(fresh)
                totals = self._combine_objective_values(torch.tensor(scores, dtype=torch.float64)).tolist()
            for row, index in enumerate(rows):
                values[index] = totals[row]
                parts[index] = [column[row] for column in scores]
                kept[index] = [column[row] for column in columns] if return_caches else []
        return values, parts, kept

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
        """∂r/∂Y per sample by backward passes, [T, K] at the candidates or [T, policy rows]; memos of the prompts.

        Args:
            point: where to differentiate; the mean over its α. Any but the hard tokens needs samples whose
                candidates are known.
            direct: include the direct part of log-likelihoods.
        """
        gradients: list[Tensor] = []
        for begin in range(0, len(samples), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            some = None if candidates is None else candidates[rows]
            with flop_counter.measure_seconds([sample.cost_key for sample in samples[rows]]):
                parts = [
                    compute_token_gradient(
                        self.objectives,
                        samples[rows],
                        caches[rows],
                        some,
                        flop_counter=flop_counter,
                        relaxed_responses=[
                            sample.relax(alpha, gradient_at.candidate_min_p) for sample in samples[rows]
                        ],
                        objective_grad_fn=self._compute_objective_grads,
                        likelihood_token_grad=likelihood_token_grad,
                    )
                    for alpha in gradient_at.alphas
                ]
                gradients += [torch.stack(some).mean(0) for some in zip(*parts, strict=True)]
        return gradients

    @property
    def step_delimiter(self) -> str:
        """What ends the steps that a process reward reads; empty for others."""
        return next((term.step_finder.delimiter for term in self.objectives if isinstance(term, ProcessObjective)), "")

    @property
    def has_dense_gradient(self) -> bool:
        """Every term is a log-likelihood, so the reward has a direct gradient at every token."""
        return all(isinstance(term, LikelihoodObjective) for term in self.objectives)

    def compute_direct_gradient(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        candidates: Sequence[Tensor],
        *,
        flop_counter: FlopCounter,
    ) -> list[Tensor]:
        """The direct part of ∂r/∂Y at the candidates [T, K], from the memos of scored responses: no backward pass.

        Of log-likelihoods it is log π(v | y_<t) for every candidate. A score s is a sum of what each token added,
        s_T = s_0 + Σ_t (s_t − s_{t−1}), with s_t read by the same head after token t: the direct part is that
        difference for the response's own token, and 0 for tokens that were not scored. It means something if the
        head was trained at every token; the gradient audit tells. A process reward Σ_e s_e is a sum of the same
        differences, each as often as a step ends at or after its token: Σ_e s_e = n_0·s_0 + Σ_t n_t (s_t − s_{t−1})
        with n_t = #{e ≥ t}, the end of the response included, and the direct part is n_t (s_t − s_{t−1}).
        """
        terms = [term for term in self.objectives if isinstance(term, LikelihoodObjective)]
        with flop_counter.measure_seconds([sample.cost_key for sample in samples]):
            if len(terms) == len(self.objectives):
                return compute_direct_likelihood_gradient(
                    terms, samples, caches, candidates, flop_counter=flop_counter
                )
            return [self._compute_score_increments(*one) for one in zip(samples, caches, candidates, strict=True)]

    def _compute_score_increments(self, sample: Sample, caches: Sequence[ScoreCache], table: Tensor) -> Tensor:
        """[T, K]: at each response token what it added to the reward; 0 for the first: before it nothing is read."""
        length = len(sample.response_ids) + 1
        levels = [
            term.compute_running_values(sample, memo).cpu() for term, memo in zip(self.objectives, caches, strict=True)
        ]
        # A stop token that a template drops has no score: it adds nothing.
        levels = [torch.cat((one, one[-1:].expand(length - len(one)))) for one in levels]
        steps = self._combine_objective_values(torch.stack(levels)).diff()
        steps[:1] = 0
        own = table == torch.tensor(sample.response_ids)[:, None]
        return torch.where(own, steps[:, None], 0.0).float()

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
        """∂r/∂Y at the candidates [T, K] as a point asks for: its direct part, backward passes, or the sum.

        Args:
            prompts: memos of the bare prompts; `scored`: of the responses.
        """
        parts = []
        if gradient_at.direct:
            parts.append(self.compute_direct_gradient(samples, response_caches, candidates, flop_counter=flop_counter))
        if gradient_at.alphas:
            direct = not gradient_at.direct
            parts.append(
                self.compute_backward_gradient(
                    samples,
                    prompt_caches,
                    candidates,
                    flop_counter=flop_counter,
                    gradient_at=gradient_at,
                    likelihood_token_grad=direct,
                )
            )
        return [sum(some[1:], start=some[0]) for some in zip(*parts, strict=True)]

    def _combine_objective_values(self, values: Tensor) -> Tensor:
        """[B] rewards from the terms' values [terms, B]."""
        if self.uncertainty_penalty is None:
            return self._get_objective_weights(values) @ values
        return values.mean(0) - self.uncertainty_penalty * values.std(0, correction=0)

    def _compute_objective_grads(self, values: Tensor) -> Tensor:
        """∂r/∂term from the terms' values, both [terms, B]."""
        if self.uncertainty_penalty is None:
            return self._get_objective_weights(values)[:, None].expand_as(values)
        centred, spread = values - values.mean(0), values.std(0, correction=0)
        # Members that agree have no direction in which their spread grows.
        return (1 - self.uncertainty_penalty * (centred / spread).nan_to_num()) / len(values)

    def _get_objective_weights(self, values: Tensor) -> Tensor:
        return torch.tensor([term.weight for term in self.objectives], dtype=values.dtype)

    def _is_scorable(self, sample: Sample) -> bool:
        body = (
            sample.response_ids[:-1]
            if sample.response_ids[-1:] and sample.response_ids[-1] in self.stop_ids
            else sample.response_ids
        )
        if not self.in_vocabulary[body].all():
            return False
        return all(_count_remaining_tokens(term, term.encode(sample)) >= 0 for term in self.objectives)


def _count_remaining_tokens(objective: Objective, encoded: EncodedSample) -> int:
    """Tokens that could still be added to an encoded sample."""
    used = len(encoded.prompt_ids) + len(encoded.response_ids) + len(encoded.turn_end_ids)
    return get_context_length(objective.model) - used


class Verifier:
    """Answer checking as a 0/1 label. Not differentiable: for labels, RL and evaluation, never at test time."""

    def __init__(self, checker: AnswerChecker):
        self.checker = checker

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[tuple[str | None, MatchResult]]:
        """Extracted answer and verdict of each response text."""
        answers = [extract_answer(text) for text in texts]
        golds = [problem.grading_target for problem in problems]
        return list(zip(answers, self.checker.check(list(zip(answers, golds, strict=True))), strict=True))
