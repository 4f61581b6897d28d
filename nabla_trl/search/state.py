"""The state of one problem's search: a prompt, a response with what is known of it, and how the search goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import Known, Memo, Sample
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import Draft
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Revision


@dataclass(frozen=True)
class Prompt:
    """A problem as policy and reward read it.

    Attributes:
        room: most tokens of a response, by the configuration and the contexts of policy and reward.
        memos: the reward's memory of the bare prompt.
    """

    problem: Problem
    ids: list[int]
    room: int
    memos: list[Memo]


@dataclass
class State:
    """A response of T tokens and what is known of it. All of it depends on the tokens alone.

    Attributes:
        candidates, logp: [T, K] the policy's candidates along the response and their log π.
        tilt: [T, K] log π less the sampler's log-probability of the candidates; None where the sampler is π.
        cache: kv row of prompt and response (all but the last token) in the policy.
        memos: the reward's memory of the response.
        gradient: [T, K] ∂r/∂Y at the candidates; None until asked for.
        slopes: [T, K] ∂L/∂Y that solver ste has asked for, by the tokens it put in place of the response's.
        scores: [T, K] proposal scores of the solver; None until asked for.
        stale: [T] bool, rows of `scores` that a scan has to work out again; None: none.
    """

    prompt: Prompt
    response: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    tilt: Tensor | None
    cache: Tensor
    memos: list[Memo]
    reward: float
    gradient: Tensor | None = None
    slopes: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    stale: Tensor | None = None

    @property
    def problem(self) -> Problem:
        return self.prompt.problem

    def choice(self) -> Tensor:
        """[T] column of each response token among the candidates."""
        own = torch.tensor(self.response)[:, None]
        return (self.candidates == own).int().argmax(-1)

    def solved(self) -> Tensor:
        """The scores, once the solver has run."""
        if self.scores is None:
            raise RuntimeError(f"{self.problem.id}: proposals were asked for before the solver ran")
        return self.scores

    def sample(self, response: list[int] | None = None) -> Sample:
        return Sample(self.problem, self.prompt.ids, self.response if response is None else response)

    def drawn(self, model: PreTrainedModel) -> Sample:
        """The response with what `model`, the policy, showed when it was drawn."""
        return replace(self.sample(), known=Known(model, self.candidates, self.logp))


@dataclass
class Chain:
    """One walk over responses; a problem may have several.

    Attributes:
        index: which of the problem's chains; each has randomness of its own.
        state: the incumbent. `initial` is the first one.
        beta: KL coefficient of this chain; None: set by a KL budget.
        tried: (position, token) branches rejected from this incumbent.
        position: where the sequential scan stands; `sweeps`: how often it has come to the end (Metropolis alone).
        rollouts: responses drawn, the first one aside.
        idle: rounds since the last acceptance.
        moves: how often another incumbent was taken.
        pull: per incumbent whose gradient was taken, what that promised at each position (see `traces.Trace`).
    """

    state: State
    initial: State
    index: int = 0
    beta: float | None = 1.0
    tried: set[tuple[int, int]] = field(default_factory=set)
    position: int = 0
    sweeps: int = 0
    rounds: int = 0
    rollouts: int = 0
    idle: int = 0
    moves: int = 0
    pull: list[list[float]] = field(default_factory=list)
    revisions: list[Revision] = field(default_factory=list)
    stop: str = ""
    error: str | None = None

    @property
    def problem(self) -> Problem:
        return self.state.problem

    def move(self, state: State) -> None:
        """Take another incumbent."""
        self.state, self.tried, self.idle, self.moves = state, set(), 0, self.moves + 1


@dataclass
class Proposal:
    """A branch: another token at one position of the incumbent, then a regenerated suffix. Or a response drawn anew.

    Attributes:
        given: the incumbent's tokens before the branch, and the branch's; empty: all is drawn anew.
        draft: what was drawn after them, if anything was.
    """

    chain: Chain
    given: list[int]
    draft: Draft | None = None

    @property
    def position(self) -> int:
        """How many of the incumbent's tokens are kept."""
        return max(0, len(self.given) - 1)

    @property
    def response(self) -> list[int]:
        return self.given if self.draft is None else self.given + self.draft.ids

    def finished(self, policy: Policy) -> bool:
        return policy.over(self.response, policy.stops(self.chain.problem))

    def cache(self) -> Tensor:
        """kv row of the prompt and the given tokens, all but the last of them."""
        state = self.chain.state
        return state.cache[:, :, :, : len(state.prompt.ids) + len(self.given) - 1]

    def state(self, policy: Policy) -> State:
        """Where it leads to, not scored yet: what is known of the incumbent at the given tokens, then of the draft.

        Its memos are the incumbent's, of which the first `position` tokens are its own.
        """
        old, draft, end = self.chain.state, self.draft, len(self.given)
        candidates, logp, tilt = old.candidates[:end], old.logp[:end], None if old.tilt is None else old.tilt[:end]
        if draft is not None:
            candidates, logp = torch.cat((candidates, draft.candidates)), torch.cat((logp, draft.logp))
            tilt = None if tilt is None else torch.cat((tilt, draft.tilted()))
        cache = self.cache() if draft is None else draft.kept()
        finished = self.finished(policy)
        return State(old.prompt, self.response, finished, candidates, logp, tilt, cache, old.memos, math.nan)
