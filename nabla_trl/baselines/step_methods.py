"""The step-level searches: beam search, diverse verifier tree search, tree of thoughts, and RAP.

Each is a coroutine over the tree of one problem (`nabla_trl.baselines.step_tree`), of a given size or at a budget of
FLOPs, and awaits the steps that it wants drawn. At a budget the first response is drawn alone, and shows what one
costs. Then comes a search as wide as fits into the rest of the budget, and others after it, from new draws, until not
one more response fits. The result is the complete response with the highest reward. A search whose responses turn out
longer than expected is narrowed at the next step.

The value of a prefix is what the reward gives its unfinished turn: the sum over its steps for a process reward, the
score at its last token for a scalar one, the sum over its tokens for a log-ratio. Equal steps drawn from one prefix
count once. Prefixes that the reward cannot read are dropped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from nabla_trl.baselines.particles import entropic_particle_filter, particle_filter
from nabla_trl.baselines.step_tree import StepNode, StepSearchMethod, StepTree, run_to_budget, run_with_size

# --- level by level -------------------------------------------------------------------------------------


async def beam_search(tree: StepTree, size: int | None) -> None:
    """Run beam search over steps with the reward as verifier (Snell et al., arXiv 2408.03314, section 5.2).

    Of `size` = N first steps the N/M best are kept, M more are drawn from each of them, and so on (M is
    `steps_per_prefix`).

    Differences from the paper: The value of a prefix is the reward's, where the paper estimates how often the problem
    is solved from there. A complete response keeps its place among the N/M as long as it is one of the best. If fewer
    than N/M distinct prefixes are left, they share the N draws. At a budget, N is what fits.
    """
    await run_with_size(tree, size, lambda num_draws: _search_level_by_level(tree, [_create_beam(tree, num_draws)]))


async def dvts(tree: StepTree, size: int | None) -> None:
    """Run diverse verifier tree search.

    Beeching, Tunstall and Rush, "Scaling test-time compute with open models", 2024.

    `size` = N beams are N/M subtrees that do not compete (M is `steps_per_prefix`). In each of them the best of M
    steps is followed, and the best of the N/M responses is taken. If M does not divide N, one subtree is smaller. At a
    budget, N is what fits.
    """
    width = tree.config.steps_per_prefix

    async def search_subtrees(num_draws: int) -> None:
        num_full, remainder = divmod(num_draws, width)
        sizes = [width] * num_full + [remainder] * (remainder > 0)
        await _search_level_by_level(tree, [_create_beam(tree, subtree_size) for subtree_size in sizes])

    await run_with_size(tree, size, search_subtrees)


async def tree_of_thought(tree: StepTree, size: int | None) -> None:
    """Run tree of thoughts by breadth-first search (Yao et al., arXiv 2305.10601, algorithm 1).

    At every step `size` = b states are kept, and k thoughts are drawn from each (k is `steps_per_prefix`).

    Differences from the paper: The reward evaluates the states, where the paper asks the language model to value or to
    compare them. A thought is a step of the response, drawn from the policy as it is, without the paper's prompts that
    propose several. A complete response stays a state. What remains of the method is a beam search that begins with k
    draws and draws k from each state, however few there are. Depth-first search is not offered. At a budget, b is what
    fits.
    """
    width = tree.config.steps_per_prefix

    async def search_states(max_states: int, num_thoughts: int) -> None:
        await _search_level_by_level(tree, [_Frontier(max_states, num_thoughts, [tree.start_attempt()])])

    if size is not None:
        await search_states(size, width)
    else:
        await run_to_budget(tree, lambda num_draws: search_states(max(1, num_draws // width), min(num_draws, width)))


@dataclass
class _Frontier:
    """Prefixes that compete with each other.

    Attributes:
        max_nodes: how many prefixes are kept at every step.
        draws_per_node: steps drawn from each prefix that can go on.
        total_draws: draws of a step when all kept prefixes can go on. None: `draws_per_node` for each of them.
    """

    max_nodes: int
    draws_per_node: int
    nodes: list[StepNode]
    total_draws: int | None = None

    def select_nodes_to_extend(self) -> list[StepNode]:
        """Return the nodes to draw from, once per draw. If not all draws fit, the last ones are given up first."""
        active = [node for node in self.nodes if not node.is_complete]
        if not active:
            return []
        num_draws = len(active) * self.draws_per_node
        if self.total_draws is not None:
            num_draws = self.total_draws - self.draws_per_node * (len(self.nodes) - len(active))
        return [active[index % len(active)] for index in range(num_draws)]

    def keep_best(self, new_nodes: Sequence[StepNode]) -> None:
        """Keep the best of the complete and the new nodes, the first among equals."""
        candidates = [node for node in self.nodes if node.is_complete]
        candidates += [node for node in new_nodes if node.reward > -math.inf]
        previous = self.nodes
        self.nodes = sorted(dict.fromkeys(candidates), key=lambda node: -node.reward)[: self.max_nodes]
        for node in [*previous, *candidates]:
            if node not in self.nodes:
                node.release_caches()


def _create_beam(tree: StepTree, num_draws: int) -> _Frontier:
    """Return a frontier with N draws per step, of which N/M are kept, at least one."""
    width = min(num_draws, tree.config.steps_per_prefix)
    return _Frontier(num_draws // width, width, [tree.start_attempt()], num_draws)


async def _search_level_by_level(tree: StepTree, frontiers: Sequence[_Frontier]) -> None:
    """Extend all frontiers step by step, until no node can go on or no step fits into the budget."""
    while requests := _interleave_draws(frontiers):
        requests = requests[: tree.count_affordable_responses([node for _, node in requests])]
        if not requests:
            return
        children = await tree.draw_steps([node for _, node in requests])
        for frontier in frontiers:
            pairs = zip(requests, children, strict=True)
            frontier.keep_best([child for (owner, _), child in pairs if owner is frontier])


def _interleave_draws(frontiers: Sequence[_Frontier]) -> list[tuple[_Frontier, StepNode]]:
    """Return the draws of all frontiers: the first draw of every frontier, then the second of each, and so on."""
    ranked = [
        (rank, frontier, node) for frontier in frontiers for rank, node in enumerate(frontier.select_nodes_to_extend())
    ]
    return [(frontier, node) for _, frontier, node in sorted(ranked, key=lambda entry: entry[0])]


# --- Monte Carlo tree search ----------------------------------------------------------------------------


async def rap(tree: StepTree, size: int | None) -> None:
    """Run RAP, reasoning as planning by Monte Carlo tree search (Hao et al., arXiv 2305.14992, algorithm 1).

    Each of `size` rollouts goes down the tree by UCT. At the leaf it draws d steps (d is `steps_per_prefix`), follows
    the one with the highest reward, draws d more there, and so on until a response is complete. The reward of the
    response is a value for every node on the way. A node is worth the mean of its values, and a node that no rollout
    has visited is worth the reward of its prefix. A complete response is not visited again, and neither is a node
    below which all responses are complete, since nothing is left to learn there.

    The paper's prompts and rewards (likelihood of the action, self-evaluation, heuristics) are replaced: An action is
    a step and a state is the prefix, so the policy, which writes the steps, is its own world model. The reward is the
    only value. Rewards have any scale, so means are scaled to [0, 1] by the lowest and the highest reward in the tree
    (as in MuZero, arXiv 1911.08265). The weight of UCT's bonus is `exploration`. When all of a tree is known, the next
    rollout begins another one. At a budget, rollouts go on until the next one is expected not to fit, and the last
    ones draw fewer steps than d.
    """
    width = tree.config.steps_per_prefix
    if size is not None:
        await _run_rollouts(tree, size, width)
    else:
        await run_to_budget(tree, lambda count: _run_rollouts(tree, 1 if count == 1 else None, min(count, width)))


@dataclass
class _NodeValues:
    """What the rollouts of one tree have shown.

    Attributes:
        rollout_values: node -> values of the rollouts through it.
        exhausted_nodes: nodes below which nothing is left to learn.
        min_reward, max_reward: over all rewards in the tree.
    """

    rollout_values: dict[StepNode, list[float]] = field(default_factory=lambda: defaultdict(list))
    exhausted_nodes: set[StepNode] = field(default_factory=set)
    min_reward: float = math.inf
    max_reward: float = -math.inf

    def record_nodes(self, nodes: Sequence[StepNode]) -> None:
        """Record the rewards of new nodes."""
        for node in nodes:
            if node.reward > -math.inf:
                self.min_reward, self.max_reward = min(self.min_reward, node.reward), max(self.max_reward, node.reward)
            if node.is_complete or node.reward == -math.inf:
                self.exhausted_nodes.add(node)

    def select_child(self, node: StepNode, exploration: float) -> StepNode:
        """Return the child with the highest UCT that is not exhausted, the first among equals."""
        log_visits = math.log(max(1, len(self.rollout_values[node])))
        reward_range = self.max_reward - self.min_reward

        def compute_uct(child: StepNode) -> float:
            values = self.rollout_values[child] or [child.reward]
            mean = math.fsum(values) / len(values)
            scaled = (mean - self.min_reward) / reward_range if self.max_reward > self.min_reward else 0.0
            return scaled + exploration * math.sqrt(log_visits / len(values))

        return max((child for child in node.children if child not in self.exhausted_nodes), key=compute_uct)

    def backpropagate(self, path: Sequence[StepNode]) -> None:
        """Give the value of the end of a rollout to its nodes, and mark those that are exhausted now."""
        for node in reversed(path):
            if path[-1].is_complete:
                self.rollout_values[node].append(path[-1].reward)
            if node.children and all(child in self.exhausted_nodes for child in node.children):
                self.exhausted_nodes.add(node)


async def _run_rollouts(tree: StepTree, num_rollouts: int | None, steps_per_prefix: int) -> None:
    """Run rollouts, in as many trees as they take. None: the rollouts of one tree that fit."""
    num_done = 0
    while True:
        root, values = tree.start_attempt(), _NodeValues()
        while root not in values.exhausted_nodes:
            path = [root]
            while path[-1].children:
                path.append(values.select_child(path[-1], tree.config.exploration))
            is_finished = await _run_rollout(tree, path, values, steps_per_prefix)
            if not is_finished:
                return
            num_done += 1
            if num_done == num_rollouts:
                return
        if num_rollouts is None:
            return


async def _run_rollout(tree: StepTree, path: list[StepNode], values: _NodeValues, steps_per_prefix: int) -> bool:
    """Follow the best step drawn at each leaf until a response is complete. Return False if a step does not fit."""
    while not path[-1].is_complete:
        leaf = path[-1]
        requests = [leaf] * steps_per_prefix
        requests = requests[: tree.count_affordable_responses(requests)]
        if not requests:
            return False
        children = await tree.draw_steps(requests)
        leaf.release_caches()
        values.record_nodes(children)
        readable = [child for child in children if child.reward > -math.inf]
        if not readable:
            break
        path.append(max(readable, key=lambda child: child.reward))
    values.backpropagate(path)
    return True


STEP_SEARCH_METHODS: dict[str, StepSearchMethod] = {
    "beam_search": beam_search,
    "dvts": dvts,
    "tot": tree_of_thought,
    "rap": rap,
    "particle_filter": particle_filter,
    "entropic_particle_filter": entropic_particle_filter,
}
