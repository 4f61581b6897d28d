"""Differentiable rewards over token ids (scalar, process, log-ratio) and the verifier, which only labels.

Every caller (the reasoner's incumbents and proposals, best-of-N, the audit) scores through `Reward.score`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_trl.gradient.likelihood import LikelihoodTerm
from nabla_trl.gradient.objectives import Encoded, Memo, Sample, Term
from nabla_trl.gradient.score import ProcessTerm
from nabla_trl.gradient.token_gradient import direct_gradient, token_gradient
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import Verdict
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.flops import Meter
from nabla_trl.models.options import HARD, Point
from nabla_trl.models.policy import Policy, context_length
from nabla_trl.models.prompts import PromptTooLong
from nabla_trl.rewards.limits import Trust
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
    terms: list[Term]
    readable: Tensor
    stop_ids: frozenset[int]
    batch_size: int = 256
    rival: Policy | None = None
    caution: float | None = None
    point: str = "mixture:0.5"
    trust: Trust | None = None
    misled: bool = False

    def room(self, problem: Problem, prompt: list[int]) -> int:
        """Most response tokens that the contexts of all terms leave.

        Raises:
            PromptTooLong: a term has no room for a response.
            ValueError: it cannot read the prompt.
        """
        bare = Sample(problem, prompt, [])
        room = min(_room(term, term.encode(bare)) for term in self.terms)
        if room < 1:
            raise PromptTooLong(f"{problem.id}: the prompt fills the context of {self.name}")
        return room

    def prompt_memos(self, samples: Sequence[Sample], meter: Meter) -> list[list[Memo]]:
        """Per sample, one memo of its bare prompt per term (responses are ignored)."""
        with meter.clock([sample.key for sample in samples]):
            columns = [term.prompt_memos(samples, meter) for term in self.terms]
        return [list(row) for row in zip(*columns, strict=True)]

    def score(
        self,
        samples: Sequence[Sample],
        memos: Sequence[Sequence[Memo]],
        *,
        meter: Meter,
        shared: Sequence[int] | None = None,
        keep: bool = False,
    ) -> tuple[list[float], list[list[Memo]]]:
        """Rewards of B responses.

        Args:
            memos: per sample one memo per term: of its prompt, or of a response that begins with the same
                `shared` tokens, which are then not computed again.
            keep: also return the memos of these responses (empty lists otherwise).

        Returns:
            B floats (−inf: unreadable, see `readable`; NaN is passed on to the caller) and memos.
        """
        values, _, kept = self.score_parts(samples, memos, meter=meter, shared=shared, keep=keep)
        return values, kept

    def score_parts(
        self,
        samples: Sequence[Sample],
        memos: Sequence[Sequence[Memo]],
        *,
        meter: Meter,
        shared: Sequence[int] | None = None,
        keep: bool = False,
    ) -> tuple[list[float], list[list[float]], list[list[Memo]]]:
        """As `score`, and per sample what each term gave, before its weight; empty where it cannot be read."""
        values, kept = [-math.inf] * len(samples), [list(memo) for memo in memos]
        parts: list[list[float]] = [[] for _ in samples]
        readable = [index for index, sample in enumerate(samples) if self._can_read(sample)]
        for begin in range(0, len(readable), self.batch_size):
            rows = readable[begin : begin + self.batch_size]
            some = [samples[index] for index in rows]
            with meter.clock([sample.key for sample in some]):
                counts = [0 if shared is None else shared[index] for index in rows]
                scores, columns = [], []
                for number, term in enumerate(self.terms):
                    bases = [memos[index][number] for index in rows]
                    column, fresh = term.score(some, bases, counts, meter, keep)
                    scores.append(column)
                    columns.append(fresh)
                totals = self._combine(torch.tensor(scores, dtype=torch.float64)).tolist()
            for row, index in enumerate(rows):
                values[index] = totals[row]
                parts[index] = [column[row] for column in scores]
                kept[index] = [column[row] for column in columns] if keep else []
        return values, parts, kept

    def gradient(
        self,
        samples: Sequence[Sample],
        memos: Sequence[Sequence[Memo]],
        candidates: Sequence[Tensor] | None,
        *,
        meter: Meter,
        point: Point = HARD,
        direct: bool = True,
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
            with meter.clock([sample.key for sample in samples[rows]]):
                parts = [
                    token_gradient(
                        self.terms,
                        samples[rows],
                        memos[rows],
                        some,
                        meter=meter,
                        relaxed=[sample.relaxed(alpha, point.min_p) for sample in samples[rows]],
                        weigh=self._weigh,
                        direct=direct,
                    )
                    for alpha in point.alphas
                ]
                gradients += [torch.stack(some).mean(0) for some in zip(*parts, strict=True)]
        return gradients

    @property
    def delimiter(self) -> str:
        """What ends the steps that a process reward reads; empty for others."""
        return next((term.steps.delimiter for term in self.terms if isinstance(term, ProcessTerm)), "")

    @property
    def dense(self) -> bool:
        """Every term is a log-likelihood, so the reward has a direct gradient at every token."""
        return all(isinstance(term, LikelihoodTerm) for term in self.terms)

    def direct_gradient(
        self, samples: Sequence[Sample], memos: Sequence[Sequence[Memo]], candidates: Sequence[Tensor], *, meter: Meter
    ) -> list[Tensor]:
        """The direct part of ∂r/∂Y at the candidates [T, K], from the memos of scored responses: no backward pass.

        Of log-likelihoods it is log π(v | y_<t) for every candidate. A score s is a sum of what each token added,
        s_T = s_0 + Σ_t (s_t − s_{t−1}), with s_t read by the same head after token t: the direct part is that
        difference for the response's own token, and 0 for tokens that were not scored. It means something if the
        head was trained at every token; the gradient audit tells. A process reward Σ_e s_e is a sum of the same
        differences, each as often as a step ends at or after its token: Σ_e s_e = n_0·s_0 + Σ_t n_t (s_t − s_{t−1})
        with n_t = #{e ≥ t}, the end of the response included, and the direct part is n_t (s_t − s_{t−1}).
        """
        terms = [term for term in self.terms if isinstance(term, LikelihoodTerm)]
        with meter.clock([sample.key for sample in samples]):
            if len(terms) == len(self.terms):
                return direct_gradient(terms, samples, memos, candidates, meter=meter)
            return [self._score_steps(*one) for one in zip(samples, memos, candidates, strict=True)]

    def _score_steps(self, sample: Sample, memos: Sequence[Memo], table: Tensor) -> Tensor:
        """[T, K]: at each response token what it added to the reward; 0 for the first: before it nothing is read."""
        length = len(sample.response) + 1
        levels = [term.running(sample, memo).cpu() for term, memo in zip(self.terms, memos, strict=True)]
        # A stop token that a template drops has no score: it adds nothing.
        levels = [torch.cat((one, one[-1:].expand(length - len(one)))) for one in levels]
        steps = self._combine(torch.stack(levels)).diff()
        steps[:1] = 0
        own = table == torch.tensor(sample.response)[:, None]
        return torch.where(own, steps[:, None], 0.0).float()

    def slope(
        self,
        samples: Sequence[Sample],
        prompts: Sequence[Sequence[Memo]],
        scored: Sequence[Sequence[Memo]],
        candidates: Sequence[Tensor],
        *,
        meter: Meter,
        point: Point,
    ) -> list[Tensor]:
        """∂r/∂Y at the candidates [T, K] as a point asks for: its direct part, backward passes, or the sum.

        Args:
            prompts: memos of the bare prompts; `scored`: of the responses.
        """
        parts = []
        if point.direct:
            parts.append(self.direct_gradient(samples, scored, candidates, meter=meter))
        if point.alphas:
            direct = not point.direct
            parts.append(self.gradient(samples, prompts, candidates, meter=meter, point=point, direct=direct))
        return [sum(some[1:], start=some[0]) for some in zip(*parts, strict=True)]

    def _combine(self, values: Tensor) -> Tensor:
        """[B] rewards from the terms' values [terms, B]."""
        if self.caution is None:
            return self._weights(values) @ values
        return values.mean(0) - self.caution * values.std(0, correction=0)

    def _weigh(self, values: Tensor) -> Tensor:
        """∂r/∂term from the terms' values, both [terms, B]."""
        if self.caution is None:
            return self._weights(values)[:, None].expand_as(values)
        centred, spread = values - values.mean(0), values.std(0, correction=0)
        # Members that agree have no direction in which their spread grows.
        return (1 - self.caution * (centred / spread).nan_to_num()) / len(values)

    def _weights(self, values: Tensor) -> Tensor:
        return torch.tensor([term.weight for term in self.terms], dtype=values.dtype)

    def _can_read(self, sample: Sample) -> bool:
        body = (
            sample.response[:-1] if sample.response[-1:] and sample.response[-1] in self.stop_ids else sample.response
        )
        if not self.readable[body].all():
            return False
        return all(_room(term, term.encode(sample)) >= 0 for term in self.terms)


def _room(term: Term, encoded: Encoded) -> int:
    """Tokens that could still be added to an encoded sample."""
    used = len(encoded.prompt) + len(encoded.response) + len(encoded.tail)
    return context_length(term.model) - used


class Verifier:
    """Answer checking as a 0/1 label. Not differentiable: for labels, RL and evaluation, never at test time."""

    def __init__(self, checker: AnswerChecker):
        self.checker = checker

    def __call__(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[tuple[str | None, Verdict]]:
        """Extracted answer and verdict of each response text."""
        answers = [extract_answer(text) for text in texts]
        golds = [problem.judge for problem in problems]
        return list(zip(answers, self.checker.check(list(zip(answers, golds, strict=True))), strict=True))
