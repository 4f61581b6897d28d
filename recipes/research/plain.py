"""A plain implementation of the published search, with which `bench.py` compares the engine.

It refines one problem at a time. The response is a matrix [T, V] of one-hot rows that enter policy and reward through
their input embeddings, and autograd differentiates the whole sequence. No prefix is kept between calls. The gradient
is computed at every position that is scanned, and again at every inner step at which a token has changed. The
algorithm is that of the paper (arXiv 2603.04948) and its released research code. The implementation is new.

It makes the engine's decisions with the same random streams, so that the two differ in work alone. Where the engine
and the released code differ, this module follows the engine:

- A position holds the incumbent's token until the argmax of its logits moves. In the released code it holds the argmax
  from the start.
- A position chooses among the policy's K candidates. All other logits [T, V] are −inf.
- Incumbent and proposal are scored in the same way, with the prompt once.

Its FLOPs are those of its own work: whole sequences, the output head at every position, forward and backward products
of one-hot rows with the embedding table, and both scores of every decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import Objective, Sample
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.models.flops import FlopCounter, ModelSize
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import SequentialProposals, SteSolver
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# Options of which this search supports the preset's value only.
PAPER_OPTIONS = ("acceptance", "num_starts", "num_chains", "max_rounds", "max_flops", "restarts", "patience")
PAPER_SOLVER_OPTIONS = ("hard_tokens", "repeat_turn_end")
PAPER_SCAN_OPTIONS = ("min_gradient_norm", "resample_top_p")
ONE_HOT_ACCOUNT = "/one-hot"  # suffix of a problem's id for the FLOPs of products with embedding tables

# position, old token, new token, new token with its suffix, is it accepted
Decision = tuple[int, int, int, tuple[int, ...], bool]


@dataclass
class PlainTrace:
    """The decisions of a plain search, and how often it computed a gradient."""

    response_ids: list[int]
    reward: float
    decisions: list[Decision] = field(default_factory=list)
    num_gradients: int = 0


def list_decisions(trace: Trace) -> list[Decision]:
    """Return the decisions of an engine's trace in the form of a plain search."""
    return [
        (revision.position, revision.old_token, revision.new_token, revision.suffix, revision.accepted)
        for revision in trace.revisions
    ]


@dataclass
class PlainObjective:
    """An objective with one-hot rows over the policy's vocabulary as input."""

    objective: Objective

    @cached_property
    def embedding_table(self) -> Tensor:
        """[V, d] this model's embedding of every policy token. Missing tokens have zeros."""
        ids = self.objective.vocab_map
        return self.objective.embed_ids(ids.clamp(min=0)) * (ids >= 0)[:, None]

    @cached_property
    def one_hot_matmul_size(self) -> ModelSize:
        """Size of the product of one-hot rows and the table, in the form of an output head."""
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
        """Return the objective of one-hot rows [T, V], by one forward pass of the whole sequence."""
        encoded = self.objective.encode(sample)
        count, begin = len(encoded.response_ids), len(encoded.prompt_ids)
        one_hot_TV = one_hot_TV[:count]
        output_rows = one_hot_TV if likelihood_token_grad else one_hot_TV.detach()
        input_rows = one_hot_TV if likelihood_suffix_grad else one_hot_TV.detach()
        before, after = (
            self.objective.embed_ids(torch.tensor(ids, dtype=torch.long, device=one_hot_TV.device))
            for ids in (encoded.prompt_ids, encoded.turn_end_ids)
        )
        embeds = torch.cat((before, input_rows @ self.embedding_table, after))[None]
        for kind in ("forward", "backward") if one_hot_TV.requires_grad else ("forward",):
            flop_counter.add_flops(sample.cost_key, self.objective.model_size, kind, 0, embeds.shape[1])
            account, size = sample.cost_key + ONE_HOT_ACCOUNT, self.one_hot_matmul_size
            flop_counter.add_flops(account, size, kind, 0, 0, num_head_positions=count)
        model = self.objective.model
        if isinstance(self.objective, ScoreObjective):
            return model.score(model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]).squeeze(-1)
        logits = model(inputs_embeds=embeds).logits[0, begin - 1 : begin - 1 + count]
        mapped = logits.log_softmax(-1)[:, self.objective.vocab_map.clamp(min=0)]
        return (output_rows * mapped).sum()


class PlainSearch:
    """A sequential scan with solver ste, one problem at a time.

    Raises:
        ValueError: if the options are not those of the preset paper.
    """

    def __init__(self, policy: Policy, reward: Reward, config: SearchConfig, seed: int = 0):
        paper, solver, scan = SearchConfig.from_preset("paper"), config.solver, config.proposals
        if not isinstance(solver, SteSolver) or not isinstance(scan, SequentialProposals):
            raise ValueError("the plain search supports the preset paper only: solver ste and sequential proposals")
        changed = [name for name in PAPER_OPTIONS if getattr(config, name) != getattr(paper, name)]
        changed += [name for name in PAPER_SOLVER_OPTIONS if getattr(solver, name) != getattr(paper.solver, name)]
        changed += [name for name in PAPER_SCAN_OPTIONS if getattr(scan, name) != getattr(paper.proposals, name)]
        if changed or reward.uncertainty_penalty is not None:
            raise ValueError(
                f"the plain search supports the preset paper only, not other {', '.join(changed) or 'rewards'}"
            )
        self.policy, self.reward, self.config, self.seed = policy, reward, config, seed
        self.solver, self.scan = solver, scan
        self.flop_counter = FlopCounter()
        self.likelihood = PlainObjective(policy_likelihood(policy))
        self.objectives = [PlainObjective(objective) for objective in reward.objectives]

    def solve(self, problem: Problem) -> PlainTrace:
        """Refine the response to one problem."""
        prompt = self.policy.encode(problem)
        max_new_tokens = min(
            self.config.max_new_tokens,
            self.policy.context_length - len(prompt),
            self.reward.compute_max_new_tokens(problem, prompt),
        )
        with self.flop_counter.measure_seconds([problem.id]):
            draft = self.draw_continuation(problem, prompt, max_new_tokens, 0)
            trace = PlainTrace(draft.ids, self.score_response(Sample(problem, prompt, draft.ids)))
            candidates, logp, position = draft.candidates, draft.logp, 0
            rng = make_rng(self.seed, problem.id, "resample", 0)
            while position < len(trace.response_ids) and 1 + len(trace.decisions) < self.config.max_rollouts:
                current, position = position, position + 1
                sample = Sample(problem, prompt, trace.response_ids)
                token = self.resample_token(sample, candidates, logp, current, rng, trace)
                if token == trace.response_ids[current]:
                    continue
                response = [*trace.response_ids[:current], token]
                tables = candidates[: current + 1], logp[: current + 1]
                if token not in self.policy.stop_ids and len(response) < max_new_tokens:
                    draft = self.draw_continuation(
                        problem, prompt + response, max_new_tokens - len(response), 1 + len(trace.decisions)
                    )
                    tables = torch.cat((tables[0], draft.candidates)), torch.cat((tables[1], draft.logp))
                    response = response + draft.ids
                proposal_reward = self.score_response(Sample(problem, prompt, response))
                accepted = proposal_reward > self.score_response(sample)
                old_token = trace.response_ids[current]
                trace.decisions.append((current, old_token, token, tuple(response[current:]), accepted))
                if accepted:
                    (candidates, logp), trace.response_ids, trace.reward = tables, response, proposal_reward
                rng = make_rng(self.seed, problem.id, "resample", len(trace.decisions))
        return trace

    def compute_flops(self, problem_id: str, include_one_hot: bool = True) -> float:
        """Return the FLOPs of a problem, with or without the products of one-hot rows and embedding tables."""
        flops = self.flop_counter.get_cost(problem_id).flops
        one_hot_flops = self.flop_counter.get_cost(problem_id + ONE_HOT_ACCOUNT).flops
        return flops + include_one_hot * one_hot_flops

    def draw_continuation(
        self, problem: Problem, prefix: list[int], max_new_tokens: int, draw_index: int
    ) -> GenerationOutput:
        """Generate a continuation. The policy computes the whole prefix again."""
        rng = make_rng(self.seed, problem.id, "suffix", draw_index)
        [output] = generate_continuations(
            self.policy,
            [GenerationRequest(problem.id, prefix, rng, max_new_tokens)],
            self.config.get_sampling(),
            flop_counter=self.flop_counter,
            top_k_candidates=self.config.top_k_candidates,
        )
        return output

    @torch.no_grad()
    def score_response(self, sample: Sample) -> float:
        """Return the reward of a response."""
        rows = self.make_one_hot(torch.tensor(sample.response_ids))
        return sum(
            objective.objective.weight * float(objective.compute_value(sample, rows, self.flop_counter))
            for objective in self.objectives
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
        """Draw the token of a position after optimization. Keep the incumbent's token if the policy is confident."""
        current_token, logp = sample.response_ids[position], candidate_logp[position]
        if float(logp.max().exp()) > self.scan.confidence:
            return current_token
        logits = self.optimize_logits(sample, candidates, candidate_logp, position, trace)[position]
        table = candidates[position]
        usable = self.reward.in_vocabulary[table] & logp.isfinite()
        if self.config.candidate_min_p:
            usable &= logp >= logp.max() + float(np.log(self.config.candidate_min_p))
        row = logits[table].masked_fill(~(usable | (table == current_token)), -torch.inf)
        row = row / self.scan.resample_temperature
        mass = row.softmax(-1, dtype=torch.float64).cumsum(-1)
        return int(table[int((mass <= rng.random() * mass[-1]).sum())])

    def optimize_logits(
        self, sample: Sample, candidates: Tensor, candidate_logp: Tensor, position: int, trace: PlainTrace
    ) -> Tensor:
        """Return the logits [T, V] after Adam steps from a position on.

        The forward pass uses hard tokens, and the gradient goes back through softmax(z / τ).
        """
        tokens, options = torch.tensor(sample.response_ids), self.solver
        usable = self.reward.in_vocabulary[candidates] | (candidates == tokens[:, None])
        initial = torch.full((len(tokens), len(self.policy.forbidden_mask)), -torch.inf)
        initial.scatter_(1, candidates, candidate_logp.masked_fill(~usable, -torch.inf))
        logits = initial.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([logits], lr=options.learning_rate)
        initial_argmax, hard_tokens = initial.argmax(-1), tokens
        has_moved = torch.zeros(len(tokens), dtype=torch.bool)
        gradient = self.compute_gradient(sample, hard_tokens, trace)
        for step in range(options.steps):
            if step:
                argmax = logits.detach().argmax(-1)
                has_moved |= argmax != initial_argmax
                new_tokens = torch.where(has_moved, argmax, tokens)
                if not torch.equal(new_tokens, hard_tokens):
                    hard_tokens, gradient = new_tokens, self.compute_gradient(sample, new_tokens, trace)
            optimizer.zero_grad()
            (logits / options.tau).softmax(-1).backward(gradient)
            assert logits.grad is not None
            logits.grad[:position] = 0
            if options.optimize_positions == "first":
                logits.grad[position + 1 :] = 0
            optimizer.param_groups[0]["lr"] = options.compute_learning_rate(step)
            optimizer.step()
        return logits.detach()

    def compute_gradient(self, sample: Sample, tokens_T: Tensor, trace: PlainTrace) -> Tensor:
        """Return the gradient [T, V] of L = −λ·r − log π with respect to one-hot rows, at hard tokens."""
        trace.num_gradients += 1
        rows = self.make_one_hot(tokens_T).requires_grad_(True)
        hard_sample = Sample(sample.problem, sample.prompt_ids, tokens_T.tolist())
        loss = -self.likelihood.compute_value(
            hard_sample,
            rows,
            self.flop_counter,
            likelihood_token_grad=self.solver.likelihood_token_grad,
            likelihood_suffix_grad=self.solver.likelihood_suffix_grad,
        )
        for objective in self.objectives:
            weight = self.config.reward_weight * objective.objective.weight
            loss = loss - weight * objective.compute_value(hard_sample, rows, self.flop_counter)
        return torch.autograd.grad(loss, rows)[0].float().cpu()

    def make_one_hot(self, tokens: Tensor) -> Tensor:
        """Return tokens [T] as rows [T, V] in the policy's data type."""
        rows = torch.nn.functional.one_hot(tokens, len(self.policy.forbidden_mask))
        return rows.to(self.policy.device, self.policy.model.dtype)


def list_differing_problems(traces: Sequence[Trace], plain_traces: Sequence[PlainTrace]) -> list[str]:
    """Return the ids of the problems on which the two searches made other decisions or ended at other responses."""
    return [
        trace.problem_id
        for trace, plain in zip(traces, plain_traces, strict=True)
        if (list_decisions(trace), trace.response_ids) != (plain.decisions, plain.response_ids)
    ]
