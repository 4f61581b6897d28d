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

from nabla_trl.baselines.step_tree import Method, Node, Tree, Walk

# --- level by level -------------------------------------------------------------------------------------


def beam_search(tree: Tree, size: int | None) -> Walk:
    """Beam search over steps with the reward as verifier (Snell et al., arXiv 2408.03314, section 5.2).

    Of N first steps the N/M best are kept, M more are drawn from each of them, and so on (M: `step_width`).

    As there, but: the value of a prefix is the reward's, where the paper has an estimate of how often it is solved
    from there; a response that has ended keeps its place among the N/M for as long as it is one of the best; where
    fewer than N/M distinct prefixes are left, they share the N draws. At a budget, N is what fits.
    """
    return _sized(tree, size, lambda count: _levels(tree, [_beam(tree, count)]))


def dvts(tree: Tree, size: int | None) -> Walk:
    """Diverse verifier tree search (Beeching, Tunstall and Rush, "Scaling test-time compute with open models", 2024).

    N beams as N/M subtrees that do not compete: in each the best of M steps is followed (M: `step_width`), and of the
    N/M responses the best is taken. Where M does not divide N, one subtree is smaller. At a budget, N is what fits.
    """

    def subtrees(count: int) -> Walk:
        whole, rest = divmod(count, tree.config.step_width)
        sizes = [tree.config.step_width] * whole + [rest] * (rest > 0)
        return _levels(tree, [_beam(tree, each) for each in sizes])

    return _sized(tree, size, subtrees)


def tree_of_thought(tree: Tree, size: int | None) -> Walk:
    """Tree of thoughts by breadth-first search (Yao et al., arXiv 2305.10601, algorithm 1): b states are kept at every
    step (`size`), and k thoughts are drawn from each (`step_width`).

    Here the reward evaluates the states, where the paper asks the language model itself to value or to compare them;
    a thought is a step of the response, drawn from the policy as it is, without the paper's prompts that propose
    several; and a response that has ended stays a state. What is left of the method is a beam search that begins with
    k draws and draws k from each state, however few. Depth-first search is not offered. At a budget, b is what fits.
    """
    width = tree.config.step_width

    def states(breadth: int, thoughts: int) -> Walk:
        return _levels(tree, [_Front(breadth, thoughts, [tree.begin()])])

    if size is not None:
        return states(size, width)
    return _at_budget(tree, lambda count: states(max(1, count // width), min(count, width)))


def _sized(tree: Tree, size: int | None, search: Callable[[int], Walk]) -> Walk:
    return _at_budget(tree, search) if size is None else search(size)


def _at_budget(tree: Tree, search: Callable[[int], Walk]) -> Walk:
    """One response, and then searches for as many more as fit, until the budget is spent."""
    yield from search(1)
    while not tree.responses and tree.fit():  # none that could be read: what one costs is not known yet
        yield from search(1)
    while count := tree.fit():
        yield from search(count)


@dataclass
class _Front:
    """Prefixes that compete with each other.

    Attributes:
        keep: how many are kept at every step.
        width: draws from each of them that can go on.
        total: draws of a step where all kept ones can go on; None: as many as there are prefixes, times `width`.
    """

    keep: int
    width: int
    kept: list[Node]
    total: int | None = None

    def wanted(self) -> list[Node]:
        """From which nodes to draw, in the order in which draws are given up where not all fit: the last first."""
        live = [node for node in self.kept if not node.ended]
        if not live:
            return []
        count = len(live) * self.width
        if self.total is not None:
            count = self.total - self.width * (len(self.kept) - len(live))
        return [live[number % len(live)] for number in range(count)]

    def choose(self, drawn: Sequence[Node]) -> None:
        """Keep the best of the ended and the new ones, the first of equals."""
        found = [node for node in self.kept if node.ended] + [node for node in drawn if node.reward > -math.inf]
        before, self.kept = self.kept, sorted(dict.fromkeys(found), key=lambda node: -node.reward)[: self.keep]
        for node in [*before, *found]:
            if node not in self.kept:
                node.release()


def _beam(tree: Tree, count: int) -> _Front:
    """N draws a step, of which N/M are kept; one at least."""
    width = min(count, tree.config.step_width)
    return _Front(count // width, width, [tree.begin()], count)


def _levels(tree: Tree, fronts: Sequence[_Front]) -> Walk:
    """Go on with all fronts, a step at a time, until nothing can go on or fits."""
    while wanted := [(front, node) for front in fronts for node in front.wanted()]:
        wanted = _evenly(wanted)
        wanted = wanted[: tree.fit([node for _, node in wanted])]
        if not wanted:
            return
        drawn = yield [node for _, node in wanted]
        for front in fronts:
            front.choose([node for (own, _), node in zip(wanted, drawn, strict=True) if own is front])


def _evenly(wanted: Sequence[tuple[_Front, Node]]) -> list[tuple[_Front, Node]]:
    """The same in another order: the first draw of every front, then the second one of each, and so on."""
    rank: dict[int, int] = defaultdict(int)
    ranked = []
    for front, node in wanted:
        ranked.append((rank[id(front)], front, node))
        rank[id(front)] += 1
    return [(front, node) for _, front, node in sorted(ranked, key=lambda one: one[0])]


# --- Monte Carlo tree search ----------------------------------------------------------------------------


def rap(tree: Tree, size: int | None) -> Walk:
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
        width = tree.config.step_width
        return _at_budget(tree, lambda count: _rollouts(tree, 1 if count == 1 else None, min(count, width)))
    return _rollouts(tree, size, tree.config.step_width)


@dataclass
class _Values:
    """What the rollouts of one tree have shown.

    Attributes:
        of: values of the rollouts through each node.
        known: nodes below which there is nothing more to learn.
        low, high: of all rewards seen.
    """

    of: dict[Node, list[float]] = field(default_factory=lambda: defaultdict(list))
    known: set[Node] = field(default_factory=set)
    low: float = math.inf
    high: float = -math.inf

    def see(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if node.reward > -math.inf:
                self.low, self.high = min(self.low, node.reward), max(self.high, node.reward)
            if node.ended or node.reward == -math.inf:
                self.known.add(node)

    def select(self, node: Node, exploration: float) -> Node:
        """The child of the highest UCT that is not known yet; the first of equals."""
        visits = math.log(max(1, len(self.of[node])))

        def uct(child: Node) -> float:
            values = self.of[child] or [child.reward]
            mean = math.fsum(values) / len(values)
            scaled = (mean - self.low) / (self.high - self.low) if self.high > self.low else 0.0
            return scaled + exploration * math.sqrt(visits / len(values))

        return max((child for child in node.children if child not in self.known), key=uct)

    def back(self, path: Sequence[Node]) -> None:
        """Give the value of the end of a rollout to its nodes, and note which of them are known now."""
        for node in reversed(path):
            if path[-1].ended:
                self.of[node].append(path[-1].reward)
            if node.children and all(child in self.known for child in node.children):
                self.known.add(node)


def _rollouts(tree: Tree, count: int | None, width: int) -> Walk:
    """So many rollouts, of as many trees as that takes; None: those of one tree that fit."""
    done = 0
    while True:
        root, values = tree.begin(), _Values()
        while root not in values.known:
            path = [root]
            while path[-1].children:
                path.append(values.select(path[-1], tree.config.exploration))
            complete = yield from _rollout(tree, path, values, width)
            if not complete:
                return
            done += 1
            if done == count:
                return
        if count is None:
            return


def _rollout(tree: Tree, path: list[Node], values: _Values, width: int) -> Generator[list[Node], list[Node], bool]:
    """Go on from a leaf, by the best of the steps drawn, until a response has ended; False where it does not fit."""
    while not path[-1].ended:
        leaf = path[-1]
        wanted = [leaf] * width
        wanted = wanted[: tree.fit(wanted)]
        if not wanted:
            return False
        drawn = yield wanted
        leaf.release()
        values.see(drawn)
        readable = [child for child in drawn if child.reward > -math.inf]
        if not readable:
            break
        path.append(max(readable, key=lambda child: child.reward))
    values.back(path)
    return True


METHODS: dict[str, Method] = {"beam_search": beam_search, "dvts": dvts, "tot": tree_of_thought, "rap": rap}
