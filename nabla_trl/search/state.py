"""The state of a search: an encoded prompt, a scored response, a chain of responses, and a proposal."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.models.policy import GenerationOutput, Policy
from nabla_trl.models.sampling import find_token_columns
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Revision


@dataclass(frozen=True)
class EncodedPrompt:
    """A problem in the policy's ids.

    Attributes:
        max_new_tokens: maximum length of a response, by the configuration and the contexts of policy and reward.
        score_caches: of the prompt alone, one per objective of the reward.
    """

    problem: Problem
    ids: list[int]
    max_new_tokens: int
    score_caches: list[ScoreCache]


@dataclass
class ScoredResponse:
    """A response of T tokens and what has been computed for it. All of it depends on the tokens alone.

    Attributes:
        finished: the response ends with a stop token or a stop string.
        candidates: [T, K] the policy's candidates at each position, the response's own token among them.
        logp: [T, K] log π of the candidates, in nats.
        log_importance_weight: [T, K] log π − log q of the candidates for the sampler q. None: q is π.
        policy_cache: state of prompt and response (all but the last token) in the policy.
        hidden_states: [T, d] the policy's last hidden states that predicted the tokens. None: the reward reads none.
        score_caches: one per objective of the reward. Not scored yet: of a response that shares its beginning.
        reward: r(x, y). Not scored yet: NaN.
        reward_gradient: [T, K] ∂r/∂Y at the candidates. None: not computed yet.
        loss_gradients: [T, K] ∂L/∂Y that solver ste has computed, by the hard tokens at which it was taken.
        proposal_scores: [T, K] scores of the solver. None: not computed yet.
        stale_mask: [T] bool, rows of `proposal_scores` that a scan has to compute again. None: no row.
    """

    prompt: EncodedPrompt
    response_ids: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    log_importance_weight: Tensor | None
    policy_cache: PrefixState
    score_caches: list[ScoreCache]
    reward: float
    reward_gradient: Tensor | None = None
    loss_gradients: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    proposal_scores: Tensor | None = None
    stale_mask: Tensor | None = None
    hidden_states: Tensor | None = None

    @property
    def problem(self) -> Problem:
        return self.prompt.problem

    def find_response_columns(self) -> Tensor:
        """Return the column [T] of each response token among the candidates."""
        return find_token_columns(self.candidates, self.response_ids)

    def get_proposal_scores(self) -> Tensor:
        """Return the scores [T, K] of the solver.

        Raises:
            RuntimeError: the solver has not run yet.
        """
        if self.proposal_scores is None:
            raise RuntimeError(f"{self.problem.id}: run the solver before making proposals")
        return self.proposal_scores

    def drop_caches(self) -> None:
        """Free the memory that only a search which goes on from this response needs."""
        self.policy_cache, self.score_caches, self.hidden_states = PrefixState(0), [], None

    def make_sample(self, response_ids: list[int] | None = None) -> Sample:
        """Return the sample to score or differentiate, with other tokens in place of the response's if given."""
        return Sample(self.problem, self.prompt.ids, self.response_ids if response_ids is None else response_ids)

    def make_sample_with_draw_info(self, model: PreTrainedModel) -> Sample:
        """Return the sample with the log-probabilities that `model`, the policy, gave when it was generated."""
        draw_info = DrawInfo(model, self.candidates, self.logp, self.hidden_states)
        return replace(self.make_sample(), draw_info=draw_info)


@dataclass(frozen=True)
class Voter:
    """A scored response that votes for its answer. None: it has no answer."""

    response_ids: list[int]
    reward: float
    answer: str | None


@dataclass
class SearchState:
    """One chain of responses. A search may run several for a problem.

    Attributes:
        incumbent, initial: the current and the first response.
        index: number of the chain. It is part of the random streams, so that chains are independent.
        beta: KL coefficient β. None: the KL target of the solver decides.
        rejected_branches: (position, token) branches that were rejected from the incumbent.
        scan_position: next position of the sequential scan.
        num_sweeps: how often a sequential Metropolis scan has reached the end.
        num_rollouts: responses and suffixes drawn, without the first response.
        num_accepted: how often the incumbent was replaced.
        predicted_gain: per incumbent whose gradient was computed, the rise of the reward that the gradient predicts
            at each position (see `traces.schema.Trace`).
        stop_reason: why the chain has ended. Empty: it has not.
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
        """Make an accepted response the incumbent."""
        self.incumbent.drop_caches()
        self.incumbent, self.rejected_branches = response, set()
        self.rounds_since_acceptance = 0
        self.num_accepted += 1


@dataclass
class Proposal:
    """A proposed response: a branch (another token at one position, then a new suffix), or a whole new response.

    Attributes:
        prefix_ids: the incumbent's tokens before the branch, then the new token. Empty: the whole response is new.
        generation: the new suffix or response. None: not generated, or nothing to generate.
    """

    chain: SearchState
    prefix_ids: list[int]
    generation: GenerationOutput | None = None

    @property
    def position(self) -> int:
        """The branch's position, which is the number of the incumbent's tokens that are kept."""
        return max(0, len(self.prefix_ids) - 1)

    @property
    def response_ids(self) -> list[int]:
        return self.prefix_ids if self.generation is None else self.prefix_ids + self.generation.ids

    def is_finished(self, policy: Policy) -> bool:
        return policy.is_finished(self.response_ids, policy.get_stop_strings(self.chain.problem))

    def get_prefix_cache(self) -> PrefixState:
        """Return the state of the prompt and the prefix, without the last token."""
        incumbent = self.chain.incumbent
        return incumbent.policy_cache.cut(len(incumbent.prompt.ids) + len(self.prefix_ids) - 1)

    def to_scored_response(self, policy: Policy) -> ScoredResponse:
        """Return the proposed response, which is still to be scored.

        Its score caches are those of the incumbent, whose first `position` tokens it shares.
        """
        incumbent, generation, length = self.chain.incumbent, self.generation, len(self.prefix_ids)
        candidates, logp = incumbent.candidates[:length], incumbent.logp[:length]
        log_weight = None if incumbent.log_importance_weight is None else incumbent.log_importance_weight[:length]
        states = None if incumbent.hidden_states is None else incumbent.hidden_states[:length]
        if generation is not None:
            candidates, logp = torch.cat((candidates, generation.candidates)), torch.cat((logp, generation.logp))
            if log_weight is not None:
                log_weight = torch.cat((log_weight, generation.get_log_importance_weight()))
            if states is not None and generation.hidden_states is not None:
                states = torch.cat((states, generation.hidden_states))
        return ScoredResponse(
            incumbent.prompt,
            self.response_ids,
            self.is_finished(policy),
            candidates,
            logp,
            log_weight,
            self.get_prefix_cache() if generation is None else generation.get_cache(),
            incumbent.score_caches,
            reward=math.nan,
            hidden_states=states,
        )
