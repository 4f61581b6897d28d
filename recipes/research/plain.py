"""The search as it is published, written plainly: what `bench.py` measures the engine against.

One problem at a time. The response is a matrix (T × V) of one-hot rows that reach policy and reward through their
input embeddings, differentiated by autograd through the whole sequence; no prefix is kept between calls; the gradient
is computed anew at every position that is scanned, and again at every inner step at which a token has changed. The
algorithm is that of the paper (arXiv 2603.04948) and its released research code; written anew.

It takes the engine's decisions, from the same random streams, so that the two differ in work alone. Where the engine
has another definition than the released code, this follows the engine:
- a position holds the incumbent's own token until the arg max of its logits moves, not the arg max from the start;
- a position chooses among the policy's K candidates: elsewhere the T × V logits are −inf;
- incumbent and proposal are scored alike, with the prompt once.

What it is charged for is what it runs: whole sequences, the output head at every position, the product of one-hot
rows and embedding table forward and backward, and both scores of every decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nabla_trl.gradient.objectives import Objective, Sample
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.models.flops import FlopCounter, ModelSize
from nabla_trl.models.generation import generate_continuations, make_rng
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import SequentialProposals, SteSolver
from nabla_trl.search.proposals import policy_likelihood
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# Options that this search does not read, or knows one value of.
PAPER_OPTIONS = ("acceptance", "num_starts", "num_chains", "max_rounds", "max_flops", "restarts", "patience")
ONE_HOT_ACCOUNT = "/one-hot"  # after a problem's id, the account of the products with embedding tables

# position, old token, new token, the new token and what follows it, accepted
Decision = tuple[int, int, int, tuple[int, ...], bool]


@dataclass
class PlainTrace:
    """What a plain search decided, and how often it computed a gradient."""

    response_ids: list[int]
    reward: float
    decisions: list[Decision] = field(default_factory=list)
    num_gradients: int = 0


def list_decisions(trace: Trace) -> list[Decision]:
    """The decisions of an engine's trace, as a plain search lists them."""
    return [(one.position, one.old_token, one.new_token, one.suffix, one.accepted) for one in trace.revisions]


@dataclass
class PlainObjective:
    """A term read through one-hot rows over the policy's vocabulary."""

    objective: Objective

    @cached_property
    def embedding_table(self) -> Tensor:
        """[V, d] this model's embedding of every policy token; 0 for those it lacks."""
        ids = self.objective.vocab_map
        return self.objective.embed_ids(ids.clamp(min=0)) * (ids >= 0)[:, None]

    @cached_property
    def one_hot_matmul_size(self) -> ModelSize:
        """The product of one-hot rows and the table, as if it were an output head."""
        return ModelSize(f"{self.objective.model_size.name}-onehot", 0, 0, 0, self.embedding_table.numel())

    def compute_value(
        self,
        sample: Sample,
        one_hot_TV: Tensor,
        flop_counter: FlopCounter,
        *,
        likelihood_token_grad: bool = True,
        likelihood_suffix_grad: bool = True,
    ) -> Tensor:
        """The term at one-hot rows [T, V]; one whole forward."""
        encoded = self.objective.encode(sample)
        count, begin = len(encoded.response_ids), len(encoded.prompt_ids)
        one_hot_TV = one_hot_TV[:count]
        picked, fed = (
            one_hot_TV if likelihood_token_grad else one_hot_TV.detach(),
            one_hot_TV if likelihood_suffix_grad else one_hot_TV.detach(),
        )
        before, after = (
            self._embed_tokens(ids, one_hot_TV.device) for ids in (encoded.prompt_ids, encoded.turn_end_ids)
        )
        embeds = torch.cat((before, fed @ self.embedding_table, after))[None]
        self._count_flops(sample, embeds.shape[1], count, one_hot_TV.requires_grad, flop_counter)
        model = self.objective.model
        if isinstance(self.objective, ScoreObjective):
            return model.score(model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]).squeeze(-1)
        logits = model(inputs_embeds=embeds).logits[0, begin - 1 : begin - 1 + count]
        mapped = logits.log_softmax(-1)[:, self.objective.vocab_map.clamp(min=0)]
        return (picked * mapped).sum()

    def _embed_tokens(self, ids: list[int], device: torch.device) -> Tensor:
        return self.objective.embed_ids(torch.tensor(ids, dtype=torch.long, device=device))

    def _count_flops(
        self, sample: Sample, length: int, num_head_positions: int, with_backward: bool, flop_counter: FlopCounter
    ) -> None:
        for kind in ("forward", "backward") if with_backward else ("forward",):
            flop_counter.add_flops(sample.cost_key, self.objective.model_size, kind, 0, length)
            flop_counter.add_flops(
                sample.cost_key + ONE_HOT_ACCOUNT,
                self.one_hot_matmul_size,
                kind,
                0,
                0,
                num_head_positions=num_head_positions,
            )


class PlainSearch:
    """The sequential scan with solver ste, one problem at a time.

    Raises:
        ValueError: another algorithm than the preset paper's.
    """

    def __init__(self, policy: Policy, reward: Reward, config: SearchConfig, seed: int = 0):
        paper, solver, scan = SearchConfig.from_preset("paper"), config.solver, config.proposals
        if not isinstance(solver, SteSolver) or not isinstance(scan, SequentialProposals):
            raise ValueError("the plain way is written for the preset paper: solver ste and sequential proposals")
        odd = [name for name in PAPER_OPTIONS if getattr(config, name) != getattr(paper, name)]
        odd += [
            name
            for name in ("min_gradient_norm", "resample_top_p")
            if getattr(scan, name) != getattr(paper.proposals, name)
        ]
        if odd or reward.uncertainty_penalty is not None:
            raise ValueError(
                f"the plain way is written for the preset paper, not for other {', '.join(odd) or 'rewards'}"
            )
        self.policy, self.reward, self.config, self.seed = policy, reward, config, seed
        self.solver, self.scan = solver, scan
        self.flop_counter = FlopCounter()
        self.likelihood = PlainObjective(policy_likelihood(policy))
        self.objectives = [PlainObjective(term) for term in reward.objectives]

    def solve(self, problem: Problem) -> PlainTrace:
        prompt = self.policy.encode(problem)
        room = min(
            self.config.max_new_tokens,
            self.policy.context_length - len(prompt),
            self.reward.compute_max_new_tokens(problem, prompt),
        )
        with self.flop_counter.measure_seconds([problem.id]):
            draft = self.draw_continuation(problem, prompt, room, 0)
            trace = PlainTrace(draft.ids, self.score_response(Sample(problem, prompt, draft.ids)))
            candidates, logp, position = draft.candidates, draft.logp, 0
            stream = make_rng(self.seed, problem.id, "resample", 0)
            while position < len(trace.response_ids) and 1 + len(trace.decisions) < self.config.max_rollouts:
                at, position = position, position + 1
                sample = Sample(problem, prompt, trace.response_ids)
                token = self.resample_token(sample, candidates, logp, at, stream, trace)
                if token == trace.response_ids[at]:
                    continue
                response, tables = [*trace.response_ids[:at], token], (candidates[: at + 1], logp[: at + 1])
                if token not in self.policy.stop_ids and len(response) < room:
                    draft = self.draw_continuation(
                        problem, prompt + response, room - len(response), 1 + len(trace.decisions)
                    )
                    tables = torch.cat((tables[0], draft.candidates)), torch.cat((tables[1], draft.logp))
                    response = response + draft.ids
                proposed, standing = (
                    self.score_response(Sample(problem, prompt, response)),
                    self.score_response(sample),
                )
                accepted = proposed > standing
                trace.decisions.append((at, trace.response_ids[at], token, tuple(response[at:]), accepted))
                if accepted:
                    (candidates, logp), trace.response_ids, trace.reward = tables, response, proposed
                stream = make_rng(self.seed, problem.id, "resample", len(trace.decisions))
        return trace

    def compute_flops(self, problem_id: str, include_one_hot: bool = True) -> float:
        """What a problem has cost, with or without the products of one-hot rows and embedding tables."""
        return (
            self.flop_counter.get_cost(problem_id).flops
            + include_one_hot * self.flop_counter.get_cost(problem_id + ONE_HOT_ACCOUNT).flops
        )

    def draw_continuation(
        self, problem: Problem, prefix: list[int], max_new_tokens: int, draw_index: int
    ) -> GenerationOutput:
        """A continuation; its prefix is run through the policy again."""
        job = GenerationRequest(
            problem.id, prefix, make_rng(self.seed, problem.id, "suffix", draw_index), max_new_tokens
        )
        [draft] = generate_continuations(
            self.policy,
            [job],
            self.config.get_sampling(),
            flop_counter=self.flop_counter,
            top_k_candidates=self.config.top_k_candidates,
        )
        return draft

    @torch.no_grad()
    def score_response(self, sample: Sample) -> float:
        rows = self.make_one_hot(torch.tensor(sample.response_ids))
        return sum(
            term.objective.weight * float(term.compute_value(sample, rows, self.flop_counter))
            for term in self.objectives
        )

    def resample_token(
        self,
        sample: Sample,
        candidates: Tensor,
        candidate_logp: Tensor,
        position: int,
        rng: np.random.Generator,
        trace: PlainTrace,
    ) -> int:
        """The token drawn at a position after optimisation; the incumbent's own where the policy is confident."""
        own, scan = sample.response_ids[position], self.scan
        if float(candidate_logp[position].max().exp()) > scan.confidence:
            return own
        logits = self.optimize_logits(sample, candidates, candidate_logp, position, trace)[position]
        table = candidates[position]
        usable = self.reward.in_vocabulary[table] & candidate_logp[position].isfinite()
        if self.config.candidate_min_p:
            usable &= candidate_logp[position] >= candidate_logp[position].max() + float(
                np.log(self.config.candidate_min_p)
            )
        row = logits[table].masked_fill(~(usable | (table == own)), -torch.inf) / scan.resample_temperature
        mass = row.softmax(-1, dtype=torch.float64).cumsum(-1)
        return int(table[int((mass <= rng.random() * mass[-1]).sum())])

    def optimize_logits(
        self, sample: Sample, candidates: Tensor, candidate_logp: Tensor, position: int, trace: PlainTrace
    ) -> Tensor:
        """Adam on the T × V logits from a position on (`moving`): a hard forward, a backward through softmax(z/τ)."""
        own, options = torch.tensor(sample.response_ids), self.solver
        placeable = self.reward.in_vocabulary[candidates] | (candidates == own[:, None])
        start = torch.full((len(own), len(self.policy.forbidden_mask)), -torch.inf)
        start.scatter_(1, candidates, candidate_logp.masked_fill(~placeable, -torch.inf))
        logits = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([logits], lr=options.learning_rate)
        first, hard = start.argmax(-1), own
        left = torch.zeros(len(own), dtype=torch.bool)
        slope = self.compute_gradient(sample, hard, trace)
        for step in range(options.steps):
            if step:
                best = logits.detach().argmax(-1)
                left |= best != first
                now = torch.where(left, best, own)
                if not torch.equal(now, hard):
                    hard, slope = now, self.compute_gradient(sample, now, trace)
            optimiser.zero_grad()
            (logits / options.tau).softmax(-1).backward(slope)
            assert logits.grad is not None
            logits.grad[:position] = 0
            if options.optimize_positions == "first":
                logits.grad[position + 1 :] = 0
            optimiser.param_groups[0]["lr"] = options.compute_learning_rate(step)
            optimiser.step()
        return logits.detach()

    def compute_gradient(self, sample: Sample, tokens_T: Tensor, trace: PlainTrace) -> Tensor:
        """[T, V] ∂L/∂Y of L = −λ·r − log π at hard tokens."""
        trace.num_gradients += 1
        rows = self.make_one_hot(tokens_T).requires_grad_(True)
        placed = Sample(sample.problem, sample.prompt_ids, tokens_T.tolist())
        loss = -self.likelihood.compute_value(
            placed,
            rows,
            self.flop_counter,
            likelihood_token_grad=self.solver.likelihood_token_grad,
            likelihood_suffix_grad=self.solver.likelihood_suffix_grad,
        )
        for term in self.objectives:
            loss = loss - self.config.reward_weight * term.objective.weight * term.compute_value(
                placed, rows, self.flop_counter
            )
        return torch.autograd.grad(loss, rows)[0].float().cpu()

    def make_one_hot(self, tokens: Tensor) -> Tensor:
        rows = torch.nn.functional.one_hot(tokens, len(self.policy.forbidden_mask))
        return rows.to(self.policy.device, self.policy.model.dtype)


def has_same_decisions(trace: Trace, plain: PlainTrace) -> bool:
    """Whether an engine's trace and a plain one took the same revisions and ended at the same response."""
    return list_decisions(trace) == plain.decisions and trace.response_ids == plain.response_ids


def list_differing_problems(traces: Sequence[Trace], plain: Sequence[PlainTrace]) -> list[str]:
    """Ids of the problems on which the two searches decided differently."""
    return [one.problem_id for one, other in zip(traces, plain, strict=True) if not has_same_decisions(one, other)]
