"""Where to branch: proposal scores from a solver, then branches from the scores.

`global_branches` looks at every position at once; `sequential_branch` is the paper's left-to-right scan. Both see
the same scores, whichever solver made them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter, ModelSize
from nabla_trl.models.generation import make_rng, prefill_prompts
from nabla_trl.models.policy import Policy
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


def compute_proposal_scores(
    responses: Sequence[ScoredResponse],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    flop_counter: FlopCounter,
    betas: Sequence[float | None] | None = None,
) -> None:
    """Set each state's `scores` [T, K]. They depend on its tokens (and β) alone, so this is called once for them.

    Args:
        betas: per state, where it is not the configuration's.
    """
    if isinstance(config.solver, NoGradient):
        scores = [state.logp for state in responses]
    elif isinstance(config.solver, MirrorSolver):
        _compute_reward_gradients(
            [state for state in responses if state.reward_gradient is None], policy, reward, config, flop_counter
        )
        wanted = [config.beta] * len(responses) if betas is None else betas
        scores = [
            _compute_mirror_scores(state, beta, reward, config, config.solver)
            for state, beta in zip(responses, wanted, strict=True)
        ]
    else:
        scores = _compute_ste_scores(responses, policy, reward, config, config.solver, flop_counter)
    for state, score in zip(responses, scores, strict=True):
        state.proposal_scores = score


def _compute_reward_gradients(
    responses: Sequence[ScoredResponse],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    flop_counter: FlopCounter,
) -> None:
    if not responses:
        return
    samples, tables = (
        [state.make_sample_with_draw_info(policy.model) for state in responses],
        [state.candidates for state in responses],
    )
    prompts, scored = [state.prompt.score_caches for state in responses], [state.score_caches for state in responses]
    point = config.get_gradient_point()
    slopes = reward.compute_gradient(samples, prompts, scored, tables, flop_counter=flop_counter, gradient_at=point)
    for state, slope in zip(responses, slopes, strict=True):
        state.reward_gradient = slope.to(state.logp.dtype)


def _compute_mirror_scores(
    response: ScoredResponse, beta: float | None, reward: Reward, config: SearchConfig, solver: MirrorSolver
) -> Tensor:
    gradient, choice = response.reward_gradient, response.find_response_columns()
    assert gradient is not None
    gain = solvers.compute_advantages(gradient, choice)
    if solver.shuffle_gradient:
        order = make_rng(0, response.problem.id, "shuffle", *response.response_ids).permutation(len(choice))
        gain = solvers.shuffle_advantages(gain, choice, torch.from_numpy(order))
    if beta is not None:
        lam = 1 / beta
    else:
        lam = solvers.find_reward_weight_for_kl(
            response.logp,
            gain,
            compute_proposable_mask(response, reward.in_vocabulary, config),
            solver.target_kl or 0.0,
        )
    return solvers.solve_mirror(response.logp, gain, choice, solver.step_size * lam)


def compute_predicted_gain(response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig) -> list[float]:
    """By how much the gradient promises to raise the reward, at most, with another token at each position [T]."""
    assert response.reward_gradient is not None
    gain = solvers.compute_advantages(response.reward_gradient, response.find_response_columns()).masked_fill(
        ~compute_proposable_mask(response, in_vocabulary, config), 0.0
    )
    return [float(f"{one:.3g}") for one in gain.amax(-1).clamp(min=0.0).tolist()]


def _compute_ste_scores(
    responses: Sequence[ScoredResponse],
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    solver: SteSolver,
    flop_counter: FlopCounter,
) -> list[Tensor]:
    """Optimised logits of whole responses, and which rows a scan has to work out by themselves (`State.stale`).

    At a scanned position t the paper optimises z_t and all later logits, with the tokens before t fixed; the released
    code z_t alone. As long as no other hard token changes on the way, that is the same for every t, and one run on
    the whole response serves all of them.
    """
    slope, choices = (
        _LossGradient(responses, policy, reward, solver, config.reward_weight, flop_counter),
        [state.find_response_columns() for state in responses],
    )
    alone = solver.optimize_positions == "first"
    asked = (lambda rows, hard: slope(rows, [choices[row] for row in rows])) if alone else slope
    found = solvers.solve_ste(slope.initial_logits, choices, asked, solver)
    if isinstance(config.proposals, SequentialProposals):
        for state, flipped in zip(responses, found.changed_positions, strict=True):
            state.stale_mask = flipped if alone else flipped.cumsum(0) > flipped
    return found.logits


def compute_ste_scores_at(
    response: ScoredResponse,
    position: int,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    flop_counter: FlopCounter,
) -> Tensor:
    """The optimised logits [K] at a scanned position, with all tokens before it fixed."""
    solver = config.solver
    assert isinstance(solver, SteSolver)  # the only one whose scores get stale
    slope, places = (
        _LossGradient([response], policy, reward, solver, config.reward_weight, flop_counter),
        torch.arange(len(response.response_ids)),
    )
    movable = places == position if solver.optimize_positions == "first" else places >= position
    return solvers.solve_ste(
        slope.initial_logits, [response.find_response_columns()], slope, solver, [movable]
    ).logits[0][position]


class _LossGradient:
    """∂L/∂Y of L = −λ·r − log π [T, K], with other tokens in place of the states' responses.

    Attributes:
        starts: per state [T, K] log π of the candidates, −inf where one could not stand.
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
        self.responses, self.policy, self.reward, self.flop_counter = responses, policy, reward, flop_counter
        self.solver, self.reward_weight = solver, reward_weight
        self.initial_logits = [
            state.logp.masked_fill(~_compute_placeable_mask(state, reward.in_vocabulary), -torch.inf)
            for state in responses
        ]
        self.prompt_caches = _get_prompt_caches(responses, policy, flop_counter)

    def __call__(self, rows: list[int], response_columns: list[Tensor]) -> list[Tensor]:
        """Of rows at hard choices [T]; tokens that come back cost nothing."""
        tables = [self.responses[row].candidates for row in rows]
        tokens = [
            tuple(t.gather(1, c[:, None]).squeeze(1).tolist()) for t, c in zip(tables, response_columns, strict=True)
        ]
        missing = [
            (row, ids) for row, ids in zip(rows, tokens, strict=True) if ids not in self.responses[row].loss_gradients
        ]
        if missing:
            found = self._compute_loss_gradients([row for row, _ in missing], [list(ids) for _, ids in missing])
            for (row, ids), slope in zip(missing, found, strict=True):
                self.responses[row].loss_gradients[ids] = slope
        return [self.responses[row].loss_gradients[ids] for row, ids in zip(rows, tokens, strict=True)]

    def _compute_loss_gradients(self, rows: Sequence[int], response_ids: Sequence[list[int]]) -> list[Tensor]:
        meter, states = self.flop_counter, [self.responses[row] for row in rows]
        samples = [state.make_sample(ids) for state, ids in zip(states, response_ids, strict=True)]
        tables = [state.candidates for state in states]
        likelihood = policy_likelihood(self.policy)
        prompts = [[likelihood.make_prompt_cache(self.prompt_caches[row])] for row in rows]
        by_reward = self.reward.compute_backward_gradient(
            samples, [state.prompt.score_caches for state in states], tables, flop_counter=meter
        )
        by_policy = compute_token_gradient(
            [likelihood],
            samples,
            prompts,
            tables,
            flop_counter=meter,
            likelihood_token_grad=self.solver.likelihood_token_grad,
            likelihood_suffix_grad=self.solver.likelihood_suffix_grad,
        )
        return [-self.reward_weight * r.float() - p.float() for r, p in zip(by_reward, by_policy, strict=True)]


def _get_prompt_caches(responses: Sequence[ScoredResponse], policy: Policy, flop_counter: FlopCounter) -> list[Tensor]:
    """kv rows of the prompts (but their last tokens) in the policy."""
    if policy.backend.returns_caches:
        return [state.policy_cache[:, :, :, : len(state.prompt.ids) - 1] for state in responses]
    # A server keeps its caches to itself: they are made here, and paid for.
    return prefill_prompts(policy, [(state.problem.id, state.prompt.ids) for state in responses], flop_counter)


def _compute_placeable_mask(response: ScoredResponse, in_vocabulary: Tensor) -> Tensor:
    """[T, K] bool: candidates with which the reward can read the response; the incumbent's own always."""
    return in_vocabulary[response.candidates] | (response.candidates == torch.tensor(response.response_ids)[:, None])


def policy_likelihood(policy: Policy) -> LikelihoodObjective:
    """log π(y|x) of the policy itself as a term.

    Raises:
        ValueError: a policy whose logits are more than its output head.
    """
    if not policy.has_plain_head:
        raise ValueError(f"{policy.name} scales or caps its logits: solver ste cannot differentiate its likelihood")
    return LikelihoodObjective(
        policy.model,
        policy.size,
        vocab_map=torch.arange(policy.forbidden_mask.shape[0]),
        encode_prompt=lambda problem, prompt: prompt,
    )


def compute_proposable_mask(
    response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig, span: slice = slice(None)
) -> Tensor:
    """[T, K] bool: candidates that may be proposed in place of the incumbent token, at the positions of a span.

    A Metropolis chain must be able to go back, so what may be proposed at a position must not depend on the token that
    stands there: not the last of the K candidates, which is the incumbent token where that is none of the likeliest.
    """
    tables = response.candidates[span], response.logp[span]
    usable = compute_replaceable_mask(response.response_ids[span], *tables, in_vocabulary, config.candidate_min_p)
    if isinstance(config.acceptance, MetropolisAcceptance) and response.candidates.shape[1] < len(in_vocabulary):
        usable[:, -1] = False
    return usable


def compute_replaceable_mask(
    response_ids: Sequence[int], candidates: Tensor, logp: Tensor, in_vocabulary: Tensor, candidate_min_p: float = 0.0
) -> Tensor:
    """[T, K] bool: candidates [T, K] that may stand in place of a response's tokens.

    Args:
        logp: [T, K] log π of the candidates; −inf: never.
        readable: [policy rows] bool, tokens that the reward can read.
        min_p: drop candidates below this fraction of the position's likeliest.
    """
    own = torch.tensor(response_ids)[:, None]
    usable = in_vocabulary[candidates] & (candidates != own) & logp.isfinite()
    if candidate_min_p:
        usable &= logp >= logp.amax(-1, keepdim=True) + float(np.log(candidate_min_p))
    return usable


def draw_global_branches(
    chain: SearchState, gumbel_noise: Tensor, in_vocabulary: Tensor, config: SearchConfig
) -> list[tuple[int, int]]:
    """k distinct (position, token) branches, drawn without replacement with weight exp(score) (Gumbel top-k).

    Args:
        noise: [T, K] standard Gumbel.
    """
    state = chain.incumbent
    usable = compute_proposable_mask(state, in_vocabulary, config)
    for position, token in chain.rejected_branches:
        usable[position] &= state.candidates[position] != token
    count = min(config.proposals.proposals_per_round, int(usable.sum()))
    keys = (state.get_proposal_scores().double() + gumbel_noise).masked_fill(~usable, -torch.inf).flatten()
    width = state.candidates.shape[1]
    picks = keys.topk(count).indices.tolist()
    return [(pick // width, int(state.candidates[pick // width, pick % width])) for pick in picks]


def compute_global_branch_logp(response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig) -> Tensor:
    """[T, K] log-probability with which `global_branches` draws each branch first; all −inf where it has none."""
    usable = compute_proposable_mask(response, in_vocabulary, config)
    scores = response.get_proposal_scores().double().masked_fill(~usable, -torch.inf)
    if not usable.any():
        return scores
    return scores.flatten().log_softmax(-1).view_as(scores)


def compute_independence_logp(response: ScoredResponse, in_vocabulary: Tensor, config: SearchConfig) -> float:
    """log-probability that a Metropolis chain tries to draw the response anew; 0, always, where no branch may be."""
    if (
        isinstance(config.proposals, GlobalProposals)
        and not compute_proposable_mask(response, in_vocabulary, config).any()
    ):
        return 0.0
    return math.log(config.acceptance.independence_prob)


def draw_sequential_branch(
    chain: SearchState,
    rng: np.random.Generator,
    in_vocabulary: Tensor,
    config: SearchConfig,
    recompute_scores_at: Callable[[ScoredResponse, int], Tensor],
) -> list[tuple[int, int]]:
    """Resample unsure positions from left to right until one changes; empty at the end of the response.

    Args:
        rescore: scores [K] of a position whose row is stale (`ste_row`).
    """
    state, scan = chain.incumbent, config.proposals
    assert isinstance(scan, SequentialProposals)
    own = state.find_response_columns()
    while chain.scan_position < len(state.response_ids):
        position = chain.scan_position
        chain.scan_position += 1
        if float(state.logp[position].max().exp()) > scan.confidence:
            continue
        if scan.min_gradient_norm and _compute_gradient_norm(state, position, config) < scan.min_gradient_norm:
            continue
        refresh_stale_scores(state, position, recompute_scores_at)
        mass = compute_scan_logp(state, position, in_vocabulary, config).exp().cumsum(-1).numpy()
        pick = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
        if pick != own[position]:
            return [(position, int(state.candidates[position, pick]))]
    return []


def refresh_stale_scores(
    response: ScoredResponse, position: int, recompute_scores_at: Callable[[ScoredResponse, int], Tensor]
) -> None:
    """Work out a stale row of the scores."""
    if response.stale_mask is not None and response.stale_mask[position]:
        response.get_proposal_scores()[position], response.stale_mask[position] = (
            recompute_scores_at(response, position),
            False,
        )


def compute_scan_logp(response: ScoredResponse, position: int, in_vocabulary: Tensor, config: SearchConfig) -> Tensor:
    """[K] float64 log-probability with which the scan draws each token at a position, the incumbent's included."""
    scan = config.proposals
    assert isinstance(scan, SequentialProposals)
    [usable] = compute_proposable_mask(response, in_vocabulary, config, slice(position, position + 1))
    usable[response.candidates[position] == response.response_ids[position]] = True
    row = (response.get_proposal_scores()[position] / scan.resample_temperature).masked_fill(~usable, -torch.inf)
    if scan.resample_top_p < 1:
        row = TopPLogitsWarper(scan.resample_top_p)(torch.zeros(1, 0, dtype=torch.long), row[None])[0]
    return row.double().log_softmax(-1)


def _compute_gradient_norm(response: ScoredResponse, position: int, config: SearchConfig) -> float:
    """‖∂L/∂z_t‖ over the candidates at the start of the optimisation, at the response's own tokens."""
    assert isinstance(config.solver, SteSolver)
    slope = response.loss_gradients[tuple(response.response_ids)][position : position + 1]
    return float(
        solvers.compute_softmax_gradient(response.logp[position : position + 1], slope, config.solver.tau).norm()
    )


def estimate_round_flops(
    response: ScoredResponse, positions: Sequence[int], policy: Policy, reward: Reward, config: SearchConfig
) -> float:
    """FLOPs of the next round if its suffixes are as long as the incumbent's, with the gradients that are due."""
    length, prompt = len(response.response_ids), len(response.prompt.ids)
    total = sum(policy.size.compute_forward_flops(prompt + at, length - at - 1) for at in positions)
    known_gradient = response.proposal_scores is not None or response.reward_gradient is not None
    gradients = 0 if isinstance(config.solver, NoGradient) or known_gradient else 1
    if isinstance(config.acceptance, MetropolisAcceptance) and not isinstance(config.solver, NoGradient):
        gradients += len(positions)  # the way back is weighed with the proposal's own scores
    known = response.make_sample_with_draw_info(policy.model)
    for term in reward.objectives:
        encoded = term.encode(response.make_sample())
        begin = len(encoded.prompt_ids) - 1
        for at in positions if not term.has_draw_logp(known) else ():
            count = len(term.select_input_ids(encoded, at))
            total += term.model_size.compute_forward_flops(begin + at, count, count)
        if gradients:
            count = len(term.select_input_ids(encoded, 0))
            head, point = count, config.get_gradient_point()
            each = len(point.alphas) * _compute_forward_backward_flops(term.model_size, begin, count, head)
            if point.direct and reward.has_dense_gradient and not term.has_draw_logp(known):
                each += term.model_size.compute_forward_flops(begin, 0, head)
            total += gradients * each
    if isinstance(config.solver, SteSolver):
        total += gradients * _compute_forward_backward_flops(policy.size, prompt - 1, length, length)
    return total


def estimate_first_response_flops(response: ScoredResponse, policy: Policy, reward: Reward) -> float:
    """FLOPs of drawing and scoring another first response as long as this one."""
    total = policy.size.compute_forward_flops(len(response.prompt.ids) - 1, len(response.response_ids))
    known = response.make_sample_with_draw_info(policy.model)
    for term in reward.objectives:
        if not term.has_draw_logp(known):
            encoded = term.encode(response.make_sample())
            count = len(term.select_input_ids(encoded, 0))
            total += term.model_size.compute_forward_flops(len(encoded.prompt_ids) - 1, count, count)
    return total


def _compute_forward_backward_flops(size: ModelSize, start: int, count: int, head: int) -> float:
    return size.compute_forward_flops(start, count, head) + size.compute_backward_flops(start, count, head)
