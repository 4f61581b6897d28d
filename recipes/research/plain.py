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

from nabla_trl.gradient.objectives import Sample, Term
from nabla_trl.gradient.score import ScoreTerm
from nabla_trl.models.flops import Meter, ModelSize
from nabla_trl.models.generation import generate, random_stream
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import Draft, Job
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.proposals import policy_likelihood
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

# Options that this search does not read, or knows one value of.
LIKE_PAPER = (
    *("solver", "proposals", "acceptance", "starts", "chains", "branches", "rounds", "flops", "restart", "patience"),
    *("gradient_norm", "resample_top_p"),
)
ONEHOT = "/one-hot"  # after a problem's id, the account of the products with embedding tables

# position, old token, new token, the new token and what follows it, accepted
Move = tuple[int, int, int, tuple[int, ...], bool]


@dataclass
class PlainTrace:
    """What a plain search decided, and how often it computed a gradient."""

    response: list[int]
    reward: float
    moves: list[Move] = field(default_factory=list)
    gradients: int = 0


def moves(trace: Trace) -> list[Move]:
    """The decisions of an engine's trace, as a plain search lists them."""
    return [(one.position, one.old, one.new, one.suffix, one.accepted) for one in trace.revisions]


@dataclass
class PlainTerm:
    """A term read through one-hot rows over the policy's vocabulary."""

    term: Term

    @cached_property
    def table(self) -> Tensor:
        """[V, d] this model's embedding of every policy token; 0 for those it lacks."""
        ids = self.term.mapping
        return self.term.embed(ids.clamp(min=0)) * (ids >= 0)[:, None]

    @cached_property
    def product(self) -> ModelSize:
        """The product of one-hot rows and the table, as if it were an output head."""
        return ModelSize(f"{self.term.size.name}-onehot", 0, 0, 0, self.table.numel())

    def value(
        self, sample: Sample, rows: Tensor, meter: Meter, *, direct: bool = True, postfix: bool = True
    ) -> Tensor:
        """The term at one-hot rows [T, V]; one whole forward."""
        encoded = self.term.encode(sample)
        count, begin = len(encoded.response), len(encoded.prompt)
        rows = rows[:count]
        picked, fed = rows if direct else rows.detach(), rows if postfix else rows.detach()
        before, after = (self._embed(ids, rows.device) for ids in (encoded.prompt, encoded.tail))
        embeds = torch.cat((before, fed @ self.table, after))[None]
        self._charge(sample, embeds.shape[1], count, rows.requires_grad, meter)
        model = self.term.model
        if isinstance(self.term, ScoreTerm):
            return model.score(model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]).squeeze(-1)
        logits = model(inputs_embeds=embeds).logits[0, begin - 1 : begin - 1 + count]
        mapped = logits.log_softmax(-1)[:, self.term.mapping.clamp(min=0)]
        return (picked * mapped).sum()

    def _embed(self, ids: list[int], device: torch.device) -> Tensor:
        return self.term.embed(torch.tensor(ids, dtype=torch.long, device=device))

    def _charge(self, sample: Sample, length: int, count: int, back: bool, meter: Meter) -> None:
        for kind in ("forward", "backward") if back else ("forward",):
            meter.charge(sample.key, self.term.size, kind, 0, length)
            meter.charge(sample.key + ONEHOT, self.product, kind, 0, 0, head=count)


class PlainSearch:
    """The sequential scan with solver ste, one problem at a time.

    Raises:
        ValueError: another algorithm than the preset paper's.
    """

    def __init__(self, policy: Policy, reward: Reward, config: ReasonerConfig, seed: int = 0):
        paper = ReasonerConfig.preset("paper")
        odd = [name for name in LIKE_PAPER if getattr(config, name) != getattr(paper, name)]
        if odd or reward.caution is not None:
            raise ValueError(
                f"the plain way is written for the preset paper, not for other {', '.join(odd) or 'rewards'}"
            )
        self.policy, self.reward, self.config, self.seed = policy, reward, config, seed
        self.meter = Meter()
        self.likelihood = PlainTerm(policy_likelihood(policy))
        self.terms = [PlainTerm(term) for term in reward.terms]

    def solve(self, problem: Problem) -> PlainTrace:
        prompt = self.policy.encode(problem)
        room = min(self.config.max_new_tokens, self.policy.context - len(prompt), self.reward.room(problem, prompt))
        with self.meter.clock([problem.id]):
            draft = self.draw(problem, prompt, room, 0)
            trace = PlainTrace(draft.ids, self.score(Sample(problem, prompt, draft.ids)))
            candidates, logp, position = draft.candidates, draft.logp, 0
            stream = random_stream(self.seed, problem.id, "resample", 0)
            while position < len(trace.response) and 1 + len(trace.moves) < self.config.rollouts:
                at, position = position, position + 1
                sample = Sample(problem, prompt, trace.response)
                token = self.resample(sample, candidates, logp, at, stream, trace)
                if token == trace.response[at]:
                    continue
                response, tables = [*trace.response[:at], token], (candidates[: at + 1], logp[: at + 1])
                if token not in self.policy.stop_ids and len(response) < room:
                    draft = self.draw(problem, prompt + response, room - len(response), 1 + len(trace.moves))
                    tables = torch.cat((tables[0], draft.candidates)), torch.cat((tables[1], draft.logp))
                    response = response + draft.ids
                proposed, standing = self.score(Sample(problem, prompt, response)), self.score(sample)
                accepted = proposed > standing
                trace.moves.append((at, trace.response[at], token, tuple(response[at:]), accepted))
                if accepted:
                    (candidates, logp), trace.response, trace.reward = tables, response, proposed
                stream = random_stream(self.seed, problem.id, "resample", len(trace.moves))
        return trace

    def flops(self, problem_id: str, onehot: bool = True) -> float:
        """What a problem has cost, with or without the products of one-hot rows and embedding tables."""
        return self.meter.cost(problem_id).flops + onehot * self.meter.cost(problem_id + ONEHOT).flops

    def draw(self, problem: Problem, prefix: list[int], limit: int, number: int) -> Draft:
        """A continuation; its prefix is run through the policy again."""
        job = Job(problem.id, prefix, random_stream(self.seed, problem.id, "suffix", number), limit)
        [draft] = generate(
            self.policy, [job], self.config.sampling(), meter=self.meter, candidates=self.config.candidates
        )
        return draft

    @torch.no_grad()
    def score(self, sample: Sample) -> float:
        rows = self.one_hot(torch.tensor(sample.response))
        return sum(term.term.weight * float(term.value(sample, rows, self.meter)) for term in self.terms)

    def resample(
        self, sample: Sample, candidates: Tensor, logp: Tensor, at: int, stream: np.random.Generator, trace: PlainTrace
    ) -> int:
        """The token drawn at a position after optimisation; the incumbent's own where the policy is confident."""
        own, scan = sample.response[at], self.config.scan()
        if float(logp[at].max().exp()) > scan.confidence:
            return own
        logits = self.optimise(sample, candidates, logp, at, trace)[at]
        table = candidates[at]
        usable = self.reward.readable[table] & logp[at].isfinite()
        if self.config.candidate_min_p:
            usable &= logp[at] >= logp[at].max() + float(np.log(self.config.candidate_min_p))
        row = logits[table].masked_fill(~(usable | (table == own)), -torch.inf) / scan.resample_temperature
        mass = row.softmax(-1, dtype=torch.float64).cumsum(-1)
        return int(table[int((mass <= stream.random() * mass[-1]).sum())])

    def optimise(self, sample: Sample, candidates: Tensor, logp: Tensor, at: int, trace: PlainTrace) -> Tensor:
        """Adam on the T × V logits from a position on (`moving`): a hard forward, a backward through softmax(z/τ)."""
        own, options = torch.tensor(sample.response), self.config.ste()
        placeable = self.reward.readable[candidates] | (candidates == own[:, None])
        start = torch.full((len(own), len(self.policy.forbidden)), -torch.inf)
        start.scatter_(1, candidates, logp.masked_fill(~placeable, -torch.inf))
        logits = start.clone().requires_grad_(True)
        optimiser = torch.optim.Adam([logits], lr=options.lr)
        first, hard = start.argmax(-1), own
        left = torch.zeros(len(own), dtype=torch.bool)
        slope = self.slope(sample, hard, trace)
        for step in range(options.steps):
            if step:
                best = logits.detach().argmax(-1)
                left |= best != first
                now = torch.where(left, best, own)
                if not torch.equal(now, hard):
                    hard, slope = now, self.slope(sample, now, trace)
            optimiser.zero_grad()
            (logits / options.tau).softmax(-1).backward(slope)
            assert logits.grad is not None
            logits.grad[:at] = 0
            if self.config.moving == "first":
                logits.grad[at + 1 :] = 0
            optimiser.param_groups[0]["lr"] = options.rate(step)
            optimiser.step()
        return logits.detach()

    def slope(self, sample: Sample, hard: Tensor, trace: PlainTrace) -> Tensor:
        """[T, V] ∂L/∂Y of L = −λ·r − log π at hard tokens."""
        trace.gradients += 1
        rows = self.one_hot(hard).requires_grad_(True)
        placed = Sample(sample.problem, sample.prompt, hard.tolist())
        loss = -self.likelihood.value(
            placed, rows, self.meter, direct=bool(self.config.direct), postfix=bool(self.config.postfix)
        )
        for term in self.terms:
            loss = loss - self.config.lam * term.term.weight * term.value(placed, rows, self.meter)
        return torch.autograd.grad(loss, rows)[0].float().cpu()

    def one_hot(self, tokens: Tensor) -> Tensor:
        rows = torch.nn.functional.one_hot(tokens, len(self.policy.forbidden))
        return rows.to(self.policy.device, self.policy.model.dtype)


def same_decisions(trace: Trace, plain: PlainTrace) -> bool:
    """Whether an engine's trace and a plain one took the same revisions and ended at the same response."""
    return moves(trace) == plain.moves and trace.response_ids == plain.response


def differing(traces: Sequence[Trace], plain: Sequence[PlainTrace]) -> list[str]:
    """Ids of the problems on which the two searches decided differently."""
    return [one.problem_id for one, other in zip(traces, plain, strict=True) if not same_decisions(one, other)]
