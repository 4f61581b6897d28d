"""Step-level searches that act where the policy is uncertain: they branch, or put a token that the reward likes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nabla_trl.baselines.step_tree import (
    MIN_SEGMENT_TOKENS,
    StepDrawing,
    StepNode,
    StepSearchMethod,
    StepTree,
    run_with_size,
)
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.models.options import HARD_GRADIENT_POINT
from nabla_trl.models.sampling import TokenStatistic

NUDGE_CANDIDATES = 25  # likeliest tokens among which GGRO chooses


async def entropy_branching(tree: StepTree, size: int | None) -> None:
    """Run entropy-gated branching with `size` beams (Li et al., arXiv 2503.21961).

    Every beam draws its next step. Where the entropy of the policy reaches `entropy_threshold` within a step, the step
    is taken back to the first such token, and M − 1 further continuations are drawn from there (M is
    `steps_per_prefix`). Certain steps are not branched. Of all steps the `size` best by the reward go on. A complete
    response keeps its place as long as it is one of the best. At a budget, the number of beams is what fits.

    Differences from the paper: The threshold is given and not learned. All beams begin with the empty response, where
    the paper begins with one beam. Equal prefixes count once.
    """
    await run_with_size(tree, size, lambda num_beams: _branch_where_uncertain(tree, num_beams))


async def _branch_where_uncertain(tree: StepTree, num_beams: int) -> None:
    beams = [tree.start_attempt()] * num_beams
    while active := [node for node in beams if not node.is_complete]:
        active = active[: tree.count_affordable_responses(active)]
        if not active:
            return
        children = await tree.draw_steps(active)
        forks = [
            fork
            for parent, child in dict.fromkeys(zip(active, children, strict=True))
            if (fork := _fork_where_uncertain(tree, parent, child)) is not None
        ]
        num_branches = 0 if tree.is_budget_spent else tree.config.steps_per_prefix - 1  # the first response goes on
        requests = [fork for fork in forks for _ in range(num_branches)]
        requests = requests[: tree.count_affordable_responses(requests)] if requests else []
        branches = await tree.draw_steps(requests) if requests else []
        complete = [node for node in beams if node.is_complete]
        # A branch may write what its step wrote. Their rewards differ by rounding, which must not decide what goes on.
        distinct: dict[tuple[int, ...], StepNode] = {}
        for node in (*complete, *children, *branches):
            distinct.setdefault(tuple(node.token_ids), node)
        nodes = [node for node in distinct.values() if node.reward > -math.inf]
        previous, beams = beams, sorted(nodes, key=lambda node: -node.reward)[:num_beams]
        for node in {*previous, *forks, *children, *branches}:
            if node.is_complete or node not in beams:
                node.release_caches()


def _fork_where_uncertain(tree: StepTree, parent: StepNode, child: StepNode) -> StepNode | None:
    """Return the prefix before the first uncertain token of a step. None: the policy was certain of all tokens."""
    if child.output is None:  # the reward cannot read it
        return None
    position = find_uncertain_token(child.output.statistics, tree.config.entropy_threshold)
    return None if position is None else tree.fork(parent, child, len(parent.token_ids) + position)


def find_uncertain_token(statistics: Tensor | None, threshold: float) -> int | None:
    """Return the first position whose distribution has at least this entropy (nats). None: there is none."""
    assert statistics is not None
    uncertain = statistics[:, TokenStatistic.ENTROPY] >= threshold
    return int(uncertain.int().argmax()) if uncertain.any() else None


async def ggro(tree: StepTree, size: int | None) -> None:
    """Run gradient-guided reward optimization with `size` candidates per segment (Lin and Zhang, arXiv 2606.09635).

    A response is written in segments. A segment ends before the first token, after at least three, whose distribution
    has an entropy of `entropy_threshold`. Its gradient ∂r/∂Y at the hard tokens names a nudging token: the one of the
    25 likeliest tokens with the largest gradient, at the first place of the segment (the fifth of the first segment).
    The segment is drawn again behind this token, scored, and so on. The candidate with the highest reward is kept, and
    the next segment begins. A nudging token that is the segment's own ends the segment. At a budget further responses
    are written, with as many candidates as fit.

    Differences from the authors' code: Tokens are drawn as the configuration says, where the code decodes greedily, so
    a segment that is drawn again differs behind the nudging token. Stop tokens are no nudging tokens. The result is
    the complete response with the highest reward.
    """
    await run_with_size(tree, size, lambda num_candidates: _write_segments(tree, num_candidates))


async def _write_segments(tree: StepTree, num_candidates: int) -> None:
    prefix, offset = tree.start_attempt(), MIN_SEGMENT_TOKENS
    while not prefix.is_complete:
        start, candidates, position = prefix, list[StepNode](), len(prefix.token_ids) + offset
        while len(candidates) < num_candidates and tree.count_affordable_responses([start]):
            [child] = await tree.draw_steps([start])
            if child.reward == -math.inf or child.token_ids in [one.token_ids for one in candidates]:
                break
            candidates.append(child)
            if position >= len(child.token_ids) or len(candidates) == num_candidates:
                break
            # The tokens before the nudged place stay, so the first candidate knows the likeliest tokens there.
            row = position - len(prefix.token_ids)
            token = await _find_nudging_token(tree, child, candidates[0].get_output().candidates[row], position)
            if token == child.token_ids[position]:
                break
            start = tree.fork(prefix, candidates[0], position, token)
        if not candidates:
            return
        best = max(candidates, key=lambda node: node.reward)
        for node in [prefix, *candidates]:
            if node is not best or node.is_complete:
                node.release_caches()
        prefix, offset = best, 0


async def _find_nudging_token(tree: StepTree, child: StepNode, options: Tensor, position: int) -> int:
    """Return which of these tokens has the largest gradient at a position of a response.

    The response's own token counts 0, and another one its gradient minus that of the own token.

    Args:
        options: [K] tokens, the response's own among them.
    """
    engine = tree.settings.engine
    policy, reward = engine.policy, engine.reward
    assert reward is not None
    ids = torch.tensor(child.token_ids)
    candidates = ids[:, None].repeat(1, len(options))
    candidates[position] = options
    draw_info = DrawInfo(policy.model, ids[:, None], child.logp[:, None], child.hidden_states)
    sample = Sample(
        tree.problem, tree.prompt_ids, child.token_ids, draw_info=draw_info, is_partial=not child.is_complete
    )

    def compute_together(items: list[tuple[Sample, list[ScoreCache], list[ScoreCache], Tensor]]) -> list[Tensor]:
        samples, prompt_caches, response_caches, tables = zip(*items, strict=True)
        return reward.compute_gradient(
            samples,
            prompt_caches,
            response_caches,
            tables,
            flop_counter=engine.flop_counter,
            gradient_at=HARD_GRADIENT_POINT,
        )

    [gradient] = await engine.batch(
        "nudging gradients", compute_together, [(sample, tree.score_caches, child.score_caches, candidates)]
    )
    own = options == ids[position]
    gain = gradient[position].cpu() - gradient[position].cpu()[own][0]
    stops = torch.tensor(sorted(policy.stop_ids))
    usable = ~(torch.isin(options, stops) | policy.forbidden_mask.cpu()[options]) & reward.in_vocabulary[options]
    return int(options[gain.masked_fill(~usable & ~own, -torch.inf).argmax()])


UNCERTAINTY_METHODS: dict[str, tuple[StepSearchMethod, StepDrawing]] = {
    "entropy_branching": (entropy_branching, StepDrawing(records_entropy=True, keeps_caches=True)),
    "ggro": (ggro, StepDrawing(stops_at_entropy=True, top_k_candidates=NUDGE_CANDIDATES, keeps_caches=True)),
}
