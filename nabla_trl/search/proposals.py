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

from nabla_trl.gradient.likelihood import LikelihoodTerm
from nabla_trl.gradient.token_gradient import token_gradient
from nabla_trl.models.flops import Meter, ModelSize
from nabla_trl.models.generation import prefill, random_stream
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import solvers
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.state import Chain, State


def solve_tokens(
    states: Sequence[State],
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    meter: Meter,
    betas: Sequence[float | None] | None = None,
) -> None:
    """Set each state's `scores` [T, K]. They depend on its tokens (and β) alone, so this is called once for them.

    Args:
        betas: per state, where it is not the configuration's.
    """
    if config.solver == "none":
        scores = [state.logp for state in states]
    elif config.solver == "mirror":
        _set_gradients([state for state in states if state.gradient is None], policy, reward, config, meter)
        wanted = [config.beta] * len(states) if betas is None else betas
        scores = [_mirror(state, beta, reward, config) for state, beta in zip(states, wanted, strict=True)]
    else:
        scores = _ste(states, policy, reward, config, meter)
    for state, score in zip(states, scores, strict=True):
        state.scores = score


def _set_gradients(
    states: Sequence[State], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> None:
    if not states:
        return
    samples, tables = [state.drawn(policy.model) for state in states], [state.candidates for state in states]
    prompts, scored = [state.prompt.memos for state in states], [state.memos for state in states]
    point = config.gradient_point()
    slopes = reward.slope(samples, prompts, scored, tables, meter=meter, point=point)
    for state, slope in zip(states, slopes, strict=True):
        state.gradient = slope.to(state.logp.dtype)


def _mirror(state: State, beta: float | None, reward: Reward, config: ReasonerConfig) -> Tensor:
    gradient, choice = state.gradient, state.choice()
    assert gradient is not None and config.step is not None
    gain = solvers.advantage(gradient, choice)
    if config.shuffle:
        order = random_stream(0, state.problem.id, "shuffle", *state.response).permutation(len(choice))
        gain = solvers.shuffled(gain, choice, torch.from_numpy(order))
    if beta is not None:
        lam = 1 / beta
    else:
        lam = solvers.lam_for_kl(state.logp, gain, allowed(state, reward.readable, config), config.kl or 0.0)
    return solvers.mirror(state.logp, gain, choice, config.step * lam)


def pull(state: State, readable: Tensor, config: ReasonerConfig) -> list[float]:
    """By how much the gradient promises to raise the reward, at most, with another token at each position [T]."""
    assert state.gradient is not None
    gain = solvers.advantage(state.gradient, state.choice()).masked_fill(~allowed(state, readable, config), 0.0)
    return [float(f"{one:.3g}") for one in gain.amax(-1).clamp(min=0.0).tolist()]


def _ste(
    states: Sequence[State], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> list[Tensor]:
    """Optimised logits of whole responses, and which rows a scan has to work out by themselves (`State.stale`).

    At a scanned position t the paper optimises z_t and all later logits, with the tokens before t fixed; the released
    code z_t alone. As long as no other hard token changes on the way, that is the same for every t, and one run on
    the whole response serves all of them.
    """
    slope, choices = _LossSlope(states, policy, reward, config, meter), [state.choice() for state in states]
    alone = config.moving == "first"
    asked = (lambda rows, hard: slope(rows, [choices[row] for row in rows])) if alone else slope
    found = solvers.ste(slope.starts, choices, asked, config.ste())
    if config.proposals == "sequential":
        for state, flipped in zip(states, found.flipped, strict=True):
            state.stale = flipped if alone else flipped.cumsum(0) > flipped
    return found.logits


def ste_row(
    state: State, position: int, policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> Tensor:
    """The optimised logits [K] at a scanned position, with all tokens before it fixed."""
    slope, places = _LossSlope([state], policy, reward, config, meter), torch.arange(len(state.response))
    movable = places == position if config.moving == "first" else places >= position
    return solvers.ste(slope.starts, [state.choice()], slope, config.ste(), [movable]).logits[0][position]


class _LossSlope:
    """∂L/∂Y of L = −λ·r − log π [T, K], with other tokens in place of the states' responses.

    Attributes:
        starts: per state [T, K] log π of the candidates, −inf where one could not stand.
    """

    def __init__(self, states: Sequence[State], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter):
        self.states, self.policy, self.reward, self.config, self.meter = states, policy, reward, config, meter
        self.starts = [state.logp.masked_fill(~_placeable(state, reward.readable), -torch.inf) for state in states]
        self.prompts = _prompt_rows(states, policy, meter)

    def __call__(self, rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        """Of rows at hard choices [T]; tokens that come back cost nothing."""
        tables = [self.states[row].candidates for row in rows]
        tokens = [tuple(t.gather(1, c[:, None]).squeeze(1).tolist()) for t, c in zip(tables, hard, strict=True)]
        missing = [(row, ids) for row, ids in zip(rows, tokens, strict=True) if ids not in self.states[row].slopes]
        if missing:
            found = self._work_out([row for row, _ in missing], [list(ids) for _, ids in missing])
            for (row, ids), slope in zip(missing, found, strict=True):
                self.states[row].slopes[ids] = slope
        return [self.states[row].slopes[ids] for row, ids in zip(rows, tokens, strict=True)]

    def _work_out(self, rows: Sequence[int], responses: Sequence[list[int]]) -> list[Tensor]:
        config, meter, states = self.config, self.meter, [self.states[row] for row in rows]
        samples = [state.sample(ids) for state, ids in zip(states, responses, strict=True)]
        tables = [state.candidates for state in states]
        likelihood = policy_likelihood(self.policy)
        prompts = [[likelihood.prompt_memo(self.prompts[row])] for row in rows]
        by_reward = self.reward.gradient(samples, [state.prompt.memos for state in states], tables, meter=meter)
        by_policy = token_gradient(
            [likelihood],
            samples,
            prompts,
            tables,
            meter=meter,
            direct=bool(config.direct),
            postfix=bool(config.postfix),
        )
        return [-config.lam * r.float() - p.float() for r, p in zip(by_reward, by_policy, strict=True)]


def _prompt_rows(states: Sequence[State], policy: Policy, meter: Meter) -> list[Tensor]:
    """kv rows of the prompts (but their last tokens) in the policy."""
    if policy.server is None:
        return [state.cache[:, :, :, : len(state.prompt.ids) - 1] for state in states]
    # A server keeps its caches to itself: they are made here, and paid for.
    return prefill(policy, [(state.problem.id, state.prompt.ids) for state in states], meter)


def _placeable(state: State, readable: Tensor) -> Tensor:
    """[T, K] bool: candidates with which the reward can read the response; the incumbent's own always."""
    return readable[state.candidates] | (state.candidates == torch.tensor(state.response)[:, None])


def policy_likelihood(policy: Policy) -> LikelihoodTerm:
    """log π(y|x) of the policy itself as a term.

    Raises:
        ValueError: a policy whose logits are more than its output head.
    """
    if not policy.plain_head:
        raise ValueError(f"{policy.name} scales or caps its logits: solver ste cannot differentiate its likelihood")
    return LikelihoodTerm(
        policy.model,
        policy.size,
        mapping=torch.arange(policy.forbidden.shape[0]),
        encode_prompt=lambda problem, prompt: prompt,
    )


def allowed(state: State, readable: Tensor, config: ReasonerConfig, span: slice = slice(None)) -> Tensor:
    """[T, K] bool: candidates that may be proposed in place of the incumbent token, at the positions of a span.

    A Metropolis chain must be able to go back, so what may be proposed at a position must not depend on the token that
    stands there: not the last of the K candidates, which is the incumbent token where that is none of the likeliest.
    """
    tables = state.candidates[span], state.logp[span]
    usable = replaceable(state.response[span], *tables, readable, config.candidate_min_p)
    if config.acceptance == "metropolis" and state.candidates.shape[1] < len(readable):
        usable[:, -1] = False
    return usable


def replaceable(
    response: Sequence[int], candidates: Tensor, logp: Tensor, readable: Tensor, min_p: float = 0.0
) -> Tensor:
    """[T, K] bool: candidates [T, K] that may stand in place of a response's tokens.

    Args:
        logp: [T, K] log π of the candidates; −inf: never.
        readable: [policy rows] bool, tokens that the reward can read.
        min_p: drop candidates below this fraction of the position's likeliest.
    """
    own = torch.tensor(response)[:, None]
    usable = readable[candidates] & (candidates != own) & logp.isfinite()
    if min_p:
        usable &= logp >= logp.amax(-1, keepdim=True) + float(np.log(min_p))
    return usable


def global_branches(chain: Chain, noise: Tensor, readable: Tensor, config: ReasonerConfig) -> list[tuple[int, int]]:
    """k distinct (position, token) branches, drawn without replacement with weight exp(score) (Gumbel top-k).

    Args:
        noise: [T, K] standard Gumbel.
    """
    state = chain.state
    usable = allowed(state, readable, config)
    for position, token in chain.tried:
        usable[position] &= state.candidates[position] != token
    count = min(config.branches, int(usable.sum()))
    keys = (state.solved().double() + noise).masked_fill(~usable, -torch.inf).flatten()
    width = state.candidates.shape[1]
    picks = keys.topk(count).indices.tolist()
    return [(pick // width, int(state.candidates[pick // width, pick % width])) for pick in picks]


def global_logp(state: State, readable: Tensor, config: ReasonerConfig) -> Tensor:
    """[T, K] log-probability with which `global_branches` draws each branch first; all −inf where it has none."""
    usable = allowed(state, readable, config)
    scores = state.solved().double().masked_fill(~usable, -torch.inf)
    if not usable.any():
        return scores
    return scores.flatten().log_softmax(-1).view_as(scores)


def redraw_logp(state: State, readable: Tensor, config: ReasonerConfig) -> float:
    """log-probability that a Metropolis chain tries to draw the response anew; 0, always, where no branch may be."""
    assert config.redraw is not None
    if config.proposals == "global" and not allowed(state, readable, config).any():
        return 0.0
    return math.log(config.redraw)


def sequential_branch(
    chain: Chain,
    stream: np.random.Generator,
    readable: Tensor,
    config: ReasonerConfig,
    rescore: Callable[[State, int], Tensor],
) -> list[tuple[int, int]]:
    """Resample unsure positions from left to right until one changes; empty at the end of the response.

    Args:
        rescore: scores [K] of a position whose row is stale (`ste_row`).
    """
    state, scan = chain.state, config.scan()
    own = state.choice()
    while chain.position < len(state.response):
        position = chain.position
        chain.position += 1
        if float(state.logp[position].max().exp()) > scan.confidence:
            continue
        if scan.gradient_norm and _slope_norm(state, position, config) < scan.gradient_norm:
            continue
        refresh(state, position, rescore)
        mass = row_logp(state, position, readable, config).exp().cumsum(-1).numpy()
        pick = int(np.searchsorted(mass, stream.random() * mass[-1], side="right"))
        if pick != own[position]:
            return [(position, int(state.candidates[position, pick]))]
    return []


def refresh(state: State, position: int, rescore: Callable[[State, int], Tensor]) -> None:
    """Work out a stale row of the scores."""
    if state.stale is not None and state.stale[position]:
        state.solved()[position], state.stale[position] = rescore(state, position), False


def row_logp(state: State, position: int, readable: Tensor, config: ReasonerConfig) -> Tensor:
    """[K] float64 log-probability with which the scan draws each token at a position, the incumbent's included."""
    scan = config.scan()
    [usable] = allowed(state, readable, config, slice(position, position + 1))
    usable[state.candidates[position] == state.response[position]] = True
    row = (state.solved()[position] / scan.resample_temperature).masked_fill(~usable, -torch.inf)
    if scan.resample_top_p < 1:
        row = TopPLogitsWarper(scan.resample_top_p)(torch.zeros(1, 0, dtype=torch.long), row[None])[0]
    return row.double().log_softmax(-1)


def _slope_norm(state: State, position: int, config: ReasonerConfig) -> float:
    """‖∂L/∂z_t‖ over the candidates at the start of the optimisation, at the response's own tokens."""
    slope = state.slopes[tuple(state.response)][position : position + 1]
    return float(solvers.through_softmax(state.logp[position : position + 1], slope, config.ste().tau).norm())


def expected_flops(
    state: State, positions: Sequence[int], policy: Policy, reward: Reward, config: ReasonerConfig
) -> float:
    """FLOPs of the next round if its suffixes are as long as the incumbent's, with the gradients that are due."""
    length, prompt = len(state.response), len(state.prompt.ids)
    total = sum(policy.size.forward_flops(prompt + at, length - at - 1) for at in positions)
    known_gradient = state.scores is not None or state.gradient is not None
    gradients = 0 if config.solver == "none" or known_gradient else 1
    if config.acceptance == "metropolis" and config.solver != "none":
        gradients += len(positions)  # the way back is weighed with the proposal's own scores
    known = state.drawn(policy.model)
    for term in reward.terms:
        encoded = term.encode(state.sample())
        begin = len(encoded.prompt) - 1
        for at in positions if not term.knows(known) else ():
            count = len(term.fed(encoded, at))
            total += term.size.forward_flops(begin + at, count, term.charge_head(count))
        if gradients:
            count = len(term.fed(encoded, 0))
            head, point = term.charge_head(count), config.gradient_point()
            each = len(point.alphas) * _both_ways(term.size, begin, count, head)
            if point.direct and reward.dense and not term.knows(known):
                each += term.size.forward_flops(begin, 0, head)
            total += gradients * each
    if config.solver == "ste":
        total += gradients * _both_ways(policy.size, prompt - 1, length, length)
    return total


def start_flops(state: State, policy: Policy, reward: Reward) -> float:
    """FLOPs of drawing and scoring another first response as long as this one."""
    total = policy.size.forward_flops(len(state.prompt.ids) - 1, len(state.response))
    known = state.drawn(policy.model)
    for term in reward.terms:
        if not term.knows(known):
            encoded = term.encode(state.sample())
            count = len(term.fed(encoded, 0))
            total += term.size.forward_flops(len(encoded.prompt) - 1, count, term.charge_head(count))
    return total


def _both_ways(size: ModelSize, start: int, count: int, head: int) -> float:
    return size.forward_flops(start, count, head) + size.backward_flops(start, count, head)
