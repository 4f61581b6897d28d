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
from nabla_trl.compute import Meter
from nabla_trl.config import ReasonerConfig
from nabla_trl.gradient import token_gradient
from nabla_trl.models import Policy
from nabla_trl.rewards import Reward
from nabla_trl.terms import LikelihoodTerm, Memo


def solve_tokens(
    chains: Sequence[Chain], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> None:
    """Set each chain's `scores` [T, K]. Called once per distinct incumbent: the scores depend on its tokens alone."""
    if config.solver == "none":
        scores = [chain.logp for chain in chains]
    elif config.solver == "mirror":
        gradients = reward.gradient(
            [chain.sample() for chain in chains],
            [chain.prompt_memos for chain in chains],
            [chain.candidates for chain in chains],
            meter=meter,
        )
        scores = [
            dto.mirror(chain.logp, gradient.float(), chain.choice(), config.lam)
            for chain, gradient in zip(chains, gradients, strict=True)
        ]
    else:
        scores = _ste(chains, policy, reward, config, meter)
    for chain, score in zip(chains, scores, strict=True):
        chain.scores = score


def _ste(
    chains: Sequence[Chain], policy: Policy, reward: Reward, config: ReasonerConfig, meter: Meter
) -> list[Tensor]:
    likelihood = policy_likelihood(policy)
    own_memos = [[Memo(chain.cache[:, :, :, : len(chain.prompt) - 1], torch.zeros(0))] for chain in chains]

    def loss_gradient(rows: list[int], hard: list[Tensor]) -> list[Tensor]:
        """∂L/∂Y of L = −λ·r − log π at the given hard tokens."""
        tables = [chains[row].candidates for row in rows]
        chosen = [
            table.gather(1, choice[:, None]).squeeze(1).tolist()
            for table, choice in zip(tables, hard, strict=True)
        ]
        moved = [chains[row].sample(ids) for row, ids in zip(rows, chosen, strict=True)]
        by_reward = reward.gradient(moved, [chains[row].prompt_memos for row in rows], tables, meter=meter)
        by_policy = token_gradient(
            [likelihood],
            moved,
            [own_memos[row] for row in rows],
            tables,
            meter=meter,
            direct=bool(config.direct),
            postfix=bool(config.postfix),
        )
        return [-config.lam * r.float() - p.float() for r, p in zip(by_reward, by_policy, strict=True)]

    starts = [chain.logp.masked_fill(~_placeable(chain, reward.readable), -torch.inf) for chain in chains]
    return dto.ste(starts, [chain.choice() for chain in chains], loss_gradient, config.ste())


def _placeable(chain: Chain, readable: Tensor) -> Tensor:
    """[T, K] bool: candidates with which the reward can read the response; the incumbent's own always."""
    return readable[chain.candidates] | (chain.candidates == torch.tensor(chain.response)[:, None])


def policy_likelihood(policy: Policy) -> LikelihoodTerm:
    """log π(y|x) of the policy itself as a term."""
    return LikelihoodTerm(
        policy.model,
        policy.size,
        mapping=torch.arange(policy.forbidden.shape[0]),
        encode_prompt=lambda problem, prompt: prompt,
    )


def allowed(chain: Chain, readable: Tensor, config: ReasonerConfig) -> Tensor:
    """[T, K] bool: candidates that may be proposed in place of the incumbent token."""
    own = torch.tensor(chain.response)[:, None]
    usable = readable[chain.candidates] & (chain.candidates != own) & chain.logp.isfinite()
    if config.candidate_min_p:
        usable &= chain.logp >= chain.logp.amax(-1, keepdim=True) + float(np.log(config.candidate_min_p))
    return usable


def global_branches(
    chain: Chain, noise: Tensor, readable: Tensor, config: ReasonerConfig
) -> list[tuple[int, int]]:
    """k distinct (position, token) branches, drawn without replacement with weight exp(score) (Gumbel top-k).

    Args:
        noise: [T, K] standard Gumbel.
    """
    usable = allowed(chain, readable, config)
    for position, token in chain.tried:
        usable[position] &= chain.candidates[position] != token
    count = min(config.branches, int(usable.sum()))
    keys = (chain.scores.double() + noise).masked_fill(~usable, -torch.inf).flatten()
    width = chain.candidates.shape[1]
    picks = keys.topk(count).indices.tolist()
    return [(pick // width, int(chain.candidates[pick // width, pick % width])) for pick in picks]


def sequential_branch(
    chain: Chain, stream: np.random.Generator, readable: Tensor, config: ReasonerConfig
) -> list[tuple[int, int]]:
    """Resample unsure positions from left to right until one changes; empty at the end of the response."""
    usable = allowed(chain, readable, config)
    while chain.position < len(chain.response):
        position = chain.position
        chain.position += 1
        if float(chain.logp[position].max().exp()) > config.confidence:
            continue
        own = chain.candidates[position] == chain.response[position]
        scores = (chain.scores[position] / config.resample_temperature).masked_fill(
            ~(usable[position] | own), -torch.inf
        )
        mass = scores.softmax(-1, dtype=torch.float64).cumsum(-1).numpy()
        pick = int(np.searchsorted(mass, stream.random() * mass[-1], side="right"))
        if not own[pick]:
            return [(position, int(chain.candidates[position, pick]))]
    return []


def expected_flops(
    chain: Chain, positions: Sequence[int], policy: Policy, reward: Reward, config: ReasonerConfig
) -> float:
    """FLOPs of the next round if its suffixes are as long as the incumbent's, with the gradient if it is due."""
    length, begin = len(chain.response), len(chain.prompt) - 1
    total = 0.0
    for position in positions:
        left = length - position
        total += policy.size.forward_flops(begin + position, left)
        for term in reward.terms:
            total += term.size.forward_flops(begin + position, left, head=term.charge_head(left))
    if chain.scores is None and config.solver != "none":
        sizes = [(term.size, term.charge_head(length)) for term in reward.terms]
        if config.solver == "ste":
            sizes.append((policy.size, length))
        for size, head in sizes:
            total += size.forward_flops(begin, length, head) + size.backward_flops(begin, length, head)
    return total
