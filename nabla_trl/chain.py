"""The state of one problem's search."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.generate import Draft
from nabla_trl.tasks import Problem
from nabla_trl.terms import Known, Memo, Sample
from nabla_trl.traces import Revision


@dataclass
class Chain:
    """One problem's search: the incumbent response and what is known about it.

    Attributes:
        room: most tokens of a response, by the configuration and the contexts of policy and reward.
        candidates, logp: [T, K] the policy's candidates along the incumbent and their log π.
        cache: kv row of prompt and incumbent (all but the last token) in the policy.
        memos: the reward's memory of the incumbent; `prompt_memos` of the bare prompt.
        scores: [T, K] proposal scores of the solver; None until asked for.
        tried: (position, token) branches rejected from this incumbent.
        position: where the sequential scan stands.
    """

    problem: Problem
    prompt: list[int]
    room: int
    response: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    cache: Tensor
    prompt_memos: list[Memo]
    memos: list[Memo]
    reward: float
    initial: list[int]
    initial_reward: float
    scores: Tensor | None = None
    tried: set[tuple[int, int]] = field(default_factory=set)
    position: int = 0
    rounds: int = 0
    rollouts: int = 1
    idle: int = 0
    revisions: list[Revision] = field(default_factory=list)
    stop: str = ""
    error: str | None = None

    def choice(self) -> Tensor:
        """[T] column of each incumbent token among the candidates."""
        own = torch.tensor(self.response)[:, None]
        return (self.candidates == own).int().argmax(-1)

    def solved(self) -> Tensor:
        """The scores, once the solver has run."""
        if self.scores is None:
            raise RuntimeError(f"{self.problem.id}: proposals were asked for before the solver ran")
        return self.scores

    def sample(self, response: list[int] | None = None) -> Sample:
        return Sample(self.problem, self.prompt, self.response if response is None else response)

    def drawn(self, model: PreTrainedModel) -> Sample:
        """The incumbent with what `model`, the policy, showed when it was drawn."""
        return replace(self.sample(), known=Known(model, self.candidates, self.logp))


@dataclass
class Proposal:
    """A branch: `token` at `position`, then a regenerated suffix."""

    chain: Chain
    position: int
    token: int
    response: list[int]
    draft: Draft | None = None

    def finished(self, stops: frozenset[int]) -> bool:
        return self.response[-1] in stops

    def tables(self) -> tuple[Tensor, Tensor]:
        """[T, K] candidates along the proposal and their log π: the incumbent's up to the branch, then the draft's."""
        end = self.position + 1
        candidates, logp = self.chain.candidates[:end], self.chain.logp[:end]
        if self.draft is None:
            return candidates, logp
        return torch.cat((candidates, self.draft.candidates)), torch.cat((logp, self.draft.logp))

    def drawn(self, model: PreTrainedModel) -> Sample:
        """The proposal with what `model`, the policy, showed when it was drawn."""
        return replace(self.chain.sample(self.response), known=Known(model, *self.tables()))
