"""The state of one problem's search: a prompt, a response with what is known of it, and how the search goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.models.generation import find_token_columns
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Revision


@dataclass(frozen=True)
class EncodedPrompt:
    """A problem as policy and reward read it.

    Attributes:
        room: most tokens of a response, by the configuration and the contexts of policy and reward.
        memos: the reward's memory of the bare prompt.
    """

    problem: Problem
    ids: list[int]
    max_new_tokens: int
    score_caches: list[ScoreCache]


@dataclass
class ScoredResponse:
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

    prompt: EncodedPrompt
    response_ids: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    log_importance_weight: Tensor | None
    policy_cache: Tensor
    score_caches: list[ScoreCache]
    reward: float
    reward_gradient: Tensor | None = None
    loss_gradients: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    proposal_scores: Tensor | None = None
    stale_mask: Tensor | None = None

    @property
    def problem(self) -> Problem:
        return self.prompt.problem

    def find_response_columns(self) -> Tensor:
        """[T] column of each response token among the candidates."""
        return find_token_columns(self.candidates, self.response_ids)

    def get_proposal_scores(self) -> Tensor:
        """The scores, once the solver has run."""
        if self.proposal_scores is None:
            raise RuntimeError(f"{self.problem.id}: proposals were asked for before the solver ran")
        return self.proposal_scores

    def make_sample(self, response_ids: list[int] | None = None) -> Sample:
        return Sample(self.problem, self.prompt.ids, self.response_ids if response_ids is None else response_ids)

    def make_sample_with_draw_info(self, model: PreTrainedModel) -> Sample:
        """The response with what `model`, the policy, showed when it was drawn."""
        return replace(self.make_sample(), draw_info=DrawInfo(model, self.candidates, self.logp))


@dataclass
class SearchState:
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

    incumbent: ScoredResponse
    initial: ScoredResponse
    index: int = 0
    beta: float | None = 1.0
    rejected_branches: set[tuple[int, int]] = field(default_factory=set)
    scan_position: int = 0
    num_sweeps: int = 0
    num_rounds: int = 0
    num_rollouts: int = 0
    rounds_since_acceptance: int = 0
    num_accepted: int = 0
    predicted_gain: list[list[float]] = field(default_factory=list)
    revisions: list[Revision] = field(default_factory=list)
    stop_reason: str = ""
    error: str | None = None

    @property
    def problem(self) -> Problem:
        return self.incumbent.problem

    def replace_incumbent(self, response: ScoredResponse) -> None:
        """Take another incumbent."""
        self.incumbent, self.rejected_branches, self.rounds_since_acceptance, self.num_accepted = (
            response,
            set(),
            0,
            self.num_accepted + 1,
        )


@dataclass
class Proposal:
    """A branch: another token at one position of the incumbent, then a regenerated suffix. Or a response drawn anew.

    Attributes:
        given: the incumbent's tokens before the branch, and the branch's; empty: all is drawn anew.
        draft: what was drawn after them, if anything was.
    """

    chain: SearchState
    prefix_ids: list[int]
    generation: GenerationOutput | None = None

    @property
    def position(self) -> int:
        """How many of the incumbent's tokens are kept."""
        return max(0, len(self.prefix_ids) - 1)

    @property
    def response_ids(self) -> list[int]:
        return self.prefix_ids if self.generation is None else self.prefix_ids + self.generation.ids

    def is_finished(self, policy: Policy) -> bool:
        return policy.is_finished(self.response_ids, policy.get_stop_strings(self.chain.problem))

    def get_prefix_cache(self) -> Tensor:
        """kv row of the prompt and the given tokens, all but the last of them."""
        state = self.chain.incumbent
        return state.policy_cache[:, :, :, : len(state.prompt.ids) + len(self.prefix_ids) - 1]

    def to_scored_response(self, policy: Policy) -> ScoredResponse:
        """Where it leads to, not scored yet: what is known of the incumbent at the given tokens, then of the draft.

        Its memos are the incumbent's, of which the first `position` tokens are its own.
        """
        old, draft, end = self.chain.incumbent, self.generation, len(self.prefix_ids)
        candidates, logp, tilt = (
            old.candidates[:end],
            old.logp[:end],
            None if old.log_importance_weight is None else old.log_importance_weight[:end],
        )
        if draft is not None:
            candidates, logp = torch.cat((candidates, draft.candidates)), torch.cat((logp, draft.logp))
            tilt = None if tilt is None else torch.cat((tilt, draft.get_log_importance_weight()))
        cache = self.get_prefix_cache() if draft is None else draft.get_cache()
        finished = self.is_finished(policy)
        return ScoredResponse(
            old.prompt, self.response_ids, finished, candidates, logp, tilt, cache, old.score_caches, math.nan
        )
