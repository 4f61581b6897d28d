"""Where to branch: proposal scores from a solver, then branches from the scores.

`global_branches` looks at every position at once; `sequential_branch` is the paper's left-to-right scan. Both see
the same scores, whichever solver made them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nabla_trl import dto
from nabla_trl.chain import Chain
from nabla_trl.compute import Meter, ModelSize
from nabla_trl.config import ReasonerConfig
from nabla_trl.generate import prefill
from nabla_trl.gradient import token_gradient
from nabla_trl.heads import LikelihoodTerm
from nabla_trl.models import Policy
from nabla_trl.rewards import Reward


def solve_tokens(
    chains: Sequence[Chain], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> None:
    """Set each chain's `scores` [T, K]. Called once per distinct incumbent: the scores depend on its tokens alone."""
    if config.solver == "none":
        scores = [chain.logp for chain in chains]
    elif config.solver == "mirror":
        scores = [
            dto.mirror(chain.logp, gradient.float(), chain.choice(), config.lam)
            for chain, gradient in zip(chains, _reward_gradients(chains, policy, reward, config, meter), strict=True)
        ]
    else:
        scores = _ste(chains, policy, reward, config, meter)
    for chain, score in zip(chains, scores, strict=True):
        chain.scores = score


def _reward_gradients(
    chains: Sequence[Chain], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> list[Tensor]:
    samples, tables = [chain.drawn(policy.model) for chain in chains], [chain.candidates for chain in chains]
    prompts, scored = [chain.prompt_memos for chain in chains], [chain.memos for chain in chains]
    return reward.slope(samples, prompts, scored, tables, meter=meter, point=config.gradient_point())


def _ste(
    chains: Sequence[Chain], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> list[Tensor]:
    cached = _prompt_rows(chains, policy, meter)
    known: dict[tuple[int, ...], Tensor] = {}  # by row and tokens: tokens that flip back cost nothing

    def loss_gradient(rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        tokens = [chains[row].candidates.gather(1, c[:, None]).squeeze(1) for row, c in zip(rows, hard, strict=True)]
        keys = [(row, *ids.tolist()) for row, ids in zip(rows, tokens, strict=True)]
        new = [key for key in keys if key not in known]
        if new:
            at, responses = [chains[key[0]] for key in new], [list(key[1:]) for key in new]
            prompts = [cached[key[0]] for key in new]
            known.update(zip(new, _loss_gradient(at, responses, prompts, policy, reward, config, meter), strict=True))
        return [known[key] for key in keys]

    starts = [chain.logp.masked_fill(~_placeable(chain, reward.readable), -torch.inf) for chain in chains]
    return dto.ste(starts, [chain.choice() for chain in chains], loss_gradient, config.ste())


def _prompt_rows(chains: Sequence[Chain], policy: Policy, meter: Meter) -> list[Tensor]:
    """kv rows of the prompts (but their last tokens) in the policy."""
    if policy.server is None:
        return [chain.cache[:, :, :, : len(chain.prompt) - 1] for chain in chains]
    # A server keeps its caches to itself: they are made here, once per incumbent, and paid for.
    return prefill(policy, [(chain.problem.id, chain.prompt) for chain in chains], meter)


def _loss_gradient(
    chains: Sequence[Chain],
    responses: Sequence[list[int]],
    cached: Sequence[Tensor],
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    meter: Meter,
) -> list[Tensor]:
    """∂L/∂Y of L = −λ·r − log π at the chains' candidates, with other tokens in place of their responses.

    Args:
        cached: the policy's kv row of each prompt but its last token.
    """
    samples = [chain.sample(ids) for chain, ids in zip(chains, responses, strict=True)]
    tables = [chain.candidates for chain in chains]
    likelihood = policy_likelihood(policy)
    prompts = [[likelihood.prompt_memo(row)] for row in cached]
    by_reward = reward.gradient(samples, [chain.prompt_memos for chain in chains], tables, meter=meter)
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


def _placeable(chain: Chain, readable: Tensor) -> Tensor:
    """[T, K] bool: candidates with which the reward can read the response; the incumbent's own always."""
    return readable[chain.candidates] | (chain.candidates == torch.tensor(chain.response)[:, None])


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


def allowed(chain: Chain, readable: Tensor, config: ReasonerConfig) -> Tensor:
    """[T, K] bool: candidates that may be proposed in place of the incumbent token."""
    return replaceable(chain.response, chain.candidates, chain.logp, readable, config.candidate_min_p)


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
    usable = allowed(chain, readable, config)
    for position, token in chain.tried:
        usable[position] &= chain.candidates[position] != token
    count = min(config.branches, int(usable.sum()))
    keys = (chain.solved().double() + noise).masked_fill(~usable, -torch.inf).flatten()
    width = chain.candidates.shape[1]
    picks = keys.topk(count).indices.tolist()
    return [(pick // width, int(chain.candidates[pick // width, pick % width])) for pick in picks]


def sequential_branch(
    chain: Chain, stream: np.random.Generator, readable: Tensor, config: ReasonerConfig
) -> list[tuple[int, int]]:
    """Resample unsure positions from left to right until one changes; empty at the end of the response."""
    usable = allowed(chain, readable, config)
    scan, scores = config.scan(), chain.solved()
    while chain.position < len(chain.response):
        position = chain.position
        chain.position += 1
        if float(chain.logp[position].max().exp()) > scan.confidence:
            continue
        own = chain.candidates[position] == chain.response[position]
        row = (scores[position] / scan.resample_temperature).masked_fill(~(usable[position] | own), -torch.inf)
        mass = row.softmax(-1, dtype=torch.float64).cumsum(-1).numpy()
        pick = int(np.searchsorted(mass, stream.random() * mass[-1], side="right"))
        if not own[pick]:
            return [(position, int(chain.candidates[position, pick]))]
    return []


def expected_flops(
    chain: Chain, positions: Sequence[int], policy: Policy, reward: Reward, config: ReasonerConfig
) -> float:
    """FLOPs of the next round if its suffixes are as long as the incumbent's, with the gradient if it is due."""
    length, prompt = len(chain.response), len(chain.prompt)
    total = sum(policy.size.forward_flops(prompt + at, length - at - 1) for at in positions)
    due = chain.scores is None and config.solver != "none"
    for term in reward.terms:
        encoded = term.encode(chain.sample())
        begin, known = len(encoded.prompt) - 1, term.knows(chain.drawn(policy.model))
        for at in positions if not known else ():
            count = len(term.fed(encoded, at))
            total += term.size.forward_flops(begin + at, count, term.charge_head(count))
        if due:
            count = len(term.fed(encoded, 0))
            head, point = term.charge_head(count), config.gradient_point()
            total += len(point.alphas) * _both_ways(term.size, begin, count, head)
            if point.direct and reward.dense and not known:
                total += term.size.forward_flops(begin, 0, head)
    if due and config.solver == "ste":
        total += _both_ways(policy.size, prompt - 1, length, length)
    return total


def _both_ways(size: ModelSize, start: int, count: int, head: int) -> float:
    return size.forward_flops(start, count, head) + size.backward_flops(start, count, head)
