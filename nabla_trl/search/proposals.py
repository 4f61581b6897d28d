"""Proposals: where to change the incumbent, and which token to put there.

The scores s [T, K] of a solver (solvers.py) define the distribution of branches (t, v), a position and its new token.

    global        b(t, v|y) ∝ exp(s_t(v)) over all branches that may be proposed
    sequential    b(v|y, t) ∝ exp(s_t(v)/temperature) at one position t after the other, as the paper does. If the
                  response's own token is drawn, the scan moves on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import EncodedSample, Objective
from nabla_trl.gradient.relaxation import compute_replaceable_mask
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter, ModelSize
from nabla_trl.models.generation import prefill_prompts
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import solvers
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import (
    GlobalProposals,
    MetropolisAcceptance,
    MirrorSolver,
    NoGradient,
    SequentialProposals,
    SteSolver,
)
from nabla_trl.search.state import ScoredResponse, SearchState

MIN_CUT_ENTROPY = 1e-3  # nats; with it a chain can change every position
JUMP_EXPONENT = 4  # of the weights of cut "jump", as in its authors' code

# --- scores ---------------------------------------------------------------------------------------------


def compute_proposal_scores(
    responses: Sequence[ScoredResponse],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    flop_counter: FlopCounter,
    betas: Sequence[float | None] | None = None,
) -> None:
    """Set the `proposal_scores` [T, K] of responses. Call it once for a response: they depend on tokens and β alone.

    Args:
        betas: β of each response. None: the configuration's.
    """
    if isinstance(config.solver, NoGradient):
        scores = [_compute_cut_scores(response, reward, config, config.solver.cut) for response in responses]
    elif isinstance(config.solver, MirrorSolver):
        _compute_reward_gradients(
            [response for response in responses if response.reward_gradient is None],
            policy,
            reward,
            config,
            flop_counter,
        )
        scores = [
            _compute_mirror_scores(response, beta, reward, config, config.solver)
            for response, beta in zip(responses, betas or [config.beta] * len(responses), strict=True)
        ]
    else:
        scores = _compute_ste_scores(responses, policy, reward, config, config.solver, flop_counter)
    for response, response_scores in zip(responses, scores, strict=True):
        response.proposal_scores = response_scores


def _compute_cut_scores(response: ScoredResponse, reward: Reward, config: SearchConfig, cut: str) -> Tensor:
    """Return the scores [T, K] of a search without the gradient: log π, or log w_t + log q_t(v) for cut weights w_t.

    q_t is π at the sampler's temperature over the tokens that may be proposed. w_t is 1 for the cut "uniform", the
    entropy H_t of π over the candidates for the cut "entropy", and max(H_t − H_{t−1}, 0)^4 for the cut "jump".
    """
    if cut == "token":
        return response.logp
    mask = compute_proposable_mask(response, reward.in_vocabulary, config)
    logits = (response.logp / (config.temperature or 1.0)).masked_fill(~mask, -torch.inf)
    scores = (logits - logits.logsumexp(-1, keepdim=True)).masked_fill(~mask, -torch.inf)
    if cut == "uniform":
        return scores
    entropy = -(response.logp.exp() * response.logp.clamp(min=-100)).sum(-1, keepdim=True)
    if cut == "entropy":
        return scores + entropy.clamp(min=MIN_CUT_ENTROPY).log()
    jump = entropy.diff(dim=0, prepend=torch.zeros_like(entropy[:1]))
    return scores + JUMP_EXPONENT * jump.clamp(min=MIN_CUT_ENTROPY).log()


def _compute_reward_gradients(
    responses: Sequence[ScoredResponse],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    flop_counter: FlopCounter,
) -> None:
    """Set the `reward_gradient` ∂r/∂Y [T, K] of responses."""
    if not responses:
        return
    gradients = reward.compute_gradient(
        [response.make_sample_with_draw_info(policy.model) for response in responses],
        [response.prompt.score_caches for response in responses],
        [response.score_caches for response in responses],
        [response.candidates for response in responses],
        flop_counter=flop_counter,
        gradient_at=config.get_gradient_point(),
    )
    for response, gradient in zip(responses, gradients, strict=True):
        response.reward_gradient = gradient.to(response.logp.dtype)


def _compute_mirror_scores(
    response: ScoredResponse, beta: float | None, reward: Reward, config: SearchConfig, solver: MirrorSolver
) -> Tensor:
    """Return s = log π + step_size·λ·A [T, K], with λ = 1/β or from the KL target."""
    assert response.reward_gradient is not None
    columns = response.find_response_columns()
    advantages = solvers.compute_advantages(response.reward_gradient, columns)
    if solver.shuffle_gradient:
        order = make_rng(0, response.problem.id, "shuffle", *response.response_ids).permutation(len(columns))
        advantages = solvers.shuffle_advantages(advantages, columns, torch.from_numpy(order))
    weight = _compute_step_weight(response, advantages, beta, reward, config, solver)
    return solvers.solve_mirror(response.logp, advantages, columns, weight)


def _compute_step_weight(
    response: ScoredResponse,
    advantages: Tensor,
    beta: float | None,
    reward: Reward,
    config: SearchConfig,
    solver: MirrorSolver,
) -> float:
    """Return step_size·λ, with λ = 1/β or from the KL target."""
    if beta is not None:
        return solver.step_size / beta
    mask = compute_proposable_mask(response, reward.in_vocabulary, config)
    lam = solvers.find_reward_weight_for_kl(response.logp, advantages, mask, solver.target_kl or 0.0)
    return solver.step_size * lam


def compute_gain_weight(response: ScoredResponse, beta: float | None, reward: Reward, config: SearchConfig) -> float:
    """Return the factor step_size·λ of the advantages in the mirror step of a response with a gradient."""
    assert response.reward_gradient is not None and isinstance(config.solver, MirrorSolver)
    advantages = solvers.compute_advantages(response.reward_gradient, response.find_response_columns())
    return _compute_step_weight(response, advantages, beta, reward, config, config.solver)


def compute_predicted_gain(response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig) -> list[float]:
    """Return max(0, max_v A_t(v)) [T] over the branches: the largest rise of the reward that the gradient predicts."""
    assert response.reward_gradient is not None
    advantages = solvers.compute_advantages(response.reward_gradient, response.find_response_columns())
    advantages = advantages.masked_fill(~compute_proposable_mask(response, in_vocabulary, config), 0.0)
    return [float(f"{gain:.3g}") for gain in advantages.amax(-1).clamp(min=0.0).tolist()]


def _compute_ste_scores(
    responses: Sequence[ScoredResponse],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    solver: SteSolver,
    flop_counter: FlopCounter,
) -> list[Tensor]:
    """Return the optimized logits [T, K] of whole responses, and mark the rows that a scan has to compute again.

    At a scanned position t the paper optimizes z_t and all later logits, with the tokens before t fixed. The released
    code optimizes z_t alone. As long as no other hard token changes, z_t is the same for every t. So one run on the
    whole response serves all positions, apart from those whose z_t depends on a change (`stale_mask`).
    """
    loss_gradient = _LossGradient(responses, policy, reward, solver, config.reward_weight, flop_counter)
    if solver.hard_tokens == "argmax":  # every scanned position has other hard tokens
        for response in responses:
            response.stale_mask = torch.ones(len(response.response_ids), dtype=torch.bool)
        return loss_gradient.initial_logits
    columns = [response.find_response_columns() for response in responses]
    one_position = solver.optimize_positions == "first"
    # If only z_t is optimized, all other tokens stay as they are: the gradient is taken at the response itself.
    gradient_fn = (
        (lambda rows, _: loss_gradient(rows, [columns[row] for row in rows])) if one_position else loss_gradient
    )
    result = solvers.solve_ste(loss_gradient.initial_logits, columns, gradient_fn, solver)
    if isinstance(config.proposals, SequentialProposals):
        for response, changed in zip(responses, result.changed_positions, strict=True):
            # Either the token at t itself changed, or a token before t did, which the scan keeps fixed.
            response.stale_mask = changed if one_position else changed.cumsum(0) > changed
    return result.logits


def compute_ste_scores_at(
    response: ScoredResponse,
    position: int,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    flop_counter: FlopCounter,
) -> Tensor:
    """Return the optimized logits [K] at a scanned position, with all tokens before it fixed."""
    solver = config.solver
    assert isinstance(solver, SteSolver)  # no other solver has stale scores
    loss_gradient = _LossGradient([response], policy, reward, solver, config.reward_weight, flop_counter)
    positions = torch.arange(len(response.response_ids))
    mask = positions == position if solver.optimize_positions == "first" else positions >= position
    columns = response.find_response_columns()
    if solver.hard_tokens == "argmax":
        columns = torch.where(positions < position, columns, loss_gradient.initial_logits[0].argmax(-1))
    result = solvers.solve_ste(loss_gradient.initial_logits, [columns], loss_gradient, solver, [mask])
    return result.logits[0][position]


class _LossGradient:
    """Computes ∂L/∂Y [T, K] of L = −λ·r − log π, with any hard tokens in place of the responses' own.

    Attributes:
        initial_logits: per response [T, K] log π of the candidates, −inf for tokens that the reward cannot read.
        prompt_caches: per response the state of its prompt (all but the last token) in the policy.
    """

    def __init__(
        self,
        responses: Sequence[ScoredResponse],
        policy: Policy,
        reward: Reward,
        solver: SteSolver,
        reward_weight: float,
        flop_counter: FlopCounter,
    ):
        self.responses, self.flop_counter = responses, flop_counter
        self.reward = reward.with_repeated_turn_end() if solver.repeat_turn_end else reward
        self.solver, self.reward_weight = solver, reward_weight
        self.likelihood = policy_likelihood(policy)
        self.initial_logits = []
        for response in responses:
            is_own = response.candidates == torch.tensor(response.response_ids)[:, None]
            readable = reward.in_vocabulary[response.candidates] | is_own
            self.initial_logits.append(response.logp.masked_fill(~readable, -torch.inf))
        if policy.backend.returns_caches:
            self.prompt_caches = [r.policy_cache.cut(len(r.prompt.ids) - 1) for r in responses]
        else:  # a server does not return its caches
            prompts = [(response.problem.id, response.prompt.ids) for response in responses]
            self.prompt_caches = prefill_prompts(policy, prompts, flop_counter)

    def __call__(self, rows: list[int], hard_columns: list[Tensor]) -> list[Tensor]:
        """Return ∂L/∂Y of rows at the columns [T] of hard tokens. Tokens that were seen before cost nothing."""
        tokens = [
            tuple(self.responses[row].candidates.gather(1, columns[:, None]).squeeze(1).tolist())
            for row, columns in zip(rows, hard_columns, strict=True)
        ]
        missing = [
            (row, ids) for row, ids in zip(rows, tokens, strict=True) if ids not in self.responses[row].loss_gradients
        ]
        if missing:
            gradients = self._compute_loss_gradients([row for row, _ in missing], [list(ids) for _, ids in missing])
            for (row, ids), gradient in zip(missing, gradients, strict=True):
                self.responses[row].loss_gradients[ids] = gradient
        return [self.responses[row].loss_gradients[ids] for row, ids in zip(rows, tokens, strict=True)]

    def _compute_loss_gradients(self, rows: Sequence[int], response_ids: Sequence[list[int]]) -> list[Tensor]:
        responses = [self.responses[row] for row in rows]
        samples = [response.make_sample(ids) for response, ids in zip(responses, response_ids, strict=True)]
        candidates = [response.candidates for response in responses]
        reward_gradients = self.reward.compute_backward_gradient(
            samples,
            [response.prompt.score_caches for response in responses],
            candidates,
            flop_counter=self.flop_counter,
        )
        likelihood_gradients = compute_token_gradient(
            [self.likelihood],
            samples,
            [[self.likelihood.make_prompt_cache(self.prompt_caches[row])] for row in rows],
            candidates,
            flop_counter=self.flop_counter,
            likelihood_token_grad=self.solver.likelihood_token_grad,
            likelihood_suffix_grad=self.solver.likelihood_suffix_grad,
        )
        # ∂L/∂Y = −λ·∂r/∂Y − ∂(log π)/∂Y
        return [
            -self.reward_weight * reward_gradient.float() - likelihood_gradient.float()
            for reward_gradient, likelihood_gradient in zip(reward_gradients, likelihood_gradients, strict=True)
        ]


# --- branches -------------------------------------------------------------------------------------------


def compute_proposable_mask(
    response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig, span: slice = slice(None)
) -> Tensor:
    """Return a mask [T, K] of the branches that may be proposed, at the positions of a span.

    Args:
        in_vocabulary: [V] bool, tokens of the policy that the reward can read.
    """
    candidates, logp = response.candidates[span], response.logp[span]
    mask = compute_replaceable_mask(
        response.response_ids[span], candidates, logp, in_vocabulary, config.candidate_min_p
    )
    if isinstance(config.acceptance, MetropolisAcceptance) and candidates.shape[1] < len(in_vocabulary):
        # A chain must be able to go back, so that what may be proposed must not depend on the token at the position.
        # The last candidate depends on it: it is the response's own token if that is not among the most likely K.
        mask[:, -1] = False
    return mask


def draw_global_branches(
    chain: SearchState, gumbel_noise: Tensor, in_vocabulary: Tensor, config: SearchConfig
) -> list[tuple[int, int]]:
    """Draw distinct branches (position, token) with weights exp(s_t(v)), without replacement, by Gumbel top-k.

    Args:
        gumbel_noise: [T, K] standard Gumbel.
        in_vocabulary: [V] bool, tokens of the policy that the reward can read.

    Returns:
        `proposals_per_round` branches, or as many as have not been rejected.
    """
    response = chain.incumbent
    mask = compute_proposable_mask(response, in_vocabulary, config)
    for position, token in chain.rejected_branches:
        mask[position] &= response.candidates[position] != token
    count = min(config.proposals.proposals_per_round, int(mask.sum()))
    keys = (response.get_proposal_scores().double() + gumbel_noise).masked_fill(~mask, -torch.inf).flatten()
    branches = [divmod(index, mask.shape[1]) for index in keys.topk(count).indices.tolist()]
    return [(position, int(response.candidates[position, column])) for position, column in branches]


def compute_global_branch_logp(response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig) -> Tensor:
    """Return log b(t, v|y) [T, K] of `draw_global_branches` for a single branch, −inf for what is not proposed."""
    mask = compute_proposable_mask(response, in_vocabulary, config)
    scores = response.get_proposal_scores().double().masked_fill(~mask, -torch.inf)
    return scores.flatten().log_softmax(-1).view_as(scores) if mask.any() else scores


def compute_independence_logp(response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig) -> float:
    """Return log c(y), where c is the probability that a Metropolis chain proposes a whole new response.

    It is 1 if global proposals have no branch, and `independence_prob` otherwise.
    """
    is_global = isinstance(config.proposals, GlobalProposals)
    if is_global and not compute_proposable_mask(response, in_vocabulary, config).any():
        return 0.0
    return math.log(config.acceptance.independence_prob)


def draw_sequential_branch(
    chain: SearchState,
    rng: np.random.Generator,
    in_vocabulary: Tensor,
    config: SearchConfig,
    recompute_scores_at: Callable[[ScoredResponse, int], Tensor],
) -> list[tuple[int, int]]:
    """Resample tokens from left to right, beginning at `chain.scan_position`, until one changes.

    Args:
        in_vocabulary: [V] bool, tokens of the policy that the reward can read.
        recompute_scores_at: scores [K] of a position whose row is stale (see `compute_ste_scores_at`).

    Returns:
        one branch (position, token), or none at the end of the response and where a score is NaN.
    """
    response, scan = chain.incumbent, config.proposals
    assert isinstance(scan, SequentialProposals)
    own_columns = response.find_response_columns()
    while chain.scan_position < len(response.response_ids):
        position = chain.scan_position
        chain.scan_position += 1
        if float(response.logp[position].max().exp()) > scan.confidence:
            continue
        if scan.min_gradient_norm and _compute_gradient_norm(response, position, config) < scan.min_gradient_norm:
            continue
        refresh_stale_scores(response, position, recompute_scores_at)
        if response.get_proposal_scores()[position].isnan().any():
            return []
        cumulative_probs = compute_scan_logp(response, position, in_vocabulary, config).exp().cumsum(-1).numpy()
        column = int(np.searchsorted(cumulative_probs, rng.random() * cumulative_probs[-1], side="right"))
        if column != own_columns[position]:
            return [(position, int(response.candidates[position, column]))]
    return []


def refresh_stale_scores(
    response: ScoredResponse, position: int, recompute_scores_at: Callable[[ScoredResponse, int], Tensor]
) -> None:
    """Compute the scores of a position again if they are stale."""
    if response.stale_mask is not None and response.stale_mask[position]:
        response.get_proposal_scores()[position] = recompute_scores_at(response, position)
        response.stale_mask[position] = False


def compute_scan_logp(response: ScoredResponse, position: int, in_vocabulary: Tensor, config: SearchConfig) -> Tensor:
    """Return log b(v|y, t) [K] (float64) of the scan at a position, the response's own token included."""
    scan = config.proposals
    assert isinstance(scan, SequentialProposals)
    [mask] = compute_proposable_mask(response, in_vocabulary, config, slice(position, position + 1))
    mask[response.candidates[position] == response.response_ids[position]] = True
    scores = (response.get_proposal_scores()[position] / scan.resample_temperature).masked_fill(~mask, -torch.inf)
    if scan.resample_top_p < 1:
        scores = TopPLogitsWarper(scan.resample_top_p)(torch.zeros(1, 0, dtype=torch.long), scores[None])[0]
    return scores.double().log_softmax(-1)


def _compute_gradient_norm(response: ScoredResponse, position: int, config: SearchConfig) -> float:
    """Return ‖∂L/∂z_t‖ over the candidates at z = log π and the response's own tokens."""
    assert isinstance(config.solver, SteSolver)
    rows = slice(position, position + 1)
    gradient = response.loss_gradients[tuple(response.response_ids)][rows]
    return float(solvers.compute_softmax_gradient(response.logp[rows], gradient, config.solver.tau).norm())


# --- costs ----------------------------------------------------------------------------------------------


def estimate_round_flops(
    response: ScoredResponse, positions: Sequence[int], policy: Policy, reward: Reward, config: SearchConfig
) -> float:
    """Return the expected FLOPs of the next round, with the gradients that it has to compute.

    New suffixes are assumed to be as long as the incumbent's.

    Args:
        response: the incumbent.
        positions: where its branches are.
    """
    length, prompt_length = len(response.response_ids), len(response.prompt.ids)
    total = sum(policy.size.compute_forward_flops(prompt_length + t, length - t - 1) for t in positions)
    num_gradients = 0
    if not isinstance(config.solver, NoGradient):
        num_gradients += response.proposal_scores is None and response.reward_gradient is None
        if isinstance(config.acceptance, MetropolisAcceptance):
            num_gradients += len(positions)  # the branch back has the probability that the proposal's own scores give
    sample = response.make_sample_with_draw_info(policy.model)
    for objective in reward.objectives:
        size, encoded, has_draw_logp = objective.model_size, objective.encode(sample), objective.has_draw_logp(sample)
        for position in positions if not has_draw_logp else ():
            total += _estimate_scoring_flops(objective, encoded, position)
        if num_gradients:
            start, num_inputs = len(encoded.prompt_ids) - 1, len(objective.select_input_ids(encoded, 0))
            point = config.get_gradient_point()
            flops = len(point.alphas) * _compute_forward_backward_flops(size, start, num_inputs)
            if point.direct and reward.has_dense_gradient and not has_draw_logp:
                flops += size.compute_forward_flops(start, 0, num_head_positions=num_inputs)
            total += num_gradients * flops
    if isinstance(config.solver, SteSolver):
        total += num_gradients * _compute_forward_backward_flops(policy.size, prompt_length - 1, length)
    return total


def estimate_first_response_flops(response: ScoredResponse, policy: Policy, reward: Reward) -> float:
    """Return the FLOPs of drawing and scoring another first response as long as this one."""
    total = policy.size.compute_forward_flops(len(response.prompt.ids) - 1, len(response.response_ids))
    sample = response.make_sample_with_draw_info(policy.model)
    for objective in reward.objectives:
        if not objective.has_draw_logp(sample):
            total += _estimate_scoring_flops(objective, objective.encode(sample), num_shared=0)
    return total


def _estimate_scoring_flops(objective: Objective, encoded: EncodedSample, num_shared: int) -> float:
    """Return the FLOPs of one score if the first `num_shared` response tokens are cached."""
    num_inputs = len(objective.select_input_ids(encoded, num_shared))
    return objective.model_size.compute_forward_flops(len(encoded.prompt_ids) - 1 + num_shared, num_inputs)


def _compute_forward_backward_flops(size: ModelSize, start: int, count: int) -> float:
    return size.compute_forward_flops(start, count) + size.compute_backward_flops(start, count)
