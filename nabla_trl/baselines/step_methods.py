"""The searches over steps: beam search, diverse verifier tree search, tree of thoughts, and RAP.

Each is a walk over the tree of one problem (`nabla_trl.baselines.step_tree`), of the size asked for, or at a budget of FLOPs.
At a budget the first response is drawn alone: it says what one costs. Then comes a search as wide as fits into what is
left, and others after it, from fresh draws, until not one more response fits; of all responses that were finished the
one of the highest reward is kept. A search whose responses turn out longer than expected is narrowed, step by step.

A prefix is as good as what the reward gives its unfinished turn: with a process reward the sum over its steps, with a
scalar one the score at its last token, with a log-ratio the sum over its tokens. Steps that are drawn twice from one
prefix are one. Prefixes that the reward cannot read are dropped.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from nabla_trl.baselines.step_tree import NodeGenerator, StepNode, StepSearchMethod, StepTree

# --- level by level -------------------------------------------------------------------------------------


def beam_search(tree: StepTree, size: int | None) -> NodeGenerator:
    """Beam search over steps with the reward as verifier (Snell et al., arXiv 2408.03314, section 5.2).

    Of N first steps the N/M best are kept, M more are drawn from each of them, and so on (M: `step_width`).

    As there, but: the value of a prefix is the reward's, where the paper has an estimate of how often it is solved
    from there; a response that has ended keeps its place among the N/M for as long as it is one of the best; where
    fewer than N/M distinct prefixes are left, they share the N draws. At a budget, N is what fits.
    """
    return _run_with_size(tree, size, lambda count: _search_level_by_level(tree, [_create_beam(tree, count)]))


def dvts(tree: StepTree, size: int | None) -> NodeGenerator:
    """Diverse verifier tree search (Beeching, Tunstall and Rush, "Scaling test-time compute with open models", 2024).

    N beams as N/M subtrees that do not compete: in each the best of M steps is followed (M: `step_width`), and of the
    N/M responses the best is taken. Where M does not divide N, one subtree is smaller. At a budget, N is what fits.
    """

    def subtrees(count: int) -> NodeGenerator:
        whole, rest = divmod(count, tree.config.steps_per_prefix)
        sizes = [tree.config.steps_per_prefix] * whole + [rest] * (rest > 0)
        return _search_level_by_level(tree, [_create_beam(tree, each) for each in sizes])

    return _run_with_size(tree, size, subtrees)


def tree_of_thought(tree: StepTree, size: int | None) -> NodeGenerator:
    """Tree of thoughts by breadth-first search (Yao et al., arXiv 2305.10601, algorithm 1): b states are kept at every
    step (`size`), and k thoughts are drawn from each (`step_width`).

    Here the reward evaluates the states, where the paper asks the language model itself to value or to compare them;
    a thought is a step of the response, drawn from the policy as it is, without the paper's prompts that propose
    several; and a response that has ended stays a state. What is left of the method is a beam search that begins with
    k draws and draws k from each state, however few. Depth-first search is not offered. At a budget, b is what fits.
    """
    width = tree.config.steps_per_prefix

    def states(breadth: int, thoughts: int) -> NodeGenerator:
        return _search_level_by_level(tree, [_Frontier(breadth, thoughts, [tree.start_attempt()])])

    if size is not None:
        return states(size, width)
    return _run_to_budget(tree, lambda count: states(max(1, count // width), min(count, width)))


def _run_with_size(tree: StepTree, size: int | None, search: Callable[[int], NodeGenerator]) -> NodeGenerator:
    return _run_to_budget(tree, search) if size is None else search(size)


def _run_to_budget(tree: StepTree, search: Callable[[int], NodeGenerator]) -> NodeGenerator:
    """One response, and then searches for as many more as fit, until the budget is spent."""
    yield from search(1)
    while (
        not tree.responses and tree.count_affordable_responses()
    ):  # none that could be read: what one costs is not known yet
        yield from search(1)
    while count := tree.count_affordable_responses():
        yield from search(count)


@dataclass
class _Frontier:
    """Prefixes that compete with each other.

    Attributes:
        keep: how many are kept at every step.
        width: draws from each of them that can go on.
        total: draws of a step where all kept ones can go on; None: as many as there are prefixes, times `width`.
    """

    max_nodes: int
    draws_per_node: int
    nodes: list[StepNode]
    total_draws: int | None = None

    def select_nodes_to_extend(self) -> list[StepNode]:
        """From which nodes to draw, in the order in which draws are given up where not all fit: the last first."""
        live = [node for node in self.nodes if not node.is_complete]
        if not live:
            return []
        count = len(live) * self.draws_per_node
        if self.total_draws is not None:
            count = self.total_draws - self.draws_per_node * (len(self.nodes) - len(live))
        return [live[number % len(live)] for number in range(count)]

    def keep_best(self, new_nodes: Sequence[StepNode]) -> None:
        """Keep the best of the ended and the new ones, the first of equals."""
        found = [node for node in self.nodes if node.is_complete] + [
            node for node in new_nodes if node.reward > -math.inf
        ]
        before, self.nodes = self.nodes, sorted(dict.fromkeys(found), key=lambda node: -node.reward)[: self.max_nodes]
        for node in [*before, *found]:
            if node not in self.nodes:
                node.release_caches()


def _create_beam(tree: StepTree, num_draws: int) -> _Frontier:
    """N draws a step, of which N/M are kept; one at least."""
    width = min(num_draws, tree.config.steps_per_prefix)
    return _Frontier(num_draws // width, width, [tree.start_attempt()], num_draws)


def _search_level_by_level(tree: StepTree, frontiers: Sequence[_Frontier]) -> NodeGenerator:
    """Go on with all fronts, a step at a time, until nothing can go on or fits."""
    while wanted := [(front, node) for front in frontiers for node in front.select_nodes_to_extend()]:
        wanted = _interleave_frontiers(wanted)
        wanted = wanted[: tree.count_affordable_responses([node for _, node in wanted])]
        if not wanted:
            return
        drawn = yield [node for _, node in wanted]
        for front in frontiers:
            front.keep_best([node for (own, _), node in zip(wanted, drawn, strict=True) if own is front])


def _interleave_frontiers(requests: Sequence[tuple[_Frontier, StepNode]]) -> list[tuple[_Frontier, StepNode]]:
    """The same in another order: the first draw of every front, then the second one of each, and so on."""
    rank: dict[int, int] = defaultdict(int)
    ranked = []
    for front, node in requests:
        ranked.append((rank[id(front)], front, node))
        rank[id(front)] += 1
    return [(front, node) for _, front, node in sorted(ranked, key=lambda one: one[0])]


# --- Monte Carlo tree search ----------------------------------------------------------------------------


def rap(tree: StepTree, size: int | None) -> NodeGenerator:
    """RAP: reasoning as planning, by Monte Carlo tree search of `size` rollouts (Hao et al., arXiv 2305.14992,
    algorithm 1).

    A rollout goes down the tree by UCT, has d steps drawn (`step_width`) at the leaf that it comes to, follows the one
    of the highest reward and has d more drawn there, until a response has ended; its reward is a value for every node
    on the way. A node is worth the mean of its values, and one that no rollout has come through what the reward gives
    its prefix. A response that has ended is not visited again, nor is a node below which all have: there is nothing
    left to learn.

    The paper's prompts and rewards (likelihood of the action, self-evaluation, heuristics) are replaced: an action is
    a step and a state the prefix, so that the policy, which writes the steps, is its own world model, and the reward
    is the only value. Rewards have any scale, so means are brought to [0, 1] by the lowest and the highest reward seen
    in the tree (as in MuZero, arXiv 1911.08265); the weight of UCT's bonus is `exploration`. When all of a tree is
    known, the next rollout begins another. At a budget, rollouts go on until the next is expected not to fit, the last
    ones narrower than d.
    """
    if size is None:
        width = tree.config.steps_per_prefix
        return _run_to_budget(tree, lambda count: _run_rollouts(tree, 1 if count == 1 else None, min(count, width)))
    return _run_rollouts(tree, size, tree.config.steps_per_prefix)


@dataclass
class _NodeValues:
    """What the rollouts of one tree have shown.

    Attributes:
        of: values of the rollouts through each node.
        known: nodes below which there is nothing more to learn.
        low, high: of all rewards seen.
    """

    rollout_values: dict[StepNode, list[float]] = field(default_factory=lambda: defaultdict(list))
    exhausted_nodes: set[StepNode] = field(default_factory=set)
    min_reward: float = math.inf
    max_reward: float = -math.inf

    def record_nodes(self, nodes: Sequence[StepNode]) -> None:
        for node in nodes:
            if node.reward > -math.inf:
                self.min_reward, self.max_reward = min(self.min_reward, node.reward), max(self.max_reward, node.reward)
            if node.is_complete or node.reward == -math.inf:
                self.exhausted_nodes.add(node)

    def select_child(self, node: StepNode, exploration: float) -> StepNode:
        """The child of the highest UCT that is not known yet; the first of equals."""
        visits = math.log(max(1, len(self.rollout_values[node])))

        def uct(child: StepNode) -> float:
            values = self.rollout_values[child] or [child.reward]
            mean = math.fsum(values) / len(values)
            scaled = (
                (mean - self.min_reward) / (self.max_reward - self.min_reward)
                if self.max_reward > self.min_reward
                else 0.0
            )
            return scaled + exploration * math.sqrt(visits / len(values))

        return max((child for child in node.children if child not in self.exhausted_nodes), key=uct)

    def backpropagate(self, path: Sequence[StepNode]) -> None:
        """Give the value of the end of a rollout to its nodes, and note which of them are known now."""
        for node in reversed(path):
            if path[-1].is_complete:
                self.rollout_values[node].append(path[-1].reward)
            if node.children and all(child in self.exhausted_nodes for child in node.children):
                self.exhausted_nodes.add(node)


def _run_rollouts(tree: StepTree, num_rollouts: int | None, steps_per_prefix: int) -> NodeGenerator:
    """So many rollouts, of as many trees as that takes; None: those of one tree that fit."""
    done = 0
    while True:
        root, values = tree.start_attempt(), _NodeValues()
        while root not in values.exhausted_nodes:
            path = [root]
            while path[-1].children:
                path.append(values.select_child(path[-1], tree.config.exploration))
            complete = yield from _run_rollout(tree, path, values, steps_per_prefix)
            if not complete:
                return
            done += 1
            if done == num_rollouts:
                return
        if num_rollouts is None:
            return


def _run_rollout(
    tree: StepTree, path: list[StepNode], values: _NodeValues, steps_per_prefix: int
) -> Generator[list[StepNode], list[StepNode], bool]:
    """Go on from a leaf, by the best of the steps drawn, until a response has ended; False where it does not fit."""
    while not path[-1].is_complete:
        leaf = path[-1]
        wanted = [leaf] * steps_per_prefix
        wanted = wanted[: tree.count_affordable_responses(wanted)]
        if not wanted:
            return False
        drawn = yield wanted
        leaf.release_caches()
        values.record_nodes(drawn)
        readable = [child for child in drawn if child.reward > -math.inf]
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
}
